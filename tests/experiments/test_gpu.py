"""What a check on a GPU measures when."""

import pytest

from tdc_ray.storage.files import read_json_lines


@pytest.mark.slow
@pytest.mark.usefixtures("importable")
def test_what_failed_is_measured_again_after_what_is_missing(tmp_path, monkeypatch):
    import gpu

    made, broken = [], {"b"}

    def section(_flags):
        for name in "abc":
            yield name, lambda name=name: made.append(name) or {"code": int(name in broken)}

    monkeypatch.setattr(gpu, "SECTIONS", {"one": section})
    flags = gpu.GpuFlags(out=tmp_path / "gpu.jsonl")
    gpu.main(flags)
    broken.clear()
    flags.out.write_text("".join(flags.out.read_text().splitlines(keepends=True)[:2]))
    gpu.main(flags)
    assert made == [*"abc", *"cb"]
    assert [row["name"] for row in read_json_lines(flags.out)] == [*"ab", *"cb"]


@pytest.mark.usefixtures("importable")
def test_a_command_takes_no_longer_than_what_is_left(monkeypatch):
    import gpu

    limits = []
    done = gpu.subprocess.CompletedProcess([], 0, "", "")

    def run(*_, timeout, **__):
        limits.append(timeout)
        return done

    monkeypatch.setattr(gpu.subprocess, "run", run)
    for seconds in (30.0, 480.0):
        _, measure = next(gpu.works(gpu.GpuFlags(seconds=seconds)))
        measure()
    assert 20 < limits[0] <= 30
    assert limits[1] == gpu.MOST_OF_A_COMMAND_S
