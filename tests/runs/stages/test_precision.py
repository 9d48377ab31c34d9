from dataclasses import replace

import pytest
import torch

from tdc_ray.diffusion.train import start_state
from tdc_ray.execution.chain import run_chain
from tdc_ray.execution.device import configure_worker, exact_products
from tdc_ray.models.precision import autocast, in_layout
from tdc_ray.models.unet2d.unet import load_unet, save_unet
from tdc_ray.runs.stages.precision import LEAST_GAIN, resolve_auto_precision
from tdc_ray.storage.files import read_json, write_json
from tdc_ray.storage.run_dir import RunDir
from tests.small import (
    TINY,
    assert_same,
    group_of,
    held_out_loss_of,
    output_of,
    random_unet,
    small_config,
)

CPU = torch.device("cpu")


def test_auto_is_settled_by_what_was_measured_and_only_where_it_is_asked_for(tmp_path):
    config = small_config(base={"precision": "auto"}, prune={"precision": "auto"})
    run_dir = RunDir(tmp_path)
    found = run_chain(resolve_auto_precision(run_dir, config, TINY, ["base", "prune", "finetune"]))
    for stage in ("base", "prune"):
        measured = read_json(tmp_path / "precision" / f"{stage}.json")
        faster = measured["fp32_seconds"] >= LEAST_GAIN * measured["bf16_seconds"] > 0
        assert measured["precision"] == ("bf16" if faster else "fp32")
        assert getattr(found, stage).precision == measured["precision"]
    assert found.finetune == config.finetune
    assert not (tmp_path / "precision" / "finetune.json").exists()


def test_what_was_settled_once_stays_so(tmp_path):
    config = small_config(finetune={"precision": "auto"})
    kept = {"precision": "bf16", "fp32_seconds": 2.0, "bf16_seconds": 1.0}
    write_json(tmp_path / "precision" / "finetune.json", kept)
    found = run_chain(resolve_auto_precision(RunDir(tmp_path), config, TINY, ["finetune"]))
    assert found == replace(config, finetune=replace(config.finetune, precision="bf16"))


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_low_precision_computes_channels_last_and_is_saved_as_any_other(tmp_path, precision):
    unet = random_unet()
    expected = {name: value.clone() for name, value in unet.state_dict().items()}
    state = start_state(unet, small_config(base={"precision": precision}).base)
    assert state.unet.conv_in.weight.is_contiguous(memory_format=torch.channels_last)
    save_unet(state.unet, tmp_path)
    assert_same(load_unet(tmp_path).state_dict(), expected)


def test_casts_of_weights_are_not_remembered_where_weights_are_exchanged():
    unet, other = random_unet().eval(), random_unet(seed=1).eval()
    with torch.inference_mode(), autocast("bf16", CPU):
        wanted = output_of(other)
        output_of(unet)
        for mine, theirs in zip(unet.parameters(), other.parameters(), strict=True):
            mine.data = theirs.data
        assert torch.equal(output_of(unet), wanted)


def test_losses_in_bf16_are_near_those_in_fp32():
    config = small_config(prune={"num_images": 64})
    unet, group = random_unet(), group_of(config, 1)
    half = replace(config, prune=replace(config.prune, precision="bf16"))
    loss, in_half = held_out_loss_of(unet, config, group), held_out_loss_of(unet, half, group)
    assert loss != in_half == pytest.approx(loss, rel=1e-2)


@pytest.mark.parametrize("tf32", [True, False])
def test_a_worker_lets_gpus_use_tf32_or_not(tf32):
    flags = torch.backends.cuda.matmul, torch.backends.cudnn
    before = torch.get_num_threads(), [flag.allow_tf32 for flag in flags]
    try:
        configure_worker(before[0], tf32=tf32)
        with exact_products():
            assert [flag.allow_tf32 for flag in flags] == [False, False]
        assert [flag.allow_tf32 for flag in flags] == [tf32, tf32]
    finally:
        for flag, value in zip(flags, before[1], strict=True):
            flag.allow_tf32 = value


def test_a_layout_changes_no_value():
    unet = random_unet()
    expected = output_of(unet)
    torch.testing.assert_close(output_of(in_layout(unet, "bf16")), expected, rtol=1e-4, atol=1e-5)
