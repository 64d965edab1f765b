"""Where programs begin and end: what may be chosen, what is, and that a run computes the same whatever was."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from small_run import bits, trainer, write_text
from test_network import gradients, model_of, network

from anert import boundaries, capabilities
from anert.boundaries import CHIPS, candidates, from_state, ranked, to_state
from anert.capabilities import ANE, CPU
from anert.errors import EngineError, InputError
from anert.events import Notice, RunDone, RunStarted, StepDone
from anert.plugin import load
from anert.runtime import Runtime
from anert.stages import Boundaries

STORIES = Path(__file__).resolve().parents[1] / "plugins" / "stories.py"
PROBED = replace(ANE, layout="ports", max_inputs=24, compile_budget=1000)


@pytest.fixture(scope="module")
def stories() -> Any:
    return load(str(STORIES))


# ---- what may be chosen


def test_separate_ports_wait_for_a_probe() -> None:
    assert {b.layout for b in candidates(ANE)} == {"packed"}
    assert {b.layout for b in candidates(PROBED)} == {"packed", "ports"}
    assert {b.layout for b in candidates(ANE, "ports")} == {"ports"}  # asked for
    assert candidates(ANE)[0].portable and [b.portable for b in candidates(ANE)].count(True) == 1


def test_what_was_asked_for_is_all_there_is() -> None:
    assert candidates(PROBED, "packed", "blocks") == [Boundaries("packed")]
    assert {b.group for b in candidates(PROBED, "auto", "3")} == {3}
    assert all(b.limits.max_inputs == 24 for b in candidates(PROBED, "ports", "1"))


def test_a_machine_that_takes_less_gets_less() -> None:
    small = replace(ANE, max_inputs=6, max_width=8192)
    found = candidates(small) + candidates(small, "ports") + candidates(small, "ports", "blocks")
    assert not any(b.portable for b in found) and {b.limits.max_width for b in found} == {8192}
    assert {b.limits.max_inputs for b in candidates(small, "ports", "blocks")} == {6}


@pytest.mark.parametrize("caps", [ANE, PROBED, replace(PROBED, max_width=6656)])
def test_designs_keep_to_inputs_and_width(stories: Any, caps: Any) -> None:
    from anert.blocks import build_blocks

    preset = stories.preset("110m")
    model = preset.model(preset.config)
    rows = ranked(model, 256, 1, candidates(caps), caps, CHIPS["m4"])
    assert len(rows) > 3
    middles = [t.middle for d, t in rows if not any(u.past_sram for u in d.units)]
    assert middles == sorted(middles) and not any(u.past_sram for u in rows[0][0].units)
    assert [any(u.past_sram for u in d.units) for d, _ in rows] == sorted(
        any(u.past_sram for u in d.units) for d, _ in rows
    )
    for design, _ in rows:
        assert design.bounds is not None
        for kernel in (k for b in build_blocks(model, 256, 1, True, design.bounds, caps) for k in b.kernels):
            ports = {s.port: s for s in kernel.inputs.values()}
            assert len(ports) <= caps.max_inputs
            if design.bounds.layout == "packed":
                assert max(s.row_stride for s in ports.values()) <= caps.max_width


def test_boundaries_outlast_a_checkpoint() -> None:
    for bounds in candidates(PROBED):
        assert from_state(to_state(bounds)) == bounds
    assert from_state(None) is None and from_state({"layout": "ports", "group": "x"}) is None


# ---- that it computes the same


@pytest.mark.parametrize("layout", ["ports", "packed"])
@pytest.mark.parametrize("fusion", ["1", "2"])
@pytest.mark.parametrize("engine", [False, True])
def test_layers_in_one_have_the_bits_of_blocks_apart_where_every_op_rounds(
    stories: Any, monkeypatch: pytest.MonkeyPatch, fusion: str, layout: str, engine: bool
) -> None:
    """In precision fp16 a port rounds what is rounded already: then boundaries change no bit of a loss. engine: cut by
    the engine's limits. Gradients are PyTorch's in test_network."""
    if engine:
        monkeypatch.setattr(Runtime, "_boundaries", lambda rt, layout, fusion: candidates(PROBED, layout, fusion)[-1])
    model = model_of(stories, n_layers=4, seq_len=32)
    one = network(model, precision="fp16", layout=layout, fusion=fusion)
    apart = network(model, precision="fp16", layout=layout, fusion="blocks")
    assert one.layers == 4 // int(fusion) and one.runtime.boundaries.group == int(fusion)
    assert one.kernels * one.layers < apart.kernels * apart.layers
    tokens, targets = np.random.default_rng(2).integers(0, 100, (2, one.n), dtype=np.int32)
    for net in (one, apart):
        net.loss(tokens, targets)
    assert one.loss(tokens, targets) == apart.loss(tokens, targets) and one.amax()[1] == -1
    assert np.array_equal(one.x[-1].array(), apart.x[-1].array()) and np.ptp(one.x[-1].array()) > 0.1


def test_layers_in_one_differ_by_the_rounding_of_ports(stories: Any) -> None:
    model = model_of(stories, n_layers=4)
    (a, ga), (b, gb) = (gradients(network(model, fusion=f)) for f in ("2", "blocks"))
    assert a == pytest.approx(b, rel=1e-4)
    off = sum(float(np.sum((ga[n] - gb[n]) ** 2)) for n in ga) / sum(float(np.sum(g**2)) for g in gb.values())
    assert 0 < off**0.5 < 1e-3


def test_a_nan_is_named_by_its_layers(stories: Any) -> None:
    net = network(model_of(stories, n_layers=4), fusion="2")
    net.store["layers.3.w1"].master[5, 7] = np.nan
    net.store.sync()
    tokens = np.arange(net.n, dtype=np.int32) % 100
    net.loss(tokens, tokens)
    assert net.name_nonfinite().startswith("layers 2 to 3, op ")


@pytest.mark.parametrize(
    ("fusion", "message"),
    [("3", "4 layers do not come in groups of 3"), ("0", "--fusion takes auto, blocks or a number of layers, got '0'"),
     ("all", "got 'all'"), ("-1", "got '-1'")],
)  # fmt: skip
def test_bad_fusion(stories: Any, fusion: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        network(model_of(stories, n_layers=4), fusion=fusion)


# ---- what a run chooses


def record(monkeypatch: pytest.MonkeyPatch, folder: Path, caps: Any) -> None:
    monkeypatch.setenv("ANERT_CAPABILITIES", str(folder / "capabilities.json"))
    capabilities.write_record(caps, {})


def small(data: Path, out: Path, **more: Any) -> list[Any]:
    given = {"backend": "ane", "precision": "fp32", "steps": 6, "eval_every": 6, "save_every": 3, **more}
    return list(trainer(data, out, **given).run())


def chosen(events: list[Any]) -> list[str]:
    return [e.text for e in events if isinstance(e, Notice) and e.text.startswith("kernel boundaries")]


def losses(events: list[Any]) -> list[float]:
    return [e.loss for e in events if isinstance(e, StepDone)]


def test_a_run_takes_what_is_predicted_fastest_and_says_so(fake_ane, tmp_path, monkeypatch) -> None:
    """Against the same choice on the CPU, step by step; the options that are asked for win."""
    monkeypatch.setenv("ANERT_ANE_FRAMEWORK", fake_ane(max_inputs=24).path)
    data = write_text(tmp_path / "text.txt")
    record(monkeypatch, tmp_path, replace(ANE, compile_budget=1000))
    found = small(data, tmp_path / "safe")
    (text,) = chosen(found)
    assert "kernel boundaries: packed, 1 layer in one: " in text and " ms a step, of 3 choices on paper (m4)" in text
    assert "separate ports wait for `anert doctor`" in text
    record(monkeypatch, tmp_path, PROBED)
    probed = small(data, tmp_path / "probed")
    (text,) = chosen(probed)
    assert "ports, 1 layer in one, at most 24 inputs: " in text and "doctor" not in text
    started = next(e for e in probed if isinstance(e, RunStarted))
    assert started.layout == "ports"
    apart = small(data, tmp_path / "apart", layout="packed", fusion="blocks")
    assert "packed, blocks apart, as on cpu: " in chosen(apart)[0]
    cpu = small(data, tmp_path / "cpu", backend="cpu")
    assert chosen(cpu) == []
    np.testing.assert_allclose(losses(apart), losses(cpu), rtol=1e-6)
    for events in (found, probed):
        assert losses(events) != losses(apart), "ports round elsewhere"
        np.testing.assert_allclose(losses(events), losses(apart), rtol=1e-3)
    kernels = [next(e for e in x if isinstance(e, RunDone)).summary["kernels"] for x in (probed, found, apart)]
    assert kernels == sorted(kernels) and kernels[0] < kernels[2]


def test_a_run_goes_on_with_the_boundaries_that_it_began_with(fake_ane, tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("ANERT_ANE_FRAMEWORK", fake_ane(max_inputs=24).path)
    data = write_text(tmp_path / "text.txt")
    record(monkeypatch, tmp_path, PROBED)
    given = {"layout": "packed", "warmup": 0, "lr": 1e-3, "min_lr": 1e-3, "eval_every": 0}
    whole = small(data, tmp_path / "whole", **given)
    small(data, tmp_path / "half", **{**given, "steps": 3})
    rest = small(data, tmp_path / "half", **{**given, "init": "resume", "layout": "auto"})  # ports would be chosen now
    assert chosen(rest) == ["kernel boundaries: packed, 1 layer in one, as the run began"]
    assert losses(rest) == losses(whole)[3:] and bits(tmp_path / "half") == bits(tmp_path / "whole")


def test_what_the_engine_refuses_is_not_insisted_on(fake_ane, tmp_path, monkeypatch) -> None:
    """Chosen on paper: blocks apart instead, with a warning. Asked for: an error."""
    fake = fake_ane(max_inputs=24)
    monkeypatch.setenv("ANERT_ANE_FRAMEWORK", fake.path)
    data = write_text(tmp_path / "text.txt")
    record(monkeypatch, tmp_path, PROBED)
    compile_as_ever = fake.compiler.compile

    def picky(job: Any) -> None:
        if b"_l0_w1" in bytes(fake.compiler.ffi.buffer(job.text, job.text_bytes)):
            fake.compiler.refuse(job, "too much of it", invalid=False)
        else:
            compile_as_ever(job)

    monkeypatch.setattr(fake.compiler, "compile", picky)
    found = small(data, tmp_path / "picky")
    first, second = chosen(found)
    assert "ports, 1 layer in one" in first and "ports, blocks apart, as on cpu instead" in second
    assert "too much of it" in second and len(losses(found)) == 6
    try:
        small(data, tmp_path / "asked", fusion="1")
    except EngineError as error:  # not pytest.raises, which keeps what the engine wants back
        assert "too much of it" in str(error)
    else:
        pytest.fail("the engine took what it refuses")


def test_no_choice_is_said_in_one_line(stories: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of(stories, n_layers=4)
    rt = Runtime("cpu", threads=1)
    rt.backend.name, rt.backend.capabilities, rt.fusion = "ane", ANE, "3"
    with pytest.raises(InputError, match=r"--fusion 3: no kernels of 4 layers within 8 inputs"):
        boundaries.settle(rt, model, 24, 1)
    assert CPU.name == "cpu"


@pytest.mark.parametrize(
    ("brand", "chip"), [("Apple M3 Ultra", "m3"), ("Apple M4", "m4"), ("Apple M19", "m4"), ("x86", "m4")]
)
def test_the_chip_of_this_machine(monkeypatch: pytest.MonkeyPatch, brand: str, chip: str) -> None:
    monkeypatch.setattr(boundaries, "machine_key", lambda: {"chip": brand})
    assert boundaries.chip_here() == chip
