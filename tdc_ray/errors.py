"""Every error the package raises on purpose.

::

    TdcError
    ├── ConfigError            settings are out of their range, or disagree
    ├── ScheduleError          betas or alphas_cumprod that are no noise schedule
    ├── DataError              a dataset is missing, malformed or does not fit the model
    │   └── CorruptFileError   a file of it cannot be read
    ├── StorageError           a run directory cannot be used
    │   └── StorageFailedError a disk or a store failed; it may work the next time
    ├── CheckpointError        a saved model is missing, malformed or of another kind
    ├── UnsupportedModelError  a UNet has a block that cannot be pruned
    ├── LimitError             a macs limit that no pruning scheme can meet
    ├── ProxyError             a proxy returned no usable scheme
    │   └── ProxyReplyError    a language model's reply holds no valid scheme
    ├── NonFiniteLossError     training diverged
    ├── EvaluationError        no feature extractor, or too few images for a score
    ├── ClusterError           the cluster cannot give what the run asks for
    └── WorkFailedError        work items failed on the pool for good

Every constructor hands all of its arguments to ``super().__init__`` so that the error can be
unpickled: Ray delivers an error that cannot as an ``UnserializableException``.
"""

import errno
from collections.abc import Mapping

_OUT_OF_MEMORY = ("out of memory", "can't allocate memory")
"""What torch's errors say when memory is exhausted, on a GPU and on a CPU."""

_OF_THE_FILE = (None, errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EINVAL)
"""Errors of the system that are about a path, or a place in the file that its content names;
libraries raise such without a number."""


def is_out_of_memory(error: BaseException | None) -> bool:
    """Whether there was not enough memory, on a GPU or a CPU."""
    return isinstance(error, MemoryError) or any(words in str(error) for words in _OUT_OF_MEMORY)


def is_from_outside(error: BaseException) -> bool:
    """Whether an error that reading a file led to says nothing about what is in the file."""
    failed = isinstance(error, OSError) and error.errno not in _OF_THE_FILE
    return failed or isinstance(error, StorageFailedError) or is_out_of_memory(error)


class TdcError(Exception):
    """Base of all errors that the package raises on purpose."""


class ConfigError(TdcError):
    """Settings are out of their range, or disagree: an argument for each that is wrong."""

    def __str__(self) -> str:
        if len(self.args) < 2:
            return super().__str__()
        problems = [f"  {problem}" for problem in self.args]
        return "\n".join([f"{len(problems)} errors in the settings:", *problems])


class ScheduleError(TdcError):
    """The betas or alphas_cumprod given are no noise schedule."""


class DataError(TdcError):
    """A dataset is missing, malformed, or does not fit the model."""


class CorruptFileError(DataError):
    """A file of a dataset is damaged or of another kind; a few of them may be left out."""


class StorageError(TdcError):
    """A run directory cannot be used."""


class StorageFailedError(StorageError):
    """A disk or a store failed; it may work the next time."""


class CheckpointError(TdcError):
    """A saved model is missing, malformed, or of another kind than expected."""


class UnsupportedModelError(TdcError):
    """A UNet holds a block that the pruning space does not know."""


class LimitError(TdcError):
    """No scheme of the pruning space is within the limit."""


class ProxyError(TdcError):
    """A proxy returned no usable scheme; the caller decides what takes over."""


class ProxyReplyError(ProxyError):
    """A language model's reply holds no valid scheme; the text is fit to be sent back to it."""


class EvaluationError(TdcError):
    """There is no feature extractor, or there are too few images for a score."""


class ClusterError(TdcError):
    """The Ray cluster cannot give what the run asks for."""


class NonFiniteLossError(TdcError):
    """The training loss became NaN or infinite at a step, counted from 1."""

    def __init__(self, step: int, loss: float) -> None:
        super().__init__(step, loss)
        self.step = step
        self.loss = loss

    def __str__(self) -> str:
        return (
            f"the loss is {self.loss} at step {self.step}. Lower the learning rate, turn on "
            "max_grad_norm, or train in fp32."
        )


class WorkFailedError(TdcError):
    """Work items failed for good; what the others finished is kept."""

    def __init__(self, reasons: Mapping[str, str]) -> None:
        super().__init__(dict(reasons))
        self.reasons = dict(reasons)

    def __str__(self) -> str:
        lines = [f"  {key}: {reason}" for key, reason in sorted(self.reasons.items())]
        return "\n".join(
            [
                f"{len(lines)} of the run's parts failed:",
                *lines,
                "The others are finished and kept; the same command tries these again.",
            ]
        )
