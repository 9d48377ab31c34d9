import argparse
import datetime
import enum
import pickle
import random
from collections import defaultdict, deque
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from tdc_ray.errors import CheckpointError
from tdc_ray.models.checkpoints.state_dicts import load_state_dict
from tests.models.unet2d.test_unet import WritesWhenUnpickled
from tests.small import assert_same

STATE = {"a.weight": torch.arange(6.0).reshape(2, 3), "a.bias": torch.zeros(2).half()}


@pytest.mark.parametrize("wrapped", [False, True])
@pytest.mark.parametrize("is_zip", [False, True])
def test_tensors_are_loaded_from_both_of_torchs_formats(tmp_path, wrapped, is_zip):
    saved = {"state_dict": STATE, "epoch": 3} if wrapped else STATE
    torch.save(saved, tmp_path / "file", _use_new_zipfile_serialization=is_zip)
    assert_same(dict(load_state_dict(tmp_path / "file")), STATE)


class AttributeDict(dict):
    """As Lightning keeps hyperparameters."""


class Stateful:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __setstate__(self, state):
        Path(state["path"]).write_text("it was unpickled")


class OpensWhenUnpickled(Stateful):
    def __reduce__(self):
        return open, (str(self.path), "w")


@pytest.mark.parametrize("is_zip", [False, True])
@pytest.mark.parametrize("harmful", [Stateful, OpensWhenUnpickled])
def test_objects_beside_the_tensors_are_left_out_and_never_unpickled(tmp_path, is_zip, harmful):
    trace, path = tmp_path / "it was unpickled", tmp_path / "model.ckpt"
    saved = {
        "callbacks": {AttributeDict: harmful(trace)},  # the class itself is a key
        "hyper_parameters": AttributeDict(first=AttributeDict(a=1), second=[Path("a/b")]),
        "state_dict": STATE,
        "epoch": 3,
    }
    torch.save(saved, path, _use_new_zipfile_serialization=is_zip)
    if is_zip:
        assert_same(dict(load_state_dict(path)), STATE)
    else:
        with pytest.raises(
            CheckpointError, match=r"model\.ckpt is no checkpoint of PyTorch whose"
        ):
            load_state_dict(path)
    assert not trace.exists()


class Phase(enum.Enum):
    FIT = "fit"


class Steps(list):
    """No list, but filled like one."""


@pytest.mark.parametrize(
    "kind",
    [
        np.float64(0.5),
        np.arange(3),
        np.array([{}, None], dtype=object),
        np.zeros(2, dtype=[("a", "f4")]),
        np.dtype("float32"),
        np.random.default_rng(0),
        np.random.RandomState(0).get_state(),
        random.Random(0),
        Phase.FIT,
        {Phase.FIT: 1, np.int64(3): 2, Path("a"): 3},
        {Path("a/b")},
        argparse.Namespace(rate=np.float32(1)),
        defaultdict(list, {"a": [1]}),
        deque([1.0, 2.0], maxlen=3),
        datetime.timedelta(1),
        partial(int, base=2),
        partial(int, base=2).__call__,
    ],
    ids=lambda kind: type(kind).__name__,
)
def test_every_kind_of_object_beside_the_weights_is_left_out(tmp_path, kind):
    torch.save({"before": kind, "state_dict": STATE, "after": [kind]}, tmp_path / "model.pt")
    assert_same(dict(load_state_dict(tmp_path / "model.pt")), STATE)


def test_an_object_that_cannot_be_left_out_is_named_with_the_way_out(tmp_path):
    torch.save({"state_dict": STATE, "steps": Steps([1])}, tmp_path / "model.pt")
    with pytest.raises(CheckpointError, match=r"having .*Steps in it.*torch\.save\(torch\.load"):
        load_state_dict(tmp_path / "model.pt")


@pytest.mark.parametrize(
    ("saved", "words"),
    [
        ({"model": STATE, "ema": STATE, "step": 3}, "has such under model, ema"),
        (STATE | {"step": np.int64(3)}, "holds something else as step"),
        ([STATE], "holds a list"),
        ({1: torch.zeros(1)}, "by name, and 1 is a"),
        (STATE | {"c": torch.zeros(1, device="meta")}, "c is a .*on meta"),
        (STATE | {"c": torch.zeros(1, dtype=torch.complex64)}, "c is a .*complex64"),
    ],
)
def test_what_a_file_holds_in_place_of_tensors_is_said(tmp_path, saved, words):
    torch.save(saved, tmp_path / "model.pt")
    with pytest.raises(CheckpointError, match=words):
        load_state_dict(tmp_path / "model.pt")


@pytest.mark.parametrize(
    ("saved", "words"),
    [
        (lambda trace: STATE | {"c": OpensWhenUnpickled(trace)}, "must hold tensors by name"),
        (
            lambda trace: STATE | {"c": WritesWhenUnpickled(trace)},
            "without running code of its own",
        ),
    ],
)
def test_an_object_in_place_of_a_tensor_is_refused(tmp_path, saved, words):
    trace, path = tmp_path / "it was unpickled", tmp_path / "model.ckpt"
    torch.save({"state_dict": saved(trace)}, path)
    with pytest.raises(CheckpointError, match=words):
        load_state_dict(path)
    assert not trace.exists()


@pytest.mark.parametrize(
    ("write", "words"),
    [
        (lambda path: None, "does not exist"),
        (lambda path: path.write_bytes(b"no checkpoint"), "no checkpoint of PyTorch"),
        (lambda path: path.write_bytes(b""), "no checkpoint of PyTorch"),
        (lambda path: path.write_bytes(pickle.dumps([1], protocol=2)), "no checkpoint of PyTorch"),
        (lambda path: torch.save([torch.zeros(1)], path), "must hold tensors by name"),
        (lambda path: torch.save({"epoch": 3}, path), "must hold tensors by name"),
    ],
)
def test_other_files_are_one_clear_error(tmp_path: Path, write, words):
    write(tmp_path / "file.pt")
    with pytest.raises(CheckpointError, match=rf"file\.pt.* {words}"):
        load_state_dict(tmp_path / "file.pt")
