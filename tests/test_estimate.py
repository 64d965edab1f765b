"""The step on paper: its arithmetic against figures worked out by hand, against published runs, and against what a run
really dispatches."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from anert import estimate as paper
from anert.blocks import build_blocks
from anert.boundaries import BLAS_TFLOPS, CHIPS, NEON_TFLOPS, Design, Unit, candidates, design_of, predict, ranked
from anert.capabilities import ANE
from anert.cli import main
from anert.estimate import published
from anert.plugin import load
from anert.stages import Boundaries

STORIES = Path(__file__).resolve().parents[1] / "plugins" / "stories.py"


def model(preset: str, **over: Any) -> Any:
    found = load(str(STORIES)).preset(preset)
    return found.model(replace(found.config, **over))


def test_a_kernel_by_hand() -> None:
    """2.4 GFLOP and 12 MB on an M4: 84 us + 2.4 / 5.4 ms + 0.1 ms at best, 160 us + 2.4 / 1.4 ms + 0.1 ms at worst."""
    ms = Unit("k", 2_400_000_000, 10_000_000, 2_000_000, times=3).ms(CHIPS["m4"])
    assert ms.best == pytest.approx(3 * (0.084 + 2.4 / 5.4 + 0.1)) and ms.worst == pytest.approx(
        3 * (0.160 + 2.4 / 1.4 + 0.1)
    )
    big = Unit("k", 2_400_000_000, 30_000_000, 0).ms(CHIPS["m4"])
    assert big.best == pytest.approx(0.084 + 2.4 / 1.4 + 0.25)  # past the SRAM the worst rate counts at both ends


def test_what_overlaps_and_what_does_not() -> None:
    chip = CHIPS["m4"]
    design = Design(
        "d", None, [Unit("f", 10**10, 0, 0)], [Unit("b", 2 * 10**10, 0, 0)], head_flops=1e10, grad_flops=1e9
    )
    e = predict(design, chip, (1.0, 1.0))
    f, b = (10 / r + 0.084 for r in (5.4, 2.7))
    assert e.total.best == pytest.approx(f + 10 + b) and e.bound_by == "engine"  # 1 ms of gradients hides behind b
    e = predict(replace(design, grad_flops=1e12), chip, (1.0, 1.0))
    assert e.total.best == pytest.approx(f + 10 + 1000) and e.bound_by == "host"
    e = predict(replace(design, grad_flops=3e9, grads_beside_forward=True), chip, (1.0, 1.0))
    assert e.total.best == pytest.approx(f + b + 10)


def test_the_published_design_has_its_published_work() -> None:
    """45.9 GFLOP forward, 36 and 84 dispatches (ane_facts 5.3, 6.2); ffnFused is 6,656 columns wide."""
    d = published(paper.SHAPES["stories110m"], 256)
    assert sum(u.flops * u.times for u in d.forward) == pytest.approx(45.90e9, rel=1e-3)
    assert sum(u.times for u in d.forward) == 36 and sum(u.times for u in d.backward) == 84
    assert d.forward[2].bytes_in == 2 * 768 * 6656
    assert d.grad_flops == pytest.approx(43.49e9, rel=1e-3)
    copied = [sum(u.copied * u.times for u in units) for units in (d.forward, d.backward)]
    assert copied[0] == pytest.approx(269e6, rel=0.01) and copied[1] == pytest.approx(368e6, rel=0.05)


def test_published_times_lie_where_they_are_said_to() -> None:
    rows = {r["what"]: r for r in paper.calibration()}
    m4 = rows["M4, whole step, Stories110M"]
    assert m4["inside"] and 0.10 < m4["error"] < 0.25
    for what, limit in {
        "M3 Ultra, engine forward": 0.35, "M3 Ultra, engine backward": 0.25, "M3 Ultra, whole step": 0.15,
        "M4, whole step, Qwen3-0.6B": 0.25, "M1 Pro and Max, whole step (143 to 167)": 0.25,
    }.items():  # fmt: skip
        assert rows[what]["inside"] and abs(rows[what]["error"]) < limit, rows[what]
    # the larger M4s have more memory bandwidth and host than the base chip, which the table describes
    assert [r["what"] for r in rows.values() if not r["inside"] and r["error"] > 0] == [
        "M4 Pro, whole step (69 to 73)", "M4 Max, whole step",
    ]  # fmt: skip


def test_the_default_is_predicted_faster_than_the_published_design() -> None:
    """At equal rates of engine and host, and at equal classes; and even with all 32,000 of them against the published
    9,205, whose step took 91 ms: with the capabilities that no probe has widened."""
    m = model("110m")
    default = ranked(m, 256, 1, candidates(ANE), ANE, CHIPS["m4"])[0][0]
    assert default.name == "packed, 1 layer in one"
    theirs = published(m.config, 256)
    mine = predict(default, CHIPS["m4"], BLAS_TFLOPS)
    other = predict(theirs, CHIPS["m4"], BLAS_TFLOPS)
    assert mine.total.best < other.total.best and mine.total.worst < other.total.worst
    assert mine.total.middle < 0.75 * other.total.middle
    assert mine.dispatches == 48 and other.dispatches == 120
    as_published = predict(published(m.config, 256, paper.COMPACTED), CHIPS["m4"], BLAS_TFLOPS)
    assert mine.total.best < as_published.total.best and mine.total.worst < as_published.total.worst
    assert mine.total.middle < 0.9 * as_published.total.middle
    compact = predict(replace(default, head_flops=6 * paper.COMPACTED * 768 * 256), CHIPS["m4"], BLAS_TFLOPS)
    measured = 91.0
    assert compact.total.middle < measured
    # not where Accelerate does not open: then the step waits for the host's products on NEON
    slow = predict(default, CHIPS["m4"], NEON_TFLOPS)
    assert slow.bound_by == "host" and slow.total.middle > 2 * mine.total.middle


@pytest.mark.parametrize("layout", ["packed", "ports"])
def test_units_are_the_kernels_of_a_run(layout: str) -> None:
    m = model("tiny", seq_len=64)
    design = design_of(m, 64, 2, Boundaries(layout))
    kernels = [k for b in build_blocks(m, 64, 2, True, layout, ANE) for k in b.kernels]
    assert sorted(u.name for u in design.units) == sorted(k.name for k in kernels)
    assert all(u.times == m.config.n_layers for u in design.units)
    for u in design.units:
        (kernel,) = (k for k in kernels if k.name == u.name)
        assert u.bytes_in + u.bytes_out == sum(kernel.sizes.values())


@pytest.mark.parametrize(
    "bounds",
    [Boundaries("packed"), Boundaries("ports"), Boundaries("packed", 1, replace(ANE, max_inputs=64)),
     Boundaries("ports", 2, replace(ANE, max_inputs=24), packable=False)],
)  # fmt: skip
def test_copies_are_those_that_a_network_makes(bounds: Boundaries) -> None:
    """Bytes counted at the Network's own copies, with the engine's wire form on the CPU."""
    from anert import network
    from anert.network import Network
    from anert.param import ParamStore
    from anert.runtime import Runtime

    m = model("tiny", seq_len=64)
    rt = Runtime("cpu", threads=1)
    rt.boundaries = bounds
    rt.backend.capabilities = replace(ANE, compile_budget=1000)
    moved = []
    made = Network._copy_tasks

    def counting(copies: Any) -> Any:
        moved.extend(2 * 2 * target.slot.rows * target.slot.cols for target, _ in copies)
        return made(copies)

    store = ParamStore(rt.heap, rt.pool, m.specs(), True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(network.Network, "_copy_tasks", staticmethod(counting))
        Network(rt, m, store, 64, 1, True)
    assert sum(moved) == sum(u.copied * u.times for u in design_of(m, 64, 1, rt.boundaries).units)


def test_groups_keep_flops_and_save_dispatches_where_inputs_allow() -> None:
    m = model("tiny", seq_len=64)
    caps = replace(ANE, max_inputs=24)
    apart, one = (design_of(m, 64, 1, Boundaries("ports", g, caps, packable=False), caps) for g in (0, 1))
    assert sum(u.times for u in one.units) == 2 * m.config.n_layers  # a program forward, one backward
    assert sum(u.times for u in one.units) < sum(u.times for u in apart.units)
    assert sum(u.flops * u.times for u in one.units) == sum(u.flops * u.times for u in apart.units)
    assert (
        one.grad_flops
        == apart.grad_flops
        == pytest.approx(
            2 * 64 * m.config.n_layers * sum(s.size for n, s in m.layer_params(m.config).items() if s.shape[1] > 1)
        )
    )


# ---- the verb


def test_the_verb(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["estimate", f"{STORIES}:tiny", "--chip", "m4", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["default"]["name"] == "packed, 2 layers in one" and report["chip"] == "m4"
    assert report["host_tflops"] == list(BLAS_TFLOPS)
    allowed = [b for b in report["boundaries"] if b["allowed"]]
    assert {b["name"].split(",")[0] for b in allowed} == {"packed"}
    assert {b["name"].split(",")[0] for b in report["boundaries"]} == {"packed", "ports"}
    assert report["default"]["engine_ms"]["middle"] == min(b["engine_ms"]["middle"] for b in allowed)
    assert 0 < report["default"]["ms"]["best"] < report["default"]["ms"]["worst"]
    assert len(report["same_model"]) >= 2 and len(report["calibration"]) == len(paper.CALIBRATION)
    assert main(["estimate", f"{STORIES}:tiny", "--max-inputs", "24", "--layout", "ports"]) == 0
    shown = capsys.readouterr().out
    assert "by Accelerate on the matrix unit: 0.759 to 1.76 TFLOPS; nobody has measured" in shown
    assert (
        "once doctor" not in shown
        and "<- a run's default" in shown
        and "M4, whole step, Stories110M" in shown
        and " to " in shown
    )


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (("--chip", "m9"), "--chip m9: no published figures of it; there are m1, m2"),
        (("--seq-len", "0"), "expected a whole number of at least 1, got 0"),
        (("--chipp", "m4"), "no option '--chipp': did you mean --chip?"),
    ],
)
def test_bad_input(argv: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["estimate", f"{STORIES}:tiny", *argv]) == 2
    err = capsys.readouterr().err
    assert message in err and err.count("\n") == 1
