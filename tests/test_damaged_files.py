"""Damaged files from outside are read, or refused by an error of ours, in bounded time and memory.

`pytest -n 0 -o addopts="" -o timeout=0 tests/test_damaged_files.py --hypothesis-profile fuzz`
tries 10,000 of each kind (`FUZZ_EXAMPLES` says otherwise), and with `FUZZ_RECORD=FILE` writes what
they took: about 10 ms of CPU each, some 200 ms of checkpoints.
"""

import dataclasses
import functools
import io
import json
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import ExifTags, Image
from pyarrow import parquet

from tdc_ray.config.data import DataConfig
from tdc_ray.config.train import TrainConfig
from tdc_ray.data.detect import data_config
from tdc_ray.data.load import load_dataset
from tdc_ray.data.sources.image_file import read_header, read_pixels
from tdc_ray.diffusion.train import TrainState, start_state
from tdc_ray.execution.timeline import Timeline, load_history, usage, worker_rows
from tdc_ray.models.checkpoints.state_dicts import load_state_dict
from tdc_ray.models.saved_expert import WEIGHTS_FILE, load_expert
from tdc_ray.pruning.llm.answer import TokenUsage, ToolCall
from tdc_ray.pruning.llm.transcripts import (
    VERSION,
    LLMExchange,
    append_exchange,
    find_transcripts,
    recorded_answers,
    total_usage,
    transcript_path,
    transcript_text,
)
from tdc_ray.pruning.memory import MemoryBank, MemoryEntry
from tdc_ray.runs.sweep.study import STUDY_FILE, reconcile
from tests.fuzzing import MAX_GROWTH, Counts, check_reading, recorded
from tests.images import random_pixels
from tests.runs.sweep.test_study import DISTRIBUTIONS, study_in, sweep_of
from tests.small import TINY, random_unet
from tests.test_malformed_files import make_expert, malformed

MAX_GROWTH_OF_IMAGES = 3 * 2**30
"""Headers may ask for the pixels that Pillow allows, 179 million: four bytes each, and copies."""


# --- damage ----------------------------------------------------------------------------------


@st.composite
def damaged(draw: st.DrawFn, content: bytes) -> bytes:
    """Damage bytes in some places: as disks and networks do, and in lengths and counts."""
    data = bytearray(content)
    for _ in range(draw(st.integers(1, 3))):
        size = len(data)
        ends = st.integers(0, 200) | st.integers(1, 200).map(lambda back, size=size: size - back)
        place = draw(ends | st.integers(0, size)) % (size + 1)
        length = draw(st.integers(1, 16) | st.integers(1, max(1, size)))
        match draw(st.integers(0, 7)):
            case 0 if place < size:
                data[place] ^= 1 << draw(st.integers(0, 7))
            case 1 if place < size:
                data[place] = draw(st.integers(0, 255))
            case 2:
                del data[place:]
            case 3:
                del data[place : place + length]
            case 4:  # splice: another part of the file in place of this one
                other = draw(st.integers(0, size))
                data[place : place + length] = data[other : other + length]
            case 5:
                data[place:place] = data[place : place + length]
            case 6:
                number = draw(st.sampled_from((0, 1, 2**31 - 1, 2**32 - 1, 2**63 - 1, 2**64 - 1)))
                width = draw(st.sampled_from((2, 4, 8)))
                order = draw(st.sampled_from(("little", "big")))
                data[place : place + width] = (number % 256**width).to_bytes(width, order)
            case 7:
                data[place:place] = draw(st.binary(max_size=8))
    return bytes(data)


