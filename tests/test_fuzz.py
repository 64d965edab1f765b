"""Hostile input: every reader answers mutated files, and what atheris finds, with our errors, within bounds."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from fuzz_targets import TARGETS, bounded, offer, seeds
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

ROOT = Path(__file__).resolve().parents[1]
EXAMPLES = int(os.environ.get("ANERT_FUZZ_EXAMPLES", "120"))
RUNS = int(os.environ.get("ANERT_FUZZ_RUNS", "1500"))
"""Inputs a target: in CI, and more by these two variables."""

NUMBERS = [0, 1, 2, 255, 256, 65535, 2**31 - 1, 2**31, 2**32 - 1, 2**63 - 1, 2**64 - 1]
TOKENS = [
    b"",
    b"\0",
    b"{",
    b"[" * 400,
    b'"',
    b"-1",
    b"1e999",
    b"nan",
    b"null",
    b"9" * 30,
    b"../../x",
    b"\xff\xfe",
    b"\n",
]


@st.composite
def mutants(draw: st.DrawFn, name: str) -> bytes:
    """A valid file, cut, spliced, overwritten with numbers of note, or with tokens put in."""
    data = bytearray(draw(st.sampled_from(seeds(name))))
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, len(data)))
        kind = draw(st.integers(0, 5))
        if kind == 0:
            del data[at:]
        elif kind == 1:
            del data[at : at + draw(st.integers(1, 64))]
        elif kind == 2:
            number = draw(st.sampled_from(NUMBERS)).to_bytes(8, "little")
            data[at : at + draw(st.sampled_from((1, 2, 4, 8)))] = number[: draw(st.sampled_from((1, 2, 4, 8)))]
        elif kind == 3:
            data[at:at] = draw(st.sampled_from(TOKENS))
        elif kind == 4 and data:
            data[at % len(data)] ^= 1 << draw(st.integers(0, 7))
        else:
            data[at:at] = data[draw(st.integers(0, len(data))) :][: draw(st.integers(0, 200))]
    return bytes(data)


@pytest.mark.parametrize("name", TARGETS)
def test_valid_files_are_taken(name: str, tmp_path: Path) -> None:
    assert seeds(name)
    taken = [offer(name, data, tmp_path) for data in seeds(name)]
    assert all(taken) or name in ("state", "config"), f"{taken.count(False)} of {len(taken)} valid files are refused"


@pytest.mark.parametrize("name", TARGETS)
def test_mutated_files(name: str, tmp_path: Path) -> None:
    taken = []

    @settings(max_examples=EXAMPLES, database=None, suppress_health_check=list(HealthCheck))
    @given(mutants(name))
    def check(data: bytes) -> None:
        taken.append(offer(name, data, tmp_path))

    check()
    assert taken.count(False) > 0 or name in ("blob", "record"), "no mutant was refused: are they mutants?"


@pytest.mark.slow
@pytest.mark.parametrize("name", TARGETS)
def test_coverage_guided(name: str, tmp_path: Path) -> None:
    pytest.importorskip("atheris", reason="the extra fuzz brings it: pip install atheris")
    command = [sys.executable, "tests/fuzz_targets.py", name, f"-runs={RUNS}", "-timeout=10", "-rss_limit_mb=2048",
               "-max_len=20000", f"-artifact_prefix={tmp_path}/", "-seed=7"]  # fmt: skip
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment, timeout=900)
    crash = [p.read_bytes()[:300] for p in tmp_path.iterdir()]
    assert done.returncode == 0, f"{crash}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    counted = re.search(r"Done (\d+) runs|DONE", done.stderr)
    assert counted, done.stderr[-2000:]


MIL = "program(1.3)\n{{\nfunc main<ios18>({params}) {{\n{body}\n}} -> (r);\n}}"


@pytest.mark.slow
def test_ten_million_numbers_are_read_within_bounds_or_refused_in_a_line() -> None:
    from anert.errors import AnertError
    from anert.mil.text import parse

    n = 10**7
    literal = "1," * (n - 1) + "1"
    for claimed, fits in ((n, True), (n - 1, False)):
        kind = f"tensor<fp16, [{claimed}]>"
        text = MIL.format(params="fp16 a", body=f'{kind} r = const()[name = string("r"), val = {kind}([{literal}])];')
        with bounded(len(text)):
            if fits:
                assert parse(text).main.outputs[0].shape == (n,)
                continue
            with pytest.raises(AnertError) as caught:
                parse(text)
        assert "\n" not in str(caught.value) and len(str(caught.value)) < 300


@pytest.mark.parametrize(
    ("params", "body", "message"),
    [
        ("fp16 a", "fp16 b = add(x = r, y = a)[]; fp16 r = add(x = b, y = a)[];", "unknown name 'r'"),
        ("fp16 a", "fp16 r = add(x = r, y = a)[];", "unknown name 'r'"),
        ("tensor<fp16, [4294967296, 4294967296, 4]> r", "", "has 73786976294838206464 elements"),
        ("tensor<fp16, [9223372036854775808, 2]> r", "", "elements"),
        ("fp16 a", "fp16 r = const()[val = fp16(" + "(" * 10**6 + "1", "deep"),
    ],
)
def test_cycles_depth_and_sizes_past_63_bits(params: str, body: str, message: str) -> None:
    from anert.errors import AnertError
    from anert.mil.text import parse

    with pytest.raises(AnertError, match=message) as caught:
        parse(MIL.format(params=params, body=body))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("shard", ["../outside.safetensors", "/etc/passwd", "a/../../outside.safetensors", "x\0y"])
def test_a_sharded_index_stays_in_its_directory(shard: str, tmp_path: Path) -> None:
    import json

    from fuzz_targets import hf_directory, read_model

    from anert.errors import InputError

    path = hf_directory(tmp_path)
    (tmp_path / "outside.safetensors").write_bytes((next(path.glob("model-00001*"))).read_bytes())
    index = path / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"] = {
        name: shard if name == "model.norm.weight" else file for name, file in content["weight_map"].items()
    }
    index.write_text(json.dumps(content))
    with pytest.raises(InputError, match=r"model\.safetensors\.index\.json|outside of|not a file name"):
        read_model(path)


def test_a_checkpoint_names_no_file_outside(tmp_path: Path) -> None:
    from anert import checkpoint
    from anert.errors import InputError

    step = checkpoint.save(tmp_path / "run", 3, {"w": np.ones((2, 2), np.float32)}, {}, {}, None)
    state = step / "state.json"
    (tmp_path / "run" / "secret").write_text("x")
    state.write_text(state.read_text().replace('"optim.safetensors"', '"../secret"'))
    with pytest.raises(InputError, match=r"state\.json is damaged"):
        checkpoint.load(step)


def test_nothing_that_is_read_is_code() -> None:
    """No marshal or shelve; pickle only of a tokenizer on its way to this run's own workers, never of a file; exec in
    the plugin loader alone, whose files are code; no eval."""
    import ast

    executed, pickled = [], []
    for path in sorted((ROOT / "anert").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not {"marshal", "shelve", "dill", "yaml"} & {n.partition(".")[0] for n in names}, path
            pickled += [path.relative_to(ROOT).as_posix() for n in names if n == "pickle"]
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ("eval", "exec"):
                executed.append((path.name, node.func.id))
            if isinstance(node, ast.keyword) and node.arg == "allow_pickle":
                assert isinstance(node.value, ast.Constant) and node.value.value is False, path
    assert executed == [("plugin.py", "exec")] and set(pickled) == {"anert/tokenizer/base.py"}


def test_the_memory_bound_can_fail() -> None:
    with pytest.raises(AssertionError, match="bytes allocated for 10 bytes"), bounded(10):
        bytearray(1 << 26)
