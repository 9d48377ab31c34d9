"""UNets of every supported kind, small."""

import random

from tdc_ray.models.network_config import NetworkConfig
from tests.small import TINY

DOWN, UP = "DownBlock2D", "UpBlock2D"
ATTN_DOWN, ATTN_UP = "AttnDownBlock2D", "AttnUpBlock2D"
RESNET_DOWN, RESNET_UP = "ResnetDownsampleBlock2D", "ResnetUpsampleBlock2D"
THREE_LEVELS = {"block_out_channels": (16, 32, 24), "attention_head_dim": 8}

CONFIGS: dict[str, NetworkConfig] = {
    "scale-shift": TINY,
    "time-added": {**TINY, "resnet_time_scale_shift": "default", "attn_norm_num_groups": None},
    "class-conditional": {**TINY, "num_class_embeds": 10},
    "no-attention": {
        **TINY,
        "down_block_types": (DOWN, DOWN),
        "up_block_types": (UP, UP),
        "add_attention": False,
    },
    "attention-everywhere": {
        **TINY,
        "down_block_types": (ATTN_DOWN, ATTN_DOWN),
        "up_block_types": (ATTN_UP, ATTN_UP),
        "attention_head_dim": 4,
    },
    "one-head": {**TINY, "attention_head_dim": None},
    "four-heads-everywhere": {**TINY, "num_heads": 4},
    "more-timestep-channels": {**TINY, "timestep_channels": 48, "time_embedding_dim": 80},
    "two-groups": {**TINY, "norm_num_groups": 2, "attn_norm_num_groups": 2},
    "a-group-per-channel": {**TINY, "norm_num_groups": 16, "attn_norm_num_groups": 16},
    "other-groups-in-the-middle": {**TINY, "norm_num_groups": 4, "attn_norm_num_groups": 16},
    "no-norm-in-the-middle": {**TINY, "attn_norm_num_groups": None},
    "no-middle": {**TINY, "mid_block_type": None},
    "three-levels-colour-learned-sigma": {
        **TINY,
        **THREE_LEVELS,
        "sample_size": [8, 12],
        "in_channels": 3,
        "out_channels": 6,
        "layers_per_block": 2,
        "down_block_types": (DOWN, ATTN_DOWN, DOWN),
        "up_block_types": (UP, ATTN_UP, UP),
        "downsample_padding": 0,
    },
    "resampled-by-residual-blocks": {
        **TINY,
        "downsample_type": "resnet",
        "upsample_type": "resnet",
        "down_block_types": (ATTN_DOWN, DOWN),
        "up_block_types": (RESNET_UP, ATTN_UP),
    },
    "nothing-but-residual-blocks": {
        **TINY,
        **THREE_LEVELS,
        "down_block_types": (RESNET_DOWN,) * 3,
        "up_block_types": (RESNET_UP,) * 3,
        "add_attention": False,
        "num_class_embeds": 10,
        "resnet_time_scale_shift": "default",
    },
    "one-resolution": {
        **TINY,
        "block_out_channels": (32,),
        "down_block_types": (DOWN,),
        "up_block_types": (ATTN_UP,),
    },
}


def random_config(seed: int) -> NetworkConfig:
    """Block kinds, groups, heads, norms, middle and classes drawn at random."""
    draw = random.Random(seed)
    levels, groups = draw.randint(1, 3), draw.choice((1, 2, 4, 8))
    return {
        **TINY,
        "block_out_channels": tuple(draw.choice((8, 16, 24)) for _ in range(levels)),
        "layers_per_block": draw.randint(1, 2),
        "down_block_types": draw.choices((DOWN, ATTN_DOWN, RESNET_DOWN), k=levels),
        "up_block_types": draw.choices((UP, ATTN_UP, RESNET_UP), k=levels),
        "downsample_type": draw.choice(("conv", "resnet")),
        "upsample_type": draw.choice(("conv", "resnet")),
        "downsample_padding": draw.randint(0, 1),
        "attention_head_dim": draw.choice((None, 4, 8)),
        "norm_num_groups": groups,
        "attn_norm_num_groups": draw.choice((None, groups, 2, 8)),
        "resnet_time_scale_shift": draw.choice(("default", "scale_shift")),
        "mid_block_type": draw.choice((None, "UNetMidBlock2D", "UNetMidBlock2D")),
        "add_attention": draw.random() < 0.8,
        "num_class_embeds": draw.choice((None, 10)),
    }
