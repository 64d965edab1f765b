"""Baked weights against weights as tensors: the same numbers, at the price of a compile for every kernel and update."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from small_run import ROOT, STORIES, flags, write_text

from anert.backend.reference import evaluate
from anert.capabilities import ANE
from anert.cli import main
from anert.errors import CompileError, InputError, ShapeError
from anert.mil import passes
from anert.mil.graph import Function
from anert.mil.text import parse
from anert.network import Network
from anert.optim import AdamW
from anert.param import ParamStore
from anert.plugin import load
from anert.runtime import Runtime

SHAPE = {"dim": 64, "hidden_dim": 160, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "vocab_size": 100, "seq_len": 24}


def network(strategy: str, precision: str = "fp32", **runtime: Any) -> Network:
    preset = load(str(STORIES)).preset("tiny")
    model = preset.model(replace(preset.config, **SHAPE))
    rt = Runtime("cpu", precision, threads=1, strategy=strategy, **runtime)
    store = ParamStore(rt.heap, rt.pool, model.specs(), train=True)
    store.initialise(3)
    net = Network(rt, model, store, SHAPE["seq_len"], 1, True)
    store.sync()
    return net


def steps(net: Network, n: int) -> list[float]:
    optimizer = AdamW(net.store, 0.9, 0.95, 1e-8, 0.1)
    ids = np.random.default_rng(0).integers(0, SHAPE["vocab_size"], net.n + 1).astype(np.int32)
    losses = []
    for _ in range(n):
        net.zero_grad()
        losses.append(net.loss_backward(ids[:-1].copy(), ids[1:].copy(), 256.0))
        optimizer.grad_norm()
        net.update(optimizer, 1e-2, 1.0)
    return losses


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_same_losses_to_the_bit(precision: str) -> None:
    tensors, baked = network("tensors", precision), network("baked", precision)
    assert steps(baked, 3) == steps(tensors, 3)
    assert (baked.store.master == tensors.store.master).all()
    assert baked.flops == tensors.flops


def test_every_update_compiles_every_kernel_that_reads_weights_in_every_layer() -> None:
    net = network("baked")
    rt = net.runtime
    assert rt.baked is not None
    reading = sum(bool(k.weights) for b in net._blocks for k in b.kernels)
    before = rt.backend.compiles
    assert rt.baked.per_update == reading * SHAPE["n_layers"] and before == net.kernels - reading
    steps(net, 2)
    # gains are ones at first, so that kernels of gains alone are the same text in every layer: compiled all the same
    assert rt.backend.compiles - before == 2 * rt.baked.per_update == rt.baked.compiles
    loss = net.loss(*[np.zeros(net.n, np.int32)] * 2)[0]
    assert np.isfinite(loss)
    forward = sum(bool(k.weights) for b in net._blocks for k in b.forward) * SHAPE["n_layers"]
    assert rt.baked.compiles == 2 * rt.baked.per_update + forward
    net.loss(*[np.zeros(net.n, np.int32)] * 2)
    assert rt.baked.compiles == 2 * rt.baked.per_update + forward  # nothing was written in between
    assert len(rt.backend._cache) == net.kernels - reading  # no update keeps the programs of the one before


def test_the_budget_is_counted() -> None:
    net = network("baked", compile_budget=25)
    baked = net.runtime.baked
    assert baked is not None and baked.affords()
    steps(net, 1)
    assert not baked.affords() and not baked.affords(all_of_them=True)
    with pytest.raises(CompileError, match="the compile budget of 25 programs is spent"):
        steps(net, 1)
    short = network("baked", compile_budget=10).runtime.baked
    assert short is not None
    with pytest.raises(CompileError, match=r"cost \d+ compiles an update, and of the budget of 10"):
        short.affords()


def test_weights_that_share_a_port_are_refused() -> None:
    with pytest.raises(InputError, match="baked weights need --layout ports"):
        network("baked", layout="packed")
    with pytest.raises(InputError, match="--strategy takes one of tensors, baked, got 'fresh'"):
        Runtime("cpu", strategy="fresh")


def test_a_constant_of_another_shape_is_refused() -> None:
    f = Function("main")
    x = f.input("x", (4, 8))
    f.returns(x + 1.0)
    with pytest.raises(ShapeError, match=r"input 'x' is \(4, 8\), its constant \(8, 4\)"):
        passes.specialise(f, {"x": np.zeros((8, 4), np.float16)})


@pytest.mark.parametrize("part", ["forward", "backward"])
def test_constant_weights_become_convolutions_on_the_neural_engine(part: str) -> None:
    """The kernels as the engine would get them: no matmul has a constant operand, and the numbers are the same."""
    from anert.blocks import build_blocks

    preset = load(str(STORIES)).preset("tiny")
    model = preset.model(replace(preset.config, **{**SHAPE, "seq_len": 32}))
    rng = np.random.default_rng(1)
    for block in build_blocks(model, 32, 1, True, "ports", ANE):
        for kernel in getattr(block, part):
            if not kernel.weights:
                continue
            function = parse(kernel.text, blobs=kernel.blobs).main
            values = {v.name: (rng.standard_normal(v.shape) / 8).astype(np.float16) for v in function.inputs}
            ports = {kernel.inputs[n].port for n in kernel.weights}
            special = passes.specialise(function, {n: a for n, a in values.items() if n in ports})
            turned = passes.constant_products(special)
            assert not [op for op in turned.ops if op.kind == "matmul" and any(v.is_const for v in op.operands())], (
                kernel.name
            )
            others = {n: a for n, a in values.items() if n not in ports}
            expected, found = evaluate(function, values, "float64"), evaluate(turned, others, "float64")
            assert list(expected) == list(found)
            for name in expected:
                np.testing.assert_allclose(found[name], expected[name], rtol=2e-3, atol=2e-3)


# ---- a run that wears its process out


def run(out: Path, data: Path, **more: Any) -> list[dict[str, Any]]:
    """The events of `anert run` in a process of its own, over all that it becomes."""
    command = [sys.executable, "-m", "anert", "run", *flags(data, out, steps=6, save_every=100, **more)]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in (out / "events.jsonl").read_text().splitlines()]


def test_a_run_goes_on_in_fresh_processes_with_the_same_losses(tmp_path: Path) -> None:
    data = write_text(tmp_path / "text.txt")
    tensors = run(tmp_path / "tensors", data)
    baked = run(tmp_path / "baked", data, strategy="baked", compile_budget=20)

    def of(events: list[dict[str, Any]], kind: str) -> list[dict[str, Any]]:
        return [e for e in events if e["event"] == kind]

    assert [e["reason"] for e in of(tensors, "RunDone")] == ["steps"]
    *spent, last = of(baked, "RunDone")
    assert len(spent) >= 2 and {e["reason"] for e in spent} == {"budget"} and last["reason"] == "steps"
    assert len(of(baked, "RunStarted")) == len(spent) + 1
    assert all(e["compiles"] <= 20 for e in of(baked, "StepDone"))
    keys = ("step", "loss", "grad_norm", "loss_scale", "amax")
    assert [[e[k] for k in keys] for e in of(baked, "StepDone")] == [
        [e[k] for k in keys] for e in of(tensors, "StepDone")
    ]
    assert len({e["loss"] for e in of(baked, "StepDone")}) == 6


def test_a_budget_without_room_for_one_update_is_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = write_text(tmp_path / "text.txt")
    argv = flags(data, tmp_path / "run", steps=2, strategy="baked", compile_budget=9)
    assert main(["run", *argv]) == 1
    err = capsys.readouterr().err
    assert "raise it with --compile-budget, or take --strategy tensors" in err and err.count("\n") == 1
