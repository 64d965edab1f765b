"""Stages and wire forms: whatever the layout and the padding, the numbers are those of the Function."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from test_grad import attention, cfg, ffn, random_inputs, shapes, trace

from anert.backend.reference import evaluate
from anert.capabilities import ANE, CPU
from anert.errors import ShapeError, Unpackable
from anert.kernel import build
from anert.mil.grad import differentiate
from anert.mil.graph import Function
from anert.mil.lint import lint
from anert.mil.parser import parse
from anert.mil.passes import fold_constants
from anert.plugin import load
from anert.stages import Stage, roles, split

ROOT = Path(__file__).resolve().parents[1]

CASES = [
    (attention, {}, 12, 1),
    (attention, {"n_kv_heads": 2}, 6, 2),
    (ffn, {}, 12, 1),
    (ffn, {"hidden_dim": 36}, 6, 2),
]


def functions(block, over, seq_len, batch):
    c = cfg(**over)
    gradient = differentiate(trace(block, c, seq_len, batch), ["x"], shapes(c, block))
    return (gradient.forward, gradient.backward), list(shapes(c, block))


def run_staged(function, params, inputs, layout, caps):
    """Every stage through its wire form: ports filled and read by slots only."""
    role = roles(function, params)
    have = dict(inputs)
    for stage in split(function, role):
        kernel = build(stage, role, layout, caps, "k")
        main = parse(kernel.text, blobs=kernel.blobs).main
        ports = {v.name: np.zeros(v.type.size) for v in main.inputs}
        for name, slot in kernel.inputs.items():
            r, c, b = np.ogrid[: slot.rows, : slot.cols, : slot.broadcast]
            ports[slot.port][slot.offset + r * slot.row_stride + c * slot.col_stride + b] = have[name].reshape(
                slot.rows, slot.cols, 1
            )
        out = evaluate(main, {v.name: ports[v.name].reshape(v.shape) for v in main.inputs}, precision="float64")
        for name, slot in kernel.outputs.items():
            flat = out[slot.port].reshape(-1)
            r, c = np.ogrid[: slot.rows, : slot.cols]
            have[name] = flat[slot.offset + r * slot.row_stride + c * slot.col_stride]
    return {v.name: have[v.name].reshape(v.shape) for v in function.outputs}


@pytest.mark.parametrize("caps", [CPU, ANE, replace(ANE, opset="ios16")], ids=["cpu", "ane", "ios16"])
@pytest.mark.parametrize("layout", ["ports", "packed"])
@pytest.mark.parametrize("case", CASES, ids=lambda c: f"{c[0].__name__}-{c[3]}")
def test_wire_form_computes_the_function(case, layout, caps):
    for function in functions(*case)[0]:
        params = functions(*case)[1]
        inputs = {k: v.astype(np.float64) for k, v in random_inputs(function).items()}
        meant = fold_constants(function, exact=False) if caps.fp16_interior else function
        want = evaluate(meant, inputs, precision="float64")
        got = run_staged(function, params, inputs, layout, caps)
        assert got.keys() == want.keys()
        for name in want:
            np.testing.assert_allclose(got[name], want[name], rtol=1e-9, atol=1e-12, err_msg=name)


@pytest.mark.parametrize("kv", [12, 4])
def test_stages_of_the_110m_blocks(kv):
    c = cfg(dim=768, hidden_dim=2048, n_heads=12, n_kv_heads=kv)
    for block, forward, backward in ((attention, 1, 2 if kv == 12 else 4), (ffn, 1, 3)):
        gradient = differentiate(trace(block, c, 256, 1), ["x"], shapes(c, block))
        for function, count in ((gradient.forward, forward), (gradient.backward, backward)):
            stages = split(function, roles(function, shapes(c, block)))
            assert len(stages) == count
            for stage in stages:
                assert stage.mode in ("column", "channel")
                assert len(stage.function.inputs) <= ANE.max_inputs
                assert all(v.type.rank == 2 for v in (*stage.function.inputs, *stage.function.outputs))


def test_ports_are_named_in_one_order():
    function = functions(ffn, {}, 8, 1)[0][0]
    stage = split(function, roles(function, shapes(cfg(), ffn)))[0]
    kernel = build(stage, roles(function, shapes(cfg(), ffn)), "ports", ANE, "k")
    main = parse(kernel.text, blobs=kernel.blobs).main
    names = [v.name for v in main.inputs]
    assert names == sorted(names) and [v.name for v in main.outputs] == sorted(v.name for v in main.outputs)
    assert all(v.type.rank == 4 and v.shape[0] == v.shape[2] == 1 and v.shape[3] % 32 == 0 for v in main.inputs)


def test_what_cannot_be_packed_is_said():
    fn = Function("odd")
    a, b = fn.input("a", (4, 6)), fn.input("b", (8, 5))
    fn.returns(a * 2.0, b * 2.0)
    with pytest.raises(Unpackable, match=r"a \(4, 6\), b \(8, 5\)"):
        build(Stage(fn, ""), {}, "packed", ANE, "odd")
    with pytest.raises(ShapeError, match="unknown layout"):
        build(Stage(fn, ""), {}, "rows", ANE, "odd")


@pytest.fixture(scope="module")
def stories():
    return load(str(ROOT / "plugins" / "stories.py"))


def shipped(plugin, preset):
    """(function, its parameters) of every program that training and inference of a preset need."""
    model = plugin.preset(preset).model(plugin.preset(preset).config)
    for block in model.blocks:
        fn = model.trace(block, model.config.seq_len, 1)
        params = [v.name for v in fn.inputs if v.name != "x"]
        gradient = differentiate(fn, ["x"], params)
        yield from ((f, params) for f in (gradient.forward, gradient.backward, fn))


@pytest.mark.parametrize("preset", ["tiny", "260k", "15m", "42m", "110m"])
def test_shipped_kernels_break_no_rule_of_the_engine(stories, preset):
    """No error of the catalogue, agreed or disputed, on any chip; no name that failed on one."""
    kernels = 0
    for function, params in shipped(stories, preset):
        role = roles(function, params)
        for stage in split(function, role):
            for layout in ("ports", "packed"):
                kernel = build(stage, role, layout, ANE, "k")
                found = lint(parse(kernel.text, blobs=kernel.blobs).main)
                bad = [f for f in found if f.severity == "error" or f.rule == "ANE120"]
                assert not bad, (layout, function.name, bad[0].rule, bad[0].message)
                kernels += 1
    assert kernels >= 2 * 6


def test_the_cpu_s_kernels_are_padded_nowhere(stories):
    """head_dim 8 and hidden 172: zeros cost time, and this engine does not need them."""
    for function, params in shipped(stories, "260k"):
        role = roles(function, params)
        for stage in split(function, role):
            here, there = (build(stage, role, "ports", caps, "k").text for caps in (CPU, ANE))
            assert "concat" not in here
            assert ("concat" in there) == any(op.kind == "matmul" and contracted(op) % 32 for op in stage.function.ops)


def contracted(op):
    x = op.inputs["x"].shape
    return x[-2] if op.attrs["transpose_x"] else x[-1]
