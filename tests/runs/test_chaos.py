"""The short form of ``tests.chaos``: one run, four kills."""

import pytest

from tests.chaos import one_run

pytestmark = [pytest.mark.ray, pytest.mark.timeout(900)]


@pytest.mark.slow
def test_lost_workers_nodes_and_heads_change_no_result_and_nothing_is_done_twice(
    finished_run, cache_dir, tmp_path
):
    outcome = one_run(
        0,
        str(tmp_path / "run"),
        tmp_path / "run.log",
        finished_run / "results.json",
        kinds=("actor", "node", "head", "actor"),
        flags=("--evaluate.cache-dir", str(cache_dir)),
    )
    assert outcome.finished, (tmp_path / "run.log").read_text()[-3000:]
    assert outcome.kills == {"actor": 2, "node": 1, "head": 1}
    assert outcome.ran_twice == []
    assert outcome.equal
