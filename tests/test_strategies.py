"""`anert bench strategies` and `anert bench scaling`: what they say, and what they refuse to say."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from small_run import STORIES, write_text

from anert.bench import Result, strategies
from anert.bench.options import BenchOptions
from anert.bench.scaling import fit, on_a_line
from anert.bench.strategies import Run, read_run
from anert.cli import main
from anert.errors import AnertError

TINY = f"{STORIES}:tiny"


def report(capsys: pytest.CaptureFixture[str], *argv: str) -> dict[str, Any]:
    code = main(["bench", *argv, "--json"])
    out, err = capsys.readouterr()
    assert code == 0, err
    return {r["name"]: r for r in json.loads(out.splitlines()[-1])["results"]}


def test_the_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = write_text(tmp_path / "text.txt")
    rows = report(capsys, "strategies", TINY, "--seq-len", "32", "--steps", "4", "--compile-budget", "75",
                  "--data", str(data), "--threads", "1")  # fmt: skip
    assert rows["losses equal to the bit"]["median"] == 4
    # an update of `tiny` bakes 30 programs: two updates go into 75, so that 4 steps take two processes
    assert rows["baked: steps until the budget is spent"]["median"] == 2 and rows["baked: restarts"]["median"] == 1
    assert rows["tensors: restarts"]["median"] == 0 and rows["tensors: compile an update"]["median"] == 0
    assert rows["baked: compiles"]["median"] >= 4 * 30 > rows["tensors: compiles"]["median"]
    assert rows["baked: step"]["ratio"] < 1 and rows["baked: whole run"]["ratio"] < 1
    assert 0 < rows["baked: compile an update"]["median"] < rows["baked: step"]["p90"] * 1.5
    assert rows["tensors: weight sync an update"]["median"] > 0 and rows["baked: step"]["n"] == 4


def a_run(losses: tuple[float, ...] = (3.0, 2.0)) -> Run:
    about = {"backend": "cpu", "threads": 1, "isa": "avx2"}
    return Run(losses, (10.0, 12.0), 1.0, 64, 11, 5.0, (2,), 1000, about)


def test_losses_that_differ_are_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    runs = {"tensors": a_run(), "baked": a_run((3.0, 2.0000001))}
    monkeypatch.setattr(strategies, "_train", lambda options, name, folder, turn: runs[name])
    with pytest.raises(AnertError, match=r"the losses differ from step 2 on \(2.0 by tensors, 2.0000001 by baked"):
        list(strategies.results(BenchOptions(TINY), 1))


def test_a_log_of_several_processes_is_one_run() -> None:
    def started(first: int) -> dict[str, Any]:
        return {"event": "RunStarted", "time": 10.0 * (first + 1), "first_step": first, "compile_ms": 4.0,
                "n_params": 9, "backend": "cpu", "precision": "fp32", "threads": 1, "isa": "avx2", "layout": "ports",
                "compile_budget": 9}  # fmt: skip

    def step(n: int) -> dict[str, Any]:
        return {"event": "StepDone", "time": 10.0 * n + 5, "step": n, "loss": 1.0 / n, "step_ms": 7, "tokens": 32}

    def done(steps: int) -> dict[str, Any]:
        return {"event": "RunDone", "summary": {"steps": steps, "compiles": 8, "bake_ms": 50.0}}

    found = read_run([started(0), step(1), step(2), done(2), started(2), step(3), done(3)])
    assert found.losses == (1.0, 0.5, 1 / 3) and found.steps_by_process == (2, 1)
    assert (found.compiles, found.compile_ms, found.tokens, found.seconds) == (16, 100.0, 96, 25.0)


# ---- scaling


def point(flops: float, ms: float) -> Result:
    return Result("p", "ms", ms, ms, ms, 5, flops=flops)


def test_a_fit_by_hand() -> None:
    x = np.array([1.0, 2.0, 4.0, 8.0])
    assert fit(x, 3 + 2 * x) == pytest.approx((3, 2))


def test_the_point_that_leaves_the_line_is_named() -> None:
    values = (1, 2, 4, 8, 16)
    straight = [point(v * 1e9, 1 + 2.0 * v) for v in values]
    rows = list(on_a_line("batch", values, straight))
    assert not any(r.notes["leaves_line"] for r in rows) and rows[0].notes["fixed_ms"] == pytest.approx(1)
    straight[2] = replace(straight[2], median=18.0)
    rows = list(on_a_line("batch", values, straight))
    worst = max(rows, key=lambda r: abs(r.notes["residual"]))
    assert worst is rows[2] and worst.notes["leaves_line"] and "<- leaves the line" in worst.notes["said"]
    halves = list(on_a_line("threads", (1, 2, 4), [point(1e9, ms) for ms in (8.0, 4.0, 2.0)]))
    assert all(abs(r.notes["residual"]) < 1e-6 for r in halves)


@pytest.mark.parametrize("axis", ["n_layers", "threads"])
def test_a_scaling(axis: str, capsys: pytest.CaptureFixture[str]) -> None:
    rows = report(capsys, "scaling", TINY, "--seq-len", "32", "--axis", axis, "--values", "1,2", "--rounds", "2")
    one, two = rows[f"{axis} 1"], rows[f"{axis} 2"]
    assert one["unit"] == "ms" and one["bytes"] > 0 and one["notes"]["value"] == 1
    if axis == "n_layers":
        assert two["flops"] > one["flops"] and two["bytes"] > one["bytes"]
    else:
        assert two["flops"] == one["flops"] and (one["notes"]["threads"], two["notes"]["threads"]) == (1, 2)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (("scaling", TINY), "bench scaling takes --axis seq_len, batch, n_layers, vocab_size, threads, got ''"),
        (("scaling", TINY, "--axis", "dim"), "got 'dim'"),
        (("scaling", TINY, "--axis", "batch", "--values", "2,x"), "--values takes whole numbers of at least 1"),
        (("scaling", TINY, "--axis", "batch", "--values", "2"), "needs two or more different points on batch"),
        (("strategies",), "needs a model: anert bench NAME PLUGIN"),
        (("strategies", TINY, "--peer", "torch"), "bench strategies has no peer 'torch'"),
        (("strategies", TINY, "--compile-budget", "0"), "expected a whole number of at least 1, got 0"),
    ],
)
def test_bad_input(argv: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", *argv]) == 2
    err = capsys.readouterr().err
    assert message in err and err.count("\n") == 1


def test_a_budget_that_is_too_small_for_one_update(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = write_text(tmp_path / "text.txt")
    argv = ("--seq-len", "32", "--steps", "1", "--compile-budget", "20", "--data", str(data))
    assert main(["bench", "strategies", TINY, *argv]) == 1
    err = capsys.readouterr().err
    assert "the baked run failed: anert: " in err and "raise it with --compile-budget" in err
