"""`anert eval CHECKPOINT --data FILE`."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path

from anert.cli.meter import Meter
from anert.cli.parser import Parser, reader
from anert.cli.sample import plugin_for


def main(argv: Sequence[str]) -> int:
    from anert.events import Evaluated

    parser = Parser(prog="anert eval", description="Loss, perplexity and bits per byte of a trained model on a text.")
    add = parser.add_argument
    add("checkpoint", metavar="CHECKPOINT", type=Path, help="a run's directory, a step's, or a model file")
    add("--data", required=True, metavar="FILE", help="text, or a file of token ids")
    add("--data-dtype", default="auto", metavar="NAME", help="of raw ids: uint16 or uint32 [as the numbers show]")
    add("--plugin", default="", metavar="PLUGIN", help="a file or an installed name [the checkpoint's, else stories]")
    add("--tokenizer", default="", metavar="FILE", help="tokenizer file [the checkpoint's own]")
    add("--tokens", default=0, type=reader(int), metavar="N", help="how many to predict; 0: all [%(default)s]")
    add("--backend", default="auto", metavar="NAME", help="auto, cpu, ane or reference [%(default)s]")
    add("--precision", default="fp32", metavar="NAME", help="auto, fp32, bf16 or fp16 [%(default)s]")
    add("--threads", default=0, type=reader(int), metavar="N", help="0: what the machine grants [%(default)s]")
    add("--json", action="store_true", help="one JSON object as the last line of stdout")
    add("--debug", action="store_true", help="an error keeps its traceback")
    found = parser.parse(argv)
    plugin = plugin_for(found.checkpoint, found.plugin)
    from anert.evaluate import evaluate

    meter = Meter()
    options = {k: getattr(found, k) for k in ("tokenizer", "tokens", "backend", "precision", "threads", "data_dtype")}
    for event in evaluate(found.checkpoint, found.data, plugin, **options):
        meter.show(event)
        if isinstance(event, Evaluated):
            meter.clear()
            print(_line(event), file=sys.stderr if found.json else sys.stdout)
            if found.json:
                plain = {k: None if isinstance(v, float) and math.isnan(v) else v for k, v in event.as_dict().items()}
                print(json.dumps({**plain, "data": found.data, "checkpoint": str(found.checkpoint), **options}))
    return 0


def _line(event: object) -> str:
    from anert.events import Evaluated

    assert isinstance(event, Evaluated)
    interval = "" if math.isnan(event.loss_low) else f" [{event.loss_low:.4f}, {event.loss_high:.4f}]"
    bits = "" if math.isnan(event.bits_per_byte) else f"  bits/byte {event.bits_per_byte:.4f}"
    size = f"{event.tokens:,} tokens, {event.bytes:,} bytes, {event.windows:,} windows"
    return f"loss {event.loss:.4f}{interval}  perplexity {event.perplexity:.4g}{bits}  ({size})"
