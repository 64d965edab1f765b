"""A long run grows nothing: judged on made-up samples, on a run that leaks, and on a real one."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from small_run import STORIES, write_text

from anert.bench import soak
from anert.bench.soak import Samples, judge
from anert.cli import main
from anert.errors import AnertError

TINY = f"{STORIES}:tiny"


def samples(n: int = 1000, rss: Any = 0.0, files: Any = 0.0, ms: Any = 0.0, compiles: Any = 0.0) -> Samples:
    """A run as it should be, with something added at each step."""
    rng = np.random.default_rng(0)
    made = Samples.room(n)
    for i in range(n):
        at = [f(i) if callable(f) else f for f in (rss, files, ms, compiles)]
        warm = min(i, 100) * 2**18
        made.add(2**28 + warm + at[0], 7 + at[1] + (i % 50 == 0), 10 + rng.exponential(2) + at[2], 11 + at[3])
    return made


def faults(s: Samples) -> dict[str, str]:
    return {f.name: f.fault for f in judge(s) if f.fault}


def test_warm_up_and_passing_disturbance_are_no_growth() -> None:
    assert faults(samples()) == {}
    assert faults(samples(ms=lambda i: 200 * (i % 3 == 0))) == {}


@pytest.mark.parametrize(
    ("grown", "name", "fault"),
    [
        ({"rss": lambda i: i * 8000}, "resident memory", "1% is allowed"),
        ({"files": lambda i: i // 400}, "open files", "2 more"),
        ({"ms": lambda i: i * 0.004}, "step", "10% is allowed"),
        ({"compiles": lambda i: i // 900}, "compiles", "1 after the start"),
    ],
)
def test_growth_is_found(grown: dict[str, Any], name: str, fault: str) -> None:
    found = faults(samples(**grown))
    assert set(found) == {name} and fault in found[name]


def test_too_few_steps_say_nothing() -> None:
    with pytest.raises(AnertError, match="99 steps were made, it takes 100"):
        judge(samples(99))


def test_a_leak_of_files_fails_the_verb(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    held: list[int] = []
    true = soak.open_files

    def leaking() -> int:
        held.append(os.open(os.devnull, os.O_RDONLY))
        return true()

    monkeypatch.setattr(soak, "open_files", leaking)
    data = write_text(tmp_path / "text.txt")
    try:
        code = main(["bench", "soak", TINY, "--seq-len", "32", "--steps", "120", "--data", str(data), "--threads", "1"])
    finally:
        for fd in held:
            os.close(fd)
    out, err = capsys.readouterr()
    assert code == 1 and "open files: " in err and " more" in err and "soak: resident memory" in out
    assert len(held) == 120


def test_bad_input(capsys: pytest.CaptureFixture[str]) -> None:
    for argv, message in (
        (("soak",), "needs a model: anert bench NAME PLUGIN"),
        (("soak", TINY, "--steps", "many"), "expected a whole number, got 'many'"),
        (("soak", TINY, "--peer", "torch"), "bench soak has no peer 'torch'"),
        (("soak", TINY, "--data", "absent.txt"), "absent.txt: cannot read the data"),
    ):
        assert main(["bench", *argv]) == 2
        err = capsys.readouterr().err
        assert message in err and err.count("\n") == 1


@pytest.fixture
def minutes(request: pytest.FixtureRequest) -> Iterator[float]:
    yield float(request.config.getoption("--soak-minutes"))


@pytest.mark.soak
def test_a_long_run_stays_as_it_is(minutes: float, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """20,000 steps, or as many as go into the time."""
    data = write_text(tmp_path / "text.txt")
    argv = ("--seq-len", "32", "--seconds", str(60 * minutes), "--data", str(data), "--threads", "1", "--json")
    code = main(["bench", "soak", TINY, *argv])
    out, err = capsys.readouterr()
    assert code == 0, err
    rows = {r["name"]: r for r in json.loads(out.splitlines()[-1])["results"]}
    assert set(rows) == {"soak: resident memory", "soak: open files", "soak: step", "soak: compiles"}
    assert all(r["n"] >= 100 and not r["notes"]["fault"] for r in rows.values())
