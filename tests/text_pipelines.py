"""Tiny text-to-image pipelines with random weights, of 16 x 16 pixels."""

import json
from pathlib import Path
from typing import Any, NoReturn

import torch
import transformers
from diffusers import (
    AutoencoderDC,
    AutoencoderKL,
    DDIMScheduler,
    DiffusionPipeline,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    PixArtAlphaPipeline,
    PixArtTransformer2DModel,
    PNDMScheduler,
    SanaPipeline,
    SanaTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)

from tdc_ray.errors import ClusterError

PROMPTS = ("a red square", "a blue circle", "a cat")

LETTERS = [chr(code) for code in range(ord("a"), ord("z") + 1)]
WORDS = [*LETTERS, *(letter + "</w>" for letter in LETTERS), "<|startoftext|>", "<|endoftext|>"]

NOISE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


def clip_tokenizer(folder: Path) -> Any:
    vocabulary = {word: number for number, word in enumerate(WORDS)}
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    files = (str(folder / "vocab.json"), str(folder / "merges.txt"))
    return transformers.CLIPTokenizer(*files, model_max_length=77)


def clip_config(hidden_size: int = 16) -> Any:
    return transformers.CLIPTextConfig(
        vocab_size=len(WORDS),
        hidden_size=hidden_size,
        intermediate_size=32,
        projection_dim=hidden_size,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=77,
        bos_token_id=len(WORDS) - 2,
        eos_token_id=len(WORDS) - 1,
    )


def autoencoder(**settings: Any) -> AutoencoderKL:
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 8),
        norm_num_groups=4,
        latent_channels=4,
        sample_size=16,
        **settings,
    )


def unet(**settings: Any) -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(16, 32),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        layers_per_block=1,
        norm_num_groups=8,
        attention_head_dim=4,
        **settings,
    )


def stable_diffusion(folder: Path) -> DiffusionPipeline:
    return StableDiffusionPipeline(
        vae=autoencoder(),
        text_encoder=transformers.CLIPTextModel(clip_config()),
        tokenizer=clip_tokenizer(folder),
        unet=unet(cross_attention_dim=16),
        scheduler=PNDMScheduler(**NOISE, skip_prk_steps=True, steps_offset=1),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def of_pixels(folder: Path) -> DiffusionPipeline:
    """Of 8 x 8 grey pixels, without a first stage."""
    return StableDiffusionPipeline(
        vae=None,
        text_encoder=transformers.CLIPTextModel(clip_config()),
        tokenizer=clip_tokenizer(folder),
        unet=unet(cross_attention_dim=16, in_channels=1, out_channels=1),
        scheduler=DDIMScheduler(steps_offset=1, clip_sample=False),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def stable_diffusion_xl(folder: Path) -> DiffusionPipeline:
    return StableDiffusionXLPipeline(
        vae=autoencoder(),
        text_encoder=transformers.CLIPTextModel(clip_config(8)),
        text_encoder_2=transformers.CLIPTextModelWithProjection(clip_config(16)),
        tokenizer=clip_tokenizer(folder),
        tokenizer_2=clip_tokenizer(folder),
        unet=unet(
            cross_attention_dim=24,
            addition_embed_type="text_time",
            addition_time_embed_dim=4,
            projection_class_embeddings_input_dim=6 * 4 + 16,
        ),
        scheduler=EulerDiscreteScheduler(**NOISE, steps_offset=1, timestep_spacing="leading"),
    )


def t5_tokenizer() -> Any:
    words = ["<pad>", "</s>", "<unk>", "\u2581", *LETTERS]
    return transformers.T5Tokenizer([(word, -1.0) for word in words], extra_ids=0)


def t5(width: int) -> Any:
    sizes = {"d_model": width, "d_kv": 4, "d_ff": 16, "num_layers": 1, "num_heads": 2}
    return transformers.T5EncoderModel(transformers.T5Config(vocab_size=4 + len(LETTERS), **sizes))


def stable_diffusion_3(folder: Path, width: int = 32) -> DiffusionPipeline:
    """With states of prompts so wide."""
    return StableDiffusion3Pipeline(
        vae=autoencoder(shift_factor=0.1),
        text_encoder=transformers.CLIPTextModelWithProjection(clip_config(8)),
        text_encoder_2=transformers.CLIPTextModelWithProjection(clip_config(16)),
        text_encoder_3=t5(width),
        tokenizer=clip_tokenizer(folder),
        tokenizer_2=clip_tokenizer(folder),
        tokenizer_3=t5_tokenizer(),
        transformer=SD3Transformer2DModel(
            sample_size=8,
            in_channels=4,
            out_channels=4,
            num_layers=2,
            num_attention_heads=4,
            attention_head_dim=8,
            joint_attention_dim=width,
            caption_projection_dim=32,
            pooled_projection_dim=24,
            pos_embed_max_size=8,
        ),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
    )


def pixart(_: Path) -> DiffusionPipeline:
    """Of 256 x 256 pixels: sizes are embedded where a network has 128 latents a side."""
    return PixArtAlphaPipeline(
        vae=autoencoder(),
        text_encoder=t5(16),
        tokenizer=t5_tokenizer(),
        transformer=PixArtTransformer2DModel(
            sample_size=128,
            patch_size=16,
            num_layers=2,
            num_attention_heads=4,
            attention_head_dim=12,
            cross_attention_dim=48,
            caption_channels=16,
        ),
        scheduler=DPMSolverMultistepScheduler(beta_start=0.0001, beta_end=0.02),
    )


def sana(_: Path) -> DiffusionPipeline:
    """Of 64 x 64 pixels, which a deep-compression autoencoder makes 8 x 8 latents of."""
    levels = 4
    gemma = transformers.Gemma2Config(
        vocab_size=4 + len(LETTERS),
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
    )
    return SanaPipeline(
        vae=AutoencoderDC(
            latent_channels=4,
            encoder_block_out_channels=(8,) * levels,
            decoder_block_out_channels=(8,) * levels,
            encoder_layers_per_block=(1,) * levels,
            decoder_layers_per_block=(1,) * levels,
            encoder_qkv_multiscales=((),) * levels,
            decoder_qkv_multiscales=((),) * levels,
            scaling_factor=0.41407,
        ),
        text_encoder=transformers.Gemma2Model(gemma),
        tokenizer=t5_tokenizer(),
        transformer=SanaTransformer2DModel(
            in_channels=4,
            out_channels=4,
            num_attention_heads=4,
            attention_head_dim=8,
            num_layers=2,
            num_cross_attention_heads=4,
            cross_attention_head_dim=8,
            cross_attention_dim=32,
            caption_channels=16,
            sample_size=8,
        ),
        scheduler=DPMSolverMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
        ),
    )


def save(pipeline: Any, folder: Path) -> Path:
    """Save a pipeline, and prompts beside it; return its folder."""
    torch.manual_seed(0)
    pipeline(folder).save_pretrained(folder / "pipe")
    (folder / "prompts.txt").write_text("\n\n".join(PROMPTS))
    return folder / "pipe"


def stop(*_: object) -> NoReturn:
    """Stop a run where it is called."""
    raise ClusterError("stopped")


def made(run: Path) -> dict[Path, int]:
    """When every file of a run's base and experts was written, in nanoseconds."""
    files = [*run.glob("base/unet/*"), *run.glob("experts/expert-*/*")]
    return {path: path.stat().st_mtime_ns for path in files}
