"""Files of tensors that are written some rows at a time."""

import torch
from safetensors.torch import load_file

from tdc_ray.data.tensor_shards import write_tensors
from tests.small import assert_same


def test_what_comes_in_parts_is_read_as_if_it_had_come_at_once(tmp_path):
    torch.manual_seed(0)
    whole = {"images": torch.randint(256, (5, 1, 3, 3), dtype=torch.uint8)}
    whole["labels"] = torch.arange(5)
    rows = {"captions": torch.randn(5, 7, 2), "captions.mask": torch.randn(5, 7)}
    parts = [{name: one[part] for name, one in rows.items()} for part in (slice(2), slice(2, 5))]
    path = tmp_path / "shard.safetensors"
    write_tensors(path, whole, 5, parts)
    found = load_file(path)
    assert found.keys() == {**whole, **rows}.keys()
    for name, tensor in {**whole, **rows}.items():
        assert found[name].dtype == tensor.dtype
        assert_same(found[name], tensor)
