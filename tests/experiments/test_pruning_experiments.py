import csv
import importlib
import itertools
import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from tdc_ray.config.presets import preset
from tdc_ray.config.proxy import ProxyConfig
from tdc_ray.errors import ConfigError, StorageError
from tdc_ray.execution.chain import run_chain
from tdc_ray.models.fingerprint import weights_digest
from tdc_ray.models.units import KeptIndices
from tdc_ray.pruning.memory import MemoryBank
from tdc_ray.pruning.proxies.language_model import language_model_proxy
from tdc_ray.pruning.proxies.offline import offline_proxy
from tdc_ray.pruning.result import SearchResult
from tdc_ray.pruning.search import search_submodel
from tdc_ray.runs.results import LossDifference, load_results
from tdc_ray.storage.run_dir import RunDir
from tests.pruning.llm.openai_server import USAGE, Handler, Server, calling, serving
from tests.small import (
    latent_config,
    make_first_stage,
    make_run_dir,
    small_config,
    task_of,
    training_of,
)


def rows_of(folder: Path, name: str) -> list[dict[str, str]]:
    with (folder / f"{name}.csv").open() as file:
        return list(csv.DictReader(file))


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.timeout(600)
def test_stability_has_five_rounds_of_three_and_a_plot(storage, monkeypatch):
    import proxy_stability
    from common import ProxyFlags, parse_flags

    monkeypatch.setattr(
        sys,
        "argv",
        ["proxy_stability.py", "--smoke", "--num-actors", "1", "--storage", str(storage)],
    )
    proxy_stability.main(parse_flags(proxy_stability.__doc__, ProxyFlags))
    folder = storage / "proxy_stability-digits-smoke-offline"
    assert [row["round"] for row in rows_of(folder, "proxy_stability")] == list("12345")
    record = json.loads((folder / "proxy_stability.json").read_text())
    for by_round in record["excess_loss"].values():
        assert [len(losses) for losses in by_round.values()] == [3] * 5
    assert (folder / "proxy_stability.png").stat().st_size > 1000


def doubts(handler: Handler) -> None:
    """Has the scheme measured that follows from doubts of another unit each time."""
    number = len(handler.server.requests)
    doubt = {"where": number % 12, "factor": 5 if number % 2 else 0.2}
    calling(("measure", {"hypothesis": "h", "distrust": [doubt]}))(handler)


def run_with_model(name: str, server: Server, storage: Path, monkeypatch) -> Path:
    """Run an experiment in little with a scripted language model; return its folder."""
    experiment, common = importlib.import_module(name), importlib.import_module("common")
    command = [f"{name}.py", "--smoke", "--num-actors", "1", "--storage", str(storage)]
    command += ["--proxy", "llm", "--llm.base-url", server.url]
    command += ["--llm.price-per-million-prompt-tokens", "5"]
    monkeypatch.setattr(sys, "argv", command)
    folder = storage / f"{name}-digits-smoke-llm"
    shutil.rmtree(folder, ignore_errors=True)  # of a rerun, whose server had another port
    experiment.main(common.parse_flags(experiment.__doc__, common.ProxyFlags))
    return folder


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.timeout(900)
def test_stability_tells_what_a_language_model_took_and_gained(storage, monkeypatch):
    with serving(doubts) as server:
        folder = run_with_model("proxy_stability", server, storage, monkeypatch)
        asked = len(server.requests)
    cost = json.loads((folder / "proxy_stability.json").read_text())["proxy"]
    assert cost["prompt_tokens"] == asked * USAGE["prompt_tokens"] > 0
    assert cost["completion_tokens"] == asked * USAGE["completion_tokens"]
    assert cost["price"] == pytest.approx(5e-6 * cost["prompt_tokens"])
    assert cost["schemes"]["llm"] > 0
    assert cost["schemes"]["offline"] == 15
    assert cost["measured"] == [15 + cost["schemes"]["llm"]]
    assert cost["measured_offline"] == [30]
    assert cost["finalists"] == cost["finalists_offline"] == [4]
    (loss,), (alone,) = cost["excess_loss"], cost["excess_loss_offline"]
    assert cost["difference"] == pytest.approx(loss - alone)
    note = (folder / "proxy_stability.md").read_text()
    assert f"{cost['prompt_tokens']:,} tokens of prompts" in note
    assert f"Excess loss {cost['difference']:+.3g} against the offline proxy's" in note


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.timeout(900)
def test_time_cost_tells_what_a_language_model_took_and_gained(storage, monkeypatch):
    with serving(doubts) as server:
        folder = run_with_model("time_cost", server, storage, monkeypatch)
        asked = len(server.requests)
    record = json.loads((folder / "time_cost.json").read_text())
    (prune,) = record["prune"]
    assert prune["prompt_tokens"] == asked * USAGE["prompt_tokens"] > 0
    assert prune["completion_tokens"] == asked * USAGE["completion_tokens"]
    assert prune["proxy_cost"] == pytest.approx(5e-6 * prune["prompt_tokens"])
    assert prune["schemes"]["llm"] > 0
    banks = [MemoryBank(RunDir(folder / f"seed-0{end}").memory) for end in ("", "-offline")]
    measured, alone = (bank.all() for bank in banks)
    assert len(measured) == sum(prune["schemes"].values())
    assert len(alone) == 2 * prune["schemes"]["offline"]
    groups = load_results(folder / "seed-0" / "results.json").groups
    gains = []
    for group in groups:
        finals = [e.final for e in alone if e.group == group.index and e.final is not None]
        assert len(finals) == (0 if group.loss_refit is None else 4)  # none where all is kept
        if finals:
            lowest = min(finals, key=lambda final: final.rank)
            gains.append(group.loss_refit - lowest.loss_refit)
    gain = record["difference_from_offline"]
    assert gains
    assert gain == pytest.approx(sum(gains) / len(groups))
    note = (folder / "time_cost.md").read_text()
    assert f"{prune['prompt_tokens']:,} tokens of prompts" in note
    assert f"at equal measurements: {gain:+.3g}" in note


