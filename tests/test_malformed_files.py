"""Documents from outside that are malformed in any way end in one of our errors, and in no other.

`pytest tests/test_malformed_files.py --hypothesis-profile fuzz` tries 10,000 of each kind; other
files are in `test_damaged_files.py`.
"""

import json
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
from diffusers import DDPMPipeline, DDPMScheduler
from hypothesis import given, settings
from hypothesis import strategies as st

from tdc_ray.config.presets import preset
from tdc_ray.config.run import from_json, to_json
from tdc_ray.diffusion.pipeline_index import INDEX_FILE, PipelineIndex
from tdc_ray.models.config_file import read_network
from tdc_ray.models.saved_expert import CONFIG_FILE, load_expert, save_expert
from tdc_ray.models.unet2d.surgery import cut
from tdc_ray.models.unet2d.units import units_of
from tdc_ray.runs.pretrained.sources import resolve_base
from tdc_ray.storage.files import read_json
from tests.fuzzing import check_reading, recorded
from tests.small import TINY, random_kept, random_unet, small_config

ODD: tuple[Any, ...] = (
    None, True, 0, -1, 1.5, 1e308, float("nan"), float("inf"), "", "x", "../..", "\0",
    [], {}, [[]], [None], {"a": 1}, [64, 64], {"_class_name": []},
)  # fmt: skip

SMALL = st.integers(-100, 100)
"""A config may ask for a network as large as it likes, and building that takes as long."""


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Return the path of every value inside a document, the document's own first."""
    found = [path]
    items = (
        value.items()
        if isinstance(value, dict)
        else enumerate(value if isinstance(value, list) else ())
    )
    for key, inner in items:
        found += places(inner, (*path, key))
    return found


@st.composite
def malformed(draw: st.DrawFn, document: Any) -> str:
    """Replace, delete or nest some values of a document."""
    changed = deepcopy(document)
    for _ in range(draw(st.integers(1, 3))):
        path = draw(st.sampled_from(places(changed)))
        odd = deepcopy(draw(st.sampled_from(ODD) | st.text(max_size=3) | SMALL))
        if not path:
            changed = odd if draw(st.integers(0, 9)) == 0 else changed
            continue
        parent = changed
        for key in path[:-1]:
            parent = parent[key]
        if draw(st.integers(0, 4)) == 0:
            del parent[path[-1]]
        else:
            parent[path[-1]] = odd
    if draw(st.integers(0, 19)) == 0:
        return "[" * 200_000
    return json.dumps(changed)


def make_expert(folder: Path) -> None:
    kept = random_kept(units_of(TINY), seed=0)
    save_expert(folder, cut(random_unet(), units_of(TINY), kept), TINY, kept)


def make_pipeline(folder: Path) -> None:
    DDPMPipeline(unet=random_unet(), scheduler=DDPMScheduler(500)).save_pretrained(folder)


def make_index(folder: Path) -> None:
    config = small_config()
    index = PipelineIndex.of(config.data, config.diffusion, config.sampler, config.conditioning)
    index.save(folder)


def make_settings(folder: Path) -> None:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(to_json(preset("digits"))))


READERS: dict[str, tuple[Callable[[Path], None], str, Callable[[Path], object]]] = {
    "expert": (make_expert, CONFIG_FILE, load_expert),
    "pipeline's index": (make_pipeline, "model_index.json", lambda path: resolve_base(str(path))),
    "scheduler": (
        make_pipeline,
        "scheduler/scheduler_config.json",
        lambda path: resolve_base(str(path)),
    ),
    "unet": (make_pipeline, "unet/config.json", lambda path: resolve_base(str(path))),
    "network": (make_pipeline, "unet/config.json", lambda path: read_network(str(path / "unet"))),
    "experts' index": (make_index, INDEX_FILE, PipelineIndex.load),
    "settings": (
        make_settings,
        "config.json",
        lambda path: from_json(read_json(path / "config.json")),
    ),
}


@pytest.fixture(scope="module", params=READERS)
def reader(request, tmp_path_factory):
    make, name, read = READERS[request.param]
    folder = tmp_path_factory.mktemp("outside") / "files"
    make(folder)
    path = folder / name
    content = path.read_bytes()
    read(folder)  # what is valid is read, and what libraries load once is there
    with recorded(request.param, {path: content}) as counts:
        yield folder, path, json.loads(content), read, counts


@pytest.mark.filterwarnings("ignore")  # of libraries, about such values
@settings(max_examples=settings.default.max_examples // 5)
@given(data=st.data())
def test_documents_are_read_or_refused_by_an_error_of_ours(reader, data):
    folder, path, document, read, counts = reader
    path.write_text(data.draw(malformed(document)))
    check_reading(read, folder, counts)
