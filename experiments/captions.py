"""Do a base and its experts draw what a caption asks for?

    python experiments/captions.py --steps-share 0.5
    python experiments/captions.py --smoke

Digits with the captions "a handwritten zero" to "a handwritten nine": a small
`UNet2DConditionModel` is trained from scratch on them in pixels, conditioned by cross-attention on
a text encoder of random weights (a CLIP of one layer that reads letters; nothing is downloaded),
with 0.1 of the captions dropped. Then it is pruned to a mean of 0.8 of its macs in groups of
timesteps, refitted and fine-tuned. Reported is the share of images, drawn by caption and guidance,
in which the project's digits classifier sees the digit that was asked for (chance: 0.1).

All is done in this process, by the stages' own functions, without Ray.

Hardware and hours: about 3 minutes of one CPU core with `--steps-share 0.5`. The paper has no
captions.
"""

import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import transformers
from common import Flags, claim, commits_of, parse_flags
from diffusers import DDIMScheduler, StableDiffusionPipeline
from output import mean_and_spread, write_record, write_table
from PIL import Image
from safetensors.torch import load_model

import tdc_ray as tdc
from tdc_ray.config.conditioning import ConditioningConfig
from tdc_ray.config.data import DataConfig
from tdc_ray.config.model import ModelConfig
from tdc_ray.config.run import RunConfig
from tdc_ray.data.batches import to_minus_one_one
from tdc_ray.data.latents import prepare_latents, training_data
from tdc_ray.data.load import load_dataset
from tdc_ray.execution.device import WorkerRank
from tdc_ray.models.config_file import with_file
from tdc_ray.models.families import build_network, save_network
from tdc_ray.models.network_config import CONDITION_CLASS, NetworkConfig
from tdc_ray.runs.collect_results import mean_over_sampling_steps
from tdc_ray.runs.evaluation.features import Classifier, train_classifier
from tdc_ray.runs.preflight import check
from tdc_ray.runs.stages.base_worker import train_base
from tdc_ray.runs.workers import workers
from tdc_ray.storage.files import atomic_path, exists, read_json, write_json

NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
CAPTIONS = [f"a handwritten {name}" for name in NAMES]

MACS_SHARE = 0.8

LETTERS = "abcdefghijklmnopqrstuvwxyz"
NUM_TOKENS = 24
WIDTH = 32

NETWORK: NetworkConfig = {
    "_class_name": CONDITION_CLASS,
    "sample_size": 8,
    "in_channels": 1,
    "out_channels": 1,
    "block_out_channels": (16, 32),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    "layers_per_block": 1,
    "norm_num_groups": 8,
    "attention_head_dim": 4,
}


@dataclass(frozen=True, kw_only=True)
class CaptionFlags(Flags):
    """Flags of this experiment."""

    seeds: tuple[int, ...] = (0,)
    guidance_scales: tuple[float, ...] = (1.0, 3.0)
    """Weights of guidance; 1 means none."""
    num_groups: int = 2
    """Groups of timesteps."""
    finetune_steps: int = 100
    """Steps of each expert."""
    num_images: int = 200
    """Images of each model, of all digits alike often."""


def captioned_digits(folder: Path) -> Path:
    """Write the digits as an image folder with captions, unless it is there."""
    if not exists(folder):
        images, labels = load_dataset(DataConfig()).__getitems__(range(1797))
        rows = []
        with atomic_path(folder) as temporary:
            temporary.mkdir()
            for number, (image, label) in enumerate(zip(images, labels.tolist(), strict=True)):
                name = f"{number:04}.png"
                Image.fromarray(image[0].numpy()).save(temporary / name)
                rows.append(json.dumps({"file_name": name, "text": CAPTIONS[label]}))
            (temporary / "metadata.jsonl").write_text("\n".join(rows))
    return folder