@pytest.mark.usefixtures("importable")
def test_a_language_model_is_asked_as_its_flags_say():
    from common import ProxyFlags
    from tdc_pruners import PrunerFlags

    llm = ProxyConfig(model="qwen3", timeout_s=900.0)
    for flags in (ProxyFlags(proxy="llm", llm=llm), PrunerFlags(proxy="llm", llm=llm)):
        config = flags.config(0)
        assert (config.prune.method, config.proxy) == ("llm", llm)
    assert (flags.num_actors, flags.steps_share) == (1, 0.25)  # those of a sweep


@pytest.mark.slow
@pytest.mark.usefixtures("importable")
def test_scripted_nonsense_is_measured_and_never_ends_behind_the_offline_proxy(tmp_path):
    from partner_bound import nonsensically, scripted

    proxies = {"offline": offline_proxy, "llm": scripted(nonsensically, 0)}
    run_dir, results = make_run_dir(tmp_path), dict[str, SearchResult]()
    for method in proxies:
        few = {"num_images": 32, "num_refit_images": 32, "num_rounds": 2, "num_candidates": 2}
        config = small_config(plan={"min_macs_share": 0.3}, prune={"method": method, **few})
        memory = MemoryBank(tmp_path / f"{method}.jsonl")
        results[method] = run_chain(search_submodel(task_of(run_dir, config), memory, proxies))
    nonsense, offline = results["llm"], results["offline"]
    measured = [one for one in nonsense.candidates if one.entry.is_by_llm]
    assert 0 < len(measured) <= len(offline.candidates)
    others = tuple(one for one in nonsense.candidates if not one.entry.is_by_llm)
    assert others == offline.candidates
    assert nonsense.entry.final.rank <= offline.entry.final.rank


@pytest.mark.usefixtures("importable")
def test_an_oracle_reaches_the_best_scheme_and_spends_all_of_its_measurements(tmp_path):
    from partner_bound import all_knowing

    few = {"num_images": 16, "num_refit_images": 16, "num_rounds": 2, "num_candidates": 3}
    config = small_config(plan={"min_macs_share": 0.3}, prune={"method": "llm", **few})
    search = task_of(make_run_dir(tmp_path), config)
    first, second = search.space.units[:2]

    def known(kept: KeptIndices) -> float:  # least for both at their full widths
        return -len(kept[first.name]) * len(kept[second.name])

    proxies = {"offline": offline_proxy, "llm": all_knowing(known, 1000)}
    found = run_chain(search_submodel(search, MemoryBank(tmp_path / "memory.jsonl"), proxies))
    measured = [one for one in found.candidates if one.entry.is_by_llm]
    assert len(measured) == 6
    assert min(known(one.kept) for one in measured) == -first.width * second.width
    assert all(note.endswith("no change of the best is better") for note in found.cost.notes)


