"""Where a worker computes."""

import torch


def worker_device() -> torch.device:
    """Give the GPU that this process was given, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