def save_pipeline(folder: Path, seed: int) -> Path:
    """Write a pipeline in pixels with a text encoder and a UNet of random weights."""
    if exists(folder):
        return folder
    torch.manual_seed(seed)
    words = [*LETTERS, *(f"{one}</w>" for one in LETTERS), "<|startoftext|>", "<|endoftext|>"]
    with atomic_path(folder) as temporary:
        temporary.mkdir()
        vocabulary, merges = temporary / "vocab.json", temporary / "merges.txt"
        vocabulary.write_text(json.dumps({word: i for i, word in enumerate(words)}))
        merges.write_text("#version: 0.2\n")
        config = transformers.CLIPTextConfig(
            vocab_size=len(words),
            hidden_size=WIDTH,
            intermediate_size=2 * WIDTH,
            num_hidden_layers=1,
            num_attention_heads=2,
            max_position_embeddings=NUM_TOKENS,
            bos_token_id=len(words) - 2,
            eos_token_id=len(words) - 1,
        )
        pipeline = StableDiffusionPipeline(
            vae=None,
            text_encoder=transformers.CLIPTextModel(config),
            tokenizer=transformers.CLIPTokenizer(
                str(vocabulary), str(merges), model_max_length=NUM_TOKENS
            ),
            unet=build_network({**NETWORK, "cross_attention_dim": WIDTH}),
            scheduler=DDIMScheduler(steps_offset=1, clip_sample=False),  # as the class asks
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
        pipeline.save_pretrained(temporary)
    return folder


def config_of(flags: CaptionFlags, seed: int, images: Path, pipeline: Path) -> RunConfig:
    """Return the settings of base and experts."""
    config = flags.config(seed)
    data = replace(config.data, source="imagefolder", path=str(images), text_encoder=str(pipeline))
    evaluate = replace(config.evaluate, cache_dir=str(flags.storage / "cache"), features="none")
    return replace(
        config,
        data=data,
        model=with_file(ModelConfig(config=str(pipeline / "unet"))),
        conditioning=ConditioningConfig(caption_dropout=0.1),
        evaluate=evaluate,
    )


def train(config: RunConfig, pipeline: Path, folder: Path) -> Path:
    """Train the base from scratch; return a copy of the pipeline that has it."""
    if exists(folder):
        return folder
    check(config)
    with workers(config) as run:
        run({"captions": prepare_latents(training_data(config.data, config.evaluate.cache_dir))})
    checkpoint = folder.with_suffix(".pt")
    state = train_base(
        config,
        WorkerRank(0, 1, torch.device("cuda" if torch.cuda.is_available() else "cpu")),
        resume_from=checkpoint if exists(checkpoint) else None,
        wrap=lambda unet: unet,
        report=lambda metrics, step: print(f"step {step}: loss {metrics['loss']:.4f}", flush=True),
        save=lambda state: state.save(checkpoint),
    )
    with state.ema_weights() as unet, atomic_path(folder) as temporary:
        shutil.copytree(pipeline, temporary)
        save_network(unet, temporary / "unet")
    return folder


def accuracy(
    pipeline: tdc.ProgressivePipeline, classifier: Classifier, flags: CaptionFlags, scale: float
) -> float:
    """Return the share of images in which the classifier sees the digit asked for."""
    pipeline.set_progress_bar_config(disable=True)
    asked = torch.arange(flags.num_images) % len(CAPTIONS)
    prompts = [CAPTIONS[digit] for digit in asked.tolist()]
    drawn = pipeline(len(prompts), prompt=prompts, guidance_scale=scale, output_type="np").images
    pixels = to_minus_one_one(torch.from_numpy(drawn).permute(0, 3, 1, 2))
    with torch.inference_mode():
        seen = classifier(pixels).argmax(1)
    return float((seen == asked).double().mean())


def models_of(
    base: tdc.Base, images: Path, folder: Path, flags: CaptionFlags
) -> Iterator[tuple[str, tdc.Base | tdc.Experts]]:
    """Yield the base, experts of it that are pruned and refitted, and the same fine-tuned."""
    yield "base", base
    limits = {"schedule": "measured", "mean_macs_share": MACS_SHARE}
    plan = tdc.plan_groups(base.scheduler, num_groups=flags.num_groups, **limits)
    how = {"folder": folder, "progress": False}
    pruned = tdc.prune(base, plan, images, **how)
    yield "pruned", pruned
    yield "fine-tuned", tdc.finetune(pruned, images, num_steps=flags.finetune_steps, **how)


def main(flags: CaptionFlags) -> None:
    """Train, prune and fine-tune for every seed, and write the table."""
    folder = flags.storage.resolve() / f"captions-{flags.variant}"
    images = captioned_digits(folder / "images")
    path, real = folder / "classifier.safetensors", folder / "classifier.json"
    if not exists(real):
        digits = load_dataset(DataConfig())
        write_json(real, {"accuracy": train_classifier(digits, 1, len(NAMES), path)})
    classifier = Classifier(1, len(NAMES))
    load_model(classifier, path)
    scores: dict[str, list[float]] = {}
    macs: list[float] = []
    for seed in flags.seeds:
        root = folder / f"seed-{seed}"
        untrained = save_pipeline(root / "untrained", seed)
        config = config_of(flags, seed, images, untrained)
        claim(root, config)
        trained = train(config, untrained, root / "base")
        base = tdc.load_base(trained, settings=replace(config, model=ModelConfig()))
        for name, model in models_of(base, images, root / "experts", flags):
            for scale in flags.guidance_scales:
                row = f"{name}, guidance {scale:g}"
                share = accuracy(model.to_pipeline(), classifier, flags, scale)
                scores.setdefault(row, []).append(share)
                print(f"seed {seed}, {row}: {share:.3f}", flush=True)
        assert isinstance(model, tdc.Experts)  # the last
        mean = mean_over_sampling_steps(model.plan, [group.macs for group in model.groups])
        macs.append(mean / base.macs)
    rows = [[row, mean_and_spread(values)] for row, values in scores.items()]
    write_table(folder, "captions", ["model", "accuracy of the digit asked for"], rows)
    record = {
        "accuracy": scores,
        "accuracy_on_training_images": read_json(real)["accuracy"],
        "num_images": flags.num_images,
        "base_steps": flags.config(0).base.num_steps,
        "finetune_steps": flags.finetune_steps,
        "mean_macs_share": macs,
    }
    write_record(folder, "captions", flags, commits_of(folder), record)


if __name__ == "__main__":
    main(parse_flags(__doc__, CaptionFlags))
