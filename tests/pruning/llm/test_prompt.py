import json
import re
from dataclasses import replace

import pytest

from tdc_ray.models.unet2d.architectures import architecture
from tdc_ray.pruning.changes import Change, Planner, Share
from tdc_ray.pruning.llm.answer import Answer, ToolCall
from tdc_ray.pruning.llm.prompt import (
    DISTANCE,
    LOSS,
    MAX_QUOTED_CHARS,
    _widths_text,
    assistant_message,
    measured_result,
    messages_for,
    planned_result,
    retry_messages,
)
from tdc_ray.pruning.memory import MemoryEntry
from tdc_ray.pruning.quadratic_model import QuadraticModel
from tdc_ray.pruning.space import space_of
from tests.pruning.requests import NAMES, SPACE, TASK, entry, task

MEASURED = {"predicted": 0.004, "loss_base": 0.05, "num_images": 45, "noise": "choice"}
MEMORY = [
    replace(entry(2, 0.05612345, u0=4), **MEASURED, standard_error=1.23e-4, hypothesis="why"),
    replace(entry(2, 0.053, candidate=1, u3=2), **MEASURED),
    replace(entry(3, 0.02, u10=6), loss_base=0.019, predicted=0.002),
    entry(0, 0.01, u0=5),
]


def content(memory=(), max_entries=20, **changes) -> str:
    request = task(**changes)
    system, user = messages_for(
        request, memory, Planner(request, memory), max_entries=max_entries, max_predictions=7
    )
    assert (system["role"], user["role"]) == ("system", "user")
    return user["content"]


def unit_rows(text: str) -> list[list[str]]:
    return [line.split(" | ") for line in text.splitlines() if re.match(r"\d+ \| [a-z]", line)]


def test_the_group_its_limit_the_round_and_what_is_left_are_told():
    text = content()
    assert "200 to 299, signal-to-noise ratio 3.5 to -1.25 dB" in text
    assert "limit: 70 % of the macs of the uncut base" in text
    assert "round: 2 of 3; measurements left in this round: 2;" in text
    assert "up to 7 replies" in text


def test_every_unit_has_its_width_and_what_the_next_step_saves_and_costs():
    planner, rows = Planner(TASK, ()), unit_rows(content())
    assert [int(row[0]) for row in rows] == list(range(len(NAMES)))
    assert rows[0][1:5] == ["down 0", "residual", "8x8", "1-8"]
    assert rows[4][1:5] == ["mid", "attention", "4x4", "1-2"]
    start = planner.start.scheme
    for number, (row, unit) in enumerate(zip(rows, SPACE.units, strict=True)):
        width = start[unit.name]
        assert int(row[5]) == width
        for cell, other in ((row[6], width - 1), (row[7], width + 1)):
            if not 1 <= other <= unit.width:
                assert cell == "-"
                continue
            to, share, cost, _, error = re.split(r"[:,]? ", cell)
            saved = SPACE.macs({**start, unit.name: other}) - SPACE.macs(start)
            change, spread = planner.predictor.change(number, width, other)
            assert (int(to), share) == (other, f"{100 * saved / SPACE.macs_base:+.4g}")
            assert (cost, error) == (f"{change:+.4g}", f"{spread:.2g}")
        assert row[8] == "1.00 ± 0.30"
    assert not any(name in content() for name in NAMES)


def test_names_scores_and_example_figures_that_mislead_are_gone():
    text = content(MEMORY)
    assert "score" not in text
    example = text.splitlines()[text.splitlines().index("# Answer") :][-1]
    assert not re.search(r"\d", example)


def test_entries_tell_predicted_and_measured_round_source_images_and_noise():
    text = content(MEMORY)
    own = next(line for line in text.splitlines() if line.endswith("| why"))
    assert own.startswith("1 | llm | 45 of choice | 0.004 | 0.0061234 ± 0.00012 | 1.531 | ")
    assert "images: how many noised images a scheme was measured on" in text
    assert "+0.006123 ± 0.00012" in own
    assert "measured / predicted: 1.140, deviation 0.55" in text
    other = next(line for line in text.splitlines() if line.startswith("3 | 1 | llm"))
    assert "| 0.002 | 0.001 | 0.500 |" in other
    assert unit_rows(text)[0][9] == "8, 5, 8"  # of this group's best, and of groups 0 and 3
    assert "best of group 2, 0, 3" in text
    assert "multiplied by" in text
    assert "None so far." in content()


