"""The networks of improved-diffusion, guided-diffusion (openai/guided-diffusion, MIT, unet.py) and
of CompVis' VQ first stage in short, to hold conversions against; their modules' names are the
checkpoints' keys."""

import math
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d, interpolate, pad


def norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(32, channels)


class Residual(nn.Module):
    def __init__(
        self, inputs: int, outputs: int, time: int, *, scale_shift: bool, scale: float = 1.0
    ) -> None:
        super().__init__()
        self.scale_shift, self.scale = scale_shift, scale
        self.in_layers = nn.Sequential(
            norm(inputs), nn.SiLU(), nn.Conv2d(inputs, outputs, 3, padding=1)
        )
        embedded = 2 * outputs if scale_shift else outputs
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(time, embedded))
        self.out_layers = nn.Sequential(
            norm(outputs), nn.SiLU(), nn.Dropout(0.3), nn.Conv2d(outputs, outputs, 3, padding=1)
        )
        same = inputs == outputs
        self.skip_connection = nn.Identity() if same else nn.Conv2d(inputs, outputs, 1)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        h, x = self.resample(self.in_layers[:-1](x)), self.resample(x)
        h, embedded = self.in_layers[-1](h), self.emb_layers(emb)[:, :, None, None]
        if self.scale_shift:
            scale, shift = embedded.chunk(2, dim=1)
            h = self.out_layers[1:](self.out_layers[0](h) * (1 + scale) + shift)
        else:
            h = self.out_layers(h + embedded)
        return self.skip_connection(x) + h

    def resample(self, x: Tensor) -> Tensor:
        if self.scale == 2:
            return interpolate(x, scale_factor=2, mode="nearest")
        return avg_pool2d(x, 2) if self.scale == 0.5 else x


