"""The probes on an engine without limits (the reference backend), and what becomes of a probe that dies."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest

from anert import probes
from anert.errors import CompileError, InputError
from anert.probes import PROBES, in_child, open_engine

LIMITLESS = {
    "dialect": "ios18 and ios16", "binding-order": "sorted", "output-order": "sorted", "unequal-sizes": "work",
    "max-inputs": "32", "width-multiple": "1", "max-width": "65536", "surface-size": "exact bytes work",
    "fp32-ports": "work", "matmul-limit": "32752", "slice-limit": "no limit", "conv-weights": "taken",
    "attention-mask": "heeded", "softmax-width": "256, 257, 272",
}  # fmt: skip
TIMED = ("dispatch-floor", "bandwidth")
"""Their answers are times, of NumPy here."""


@pytest.mark.parametrize("name", [n for n, p in PROBES.items() if not p.optional and n not in TIMED])
def test_an_engine_without_limits_has_none(name: str) -> None:
    outcome = PROBES[name].run(open_engine("reference", "ios18"))
    assert outcome.ok and outcome.value == LIMITLESS.get(name, outcome.value)
    if name.startswith("op-"):
        assert outcome.value == "works" and outcome.record == {"ops": {name[3:]: True}}


class Quirky:
    """The reference backend with its results bent by `quirk(feeds by name, results)`."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, quirk: Any) -> None:
        real = probes.evaluate

        def evaluate(engine: Any, fn: Any, feeds: Mapping[str, np.ndarray], exact: bool = False) -> list[np.ndarray]:
            return list(quirk(fn, lambda f: real(engine, fn, f, exact), dict(feeds)))

        monkeypatch.setattr(probes, "evaluate", evaluate)


def test_an_engine_that_binds_as_declared_is_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    def declared(fn: Any, run: Any, feeds: dict[str, np.ndarray]) -> Any:
        return run(dict(zip([v.name for v in fn.inputs], [feeds[n] for n in sorted(feeds)], strict=True)))

    Quirky(monkeypatch, declared)
    outcome = PROBES["binding-order"].run(open_engine("reference", "ios18"))
    assert outcome.ok is False and outcome.record == {"binding": "declared"} and outcome.rules == {"ANE101": False}


def test_an_engine_that_takes_eight_inputs(monkeypatch: pytest.MonkeyPatch) -> None:
    def eight(fn: Any, run: Any, feeds: dict[str, np.ndarray]) -> Any:
        names, values = list(feeds), list(feeds.values())
        return run(feeds if len(names) <= 8 else dict(zip(names, values[::-1], strict=True)))

    Quirky(monkeypatch, eight)
    outcome = PROBES["max-inputs"].run(open_engine("reference", "ios18"))
    assert outcome.ok and outcome.record == {"max_inputs": 8} and outcome.value == "8 (wrong numbers beyond)"


def test_an_engine_that_is_useless_after_an_op(monkeypatch: pytest.MonkeyPatch) -> None:
    poisoned = []

    def poison(fn: Any, run: Any, feeds: dict[str, np.ndarray]) -> Any:
        poisoned.extend(op.kind for op in fn.ops if op.kind == "tile")
        if poisoned and not any(op.kind == "tile" for op in fn.ops):
            raise CompileError("status=0x1d")
        return run(feeds)

    Quirky(monkeypatch, poison)
    outcome = PROBES["op-tile"].run(open_engine("reference", "ios18"))
    assert outcome.ok is False and "useless after it (refused: status=0x1d)" in outcome.value
    assert outcome.record == {"ops": {"tile": False}} and outcome.rules == {"ANE202": True}


def test_a_child_answers_in_one_line() -> None:
    outcome = in_child("basic", "reference")
    assert outcome["ok"] is True and outcome["value"] == "computes; 1 compile for two sets of weights"


def test_a_child_without_an_engine_says_why() -> None:
    outcome = in_child("basic", "ane")
    assert outcome["ok"] is None and "BackendUnavailable" in outcome["value"]


def test_a_child_that_dies_or_hangs_is_an_outcome(monkeypatch: pytest.MonkeyPatch) -> None:
    real = probes.subprocess.run

    def dying(command: list[str], **settings: Any) -> Any:
        return real([command[0], "-c", "import os; os.kill(os.getpid(), 11)"], **settings)

    monkeypatch.setattr(probes.subprocess, "run", dying)
    assert in_child("basic", "reference")["value"] == "the probe's process ended with signal 11: no message"

    def hanging(command: list[str], **settings: Any) -> Any:
        return real([command[0], "-c", "import time; time.sleep(60)"], **{**settings, "timeout": 0.2})

    monkeypatch.setattr(probes.subprocess, "run", hanging)
    assert "no answer within" in in_child("basic", "reference")["value"]


def test_an_unknown_probe() -> None:
    with pytest.raises(InputError, match="no probe is called 'colour': dialect, "):
        probes.child(["colour", "reference", "ios18"])