def test_the_cap_keeps_the_groups_own_and_the_best_and_says_how_many_are_left_out():
    text = content(MEMORY, max_entries=1)
    assert "of choice" in text
    assert not text.count("| why")
    assert "other groups:" not in text
    assert "Not listed: 1 more of this group, which measured worse," in text
    assert "Not listed: 2 more of other groups, farther or worse," in text
    assert "Not listed" not in content(MEMORY, max_entries=4)
    nothing = content(MEMORY, max_entries=0)
    assert "Not listed: 2 more of this group" in nothing
    assert "None so far." not in nothing


def refitted(loss: float, distance: float, error: float | None) -> MemoryEntry:
    one = replace(entry(2, loss, u0=4), **MEASURED, loss_refit=loss, standard_error=3e-3)
    return replace(one, distance=distance, distance_error=error)


def test_distances_have_a_standard_error_of_their_own():
    text = content([refitted(0.056, 0.0061, 2.34e-4)])
    assert "| 0.004 | 0.0061 ± 0.00023 | 1.525 | +0.006 ± 0.003 |" in text
    told = measured_result(TASK, refitted(0.056, 0.0061, 2.34e-4))
    assert (told["measured_increase"], told["measured_standard_error"]) == (0.0061, 2.3e-4)
    assert told["loss_standard_error"] == 0.003
    old = refitted(0.056, 0.0061, None)  # as it was kept before
    assert "| 0.004 | 0.0061 | 1.525 |" in content([old])
    assert measured_result(TASK, old)["measured_standard_error"] is None


def test_what_measured_rests_on_and_what_decides_is_said():
    first = content(num_images=512, num_refit_images=1024, images_share=0.25)
    assert "on 128 noised images after a refit from 256." in first
    assert "first heat of a race: the best of yours and of the others" in first
    assert "on\n  512 noised images after a refit from 1024, which decides.\n" in first
    final = content(num_images=512, num_refit_images=0)
    assert "ranked, on 512 noised images.\n" in final
    assert "first heat" not in final


@pytest.mark.parametrize("memory", [(), MEMORY], ids=["nothing measured", "corrected"])
def test_the_error_of_a_prediction_is_always_called_assumed(memory):
    text = content(memory)
    assert "Its ± is assumed, not measured: 30 % of what a unit costs" in text
    assert ("No measurement has corrected them yet" in text) is not memory


def test_a_step_that_was_not_told_from_noise_has_no_figure():
    text = content(sensitivities={NAMES[0]: {1: 0.01, 4: -1e-4}, NAMES[1]: {1: 0.01}})
    rows = unit_rows(text)
    assert rows[2][7].endswith(", below noise")
    assert re.search(r", [+-]0\.0\d+ ± 0\.0", rows[1][6] + rows[1][7])
    assert "+0 ±" not in text
    assert "its predicted increase: below noise" in content(sensitivities={})


MODEL = QuadraticModel({NAMES[0]: (4,)}, ((0.01,),))


@pytest.mark.parametrize(
    ("changes", "predicted", "measured", "differ"),
    [
        ({"num_refit_images": 64, "model": MODEL}, DISTANCE, DISTANCE, False),
        ({"num_refit_images": 64}, LOSS, DISTANCE, True),
        ({}, LOSS, LOSS, False),
    ],
    ids=["second-order", "measured", "no refit"],
)
def test_the_quantities_that_are_predicted_and_measured_are_said(
    changes, predicted, measured, differ
):
    text = content(**changes)
    assert f"\npredicted: {predicted},\n" in text
    assert f"\nmeasured: {measured},\n  by which schemes are ranked" in text
    assert ("That is another quantity than the measured one." in text) is differ


def test_steps_measured_on_pruned_models_are_marked():
    width = Planner(TASK, ()).start.scheme[NAMES[0]]
    text = content(pruned_elsewhere={NAMES[0]: width - 1})
    rows = unit_rows(text)
    assert rows[0][6].endswith("*")
    assert not rows[1][6].endswith("*")
    assert "on models that were cut elsewhere too" in text
    assert "cut elsewhere" not in content()


