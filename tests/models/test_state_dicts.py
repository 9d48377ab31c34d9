import pickle
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tdc_ray.errors import CheckpointError
from tdc_ray.models.state_dicts import load_state_dict
from tests.models.test_unet import WritesWhenUnpickled
from tests.small import assert_same

STATE = {"a.weight": torch.arange(6.0).reshape(2, 3), "a.bias": torch.zeros(2).half()}


@pytest.mark.parametrize("wrapped", [False, True])
@pytest.mark.parametrize("is_zip", [False, True])
def test_tensors_are_loaded_from_both_of_torchs_formats(tmp_path, wrapped, is_zip):
    saved = {"state_dict": STATE, "epoch": 3} if wrapped else STATE
    torch.save(saved, tmp_path / "file", _use_new_zipfile_serialization=is_zip)
    assert_same(dict(load_state_dict(tmp_path / "file")), STATE)


@pytest.mark.parametrize("is_zip", [False, True])
def test_objects_beside_the_tensors_are_never_unpickled(tmp_path, is_zip):
    trace, path = tmp_path / "it was unpickled", tmp_path / "model.ckpt"
    saved = {"state_dict": STATE, "callbacks": WritesWhenUnpickled(trace)}
    torch.save(saved, path, _use_new_zipfile_serialization=is_zip)
    with pytest.raises(CheckpointError) as error:
        load_state_dict(path)
    assert str(path) in str(error.value)
    if is_zip:
        assert "holds objects beside its tensors (" in str(error.value)
    assert not trace.exists()


class AttributeDict(dict):
    """As Lightning keeps hyperparameters."""


class OpensWhenUnpickled:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def test_the_command_that_the_error_gives_saves_the_tensors_and_runs_no_code(tmp_path):
    trace, path = tmp_path / "it was unpickled", tmp_path / "model.ckpt"
    saved = {
        "state_dict": STATE,
        "callbacks": {AttributeDict: OpensWhenUnpickled(trace)},  # the class itself is a key
        "hyper_parameters": AttributeDict(first=AttributeDict(a=1), second=[Path("a/b")]),
        "epoch": 3,
    }
    torch.save(saved, path)
    with pytest.raises(
        CheckpointError, match=r"AttributeDict.*as Lightning's checkpoints"
    ) as error:
        load_state_dict(path)
    command = re.search(r'python (-c ".*"), and name weights\.ckpt', str(error.value))
    assert command is not None
    # in a fresh process that knows neither this module nor its classes
    subprocess.run(f"{sys.executable} -I {command[1]}", shell=True, cwd=tmp_path, check=True)
    assert_same(dict(load_state_dict(tmp_path / "weights.ckpt")), STATE)
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
