import json
import re
from dataclasses import replace

import pytest

from tdc_ray.models.unet2d.architectures import architecture
from tdc_ray.pruning.llm.prompt import MAX_QUOTED_CHARS, messages_for, retry_messages
from tdc_ray.pruning.llm.reply import parse_reply
from tdc_ray.pruning.space import space_of
from tests.pruning.requests import NAMES, SPACE, TASK, entry, task

MEMORY = [
    entry(2, 0.07, u0=4),
    entry(2, 0.06, candidate=1, u0=3, u5=2, u6=1, u8=1, u10=3),
    entry(2, 0.065, candidate=2, u0=2),
    entry(3, 0.02, u10=6),
    entry(0, 0.01, u0=5),
    entry(1, 0.01, u0=4),
]


def content(memory=(), max_entries=20, **changes) -> str:
    system, user = messages_for(task(**changes), memory, max_entries=max_entries)
    assert (system["role"], user["role"]) == ("system", "user")
    return user["content"]


def lines_of_memory(text: str) -> list[str]:
    return [line for line in text.splitlines() if re.match(r"(this )?group.* \| macs", line)]


def test_the_group_its_limit_and_the_round_are_told():
    text = content()
    assert "200 to 299, signal-to-noise ratio 3.5 to -1.25 dB" in text
    assert f"limit: {TASK.limit} macs = 70 % of the base's" in text
    assert str(SPACE.macs_base) in text
    assert "round: 2 of 3" in text
    assert "Propose 2 different schemes" in text


def test_every_unit_is_in_the_table_with_its_widths_macs_and_score():
    scores = TASK.scores | {NAMES[3]: [9.0] * 8, NAMES[4]: [0.0, 0.0]}
    lines = content(scores=scores).splitlines()
    rows = [line.split(" | ") for line in lines if re.match(r"\d+ \| [a-z]", line)]
    assert [row[1] for row in rows] == NAMES
    assert rows[0][2:7] == ["residual", "down 0", "8x8", "2", "1-8"]
    assert rows[4][2:7] == ["attention", "mid", "4x4", "16", "1-2"]
    assert rows[11][3] == "up 1"
    for row, unit in zip(rows, SPACE.units, strict=True):  # the sum in the prompt is right
        cut = SPACE.macs({**SPACE.full, unit.name: 1})
        steps = float(row[8]) * (unit.width - 1)
        assert 100 - steps == pytest.approx(100 * cut / SPACE.macs_base, abs=0.01)
        assert float(row[7]) == pytest.approx(float(row[8]) * unit.width, rel=1e-3)
    scores = [float(row[9]) for row in rows]
    assert max(scores) == scores[3]
    assert min(scores) == scores[4]
    assert (rows[3][10], rows[4][10], rows[0][10]) == ("50", "0", "28")


def test_in_the_full_space_the_model_is_told_that_macs_multiply():
    space = space_of(architecture("tiny"), "full")
    scores = {unit.name: [1.0] * unit.width for unit in space.units}
    text = content(space=space, scores=scores, sensitivities={})
    streams = [unit for unit in space.units if unit.kind == "stream"]
    assert streams
    for unit in streams:
        assert f"{unit.name} | stream | " in text
        assert f" | {unit.channels} | 1-{unit.width} | " in text
    assert "multiplies" in text
    assert "Macs add up" not in text
    assert "Macs add up" in content()


def test_measured_sensitivities_are_told_in_percent_of_the_loss():
    assert "3 | 4: +2, 1: +20" in content(sensitivities={NAMES[3]: {1: 0.01, 4: 0.001}})
    assert "None were measured." in content(sensitivities={})


def test_the_best_of_this_group_stands_last_and_the_nearest_groups_before_it():
    lines = lines_of_memory(content(MEMORY))
    groups = [line.partition(" |")[0] for line in lines]
    assert groups == ["group 0", "group 3", "this group", "this group", "this group"]
    assert "loss 0.06 (+20 % of the base's) | 0: 3, 5: 2, 6: 1, 8: 1, 10: 3" in lines[-1]


def test_a_scheme_is_told_once_and_the_cap_keeps_the_best():
    lines = lines_of_memory(content(MEMORY))
    assert sum(line.endswith("| 0: 4") for line in lines) == 1  # that of the group itself
    assert lines_of_memory(content(MEMORY, max_entries=2)) == lines[-2:]
    assert lines_of_memory(content(MEMORY, max_entries=0)) == []
    assert "It is empty." in content()


def test_an_overshoot_is_told_with_its_size():
    lines = lines_of_memory(content(MEMORY))
    within = SPACE.macs(MEMORY[1].widths) <= TASK.limit
    assert ("overshoots" in lines[-1]) is not within
    share = 100 * SPACE.macs(MEMORY[3].widths) / SPACE.macs_base
    over = 100 * (SPACE.macs(MEMORY[3].widths) - TASK.limit) / SPACE.macs_base
    assert f"macs {share:.4g} % (overshoots this group's limit by {over:.4g} points)" in lines[1]


def test_a_proposal_that_was_brought_down_is_told_of():
    above = replace(entry(2, 1.0, u0=1), overshoot=SPACE.macs_base // 50)
    assert "(cut to it from 2 points above the limit)" in lines_of_memory(content([above]))[0]


def test_a_loss_that_is_not_finite_is_the_worst():
    lines = lines_of_memory(content([entry(2, float("nan"), u0=1), entry(2, 9.0, u0=2)]))
    assert "loss nan" in lines[0]


def test_the_example_of_the_answer_is_a_valid_answer():
    example = next(line for line in content().splitlines() if line.startswith('{"schemes"'))
    assert json.loads(example)
    assert parse_reply(example, TASK)


def test_a_bad_reply_is_quoted_and_answered():
    said, told = retry_messages("no", "it is prose.")
    assert said == {"role": "assistant", "content": "no"}
    assert told["role"] == "user"
    assert "it is prose." in told["content"]
    assert retry_messages("", "it is empty.") == []
    said, _ = retry_messages("x" * 10 * MAX_QUOTED_CHARS, "it is longer than that.")
    assert len(said["content"]) < MAX_QUOTED_CHARS + 10


def test_the_prompt_for_a_large_unet_is_short():
    space = space_of(architecture("iddpm-cifar10"))
    scores = {unit.name: [1.0] * unit.width for unit in space.units}
    levels = {u.name: dict.fromkeys(range(1, u.width, 8), 0.0123) for u in space.units}
    text = content(space=space, scores=scores, sensitivities=levels)
    assert len(text) < 10_000
