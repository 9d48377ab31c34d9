"""The presets: functions that each return a complete ``RunConfig``; a variant replaces fields."""

from collections.abc import Callable, Mapping
from dataclasses import replace

from tdc_ray.config.compute import ComputeConfig
from tdc_ray.config.data import DataConfig
from tdc_ray.config.diffusion import DiffusionConfig
from tdc_ray.config.evaluate import EvaluateConfig
from tdc_ray.config.model import ModelConfig
from tdc_ray.config.plan import PlanConfig
from tdc_ray.config.prune import PruneConfig
from tdc_ray.config.run import RunConfig
from tdc_ray.config.sampler import SamplerConfig
from tdc_ray.config.train import FinetuneConfig, TrainConfig
from tdc_ray.config.validation import meant
from tdc_ray.errors import ConfigError

LDM_DIFFUSION = DiffusionConfig(beta_schedule="scaled_linear", beta_start=0.0015, beta_end=0.0195)
"""CompVis's latent diffusion on FFHQ-256."""

LDM_SAMPLER = SamplerConfig(
    num_inference_steps=200, steps_offset=1, clip_sample=False, set_alpha_to_one=False
)
"""As CompVis samples from it."""


def digits() -> RunConfig:
    """Scikit-learn's 1,797 digits of 8x8 and a UNet of 1.08 M parameters: minutes on 2 cores."""
    base = TrainConfig(
        num_steps=2000,
        batch_size=64,
        learning_rate=1e-3,
        num_warmup_steps=100,
        ema_decay=0.995,
        ema_warmup=True,
        checkpoint_every=500,
    )
    return RunConfig(
        preset="digits",
        # Better here than the paper's SNR schedule (experiments/README.md).
        plan=PlanConfig(num_groups=4, schedule="measured"),
        base=base,
        prune=PruneConfig(
            num_rounds=1, num_candidates=4, num_images=180, num_refit_images=180, num_levels=8
        ),
        finetune=replace(
            FinetuneConfig.of(base),
            num_steps=400,
            learning_rate=5e-4,
            num_warmup_steps=20,
            lr_schedule="linear",
            checkpoint_every=200,
        ),
        # As good as 200 steps of DDIM here: more of its steps would not raise the score.
        sampler=SamplerConfig(sampler="dpmsolver++", num_inference_steps=20),
        evaluate=EvaluateConfig(num_images=2000, features="classifier"),
        # Of a single run nothing else is at work beside stage 1.
        compute=ComputeConfig(cpus_per_base_worker=2),
    )


def digits_smoke() -> RunConfig:
    """``digits`` for quick tests: 0.19 M parameters, a few steps; its images are noise."""
    full = digits()
    return replace(
        full,
        preset="digits-smoke",
        plan=PlanConfig(num_groups=4),
        model=ModelConfig(architecture="tiny"),
        base=replace(full.base, num_steps=60, batch_size=32, checkpoint_every=20, log_every=10),
        finetune=replace(
            full.finetune,
            num_steps=20,
            batch_size=32,
            num_warmup_steps=1,
            checkpoint_every=10,
            log_every=5,
        ),
        prune=PruneConfig(
            num_rounds=2,
            num_candidates=2,
            num_images=64,
            num_refit_images=64,
            num_passes=2,
            batch_size=64,
        ),
        sampler=SamplerConfig(num_inference_steps=10),
        evaluate=replace(full.evaluate, num_images=200, batch_size=100),
        compute=ComputeConfig(),
    )


def photos() -> RunConfig:
    """Squares of 16x16 of scikit-learn's two photographs: colour, minutes on 2 cores."""
    full = digits()
    return replace(
        full,
        preset="photos",
        data=DataConfig(source="photos", image_size=16, num_channels=3),
        model=ModelConfig(architecture="photos16"),
        # The squares differ in overall colour: epsilon's networks drew black and white ones.
        diffusion=DiffusionConfig(prediction_type="v_prediction"),
    )


STEPS_BY_SIZE = {
    16: (2_000, 400),
    32: (10_000, 2_000),
    64: (40_000, 8_000),
    256: (100_000, 20_000),
}
"""Steps of the base, and of each fine-tune, by the largest side of images of one's own."""


