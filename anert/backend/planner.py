"""MIL Function -> Plan: lowering, fusion, regions, memory. Loaded only when something is compiled."""

from __future__ import annotations

from collections.abc import Mapping

from anert.backend.attention import Finder
from anert.backend.base import Port, ProgramStats, written_flops
from anert.backend.emit import Emitted, Emitter
from anert.backend.fuse import Fuser, narrow, prune, read_outputs, retarget, widen_sums
from anert.backend.lower import Lowering, OpLowering
from anert.backend.nodes import Graph
from anert.backend.plan import Plan
from anert.backend.tiles import DIMS
from anert.errors import UnsupportedError
from anert.mil.graph import Function


def lowerings() -> dict[str, OpLowering]:
    """Every op that the engine runs."""
    from anert.backend import lower_contract, lower_moves, lower_ops

    return {**lower_ops.TABLE, **lower_moves.TABLE, **lower_contract.TABLE}


def plan_function(function: Function, precision: str, fuse: bool, encodings: Mapping[str, str]) -> Plan:
    """The plan of a Function. fuse=False: every elementwise op is a step of its own."""
    try:
        graph, emitted = _emitted(function, precision, fuse, encodings, 64)
    except UnsupportedError:  # a fused program over more dims than a step has: fuse less
        graph, emitted = _emitted(function, precision, fuse, encodings, DIMS)
    written = written_flops(function)
    encoded = {b.name: b.nbytes for b in emitted.buffers if b is not None and b.name in encodings}
    inputs = tuple(Port(v.name, v.type, encoded.get(v.name, 0)) for v in function.inputs)
    outputs = tuple(Port(v.name, v.type) for v in function.outputs)
    stats = ProgramStats(
        flops_written=written,
        flops_executed=written - emitted.skipped,
        bytes_in=sum(p.nbytes for p in inputs),
        bytes_out=sum(p.nbytes for p in outputs),
        steps=emitted.steps,
        arena_bytes=emitted.arena_bytes,
        patterns=dict(emitted.patterns),
    )
    return Plan(inputs, outputs, emitted.buffers, emitted.tables, tuple(graph.counters), stats)


def _emitted(
    function: Function, precision: str, fuse: bool, encodings: Mapping[str, str], max_dims: int
) -> tuple[Graph, Emitted]:
    graph = Lowering(function, precision, encodings).run(lowerings())
    prune(graph)
    if precision != "fp32":
        read_outputs(graph)
    retarget(graph)
    units = Fuser(graph, fuse, max_dims).run()
    if fuse:
        units = widen_sums(Finder(units).run())
    if precision == "bf16":
        narrow(units)
    return graph, Emitter(graph, units, precision).run()
