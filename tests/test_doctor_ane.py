"""Every probe against the stand-in for Apple's frameworks, in each profile: they recover just its quirks."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from fake_quirks import PROFILES
from test_ane_backend import child_env

from anert.errors import AnertError
from anert.probes import PROBES, Outcome, open_engine

ROOT = Path(__file__).resolve().parents[1]

OPEN = {
    "binding": "sorted", "output_binding": "sorted", "equal_sizes": False, "max_inputs": 8, "width_multiple": 16,
    "surface_multiple": 64, "min_surface": 64, "contraction_multiple": 1, "softmax_any_width": True,
    "opset": "ios18", "max_width": 65536, "fp32_ports": True, "attention_mask": True, "conv_runtime_weights": True,
    "slice_limit": 65504.0, "matmul_limit": 65504.0, "slice_concat": True,
}  # fmt: skip
"""What the probes find of an engine without quirks; the stand-in's own contract has 8 inputs and widths of 16."""
TIMES = ("ops", "dispatch_us", "refusal_us", "stream_gbps")
FOUND = {
    "plain": OPEN,
    "m4": OPEN | {"attention_mask": False, "conv_runtime_weights": False, "matmul_limit": 32752.0},
    "m1": OPEN | {"opset": "ios16", "max_width": 16384, "fp32_ports": False, "attention_mask": False,
                  "conv_runtime_weights": False, "matmul_limit": 32752.0, "slice_limit": 4094.0},
}  # fmt: skip


def probed(fake: Any, monkeypatch: pytest.MonkeyPatch, *names: str, **options: Any) -> dict[str, Outcome]:
    """Outcomes of the named probes (all but the optional), each on an engine that forgot the others."""
    monkeypatch.setenv("ANERT_ANE_FRAMEWORK", fake.path)
    opset, outcomes = "ios18", {}
    for name in names or [n for n, p in PROBES.items() if not p.optional]:
        fake.reset(**options)
        try:
            engine = open_engine("ane", opset)
            engine.budget = 1_000_000  # a process of its own each has 100; these share one
            outcomes[name] = PROBES[name].run(engine)
        except AnertError as error:
            outcomes[name] = Outcome(None, str(error))
        opset = outcomes[name].record.get("opset", opset) if name == "dialect" else opset
    fake.reset()
    return outcomes


@pytest.mark.parametrize("profile", PROFILES)
def test_the_probes_recover_a_profiles_quirks(profile: str, fake_ane: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    outcomes = probed(fake_ane(profile=profile), monkeypatch)
    record: dict[str, Any] = {}
    usable = {}
    for outcome in outcomes.values():
        usable |= outcome.record.get("ops", {})
        record |= {k: v for k, v in outcome.record.items() if k not in TIMES}
    assert record == FOUND[profile]
    quirks = PROFILES[profile]
    assert usable == {kind: kind != "tile" or not quirks.tile_poisons for kind in usable} and len(usable) == 14
    assert outcomes["op-tile"].rules == {"ANE202": quirks.tile_poisons}
    assert outcomes["basic"].ok and "1 compile for two sets of weights" in outcomes["basic"].value
    assert 50 < outcomes["dispatch-floor"].record["dispatch_us"] < 5000
    assert outcomes["refusal-time"].record["refusal_us"] > 0 and outcomes["bandwidth"].record["stream_gbps"] > 0


def test_binding_as_declared_is_found(fake_ane: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    found = probed(fake_ane(), monkeypatch, "binding-order", "basic", declaration_order=1)
    assert found["binding-order"].record == {"binding": "declared"} and found["binding-order"].rules == {
        "ANE101": False
    }
    assert found["basic"].ok  # our own names bind the same in either order


@pytest.mark.parametrize(
    ("probe", "options", "record"),
    [
        ("max-inputs", {"max_inputs": 12}, {"max_inputs": 12}),
        ("max-inputs", {"max_inputs": 2}, {"max_inputs": 2}),
        ("width-multiple", {"width_multiple": 32}, {"width_multiple": 32}),
        ("unequal-sizes", {"equal_sizes": 1}, {"equal_sizes": True}),
    ],
)
def test_limits_are_found(
    probe: str, options: dict[str, int], record: dict[str, Any], fake_ane: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert probed(fake_ane(), monkeypatch, probe, **options)[probe].record == record


def test_the_compile_limit_is_counted_only_when_asked(fake_ane: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    assert PROBES["compile-limit"].optional
    outcome = probed(fake_ane(), monkeypatch, "compile-limit", compile_limit=60)["compile-limit"]
    assert outcome.value.startswith("60 (") and outcome.ok is False and outcome.record == {"compile_budget": 50}


def test_an_engine_that_refuses_everything(fake_ane: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = fake_ane()
    found = probed(fake, monkeypatch, "basic", "binding-order", evaluate_failures=-1)
    assert found["basic"].ok is False and "refuses to evaluate" in found["basic"].value
    assert found["binding-order"].ok is None


@pytest.mark.slow
def test_the_verb_probes_in_children_and_keeps_the_record(tmp_path: Path) -> None:
    record = tmp_path / "capabilities.json"
    env = child_env(ANERT_FAKE_PROFILE="m1", ANERT_CAPABILITIES=str(record))
    command = [sys.executable, "-m", "anert", "doctor", "--json"]
    done = subprocess.run(command, env=env, capture_output=True, text=True, cwd=ROOT)
    checks = {c["id"]: c for c in json.loads(done.stdout.splitlines()[-1])["checks"]}
    assert checks["neural-engine"]["ok"] is True and checks["record"]["ok"] is True, checks
    assert checks["probe-op-tile"]["ok"] is False and "useless after it" in checks["probe-op-tile"]["value"]
    kept = json.loads(record.read_text())
    assert kept["capabilities"]["opset"] == "ios16" and kept["capabilities"]["max_width"] == 16384
    assert kept["rules"]["ANE214"] is True and kept["rules"]["ANE207"] is True and kept["rules"]["ANE101"] is True
    assert kept["capabilities"]["layout"] == "ports"
    assert done.returncode == 1  # something is wrong with this engine, and said
