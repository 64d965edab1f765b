"""`anert estimate PLUGIN[:PRESET] --chip m4`: a training step on a Neural Engine that is not here, on paper."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from anert.cli.parser import Parser, reader

ABOUT = """\
Predict a training step on the Neural Engine from the kernels that a run would compile: dispatches, bytes, FLOPs, what
overlaps, and ms as an interval over published rates. The same arithmetic is set against published runs of another
program, with its error on each. Nothing is compiled, and nothing here was measured by anert on a Neural Engine.
"""


def main(argv: Sequence[str]) -> int:
    from dataclasses import replace

    from anert import estimate as paper
    from anert.capabilities import ANE
    from anert.plugin import load, split_name

    parser = Parser(prog="anert estimate", description=ABOUT, usage="anert estimate PLUGIN[:PRESET] [options]")
    add = parser.add_argument
    add("plugin", metavar="PLUGIN", help="the model, as plugins/stories.py:110m")
    add("--chip", default="m4", metavar="NAME", help=f"of {', '.join(paper.CHIPS)} [%(default)s]")
    add("--seq-len", default=0, type=reader(int, 1), metavar="N", help="positions [the preset's]")
    add("--batch", default=1, type=reader(int, 1), metavar="N", help="sequences [%(default)s]")
    add("--max-inputs", default=ANE.max_inputs, type=reader(int, 1), metavar="N",
        help="inputs of a program; more than 8 if doctor found that the engine takes them [%(default)s]")  # fmt: skip
    add("--host-blas", action="store_true", help="the host's products at the rate of its matrix unit, not of NEON")
    add("--json", action="store_true", help="one JSON object instead")
    found = parser.parse(argv)
    name, preset = split_name(found.plugin)
    chosen = load(name).preset(preset)
    config = chosen.config
    if found.seq_len:
        config = replace(config, seq_len=found.seq_len)
    rates = paper.BLAS_TFLOPS if found.host_blas else paper.NEON_TFLOPS
    caps = replace(ANE, max_inputs=found.max_inputs)
    report = paper.estimate(chosen.model(config), found.chip, config.seq_len, found.batch, caps, rates)
    report = {"model": found.plugin, **report}
    print(json.dumps(report) if found.json else text(report))
    return 0


def text(r: dict[str, Any]) -> str:
    """The report for people."""
    d = r["default"]
    low, high = r["host_tflops"]
    lines = [
        f"{r['model']} on {r['chip'].upper()}, seq_len {r['seq_len']}, batch {r['batch']}, on paper: a step of "
        "forward, backward and weight gradients",
        f"rates: {r['source']}; host products {low:g} to {high:g} TFLOPS",
        f"a run: {d['name']}: {d['dispatches']} dispatches, {d['flops'] / 1e9:.1f} GFLOP, {d['bytes'] / 1e6:.0f} MB",
        f"  {span(d['ms'])} ms a step; weight gradients run beside the backward, and the {d['bound_by']} is longer",
        *(f"    {name.ljust(18)}{span(i)} ms" for name, i in d["parts"].items() if i["worst"]),
        f"  AdamW and fp16 copies, once an optimizer step: {r['optimizer_ms']['best']:.0f} to "
        f"{r['optimizer_ms']['worst']:.0f} ms more",
        "kernels (all layers):",
    ]
    for u in r["units"]:
        past = "  past the SRAM" if u["past_sram"] else ""
        lines.append(
            f"  {u['name'].ljust(24)}{u['dispatches']:4} x {u['flops'] / 1e9:6.2f} GFLOP, {u['bytes_in'] / 1e6:5.1f} "
            f"MB in, {u['bytes_out'] / 1e6:4.1f} out, {u['copied'] / 1e6:4.1f} copied: {u['best_ms']:.1f} to "
            f"{u['worst_ms']:.1f} ms{past}"
        )
    lines.append("kernel boundaries, by the time of engine and copies:")
    for b in sorted(r["boundaries"], key=lambda b: float(b["engine_ms"]["middle"])):
        mark = "  <- a run's default" if b.get("default") else ""
        lines.append(f"  {b['name'].ljust(38)}{b['dispatches']:4} dispatches  {span(b['engine_ms'])} ms{mark}")
    if r["same_model"]:
        lines.append("beside the published design, both with host products on the matrix unit:")
        lines += [f"  {b['name'].ljust(54)}{span(b['ms'])} ms" for b in r["same_model"]]
    lines.append("the same arithmetic on the published design against its published times:")
    for c in r["calibration"]:
        outside = "" if c["inside"] else "  outside the interval"
        lines.append(f"  {c['what'].ljust(54)}{c['published_ms']:6.1f} ms: {c['best_ms']:.1f} to {c['worst_ms']:.1f}, "
                     f"middle {c['error']:+.0%}{outside}")  # fmt: skip
    return "\n".join(lines)


def span(i: dict[str, float]) -> str:
    return f"{i['best']:.1f} to {i['worst']:.1f} (middle {i['middle']:.1f})"