def images(side: int = 32) -> RunConfig:
    """Images of one's own: what ``--data PATH`` takes, which finds out all that is of the data.

    Steps, rates and averages are chosen between those of ``digits`` and of DDPM, not measured.

    Args:
        side: The longer side of the images in pixels, which decides how many steps are taken.
    """
    full = digits()
    row = min((most for most in STEPS_BY_SIZE if side <= most), default=max(STEPS_BY_SIZE))
    steps, finetune_steps = STEPS_BY_SIZE[row]
    base = replace(
        full.base,
        num_steps=steps,
        learning_rate=1e-3 if side <= 16 else 5e-4 if side <= 64 else 1e-4,
        ema_decay=0.995 if side <= 16 else 0.9995,
        micro_batch_size=None if side <= 64 else 8,
        precision="auto",
        checkpoint_every=500 if side <= 16 else 1000,
    )
    finetune = replace(
        full.finetune,
        num_steps=finetune_steps,
        learning_rate=base.learning_rate / 2,
        ema_decay=base.ema_decay,
        micro_batch_size=base.micro_batch_size,
        precision=base.precision,
        checkpoint_every=base.checkpoint_every // 2,
    )
    return replace(
        full,
        preset="images",
        data=DataConfig(source="folder", path="images", image_size=side, num_channels=3),
        model=ModelConfig(architecture="auto"),
        # Images differ in overall colour, which networks that predict epsilon learn slowly.
        diffusion=DiffusionConfig(prediction_type="v_prediction"),
        base=base,
        finetune=finetune,
        evaluate=replace(full.evaluate, features="auto", batch_size=250 if side <= 32 else 50),
        # Worker processes of one kind, as precision auto and --hours time the base and experts.
        compute=ComputeConfig(),
    )


def mnist() -> RunConfig:
    """MNIST from an npz file (``--data.path``), at 16x16."""
    full = digits()
    return replace(
        full,
        preset="mnist",
        data=DataConfig(source="npz", path="mnist.npz", image_size=16),
        model=ModelConfig(architecture="mnist16"),
    )


def mnist32() -> RunConfig:
    """MNIST from an npz file (``--data.path``), at 32x32."""
    small = mnist()
    return replace(
        small,
        preset="mnist-32",
        data=replace(small.data, image_size=32),
        model=ModelConfig(architecture="mnist32"),
    )


def mnist32_ldm() -> RunConfig:
    """Latent diffusion on MNIST at 32x32 (``--data.path``), on latents of 8x8x4.

    The first stage (``--data.first-stage``) is what ``tdc-ray train-autoencoder`` trains.
    """
    full = mnist32()
    return replace(
        full,
        preset="mnist-32-ldm",
        model=ModelConfig(architecture="mnist32-ldm"),
        diffusion=LDM_DIFFUSION,
        sampler=replace(LDM_SAMPLER, num_inference_steps=50),
    )


def cifar10() -> RunConfig:
    """The paper's main setting: IDDPM on CIFAR-10, linear betas, T = 1000, 100 DDIM steps.

    Base and fine-tune steps add up to the 450 k of Table I (the paper does not split them).
    """
    base = TrainConfig(
        num_steps=250_000,
        batch_size=128,
        learning_rate=1e-4,
        max_grad_norm=None,
        ema_decay=0.9999,
        precision="auto",
        log_every=100,
        checkpoint_every=10_000,
    )
    return RunConfig(
        preset="cifar10",
        data=DataConfig(
            source="cifar10", path="data", image_size=32, num_channels=3, num_workers=2
        ),
        model=ModelConfig(architecture="iddpm-cifar10", dropout=0.3),
        diffusion=DiffusionConfig(learned_sigma=True),
        base=base,
        prune=PruneConfig(num_images=1024, num_refit_images=512),
        finetune=replace(FinetuneConfig.of(base), num_steps=20_000, checkpoint_every=2_000),
        evaluate=EvaluateConfig(reference="cifar10"),
        compute=ComputeConfig(gpus_per_base_worker=1, gpus_per_actor=1),
    )


def cifar10_cosine() -> RunConfig:
    """The schedule of OpenAI's released CIFAR-10 checkpoint: cosine, T = 4000."""
    return replace(
        cifar10(),
        preset="cifar10-cosine",
        diffusion=DiffusionConfig(
            num_train_timesteps=4000,
            beta_schedule="squaredcos_cap_v2",
            learned_sigma=True,
            rescale_timesteps=True,
        ),
    )