@st.composite
def damaged_inside(draw: st.DrawFn, name: str, content: bytes) -> bytes:
    """Damage what checksums, lengths or other lines protect, and make these right again."""
    match Path(name).suffix:
        case ".npz" | ".pt":
            with zipfile.ZipFile(io.BytesIO(content)) as archive:
                members = {info.filename: archive.read(info) for info in archive.infolist()}
            chosen = draw(st.sampled_from(sorted(members)))
            members[chosen] = draw(damaged(members[chosen]))
            with zipfile.ZipFile(buffer := io.BytesIO(), "w") as archive:
                for member, part in members.items():
                    archive.writestr(member, part)
            return buffer.getvalue()
        case ".png":
            chunks, place = [], 8
            while place < len(content):
                (size,) = struct.unpack_from(">I", content, place)
                chunks.append(content[place + 4 : place + 8 + size])
                place += size + 12
            chosen = draw(st.integers(0, len(chunks) - 1))
            chunks[chosen] = draw(damaged(chunks[chosen]))
            return content[:8] + b"".join(
                struct.pack(">I", max(0, len(one) - 4)) + one + struct.pack(">I", zlib.crc32(one))
                for one in chunks
            )
        case ".tar":
            places = [
                place
                for place in range(0, len(content), 512)
                if content[place + 257 :][:5] == b"ustar"
            ]
            place = draw(st.sampled_from(places))
            header = bytearray((draw(damaged(content[place : place + 512])) + bytes(512))[:512])
            header[148:156] = b" " * 8
            header[148:156] = b"%06o\0 " % sum(header)
            return content[:place] + bytes(header) + content[place + 512 :]
        case ".safetensors":
            (size,) = struct.unpack_from("<Q", content)
            header = draw(malformed(json.loads(content[8 : 8 + size]))).encode()
            return struct.pack("<Q", len(header)) + header + content[8 + size :]
        case ".jsonl" | ".log":
            lines = content.splitlines()
            chosen = draw(st.integers(0, len(lines) - 1))
            lines[chosen] = draw(malformed(json.loads(lines[chosen]))).encode()
            return b"\n".join(lines) + b"\n"
    return draw(damaged(content))


# --- kinds of files --------------------------------------------------------------------------


@dataclass(frozen=True)
class Kind:
    """Valid files of a kind, and what reads each of them."""

    make: Callable[[Path], list[Path]]
    """Makes them below a folder."""

    read: Callable[[Path], object]
    max_growth: int = MAX_GROWTH


def load_images(path: Path) -> None:
    """Read all images of a data set that is one file."""
    config = dataclasses.replace(DataConfig(), cache_dir=str(path.parent / "cache"))
    dataset = load_dataset(data_config(str(path), config))
    dataset.__getitems__(range(len(dataset)))


def make_images(folder: Path) -> list[Path]:
    colour, grey = Image.fromarray(random_pixels(6, 8, 3)), Image.fromarray(random_pixels(6, 8))
    deep = Image.fromarray(np.arange(48, dtype=np.uint16).reshape(6, 8))
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    alpha = colour.convert("RGBA")
    alpha.putalpha(grey)
    colour.save(folder / "colour.png", exif=exif)
    alpha.save(folder / "alpha.png", pnginfo=None)
    colour.quantize(4).save(folder / "palette.png", transparency=1)
    deep.save(folder / "deep.png")
    colour.save(folder / "colour.jpg", exif=exif)
    colour.save(folder / "progressive.jpg", progressive=True)
    colour.save(folder / "moving.gif", save_all=True, append_images=[alpha], transparency=0)
    alpha.save(folder / "moving.png", save_all=True, append_images=[alpha])
    colour.save(folder / "lossy.webp", exif=exif)
    alpha.save(folder / "lossless.webp", lossless=True)
    deep.save(folder / "deep.tiff")
    colour.save(folder / "lzw.tiff", compression="tiff_lzw", exif=exif)
    colour.save(folder / "plain.bmp")
    colour.save(folder / "icon.ico")
    colour.save(folder / "plain.ppm")
    colour.save(folder / "truevision.tga", compression="tga_rle")
    return sorted(folder.iterdir())


def read_image(path: Path) -> None:
    read_header(path)
    read_pixels(path, 3)


def make_npz(folder: Path) -> list[Path]:
    images = random_pixels(12, 8, 8, 3)
    np.savez(folder / "stored.npz", images=images, labels=np.arange(12) % 3)
    np.savez_compressed(folder / "packed.npz", arr_0=images, arr_1=np.arange(12.0))
    np.savez(folder / "rows.npz", data=random_pixels(12, 3 * 64), labels=1 + np.arange(12))
    return sorted(folder.iterdir())