def test_streams_have_blocks_and_times_another_word():
    space = space_of(architecture("tiny"), "full")
    text = content(space=space, sensitivities={})
    assert re.search(r"^\d+ \| \S.* \| stream \| ", text, re.M)


def test_a_prediction_tells_what_changed_and_what_was_dropped():
    planner = Planner(TASK, ())
    told = planned_result(TASK, planner, replace(planner.start, notes=("x: y",)))
    assert told["predicted_increase"] == told["knapsack_increase"]
    assert told["predicted_increase"] > told["predicted_standard_error"] > 0
    assert told["cost_in_percent"] <= told["limit_in_percent"] == 70
    assert (told["widths_changed"], told["not_done_as_asked"]) == ({}, ["x: y"])
    assert told["points_changed"] == {}
    moved = planner.plan(Change(shares=[Share(block="mid", least=0, most=6)]))
    before, after = planned_result(TASK, planner, moved)["points_changed"]["mid"]
    assert before > 6 >= after > 0
    assert f"mid: {before:.4g}" in content()
    came_to = measured_result(TASK, MEMORY[0])
    assert came_to["measured_increase"] == 0.0061234
    assert (came_to["predicted_increase"], came_to["images"]) == (0.004, 45)
    lost = measured_result(TASK, entry(2, float("nan"), u0=1))
    assert json.loads(json.dumps(lost, allow_nan=False))["measured_increase"] is None


def test_a_bad_reply_is_quoted_and_answered():
    said, told = retry_messages(Answer(text="no"), "it is prose.")
    assert said == {"role": "assistant", "content": "no"}
    assert told["role"] == "user"
    assert "it is prose." in told["content"]
    assert retry_messages(Answer(), "it is empty.") == []
    said, _ = retry_messages(Answer(text="x" * 10 * MAX_QUOTED_CHARS), "too long.")
    assert len(said["content"]) < MAX_QUOTED_CHARS + 10
    calls = (ToolCall(id="a", name="cut", arguments="{"),)
    said, told = retry_messages(Answer(calls=calls), "no such tool.")
    assert (told["role"], told["tool_call_id"]) == ("tool", "a")
    assert said["tool_calls"][0]["function"]["arguments"] == "{}"  # servers parse it
    assert assistant_message(Answer(text="hm"))["content"] == "hm"


@pytest.mark.parametrize("arguments", ["{", "[]", "NaN", '{"points": NaN}', "[" * 10_000])
def test_servers_are_sent_objects_as_arguments(arguments):
    message = assistant_message(Answer(calls=(ToolCall(id="a", name="x", arguments=arguments),)))
    assert message["tool_calls"][0]["function"]["arguments"] == "{}"


def test_the_prompt_for_a_large_unet_is_short():
    space = space_of(architecture("iddpm-cifar10"))
    levels = {u.name: dict.fromkeys(range(1, u.width, 8), 0.0123) for u in space.units}
    text = content(space=space, sensitivities=levels, limit=round(0.7 * space.macs_base))
    assert len(text) < 10_000


@pytest.mark.parametrize("multiple", [1, 8])
def test_a_feed_forwards_hundreds_of_widths_are_ranges(multiple):
    space = space_of(
        {
            "_class_name": "DiTTransformer2DModel",
            "num_attention_heads": 4,
            "attention_head_dim": 64,
            "num_layers": 2,
            "sample_size": 8,
            "num_embeds_ada_norm": 10,
        },
        channel_multiple=multiple,
    )
    text = content(space=space, sensitivities={}, limit=round(0.7 * space.macs_base))
    assert [row[4] for row in unit_rows(text)[:2]] == [
        "1-4",
        {1: "1-1024", 8: "8-1024 by 8"}[multiple],
    ]
    assert "UNet" not in text


@pytest.mark.parametrize(
    ("legal", "text"),
    [
        ((5,), "5"),
        ((1, 2), "1-2"),
        ((2, 4, 6), "2, 4, 6"),
        ((3, 8, 16, 24, 32, 33), "3, 8-32 by 8, 33"),
        ((1, 2, 3, 4, 8, 12, 16), "1-4, 8, 12, 16"),
    ],
)
def test_widths_are_ranges_where_these_are_shorter(legal, text):
    assert _widths_text(legal) == text