class Attention(nn.Module):
    def __init__(self, channels: int, heads: int, *, new_order: bool) -> None:
        super().__init__()
        self.heads, self.new_order = heads, new_order
        self.norm = norm(channels)
        self.qkv = nn.Conv1d(channels, 3 * channels, 1)
        self.proj_out = nn.Conv1d(channels, channels, 1)

    def forward(self, x: Tensor, _: Tensor) -> Tensor:
        batch, channels = x.shape[:2]
        flat = x.reshape(batch, channels, -1)
        qkv, width = self.qkv(self.norm(flat)), channels // self.heads
        if self.new_order:  # guided-diffusion's QKVAttention
            qkv = qkv.reshape(batch, 3, self.heads, width, -1).transpose(1, 2)
        else:
            qkv = qkv.reshape(batch, self.heads, 3, width, -1)
        q, k, v = qkv.unbind(dim=2)  # (B, heads, C / heads, pixels)
        weights = torch.einsum("bhct,bhcs->bhts", q, k) / math.sqrt(channels // self.heads)
        mixed = torch.einsum("bhts,bhcs->bhct", weights.softmax(dim=-1), v)
        return (flat + self.proj_out(mixed.reshape(flat.shape))).reshape(x.shape)


class Down(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.op = nn.Conv2d(channels, channels, 3, stride=2, padding=1)

    def forward(self, x: Tensor, _: Tensor) -> Tensor:
        return self.op(x)


class Up(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor, _: Tensor) -> Tensor:
        return self.conv(interpolate(x, scale_factor=2, mode="nearest"))


class First(nn.Conv2d):
    def forward(self, x: Tensor, _: Tensor) -> Tensor:
        return super().forward(x)


class OpenAIUNet(nn.Module):
    """``attention_at`` are levels; level 0 has the full resolution."""

    def __init__(
        self,
        channels: tuple[int, ...] = (32, 64),
        *,
        layers: int = 2,
        attention_at: tuple[int, ...] = (1,),
        heads: int = 4,
        head_channels: int | None = None,
        heads_upsample: int | None = None,
        new_order: bool = False,
        in_channels: int = 3,
        out_channels: int = 6,
        scale_shift: bool = True,
        num_classes: int | None = None,
        timestep_channels: int | None = None,
        resblock_updown: bool = False,
    ) -> None:
        super().__init__()
        self.width = timestep_channels or channels[0]
        time = 4 * self.width
        self.time_embed = nn.Sequential(
            nn.Linear(self.width, time), nn.SiLU(), nn.Linear(time, time)
        )
        if num_classes is not None:
            self.label_emb = nn.Embedding(num_classes, time)

        def residual(inputs: int, outputs: int, scale: float = 1.0) -> Residual:
            return Residual(inputs, outputs, time, scale_shift=scale_shift, scale=scale)

        def attend(width: int, heads: int) -> Attention:
            return Attention(
                width, width // (head_channels or width // heads), new_order=new_order
            )

        now, skips = channels[0], [channels[0]]
        blocks: list[list[nn.Module]] = [[First(in_channels, now, 3, padding=1)]]
        for level, width in enumerate(channels):
            for _ in range(layers):
                attention = [attend(width, heads)] if level in attention_at else []
                blocks.append([residual(now, width), *attention])
                now = width
                skips.append(now)
            if level < len(channels) - 1:
                blocks.append([residual(now, now, 0.5) if resblock_updown else Down(now)])
                skips.append(now)
        self.input_blocks = nn.ModuleList(map(nn.ModuleList, blocks))
        self.middle_block = nn.ModuleList(
            [residual(now, now), attend(now, heads), residual(now, now)]
        )
        blocks = []
        for level, width in reversed(list(enumerate(channels))):
            for layer in range(layers + 1):
                attention = (
                    [attend(width, heads_upsample or heads)] if level in attention_at else []
                )
                last = [residual(width, width, 2) if resblock_updown else Up(width)]
                last = last if level and layer == layers else []
                blocks.append([residual(now + skips.pop(), width), *attention, *last])
                now = width
        self.output_blocks = nn.ModuleList(map(nn.ModuleList, blocks))
        self.out = nn.Sequential(norm(now), nn.SiLU(), nn.Conv2d(now, out_channels, 3, padding=1))

    def forward(self, x: Tensor, timesteps: Tensor, labels: Tensor | None = None) -> Tensor:
        half = self.width // 2
        frequencies = torch.exp(-math.log(10000) * torch.arange(half) / half)
        angles = timesteps[:, None].float() * frequencies
        emb = self.time_embed(torch.cat([angles.cos(), angles.sin()], dim=1))
        if labels is not None:
            emb = emb + self.label_emb(labels)
        kept = []
        for block in self.input_blocks:
            for layer in block:
                x = layer(x, emb)
            kept.append(x)
        for layer in self.middle_block:
            x = layer(x, emb)
        for block in self.output_blocks:
            x = torch.cat([x, kept.pop()], dim=1)
            for layer in block:
                x = layer(x, emb)
        return self.out(x)


# --- CompVis' VQ first stage -----------------------------------------------------------------


def norm_vq(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(32, channels, eps=1e-6)


class ResidualVQ(nn.Module):
    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.norm1, self.conv1 = norm_vq(inputs), nn.Conv2d(inputs, outputs, 3, padding=1)
        self.norm2, self.conv2 = norm_vq(outputs), nn.Conv2d(outputs, outputs, 3, padding=1)
        if inputs != outputs:
            self.nin_shortcut = nn.Conv2d(inputs, outputs, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(nn.functional.silu(self.norm1(x)))
        h = self.conv2(nn.functional.silu(self.norm2(h)))
        return h + (self.nin_shortcut(x) if hasattr(self, "nin_shortcut") else x)


class AttentionVQ(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = norm_vq(channels)
        self.q, self.k, self.v, self.proj_out = (
            nn.Conv2d(channels, channels, 1) for _ in range(4)
        )

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        q, k, v = (part(h).flatten(2) for part in (self.q, self.k, self.v))  # (B, C, pixels)
        weights = (torch.einsum("bct,bcs->bts", q, k) / math.sqrt(x.shape[1])).softmax(dim=-1)
        return x + self.proj_out(torch.einsum("bts,bcs->bct", weights, v).reshape(x.shape))


class Resample(nn.Module):
    def __init__(self, channels: int, stride: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=stride, padding=2 - stride)

    def forward(self, x: Tensor) -> Tensor:
        if self.conv.stride == (2, 2):
            return self.conv(pad(x, (0, 1, 0, 1)))
        return self.conv(interpolate(x, scale_factor=2, mode="nearest"))


class Level(nn.Module):
    def __init__(self, inputs: int, outputs: int, layers: int, *, attends: bool) -> None:
        super().__init__()
        widths = [inputs, *[outputs] * layers]
        self.block = nn.ModuleList(ResidualVQ(a, b) for a, b in pairwise(widths))
        self.attn = nn.ModuleList(AttentionVQ(outputs) for _ in range(layers if attends else 0))


def middle(channels: int) -> nn.Module:
    module = nn.Module()
    module.block_1, module.attn_1 = ResidualVQ(channels, channels), AttentionVQ(channels)
    module.block_2 = ResidualVQ(channels, channels)
    return module


class Coder(nn.Module):
    """The encoder, or with ``decodes`` the decoder."""

    def __init__(
        self,
        inputs: int,
        outputs: int,
        channels: tuple[int, ...],
        layers: int,
        attention_at: tuple[int, ...],
        *,
        decodes: bool,
    ) -> None:
        super().__init__()
        self.decodes, deep, wide = decodes, channels[-1], channels[0]
        self.conv_in = nn.Conv2d(inputs, deep if decodes else wide, 3, padding=1)
        self.mid = middle(deep)
        levels = []
        for level, width in enumerate(channels):
            attends = level in attention_at
            if decodes:
                before = channels[min(level + 1, len(channels) - 1)]
                levels.append(Level(before, width, layers + 1, attends=attends))
                if level > 0:
                    levels[-1].upsample = Resample(width, 1)
            else:
                before = channels[max(level - 1, 0)]
                levels.append(Level(before, width, layers, attends=attends))
                if level < len(channels) - 1:
                    levels[-1].downsample = Resample(width, 2)
        setattr(self, "up" if decodes else "down", nn.ModuleList(levels))
        last = wide if decodes else deep
        self.norm_out, self.conv_out = norm_vq(last), nn.Conv2d(last, outputs, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)
        if self.decodes:
            x = self.through_the_middle(x)
        for level in reversed(self.up) if self.decodes else self.down:
            for number, block in enumerate(level.block):
                x = block(x)
                if level.attn:
                    x = level.attn[number](x)
            for name in ("upsample", "downsample"):
                x = getattr(level, name, nn.Identity())(x)
        if not self.decodes:
            x = self.through_the_middle(x)
        return self.conv_out(nn.functional.silu(self.norm_out(x)))

    def through_the_middle(self, x: Tensor) -> Tensor:
        return self.mid.block_2(self.mid.attn_1(self.mid.block_1(x)))


class FirstStageVQ(nn.Module):
    def __init__(
        self,
        channels: tuple[int, ...] = (32, 64),
        layers: int = 1,
        attention_at: tuple[int, ...] = (),
    ) -> None:
        super().__init__()
        self.encoder = Coder(3, 3, channels, layers, attention_at, decodes=False)
        self.decoder = Coder(3, 3, channels, layers, attention_at, decodes=True)
        self.quantize = nn.Module()
        self.quantize.embedding = nn.Embedding(64, 3)
        self.quant_conv, self.post_quant_conv = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1)

    def encode(self, x: Tensor) -> Tensor:
        return self.quant_conv(self.encoder(x))

    def decode(self, z: Tensor) -> Tensor:
        codes = self.quantize.embedding.weight
        distances = (z.movedim(1, -1)[..., None, :] - codes).square().sum(dim=-1)
        nearest = codes[distances.argmin(dim=-1)].movedim(-1, 1)
        return self.decoder(self.post_quant_conv(nearest))


class FirstStageKL(nn.Module):
    def __init__(
        self,
        channels: tuple[int, ...] = (32, 64),
        layers: int = 1,
        attention_at: tuple[int, ...] = (),
        latents: int = 3,
    ) -> None:
        super().__init__()
        self.encoder = Coder(3, 2 * latents, channels, layers, attention_at, decodes=False)
        self.decoder = Coder(latents, 3, channels, layers, attention_at, decodes=True)
        self.quant_conv = nn.Conv2d(2 * latents, 2 * latents, 1)
        self.post_quant_conv = nn.Conv2d(latents, latents, 1)

    def encode(self, x: Tensor) -> Tensor:
        """The posterior's mean."""
        return self.quant_conv(self.encoder(x)).chunk(2, dim=1)[0]

    def decode(self, z: Tensor) -> Tensor:
        return self.decoder(self.post_quant_conv(z))


def compvis_checkpoint(
    unet: OpenAIUNet, averaged: OpenAIUNet | None, first_stage: FirstStageVQ, betas: Tensor
) -> dict[str, dict[str, Tensor]]:
    """What CompVis saves of a model, as far as it is tensors."""
    state = {f"model.diffusion_model.{name}": value for name, value in unet.state_dict().items()}
    if averaged is not None:
        for name, value in averaged.state_dict().items():
            state["model_ema." + f"diffusion_model.{name}".replace(".", "")] = value
        state["model_ema.decay"] = torch.tensor(0.9999)
        state["model_ema.num_updates"] = torch.tensor(7, dtype=torch.int)
    state |= {f"first_stage_model.{k}": v for k, v in first_stage.state_dict().items()}
    state |= {"betas": betas, "alphas_cumprod": (1 - betas).cumprod(dim=0)}
    return {"state_dict": state}


def randomise(module: nn.Module, seed: int) -> nn.Module:
    """Move every parameter away from its initial value, and go into eval mode."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return module.eval()