def encoded() -> list[bytes]:
    images = []
    for seed in range(3):
        Image.fromarray(random_pixels(8, 8, 3, seed=seed)).save(buffer := io.BytesIO(), "png")
        images.append(buffer.getvalue())
    return images


def make_tar(folder: Path) -> list[Path]:
    for name, form in (("ustar", tarfile.USTAR_FORMAT), ("pax", tarfile.PAX_FORMAT)):
        with tarfile.open(folder / f"{name}.tar", "w", format=form) as tar:
            for number, image in enumerate(encoded()):
                label = b"1" if name == "ustar" else b'{"label": 1}'
                suffix = "cls" if name == "ustar" else "json"
                stem = f"{number}" if name == "ustar" else f"\u00e9{number:0100d}"
                for member, content in ((f"{stem}.png", image), (f"{stem}.{suffix}", label)):
                    info = tarfile.TarInfo(member)
                    info.size = len(content)
                    tar.addfile(info, io.BytesIO(content))
    return sorted(folder.iterdir())


def make_parquet(folder: Path) -> list[Path]:
    images = encoded()
    structs = [{"bytes": image, "path": f"{n}.png"} for n, image in enumerate(images)]
    features = {"image": {"_type": "Image"}, "label": {"_type": "ClassLabel", "names": ["a", "b"]}}
    of_hub = pa.table({"image": structs, "label": [0, 1, 1]}).replace_schema_metadata(
        {"huggingface": json.dumps({"info": {"features": features}})}
    )
    parquet.write_table(of_hub, folder / "hub.parquet")
    plain = pa.table({"img": images, "label": ["a", "b", "b"]})
    parquet.write_table(plain, folder / "plain.parquet", compression="none", use_dictionary=False)
    return sorted(folder.iterdir())


def make_metadata(folder: Path) -> list[Path]:
    paths = []
    for name, text in (
        (
            "metadata.jsonl",
            "".join(f'{{"file_name": "{n}.png", "label": {n}}}\n' for n in range(3)),
        ),
        ("metadata.csv", "file_name,label\n0.png,a\n1.png,b\n2.png,b\n"),
    ):
        below = folder / Path(name).suffix[1:]
        below.mkdir()
        for number, image in enumerate(encoded()):
            (below / f"{number}.png").write_bytes(image)
        (below / name).write_text(text)
        paths.append(below / name)
    return paths


def make_weights(folder: Path) -> list[Path]:
    make_expert(folder / "expert")
    return [folder / "expert" / WEIGHTS_FILE]


@functools.cache
def train_state() -> TrainState:
    config = {**TINY, "block_out_channels": (8, 8), "layers_per_block": 1}
    return start_state(random_unet(config), TrainConfig(), keep_start=True)


def make_checkpoint(folder: Path) -> list[Path]:
    state = train_state()
    for parameter in state.unet.parameters():
        parameter.grad = torch.zeros_like(parameter)
    state.optimizer.step()
    state.save(folder / "state.pt")
    return [folder / "state.pt"]


def make_released(folder: Path) -> list[Path]:
    weights = {f"layer.{number}.weight": torch.randn(4, 3) for number in range(4)}
    torch.save(
        {"state_dict": weights, "step": np.float64(3), "path": Path("a")}, folder / "new.pt"
    )
    torch.save(weights, folder / "old.pth", _use_new_zipfile_serialization=False)
    return sorted(folder.iterdir())


def make_memory(folder: Path) -> list[Path]:
    bank = MemoryBank(folder / "memory.jsonl")
    for candidate in range(3):
        widths = {"mid": 4, "down.0": 8 - candidate}
        sizes = {"macs": 1000, "num_params": 100}
        losses = {"loss_cut": 0.5, "loss_refit": 0.4, "distance": 0.1, "standard_error": 0.01}
        bank.add(
            MemoryEntry(
                group=0,
                round=1,
                candidate=candidate,
                source="llm",
                widths=widths,
                **sizes,
                **losses,
            )
        )
    return [bank.path]


