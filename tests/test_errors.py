import errno
import pickle
from collections.abc import Iterator

import pytest

import tdc_ray.errors
from tdc_ray.errors import (
    NonFiniteLossError,
    StorageFailedError,
    TdcError,
    WorkFailedError,
    is_from_outside,
)


def subclasses(error: type[TdcError]) -> Iterator[type[TdcError]]:
    for subclass in error.__subclasses__():
        yield subclass
        yield from subclasses(subclass)


ALL = [TdcError, *subclasses(TdcError)]
ARGUMENTS = {
    NonFiniteLossError: (17, float("inf")),
    WorkFailedError: ({"group-03/finetune": "out of memory", "base": "lost"},),
}
"""Of errors that take something else than a message."""


def make(error: type[TdcError]) -> TdcError:
    return error(*ARGUMENTS.get(error, (f"what {error.__name__} says",)))


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize("error", ALL)
def test_every_error_survives_pickling_with_its_message(error, protocol):
    before = make(error)
    after = pickle.loads(pickle.dumps(before, protocol))
    assert type(after) is error
    assert str(after) == str(before) != ""
    assert vars(after) == vars(before)


@pytest.mark.parametrize("error", ALL)
def test_every_error_is_raised_and_caught_as_a_tdc_error(error):
    with pytest.raises(TdcError) as caught:
        raise make(error)
    assert not isinstance(caught.value, ValueError | RuntimeError | OSError)


@pytest.mark.parametrize("error", ALL)
def test_every_error_is_in_the_tree_of_the_docstring(error):
    assert error.__module__ == "tdc_ray.errors"
    assert error.__name__ in tdc_ray.errors.__doc__


def test_a_message_is_shown_as_it_was_given():
    assert str(TdcError("plan.num_groups must be at least 1, got 0.")).endswith("got 0.")


def test_a_diverged_loss_is_told_with_its_step_and_what_to_do():
    message = str(NonFiniteLossError(17, float("inf")))
    assert message.startswith("the loss is inf at step 17.")
    assert "learning rate" in message


def test_every_failed_item_is_told_with_its_reason_in_order():
    reasons = {"group-03": "out of memory", "base": "lost"}
    error = WorkFailedError(reasons)
    first, *lines, last = str(error).splitlines()
    assert first.startswith("2 of the run's parts failed")
    assert lines == ["  base: lost", "  group-03: out of memory"]
    assert "the same command tries these again" in last
    reasons["later"] = "no"
    assert "later" not in error.reasons


@pytest.mark.parametrize(
    ("error", "is_outside"),
    [
        (OSError(errno.EIO, "Input/output error"), True),
        (OSError(errno.ESTALE, "Stale file handle"), True),
        (StorageFailedError("the store is down"), True),
        (RuntimeError("CUDA error: out of memory"), True),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), True),
        (MemoryError(), True),
        (FileNotFoundError(errno.ENOENT, "No such file"), False),
        (OSError("no file named diffusion_pytorch_model.safetensors"), False),
        (RuntimeError("size mismatch for conv_in.weight"), False),
    ],
)
def test_a_file_is_not_blamed_for_what_memory_or_disk_did(error, is_outside):
    assert is_from_outside(error) is is_outside