@pytest.mark.usefixtures("importable")
def test_an_oracle_that_may_know_little_is_cut_off(tmp_path):
    from partner_bound import all_knowing

    few = {"num_images": 16, "num_refit_images": 16, "num_rounds": 1, "num_candidates": 2}
    config = small_config(plan={"min_macs_share": 0.3}, prune={"method": "llm", **few})
    search, asked = task_of(make_run_dir(tmp_path), config), list[KeptIndices]()

    def known(kept: KeptIndices) -> float:
        asked.append(kept)
        return 1 / len(asked)

    proxies = {"offline": offline_proxy, "llm": all_knowing(known, 5)}
    found = run_chain(search_submodel(search, MemoryBank(tmp_path / "memory.jsonl"), proxies))
    assert found.cost.notes == ["round 0: 7 schemes are known, cut off"]
    assert len(asked) == 2 + 5


@pytest.mark.usefixtures("importable")
def test_twice_the_offline_measurements_have_as_many_finalists_as_a_partner(tmp_path):
    from partner_bound import randomly, scripted
    from proxy_cost import offline_again

    few = {"num_images": 16, "num_refit_images": 16, "num_rounds": 1, "num_candidates": 3}
    config = small_config(plan={"min_macs_share": 0.3}, prune={"method": "llm", **few})
    search, finalists = task_of(make_run_dir(tmp_path), config), []
    for name, partner in (("twice", offline_again), ("random", scripted(randomly, 0))):
        proxies = {"offline": offline_proxy, "llm": partner}
        memory = MemoryBank(tmp_path / f"{name}.jsonl")
        found = run_chain(search_submodel(search, memory, proxies))
        assert len(found.candidates) == 6
        finalists.append(sum(one.entry.final is not None for one in found.candidates))
    assert finalists == [4, 4]


@pytest.mark.usefixtures("importable")
def test_tokens_money_and_gain_of_a_language_model_are_told(tmp_path):
    from proxy_cost import ALONE, proxy_cost, proxy_note

    run_dir, results = make_run_dir(tmp_path), []
    proxies = {"offline": offline_proxy, "llm": language_model_proxy}
    few = {"num_images": 32, "num_refit_images": 32, "num_rounds": 1, "num_candidates": 1}
    with serving(calling(("measure", {"distrust": [{"where": 0, "factor": 9}]}))) as server:
        llm = {"base_url": server.url, "price_per_million_prompt_tokens": 5.0}
        config = small_config(prune={"method": "llm", **few}, proxy=llm)
        for name, partners in (("llm.jsonl", proxies), ("offline.jsonl", ALONE)):
            search, memory = task_of(run_dir, config), MemoryBank(tmp_path / name)
            results.append(run_chain(search_submodel(search, memory, partners)))
    found, offline = results
    cost = proxy_cost([found], [offline])
    assert (cost["measured"], cost["measured_offline"]) == ([2], [2])
    assert cost["schemes"] == {"llm": 1, "offline": 1}
    assert (cost["finalists"], cost["finalists_offline"]) == ([2], [2])
    note = proxy_note(cost)
    assert note.startswith(
        "1,000 tokens of prompts, 200 of replies, price 0.005; measured 2 schemes"
    )
    assert f"Excess loss {cost['difference']:+.3g} against" in note