def make_timeline(folder: Path) -> list[Path]:
    timeline = Timeline(folder / "timeline.jsonl")
    timeline.add("phase", name="experts")
    for task in range(3):
        timeline.add("join", worker=f"worker-{task}", node="n")
        timeline.add(
            "start",
            task=task,
            chain="a",
            stage=task,
            item=f"a/{task}",
            workers=[f"worker-{task}"],
            attempt=1,
            macs=1e6,
        )
        timeline.flush()
        timeline.add("end", task=task, outcome="done")
        timeline.add("leave", worker=f"worker-{task}")
    timeline.add("failed", chain="a", reason="a loss is nan")
    timeline.flush()
    return [folder / "timeline.jsonl"]


def read_timeline(path: Path) -> None:
    history = load_history(path)
    usage(history)
    worker_rows(history)


def make_transcript(folder: Path) -> list[Path]:
    path = transcript_path(folder / "proxy", 0, 1)
    messages = [{"role": "system", "content": "prune"}, {"role": "user", "content": None}]
    for number in range(3):
        append_exchange(
            path,
            LLMExchange(
                request={"model": "m", "messages": messages},
                reply="I cut the middle.",
                error=None if number else "no JSON",
                usage=TokenUsage(calls=1, prompt_tokens=100, completion_tokens=10),
                seconds=1.5,
                calls=(ToolCall(id="1", name="propose", arguments='{"mid": 4}'),),
                number=number,
                version=VERSION,
            ),
        )
    return [path]


def read_transcript(path: Path) -> None:
    find_transcripts(path.parents[1])
    recorded_answers(path, 0)
    total_usage(path.parent)
    transcript_text(path)


def make_study(folder: Path) -> list[Path]:
    study = study_in(folder)
    study.tell(study.ask(DISTRIBUTIONS), [2.0])
    study.ask(DISTRIBUTIONS)
    study.enqueue_trial({"plan.min_macs_share": 0.4})
    return [folder / STUDY_FILE]


def read_study(path: Path) -> None:
    for aside in path.parent.glob("*.torn-*"):
        aside.unlink()
    reconcile(study_in(path.parent), sweep_of(path.parent, done=[0.5]), DISTRIBUTIONS)


KINDS = {
    "images": Kind(make_images, read_image, MAX_GROWTH_OF_IMAGES),
    "npz": Kind(make_npz, load_images),
    "tar": Kind(make_tar, load_images),
    "parquet": Kind(make_parquet, load_images),
    "metadata": Kind(make_metadata, lambda path: load_images(path.parent)),
    "weights": Kind(make_weights, lambda path: load_expert(path.parent)),
    "checkpoint": Kind(make_checkpoint, lambda path: train_state().load(path)),
    "released": Kind(make_released, load_state_dict),
    "memory": Kind(make_memory, MemoryBank),
    "timeline": Kind(make_timeline, read_timeline),
    "transcript": Kind(make_transcript, read_transcript),
    "study": Kind(make_study, read_study),
}


# --- the test --------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=KINDS)
def kind(request, tmp_path_factory) -> Iterator[tuple[Kind, dict[Path, bytes], Counts]]:
    kind = KINDS[request.param]
    paths = kind.make(tmp_path_factory.mktemp("outside"))
    for path in paths:  # what is valid is read, and what libraries load once is there
        kind.read(path)
    contents = {path: path.read_bytes() for path in paths}
    with recorded(request.param, contents) as counts:
        yield kind, contents, counts


@pytest.mark.filterwarnings("ignore")  # of libraries, about such values
@settings(max_examples=settings.default.max_examples // 5)
@given(data=st.data())
def test_damaged_files_are_read_or_refused_by_an_error_of_ours(kind, data):
    kind, contents, counts = kind
    path = data.draw(st.sampled_from(sorted(contents)))
    damage = data.draw(
        st.sampled_from((damaged(contents[path]), damaged_inside(path.name, contents[path])))
    )
    content = data.draw(damage)
    path.unlink()  # another file: the one that is read before may still be mapped
    path.write_bytes(content)
    try:
        check_reading(kind.read, path, counts, kind.max_growth)
    finally:
        path.unlink()
        path.write_bytes(contents[path])
