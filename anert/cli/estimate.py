"""`anert estimate PLUGIN[:PRESET] --chip m4`: a training step on a Neural Engine that is not here, on paper."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from anert.cli.parser import Parser, reader

ABOUT = """\
Predict a training step on the Neural Engine from the kernels that a run would compile: dispatches, bytes, FLOPs, what
overlaps, and ms as an interval over published rates; and rank the kernel boundaries, as a run does that chooses its
own. The same arithmetic is set against published runs of another program, with its error on each. Nothing is compiled,
and nothing here was measured by anert on a Neural Engine.
"""


def main(argv: Sequence[str]) -> int:
    from dataclasses import replace

    from anert import estimate as paper
    from anert.boundaries import BLAS_TFLOPS, CHIPS, NEON_TFLOPS
    from anert.capabilities import ANE, load_record
    from anert.plugin import load, split_name

    parser = Parser(prog="anert estimate", description=ABOUT, usage="anert estimate PLUGIN[:PRESET] [options]")
    add = parser.add_argument
    add("plugin", metavar="PLUGIN", help="the model, as plugins/stories.py:110m")
    add("--chip", default="m4", metavar="NAME", help=f"of {', '.join(CHIPS)} [%(default)s]")
    add("--seq-len", default=0, type=reader(int, 1), metavar="N", help="positions [the preset's]")
    add("--batch", default=1, type=reader(int, 1), metavar="N", help="sequences [%(default)s]")
    add("--max-inputs", default=0, type=reader(int, 1), metavar="N",
        help="inputs of a program [what doctor recorded here, else 8]")  # fmt: skip
    add("--layout", default="", choices=("", "packed", "ports"), metavar="NAME",
        help="ports: as if doctor had found that inputs bind in order [recorded here, else packed]")  # fmt: skip
    add("--host", default="blas", choices=("blas", "neon"), metavar="NAME",
        help="the host's products: blas (Accelerate) or neon, as with ANERT_ISA=neon [%(default)s]")  # fmt: skip
    add("--json", action="store_true", help="one JSON object instead")
    found = parser.parse(argv)
    name, preset = split_name(found.plugin)
    chosen = load(name).preset(preset)
    config = chosen.config
    if found.seq_len:
        config = replace(config, seq_len=found.seq_len)
    rates = BLAS_TFLOPS if found.host == "blas" else NEON_TFLOPS
    caps = load_record() or ANE
    caps = replace(caps, max_inputs=found.max_inputs or caps.max_inputs, layout=found.layout or caps.layout)
    report = paper.estimate(chosen.model(config), found.chip, config.seq_len, found.batch, caps, rates)
    report = {"model": found.plugin, "host": found.host, **report}
    print(json.dumps(report) if found.json else text(report))
    return 0


HOSTS = {"blas": "by Accelerate on the matrix unit", "neon": "on NEON"}


def text(r: dict[str, Any]) -> str:
    """The report for people."""
    d = r["default"]
    low, high = r["host_tflops"]
    lines = [
        f"{r['model']} on {r['chip'].upper()}, seq_len {r['seq_len']}, batch {r['batch']}, on paper: a step of "
        "forward, backward and weight gradients",
        f"rates: {r['source']}",
        f"host products {HOSTS[r['host']]}: {low:g} to {high:g} TFLOPS; nobody has measured anert's",
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
        mark = "  <- a run's default" if b.get("default") else "" if b["allowed"] else "  once doctor allows ports"
        lines.append(f"  {b['name'].ljust(41)}{b['dispatches']:4} dispatches  {span(b['engine_ms'])} ms{mark}")
    if r["same_model"]:
        lines.append("beside the published design, both with host products on the matrix unit:")
        lines += [f"  {b['name'].ljust(60)}{span(b['ms'])} ms" for b in r["same_model"]]
    lines.append("the same arithmetic on the published design against its published times:")
    for c in r["calibration"]:
        outside = "" if c["inside"] else "  outside the interval"
        lines.append(f"  {c['what'].ljust(54)}{c['published_ms']:6.1f} ms: {c['best_ms']:.1f} to {c['worst_ms']:.1f}, "
                     f"middle {c['error']:+.0%}{outside}")  # fmt: skip
    return "\n".join(lines)


def span(i: dict[str, float]) -> str:
    return f"{i['best']:.1f} to {i['worst']:.1f} (middle {i['middle']:.1f})"