@pytest.mark.usefixtures("importable")
def test_an_oracle_that_was_interrupted_measures_nothing_again(tmp_path, monkeypatch):
    import partner_bound

    losses = iter([0.5, 0.25, 0.75, 1.0])
    monkeypatch.setattr(partner_bound, "load_base", lambda *_: None)

    def value(*_: object) -> float:
        return next(losses)

    search = task_of(make_run_dir(tmp_path), small_config())
    for _ in range(2):
        known = partner_bound.knowledge_of(search, "judge", 8, value, tmp_path, "all")
        assert [known({"a": (0, 1)}), known({"a": (0,)}), known({"a": (0, 1)})] == [0.5, 0.25, 0.5]
    on_more = partner_bound.knowledge_of(search, "judge", 9, value, tmp_path, "all")
    assert on_more({"a": (0,)}) == 0.75
    monkeypatch.setattr(partner_bound, "IMAGES_VERSION", partner_bound.IMAGES_VERSION + 1)
    on_others = partner_bound.knowledge_of(search, "judge", 8, value, tmp_path, "all")
    assert on_others({"a": (0,)}) == 1.0


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.timeout(600)
def test_losses_are_compared_on_every_setting_and_held_against_the_aims(storage, monkeypatch):
    import loss_after_pruning
    from common import parse_flags

    arguments = [
        "loss_after_pruning.py",
        "--smoke",
        "--num-actors",
        "1",
        "--storage",
        str(storage),
    ]
    monkeypatch.setattr(sys, "argv", arguments)
    flags = parse_flags(loss_after_pruning.__doc__, loss_after_pruning.LossFlags)
    loss_after_pruning.main(flags)
    folder = storage / "loss_after_pruning-digits-smoke"
    names = {row["loss above the base's (seeds)"] for row in rows_of(folder, "loss_after_pruning")}
    for name in ("taylor/uniform", "magnitude/global, refit", "second-order, refit", "measured"):
        assert name in names
    record = json.loads((folder / "loss_after_pruning.json").read_text())
    assert list(record["excess_loss"]) == ["seed 0, group 6"]
    for name in ("second-order", "second-order with rivals", "measured"):
        found = record["against_baselines"][f"seed 0, group 6, {name}"]
        for against in (found["chosen"], found["best"]):
            assert against["low"] <= against["difference"] <= against["high"]
            assert against["baseline"].endswith(", refit")
        assert found["best"]["difference"] >= found["chosen"]["difference"]
        assert found["search_macs"] > 0
    judged = (storage / "loss_after_pruning-digits-smoke").glob("seed-0/group-6/judged.npz")
    assert len(list(judged)) == 1


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    ("name", "folder", "flags", "column"),
    [
        ("pruning_methods", "digits-smoke", "Flags", "row"),
        ("time_cost", "digits-smoke-offline", "ProxyFlags", "stage"),
        ("training_free", "digits-smoke", "FreeFlags", "experts"),
        ("no_data_set", "digits-smoke", "DataFlags", "experts"),
        ("samplers", "digits-smoke", "SamplerFlags", "sampler"),
        ("finetune_ways", "digits-smoke", "WaysFlags", "model"),
        ("equal_compute", "digits-smoke", "EqualFlags", "row"),
        ("step_schedules", "digits-smoke", "StepFlags", "schedule"),
        ("two_stage", "digits-smoke", "StagesFlags", "strategy, share"),
        ("plateau", "digits-smoke", "PlateauFlags", "steps"),
    ],
)
def test_smoke_writes_table_plot_and_what_made_them(
    storage, monkeypatch, name, folder, flags, column
):
    experiment = importlib.import_module(name)
    from common import parse_flags

    command = [f"{name}.py", "--smoke", "--num-actors", "1", "--storage", str(storage)]
    monkeypatch.setattr(sys, "argv", command)
    experiment.main(parse_flags(experiment.__doc__, getattr(experiment, flags)))
    where = storage / f"{name}-{folder}"
    found = [row[column] for row in rows_of(where, name)]
    assert len(set(found)) == len(found) >= 4
    if hasattr(experiment, "PAPER"):  # the paper's number stands beside ours
        paper = {row[column]: row["the paper's (cifar10)"] for row in rows_of(where, name)}
        theirs = experiment.PAPER["cifar10"]
        assert paper == {row: theirs.get(row, "-") for row in found}
        assert len(set(paper.values())) > 2
    made_by = json.loads((where / f"{name}.json").read_text())["made_by"]
    assert len(made_by["commits"]) == 1
    assert made_by["settings"]["preset"] == "digits-smoke"
    assert (where / f"{name}.png").stat().st_size > 1000


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("finetune_ways", "WaysFlags"),
        ("no_data_set", "DataFlags"),
        ("samplers", "SamplerFlags"),
        ("training_free", "FreeFlags"),
    ],
)
@pytest.mark.usefixtures("importable")
def test_scores_are_of_as_many_images_as_a_flag_says(name, kind):
    flags = getattr(importlib.import_module(name), kind)
    assert flags(num_images=96).config(0).evaluate.num_images == 96
    assert flags().config(0).evaluate == preset("digits").evaluate


