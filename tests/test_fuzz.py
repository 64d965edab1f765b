"""Hostile input: every reader answers mutated files, and what atheris finds, with our errors, within bounds."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

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


def test_the_memory_bound_can_fail() -> None:
    with pytest.raises(AssertionError, match="bytes allocated for 10 bytes"), bounded(10):
        bytearray(1 << 26)