def imagenet64() -> RunConfig:
    """IDDPM on ImageNet-64 (npz batches), linear betas, T = 1000; 1.3 M steps as in Table I."""
    full = cifar10()
    return replace(
        full,
        preset="imagenet64",
        data=DataConfig(
            source="npz", path="imagenet64", image_size=64, num_channels=3, num_workers=4
        ),
        model=ModelConfig(architecture="iddpm-imagenet64"),
        base=replace(full.base, num_steps=800_000),
        finetune=replace(full.finetune, num_steps=50_000, checkpoint_every=5_000),
        evaluate=EvaluateConfig(),
    )


def imagenet64_cosine() -> RunConfig:
    """The schedule of OpenAI's released ImageNet-64 checkpoint: cosine, T = 4000."""
    return replace(imagenet64(), preset="imagenet64-cosine", diffusion=cifar10_cosine().diffusion)


def ffhq256_ldm() -> RunConfig:
    """The UNet and schedule of CompVis's FFHQ-256 latent diffusion, on latents of 64x64x3."""
    full = cifar10()
    return replace(
        full,
        preset="ffhq256-ldm",
        data=DataConfig(
            source="folder", path="ffhq256", image_size=256, num_channels=3, num_workers=4
        ),
        model=ModelConfig(architecture="ldm-ffhq256"),
        diffusion=LDM_DIFFUSION,
        base=replace(full.base, num_steps=350_000, batch_size=48),
        finetune=replace(full.finetune, batch_size=48),
        sampler=LDM_SAMPLER,
        evaluate=EvaluateConfig(),
    )


def ddpm_cifar10() -> RunConfig:
    """DDPM on CIFAR-10: fixed sigma, L_simple, one attention head.

    Learning rate, batch 128, EMA, flips, dropout and the 800 k steps are those of DDPM's appendix
    B (arXiv:2006.11239), warm-up and clipping those of its code; the fine-tune's steps are
    chosen here.
    """
    full = cifar10()
    train = replace(full.base, learning_rate=2e-4, num_warmup_steps=5_000, max_grad_norm=1.0)
    return replace(
        full,
        preset="ddpm-cifar10",
        data=replace(full.data, horizontal_flip=True),
        model=ModelConfig(architecture="ddpm-cifar10", dropout=0.1),
        diffusion=DiffusionConfig(),
        base=replace(train, num_steps=800_000),
        finetune=replace(
            FinetuneConfig.of(train), num_steps=20_000, num_warmup_steps=0, checkpoint_every=2_000
        ),
    )


def ddpm_ffhq256() -> RunConfig:
    """DDPM on FFHQ-256 (a folder of images), in pixels: the rows DDPM and P2 of Table I.

    From DDPM's appendix B for 256x256 (arXiv:2006.11239): learning rate 2e-5, batch 64, EMA
    0.9999, flips, no dropout, linear betas, T = 1000; from its code: 5,000 steps of warm-up,
    gradients clipped to 1. The 800 k steps are Table I's; the micro-batch, the fine-tune's steps
    and the images of pruning are chosen here. P2's row adds ``loss_weight="p2"``.
    """
    full = ddpm_cifar10()
    train = replace(full.base, batch_size=64, micro_batch_size=8, learning_rate=2e-5)
    return replace(
        full,
        preset="ddpm-ffhq256",
        data=replace(full.data, source="folder", path="ffhq256", image_size=256, num_workers=4),
        model=ModelConfig(architecture="ddpm-ffhq256"),
        base=train,
        prune=PruneConfig(num_images=256, num_refit_images=128),
        finetune=replace(
            FinetuneConfig.of(train), num_steps=20_000, num_warmup_steps=0, checkpoint_every=2_000
        ),
        evaluate=EvaluateConfig(batch_size=50),
    )


PRESETS: Mapping[str, Callable[[], RunConfig]] = {
    "digits": digits,
    "digits-smoke": digits_smoke,
    "photos": photos,
    "images": images,
    "mnist": mnist,
    "mnist-32": mnist32,
    "mnist-32-ldm": mnist32_ldm,
    "cifar10": cifar10,
    "cifar10-cosine": cifar10_cosine,
    "imagenet64": imagenet64,
    "imagenet64-cosine": imagenet64_cosine,
    "ffhq256-ldm": ffhq256_ldm,
    "ddpm-cifar10": ddpm_cifar10,
    "ddpm-ffhq256": ddpm_ffhq256,
}


def preset(name: str) -> RunConfig:
    """Return the settings of a preset.

    Raises:
        ConfigError: No preset has this name.
    """
    if name not in PRESETS:
        hint = meant(name, PRESETS)
        raise ConfigError(f"--preset must be one of {', '.join(PRESETS)}, got {name}{hint}")
    return PRESETS[name]()
