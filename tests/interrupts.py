"""Runs, sweeps and prunings that are interrupted at random moments: Ctrl-C, SIGTERM, both twice.

    python -m tests.interrupts --tries 200 --out interrupts.json

Each must say in one line how to go on, leave no process behind, and exit with 130 or 143; one
that was all but over may end as if nothing had been.
"""

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tdc_ray.storage.files import write_json

MARK = "TDC_RAY_TRY"
"""Environment variable by which all processes of a try are found."""

SECONDS_TO_END = 60.0
SECONDS_TO_VANISH = 10.0

SECONDS_OF_END = 10.0
"""Longest time that a process takes to end whose work is done, on a busy machine."""

SMOKE = ("--preset", "digits-smoke", "--compute.num-actors", "1")


def commands(folder: Path, cache_dir: Path) -> dict[str, list[str]]:
    """Return what is interrupted, by its name."""
    cache = ["--evaluate.cache-dir", str(cache_dir)]
    return {
        "run": ["run", *SMOKE, *cache, "--run-dir", str(folder / "run")],
        "sweep": ["sweep", *SMOKE, *cache, "--vary", "k=0.4,0.6", "--storage", str(folder)],
    }


def processes_of(mark: str) -> list[int]:
    """Return the processes with a mark in their environment."""
    found = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        try:
            if f"{MARK}={mark}".encode() in path.read_bytes():
                found.append(int(path.parent.name))
        except OSError:
            continue
    return found


def one_try(
    arguments: Sequence[str], after_s: float, number: signal.Signals, *, twice: bool
) -> dict[str, Any]:
    """Start a command, interrupt it after a while, and return what became of it."""
    mark = uuid.uuid4().hex
    moment = {"command": arguments[0], "after_s": round(after_s, 3), "load": os.getloadavg()[0]}
    process = subprocess.Popen(
        [sys.executable, "-m", "tdc_ray", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {MARK: mark},
        start_new_session=True,
        # A shell starts its background jobs deaf to it, and what they start inherits that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    try:
        process.wait(after_s)
    except subprocess.TimeoutExpired:
        process.send_signal(number)
        sent = time.monotonic()
        if twice:
            time.sleep(0.3)
            process.send_signal(number)
    else:
        process.communicate()
        return {**moment, "finished": process.returncode == 0, "code": process.returncode}
    try:
        _, errors = process.communicate(timeout=SECONDS_TO_END)
    except subprocess.TimeoutExpired:
        process.kill()
        _, errors = process.communicate()
    seconds = time.monotonic() - sent
    deadline = time.monotonic() + SECONDS_TO_VANISH
    while (left := processes_of(mark)) and time.monotonic() < deadline:
        time.sleep(0.1)
    for pid in left:
        os.kill(pid, signal.SIGKILL)
    lines = [
        line for line in errors.splitlines() if line.startswith(("interrupted", "terminated"))
    ]
    return {
        **moment,
        "signal": number.name,
        "twice": twice,
        "code": process.returncode,
        "seconds": round(seconds, 2),
        "left": len(left),
        "said": lines,
        "traceback": "Traceback" in errors,
        "errors": errors[-2000:],
    }


def is_right(outcome: dict[str, Any]) -> bool:
    """Whether a try ended as it must."""
    if "finished" in outcome:
        return bool(outcome["finished"])
    number = signal.Signals[outcome["signal"]]
    if outcome["code"] == -number and not outcome["said"]:
        return outcome["after_s"] < 1.0  # Python itself was starting
    if outcome["code"] == 0 and not outcome["said"]:
        return outcome["seconds"] < SECONDS_OF_END and not outcome["left"]
    said = [line for line in outcome["said"] if "run the same command again" in line]
    right = outcome["code"] == 128 + number and not outcome["left"]
    return right and len(said) == len(outcome["said"]) == 1 and not outcome["traceback"]


def main() -> None:
    """Interrupt many times, after those of an earlier call, and write the outcomes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tries", type=int, default=200)
    parser.add_argument("--longest", type=float, default=60.0, help="seconds of a whole run")
    parser.add_argument("--folder", type=Path, default=Path("/tmp/tdc_ray-interrupts"))
    parser.add_argument("--out", type=Path, default=Path("interrupts.json"))
    flags = parser.parse_args()
    outcomes = json.loads(flags.out.read_text()) if flags.out.exists() else []
    for seed in range(len(outcomes), flags.tries):
        draw = random.Random(seed)
        named = commands(flags.folder / str(seed // 20), flags.folder / "cache")
        arguments = named[draw.choice(sorted(named))]
        after_s = draw.uniform(0.0, draw.choice([10.0, flags.longest]))
        number = draw.choice([signal.SIGINT, signal.SIGTERM])
        outcomes.append(one_try(arguments, after_s, number, twice=draw.random() < 0.2))
        sys.stdout.write(f"{outcomes[-1]}\n")
        write_json(flags.out, outcomes)
    bad = [one for one in outcomes if not is_right(one)]
    raise SystemExit(f"{len(bad)} of {len(outcomes)} went wrong: {bad}" if bad else 0)


if __name__ == "__main__":
    main()
