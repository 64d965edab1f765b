"""`anert doctor` off a Mac, the capability record, and what the probes' answers become."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from anert import capabilities, doctor
from anert.capabilities import ANE, from_probes, load_record, machine_key, record_path, write_record
from anert.cli import main
from anert.doctor import Check, chosen, examine, self_test

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "deep" / "capabilities.json"
    monkeypatch.setenv("ANERT_CAPABILITIES", str(path))
    return path


def answers(**given: Any) -> Any:
    """in_child, answering `given` (by probe, `-` as `_`) and `fine` otherwise."""

    def in_child(name: str, backend: str = "ane", opset: str = "ios18", limit_s: float = 60) -> dict[str, Any]:
        fine = {"ok": True, "value": "fine", "record": {}, "rules": {}}
        return {**fine, **given.get(name.replace("-", "_"), {})}

    return in_child


def test_the_verb_says_all_in_one_object(capsys: pytest.CaptureFixture[str]) -> None:
    code = main(["doctor", "--json", "--no-probes", str(ROOT / "plugins")])
    out, err = capsys.readouterr()
    checks = {c["id"]: c for c in json.loads(out)["checks"]}
    assert code == 0 and set(checks["threads"]) == {"id", "ok", "value", "remedy"}
    assert {"platform", "native", "memory", "disk", "peak-fp32", "peak-bf16", "bandwidth", "cpu-engine", "compilers",
            "package-torch", "plugin-stories", "plugin-bigram", "neural-engine"} <= set(checks)  # fmt: skip
    assert float(checks["peak-fp32"]["value"].split()[0]) > 0.5 and checks["cpu-engine"]["ok"]
    assert "   ok  native" in err


def test_a_broken_plugin_is_something_wrong(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "bad.py"
    path.write_text("raise ValueError('no')\n")
    code = main(["doctor", "--no-probes", str(path)])
    assert code == 1 and "WRONG  plugin-bad" in capsys.readouterr().out


def test_the_self_test_sees_a_wrong_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    assert self_test() < doctor.CPU_ERROR
    from anert.backend.cpu import CpuBackend

    real = CpuBackend._compile

    def without_residual(self: Any, text: str, blobs: Any) -> Any:
        return real(self, text.replace("y = i00_x)[", "y = i01_x)["), blobs)

    monkeypatch.setattr(CpuBackend, "_compile", without_residual)
    assert self_test() > 0.1


# ---- probes and their record


def test_the_probes_become_a_record(record: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = answers(
        dialect={"value": "ios16", "record": {"opset": "ios16"}, "rules": {"ANE121": True}},
        binding_order={"record": {"binding": "sorted"}, "rules": {"ANE101": True}},
        output_order={"record": {"output_binding": "sorted"}},
        unequal_sizes={"record": {"equal_sizes": False}, "rules": {"ANE110": False}},
        max_inputs={"record": {"max_inputs": 12}},
    )
    monkeypatch.setattr(doctor, "in_child", found)
    checks = list(examine(probe=True))
    assert checks[-1].id == "record" and checks[-1].ok and "dialect ios16, layout ports" in checks[-1].value
    expected = replace(ANE, opset="ios16", layout="ports", max_inputs=12,
                       rules={"ANE121": True, "ANE101": True, "ANE110": False})  # fmt: skip
    assert load_record() == expected
    assert json.loads(record.read_text())["probes"]["op-tile"] == "fine"
    asked = {c.id.removeprefix("probe-") for c in checks if c.id.startswith("probe-")}
    assert "dispatch-floor" in asked and "compile-limit" not in asked
    assert "probe-compile-limit" in {c.id for c in examine(probe=True, exhaust=True)}


def test_an_engine_that_does_not_answer_leaves_no_record(record: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "in_child", answers(basic={"ok": None, "value": "no class _ANERequest"}))
    last = list(examine(probe=True))[-1]
    assert last.id == "neural-engine" and last.ok is False and "send us the output" in last.remedy
    assert not record.exists() and load_record() is None


def test_a_doubtful_binding_keeps_the_packed_layout() -> None:
    good = {"binding": "sorted", "output_binding": "sorted", "equal_sizes": False, "max_inputs": 8}
    assert chosen(good, {}).layout == "ports"
    for doubt in ({"binding": "declared"}, {"equal_sizes": True}, {"max_inputs": 2}, {"output_binding": "declared"}):
        assert chosen({**good, **doubt}, {}).layout == "packed"


def test_a_record_counts_only_for_its_machine_and_version(record: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wide = replace(ANE, max_width=65536)
    write_record(wide, {"max-width": "65536"})
    assert record_path() == record and load_record() == wide
    other = {**machine_key(), "build": "25A1"}
    monkeypatch.setattr(capabilities, "machine_key", lambda: other)
    assert load_record() is None


@pytest.mark.parametrize("text", ["", "{", "[]", '{"key": 3}', "null"])
def test_a_damaged_record_counts_as_none(record: Path, text: str) -> None:
    record.parent.mkdir()
    record.write_text(text)
    assert load_record() is None


def test_a_field_of_another_type_is_refused() -> None:
    with pytest.raises(TypeError, match="capability 'max_width' is a int, got '9'"):
        from_probes({"max_width": "9"}, {})
    assert from_probes({"unknown": 3, "binding": "sorted"}, {}) == ANE


def test_a_record_that_cannot_be_written_is_said(record: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    record.parent.parent.joinpath("deep").write_text("a file where the folder should be")
    monkeypatch.setattr(doctor, "in_child", answers())
    assert list(examine(probe=True))[-1] == Check(
        "record", False, f"cannot be written: [Errno 17] File exists: '{record.parent}'",
        "name a file that can be: ANERT_CAPABILITIES=...",
    )  # fmt: skip


# ---- lint heeds the record


def test_lint_here_heeds_what_was_probed(
    record: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    from test_lint_verb import UNSORTED

    path = tmp_path / "unsorted.mil"
    path.write_text(UNSORTED)
    assert main(["lint", str(path), "--here"]) == 2 and "run anert doctor on a Mac" in capsys.readouterr().err
    mac = {**machine_key(), "chip": "Apple M4 Pro"}
    monkeypatch.setattr(capabilities, "machine_key", lambda: mac)
    write_record(replace(ANE, rules={"ANE101": True}), {})
    assert main(["lint", str(path), "--here"]) == 1
    assert "error (measured) ANE101 [m4]" in capsys.readouterr().out
    write_record(replace(ANE, rules={"ANE101": False}), {})
    assert main(["lint", str(path), "--here"]) == 0
