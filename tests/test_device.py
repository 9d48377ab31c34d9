"""What a process's memory does, in processes of their own."""

import subprocess
import sys

import pytest

SCRIPT = """
import sys
import torch
from pathlib import Path
from tdc_ray.device import keep_freed_memory

def resident() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) // 1024 for line in lines if line.startswith("VmRSS"))

if sys.argv[1] == "keep":
    keep_freed_memory()
before = resident()
parts = [torch.ones(100 * 2**18) for _ in range(8)]  # 100 MiB each
del parts
print(resident() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's malloc")
def test_a_process_keeps_the_memory_of_tensors_that_it_freed():
    left = {}
    for word in ("keep", "leave"):
        command = [sys.executable, "-c", SCRIPT, word]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        left[word] = int(done.stdout)
    assert left["leave"] < 400
    assert left["keep"] > 700
