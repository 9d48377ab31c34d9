"""The notebooks: their cells run in order, the second one on the experts of the first."""

import json
from pathlib import Path

import matplotlib as mpl
import matplotlib.pyplot as plt
import pytest

import tdc_ray as tdc

FOLDER = Path(__file__).parents[2] / "experiments" / "notebooks"
NOTEBOOKS = sorted(path.name for path in FOLDER.iterdir())


def run_cells(name: str, folder: Path) -> dict:
    """Run the code of a notebook in a folder; return its variables."""
    document, variables = json.loads((FOLDER / name).read_text()), {"__name__": "__main__"}
    mpl.use("Agg")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for cell in document["cells"]:
            if cell["cell_type"] == "code":
                code = compile("".join(cell["source"]), f"{name}:{cell['id']}", "exec")
                exec(code, variables)
    return variables


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> tuple[Path, dict]:
    folder = tmp_path_factory.mktemp("notebook")
    return folder, run_cells("make_experts.ipynb", folder)


@pytest.mark.slow
def test_experts_are_made_of_a_base_and_a_folder_of_images(made):
    folder, variables = made
    experts = variables["experts"]
    assert [group.train_steps for group in experts.groups] == [40] * 3
    for group in experts.groups:
        assert group.macs <= group.macs_limit
        assert group.loss_finetuned < group.loss_base  # which was trained for seconds
    assert variables["grid"].size == (8 * 48, 2 * 48)
    assert tdc.load_experts(folder / "experts").groups == experts.groups


@pytest.mark.slow
def test_what_was_pruned_is_looked_at(made, capsys):
    folder, variables = made
    looked = run_cells("look_at_experts.ipynb", folder)
    assert len(plt.get_fignums()) == 3
    plt.close("all")
    assert looked["experts"].groups == variables["experts"].groups
    assert looked["kept"].shape == (3, len(looked["units"]))
    assert looked["kept"].min() < looked["kept"][-1].min() == 1
    printed = capsys.readouterr().out
    assert printed.count("fine-tuned -") == 3


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_a_notebook_is_whole_and_without_outputs(name):
    document = json.loads((FOLDER / name).read_text())
    assert (document["nbformat"], document["nbformat_minor"]) == (4, 5)
    assert len({cell["id"] for cell in document["cells"]}) == len(document["cells"]) > 5
    for cell in document["cells"]:
        keys = {"cell_type", "id", "metadata", "source"}
        if cell["cell_type"] == "code":
            keys |= {"execution_count", "outputs"}
            assert (cell["execution_count"], cell["outputs"]) == (None, [])
        assert cell.keys() == keys
