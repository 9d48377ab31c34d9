"""Digits by captions: a smoke run, whose images are noise."""

import sys

import pytest

from tdc_ray.storage.files import read_json

pytest.importorskip("transformers")


@pytest.mark.slow
@pytest.mark.usefixtures("importable")
def test_what_a_base_and_its_experts_draw_by_captions_is_classified(tmp_path, monkeypatch):
    import captions
    from common import parse_flags

    command = ["captions.py", "--smoke", "--storage", str(tmp_path), "--guidance-scales", "3"]
    command += ["--num-images", "20", "--finetune-steps", "2"]
    monkeypatch.setattr(sys, "argv", command)
    captions.main(parse_flags(captions.__doc__, captions.CaptionFlags))
    record = read_json(tmp_path / "captions-digits-smoke/captions.json")
    assert record["accuracy"].keys() == {
        f"{model}, guidance 3" for model in ("base", "pruned", "fine-tuned")
    }
    assert record["mean_macs_share"][0] <= 0.8