@pytest.mark.usefixtures("importable")
def test_no_two_ways_are_the_same():
    from finetune_ways import WAYS

    start = preset("digits").finetune
    ways = [replace(start, **changes) for changes in WAYS.values()]
    assert all(one != other for one, other in itertools.combinations(ways, 2))
    assert {way.lr_schedule for way in ways} == {"constant", "linear", "cosine"}


@pytest.mark.usefixtures("importable")
def test_the_table_of_losses_names_the_training_seeds_and_the_reference():
    from finetune_ways import table_of_losses

    same = LossDifference(loss_tdc=0.5, loss_base=0.5, difference=0.0, low=-0.05, high=0.05)
    less = LossDifference(loss_tdc=0.4, loss_base=0.5, difference=-0.1, low=-0.2, high=0.0)
    losses = {"base": [[less, same]] * 2, "base trained on, cosine": [[same, same]] * 2}
    columns, rows = table_of_losses(losses, (3, 7))
    assert columns == ["loss against base trained on, cosine", "seed", "group 0", "group 1"]
    assert rows[:2] == [["base", seed, "-20.00 ± 20.00 %", "+0.00 ± 10.00 %"] for seed in "37"]
    assert [row[:2] for row in rows[2:]] == [["base trained on, cosine", seed] for seed in "37"]


@pytest.mark.usefixtures("importable")
def test_a_storage_of_other_settings_is_refused(tmp_path):
    from common import claim

    claim(tmp_path, small_config())
    claim(tmp_path, small_config())
    with pytest.raises(StorageError, match=r"finetune.num_steps 20 -> 7\. .*another --storage"):
        claim(tmp_path, small_config(finetune={"num_steps": 7}))


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.usefixtures("importable", "ray_cluster")
def test_latents_are_ready_before_all_else(tmp_path):
    from common import workers

    stage = make_first_stage(tmp_path / "first_stage")
    config = latent_config(stage, tmp_path / "cache")
    with workers(config, tmp_path / "more", tmp_path / "store"):
        assert len(list(training_of(config).latents.glob("*.safetensors"))) == 2  # of 1,797 digits


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.usefixtures("importable", "ray_cluster")
def test_a_base_that_goes_on_with_a_shorter_ones_training_is_as_if_trained_at_once(tmp_path):
    from common import trained_base

    shorter = small_config(base={"num_steps": 4, "checkpoint_every": 2})
    longer = replace(shorter, base=replace(shorter.base, num_steps=6))
    trained_base(shorter, tmp_path / "shorter", tmp_path / "store")
    gone_on = trained_base(longer, tmp_path / "on", tmp_path / "store", tmp_path / "shorter")
    at_once = trained_base(longer, tmp_path / "once", tmp_path / "other")
    assert weights_digest(gone_on) == weights_digest(at_once)
    folders = [RunDir(tmp_path / name).base_training for name in ("shorter", "on")]
    first, later = ({path.name for path in one.glob("checkpoint_*/")} for one in folders)
    assert first & later


@pytest.mark.usefixtures("importable")
def test_a_preset_of_latents_asks_for_its_first_stage(tmp_path, monkeypatch):
    from common import parse_flags, trained_base

    arguments = ["x.py", "--preset", "mnist-32-ldm", "--data", str(tmp_path / "mnist.npz")]
    monkeypatch.setattr(sys, "argv", arguments)
    config = parse_flags("").config(0)
    with pytest.raises(ConfigError, match=r"mnist32-ldm .*needs a first stage.*first-stage"):
        trained_base(config, tmp_path / "base", tmp_path / "store")
    assert not (tmp_path / "base").exists()
    monkeypatch.setattr(sys, "argv", [*arguments, "--first-stage", str(tmp_path / "stage")])
    assert parse_flags("").config(0).data.first_stage == str(tmp_path / "stage")
