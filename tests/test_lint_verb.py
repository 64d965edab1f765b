"""`anert lint`: files, plugins, targets, formats and exit codes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from anert.cli import main

ROOT = Path(__file__).resolve().parents[1]
STORIES = str(ROOT / "plugins" / "stories.py")
UNSORTED = """program(1.3)
[buildInfo = dict<string, string>({{"coremlc-version", "3505.4.1"}})]
{
    func main<ios18>(tensor<fp16, [1, 64, 1, 32]> b, tensor<fp16, [1, 64, 1, 32]> a) {
        tensor<fp16, [1, 64, 1, 32]> r = sub(x = a, y = b)[name = string("r")];
    } -> (r);
}
"""


def run(capsys: pytest.CaptureFixture[str], *argv: str) -> tuple[int, str, str]:
    code = main(["lint", *argv])
    out, err = capsys.readouterr()
    return code, out, err


@pytest.fixture
def unsorted(tmp_path: Path) -> str:
    path = tmp_path / "unsorted.mil"
    path.write_text(UNSORTED)
    return str(path)


def test_a_file_with_an_agreed_error_fails_with_its_place(unsorted: str, capsys: Any) -> None:
    code, out, err = run(capsys, unsorted)
    assert code == 1 and f"{unsorted}:4:51: error ANE101 [m1,m2,m3,m4,m5]" in out and "fix: name the inputs" in out
    assert "1 programs checked for m1,m2,m3,m4,m5: 1 agreed errors" in err
    assert run(capsys, unsorted, "--fail-on", "never")[0] == 0
    assert run(capsys, unsorted, "--target", "m3")[1].count("[m3]") == 1


def test_json_and_sarif_are_one_object(unsorted: str, capsys: Any) -> None:
    code, out, _ = run(capsys, unsorted, "--json")
    found = json.loads(out)
    assert code == 1 and next((f["rule"], f["line"]) for f in found["findings"]) == ("ANE101", 4)
    log = json.loads(run(capsys, unsorted, "--format", "sarif")[1])
    result = log["runs"][0]["results"][0]
    assert result["ruleId"] == "ANE101" and result["level"] == "error"
    assert result["locations"][0]["physicalLocation"]["region"] == {"startLine": 4, "startColumn": 51}


def test_no_kernel_that_we_ship_has_an_agreed_error_on_any_chip(capsys: Any) -> None:
    code, out, _ = run(capsys, STORIES, "--json")
    found = json.loads(out)
    assert code == 0 and found["programs"] > 50
    assert not [f for f in found["findings"] if f["severity"] == "error" and f["confidence"] == "agreed"]


def test_one_preset_and_the_catalogue(capsys: Any) -> None:
    code, out, err = run(capsys, f"{STORIES}:tiny", "--target", "m4")
    assert code == 0 and "programs checked for m4: 0 agreed errors" in err
    code, out, _ = run(capsys, "--rules")
    assert code == 0 and "ANE101  input-order: " in out and len(out.splitlines()) > 40


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ((), "nothing to check"),
        (("absent.mil",), "absent.mil: cannot be read: No such file"),
        ((STORIES, "--target", "m9"), "no chip is called 'm9': expected some of m1, m2, m3, m4, m5"),
        ((f"{STORIES}:teeny",), "no preset 'teeny': did you mean tiny?"),
        ((str(ROOT / "README.md"),), "README.md:1:1: expected a token of MIL text"),
        ((str(ROOT / "anert" / "errors.py"),), "no name `plugin` in it"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(argv: tuple[str, ...], message: str, capsys: Any) -> None:
    code, _, err = run(capsys, *argv)
    assert code == 2 and message in err and err.count("\n") == 1 and err.startswith("anert: ")


def test_a_compiled_model_is_no_text(tmp_path: Path, capsys: Any) -> None:
    path = tmp_path / "model.mil"
    path.write_bytes(b"program(1.3)\xff\xfe")
    code, _, err = run(capsys, str(path))
    assert code == 2 and "MIL text is UTF-8, byte 12 is not" in err
