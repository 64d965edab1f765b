"""Benchmarks that cannot lie: what is refused, how ratios and rounds are made, and that each one runs."""

from __future__ import annotations

import itertools
import json
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from anert.bench import BENCHMARKS, Case, Result, fingerprint, measure
from anert.bench.decode_peers import PROMPT, write_vocabulary
from anert.bench.measure import NoisyError, busy_seconds
from anert.bench.roofline import implausible
from anert.cli import main
from anert.errors import AnertError, ImplausibleError
from anert.tokenizer import load_tokenizer

ROOT = Path(__file__).resolve().parents[1]
TINY = f"{ROOT / 'plugins' / 'stories.py'}:260k"


def results(*cases: Case, **settings: Any) -> list[Result]:
    settings = {"rounds": 5, "warmup": 1, "quiet": False, "max_spread": 9.0, **settings}
    return [r for r in measure(cases, **settings) if isinstance(r, Result)]


def sleeper(seconds: float) -> Any:
    return lambda: time.sleep(seconds)


# ---- what is refused


def test_the_seeds_claim_is_refused() -> None:
    """0.60 ms and 94.4 TFLOPS at seq 256: 2 * 110e6 * 256 FLOPs, 24 dispatches, 170 MB of fresh weights."""
    why = implausible(0.597, 56.32e9, 169.9e6, dispatches=24, chip="m4")
    assert "94.3 TFLOPS is above the 19 that an M4's engine can do" in why
    assert "24 dispatches take at least 1.2 ms" in why and "285 GB/s is above the 120 of an M4's memory" in why
    assert implausible(91.0, 45.9e9 * 3, 256e6 * 3, dispatches=120, chip="m4") == ""  # a published step that is honest


def test_a_figure_above_the_measured_peak_is_refused_with_exit_3() -> None:
    case = Case("claim", sleeper(0.6e-3), flops=56.32e9, peak=lambda: 19_000.0)
    with pytest.raises(
        ImplausibleError, match=r"above 1\.05 times the measured peak of 19000; the figure is refused"
    ) as e:
        results(case)
    assert e.value.exit_code == 3
    honest = Case("honest", sleeper(30e-3), flops=1e9, peak=lambda: 100.0)
    (r,) = results(honest)
    assert r.peak_fraction is not None and 0.1 < r.peak_fraction < 0.4


def test_faster_than_the_floor_is_refused() -> None:
    with pytest.raises(ImplausibleError, match="under the floor of 50 us: the call did not do its work"):
        results(Case("evaluate", lambda: None, "us", floor_us=50))


def test_noise_is_refused() -> None:
    times = itertools.cycle((0.03, 0.2))
    with pytest.raises(NoisyError, match="noise, not a figure"):
        results(Case("jumpy", lambda: time.sleep(next(times))), max_spread=0.6)


def test_wrong_results_are_refused_before_and_after() -> None:
    state = {"runs": 0}

    def run() -> None:
        state["runs"] += 1

    def verify() -> None:
        if state["runs"] > 3:
            raise AnertError("wrong")

    with pytest.raises(AnertError, match="wrong"):
        results(Case("rots", run, verify=verify))

    def at_once() -> None:
        raise AnertError("wrong at once")

    with pytest.raises(AnertError, match="wrong at once"):
        results(Case("bad", run, verify=at_once))


# ---- how figures are made


def test_rounds_interleave_the_cases() -> None:
    order: list[str] = []
    cases = [Case(n, lambda n=n: (order.append(n), time.sleep(0.03))) for n in "abc"]
    results(*cases, rounds=3)
    timed = order[-9:]
    assert all(set(timed[i : i + 3]) == set("abc") for i in (0, 3, 6)) and timed[:3] != timed[3:6]


def test_times_rates_and_ratios() -> None:
    slow = Case("slow", sleeper(0.12), "tok/s", 100.0)
    fast = Case("fast", sleeper(0.06), "tok/s", 100.0, baseline="slow", flops=2e9, nbytes=1e6)
    a, b = results(slow, fast)
    assert a.ratio is None and b.baseline == "slow" and 1.7 < b.ratio < 2.3  # type: ignore[operator]
    assert 600 < a.median < 850 and a.p10 <= a.median <= a.p90 and a.n == 5
    assert b.tflops == pytest.approx(2e9 / (100 / b.median) / 1e12) and b.gbps == pytest.approx(
        b.median * 1e6 / 100 / 1e9
    )
    slow, fast = Case("slow", sleeper(0.12)), Case("fast", sleeper(0.06), baseline="slow")
    a, b = results(slow, fast)
    assert 119 < a.median < 180 and 1.7 < b.ratio < 2.3  # type: ignore[operator]


def test_disturbed_timings_are_repeated(monkeypatch: pytest.MonkeyPatch) -> None:
    from anert.bench import measure as function
    from anert.bench.measure import measure as same

    assert function is same
    import sys

    module = sys.modules["anert.bench.measure"]
    calls = itertools.count()

    def timed(run: Any, repeats: int) -> tuple[float, float]:
        run()
        n = next(calls)
        return (9.0, 0.9) if n < 2 else (1.0, 0.0)

    monkeypatch.setattr(module, "timed", timed)
    (r,) = results(Case("x", lambda: None), rounds=4, quiet=True)
    assert r.n == 4 and r.disturbed == 0 and r.median == 1000.0
    calls = itertools.count()
    (r,) = results(Case("x", lambda: None), rounds=1, quiet=True)
    assert r.disturbed == 1 and r.median == 9000.0  # the spare ones are spent


def test_the_fingerprint_names_the_machine() -> None:
    found = fingerprint(2, "avx2")
    assert found["cpu"] and found["threads"] == 2 and {"numpy", "governor", "load", "system"} <= set(found)
    assert busy_seconds() > 0


# ---- the verb


def run(capsys: pytest.CaptureFixture[str], *argv: str) -> tuple[int, dict[str, Any], str]:
    code = main(["bench", *argv, "--json", "--no-wait"])
    out, err = capsys.readouterr()
    return code, json.loads(out.splitlines()[-1]) if out else {}, err


FAST = ("--rounds", "2", "--warmup", "1", "--max-spread", "1000")


@pytest.mark.parametrize("name", ["gemm", "convert", "sync", "dispatch", "decode", "prefill", "forward", "train"])
def test_each_benchmark_runs(name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    from anert.runtime import Runtime

    monkeypatch.setattr(Runtime, "peak_gflops", lambda self, again=False: 1e5)  # what else runs cannot lower it
    code, report, err = run(capsys, name, TINY, "--size", "100000", "--seq-len", "32", *FAST)
    assert code == 0, err
    keys = {"name", "unit", "median", "p10", "p90", "n", "flops", "bytes", "tflops", "gbps", "peak_fraction",
            "baseline", "ratio"}  # fmt: skip
    assert report["results"] and all(keys <= set(row) and row["median"] > 0 for row in report["results"])
    if name in ("forward", "train"):
        (row,) = report["results"]
        assert row["flops"] > 1e6 and 0 < row["peak_fraction"] < 1 and row["notes"]["seq_len"] == 32
    if name == "train":
        assert row["notes"]["compiles"] == row["notes"]["kernels"]


def test_every_benchmark_is_in_the_help(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["bench", "--help"])
    out = capsys.readouterr().out
    assert all(f"\n  {name} " in out for name in BENCHMARKS)


def test_results_are_compared_with_saved_ones(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    saved = tmp_path / "before.json"
    code, report, _ = run(capsys, "dispatch", *FAST, "--save", str(saved))
    assert code == 0 and json.loads(saved.read_text())["results"] == report["results"]
    row = report["results"][0]
    saved.write_text(json.dumps({"results": [{**row, "median": row["median"] / 50}]}))
    code, report, _ = run(capsys, "dispatch", *FAST, "--compare", str(saved))
    assert code == 1 and "slower by" in report["slower"][0]
    saved.write_text(json.dumps({"results": [{**row, "median": row["median"] * 50}]}))
    assert run(capsys, "dispatch", *FAST, "--compare", str(saved))[0] == 0


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (("trian",), "no benchmark 'trian': did you mean train?"),
        (("train",), "needs a model: anert bench NAME PLUGIN"),
        (("train", TINY, "--peer", "mlx"), "has no peer 'mlx': torch is the one"),
        (("dispatch", "--compare", "absent.json"), "--compare absent.json: cannot be read: No such file"),
        (("dispatch", "--compare", str(ROOT / "pyproject.toml")), "no results of anert bench --save"),
        (("dispatch", "--fail-over", "lots", "--compare", "SAVED", *FAST), "--fail-over takes a percentage"),
        (("dispatch", "--backend", "ane"), "Neural Engine"),
    ],
)
def test_bad_input(argv: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    saved = tmp_path / "saved.json"
    saved.write_text('{"results": [{"name": "dispatch cpu", "unit": "us", "median": 1}]}')
    code = main(["bench", *(str(saved) if a == "SAVED" else a for a in argv)])
    err = capsys.readouterr().err
    assert code in (2, 3) and message in err and err.count("\n") == 1


@pytest.mark.slow
def test_torch_is_measured_beside(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    from anert.runtime import Runtime

    pytest.importorskip("torch", reason="pip install 'anert[peers]' brings it")
    monkeypatch.setattr(Runtime, "peak_gflops", lambda self, again=False: 1e5)
    code, report, err = run(capsys, "train", TINY, "--seq-len", "32", "--peer", "torch", *FAST)
    assert code == 0, err
    ours, eager, compiled = report["results"]
    assert eager["name"].startswith("torch eager") and compiled["name"].startswith("torch compile")
    assert ours["baseline"] == eager["name"] and ours["ratio"] == pytest.approx(ours["median"] / eager["median"])


# ---- peers of decoding

LLAMA_BENCH = """#!{python}
import json, os, sys
argv = dict(zip(sys.argv[1::2], sys.argv[2::2]))
data = open(argv["-m"], "rb").read(4)
assert data == b"GGUF" and argv["-r"] == "1" and argv["-t"] == "1"
assert "OMP_WAIT_POLICY" not in os.environ, "a peer waits as it was built to"
print(json.dumps([{{"avg_ns": 2e6 * (int(argv["-n"]) + int(argv["-p"]))}}]))
"""
RUN = """#!{python}
import os, struct, sys
dim, hidden, layers, heads, kv, vocab, seq = struct.unpack("<7i", open(sys.argv[1], "rb").read(28))
argv = dict(zip(sys.argv[2::2], sys.argv[3::2]))
per_layer = 2 * dim + 2 * dim * dim + 2 * kv * dim // heads * dim + 3 * dim * hidden
floats = vocab * dim + layers * per_layer + dim + seq * dim // heads
assert os.path.getsize(sys.argv[1]) == 28 + 4 * floats and os.environ["OMP_NUM_THREADS"] == "1"
print("once upon a time")
print("achieved tok/s: 500.0", file=sys.stderr)
"""


def script(path: Path, text: str) -> str:
    path.write_text(text.format(python=sys.executable))
    path.chmod(0o755)
    return str(path)


@pytest.mark.parametrize("size", [512, 32_000])
def test_the_prompt_of_a_first_token_is_as_short_as_with_a_trained_vocabulary(tmp_path: Path, size: int) -> None:
    write_vocabulary(size, tmp_path / "tokenizer.bin")
    tokenizer = load_tokenizer(tmp_path / "tokenizer.bin")
    ids = tokenizer.encode(PROMPT, bos=True)
    assert tokenizer.vocab_size == size and len(ids) == 1 + len(PROMPT.split()) and tokenizer.decode(ids) == PROMPT


def test_peers_of_decode(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stand-ins for the two programs: they check the files, arguments and environment that they get, and answer as
    those do."""
    monkeypatch.setenv("OMP_WAIT_POLICY", "passive")
    bench, other = script(tmp_path / "llama-bench", LLAMA_BENCH), script(tmp_path / "run", RUN)
    argv = ("decode", TINY, "--seq-len", "64", "--threads", "1", *FAST)
    code, report, err = run(capsys, *argv, "--peer", f"llamacpp={bench}", "--peer", f"llama2c={other}")
    assert code == 0, err
    rows = {row["name"]: row for row in report["results"]}
    assert rows["llama.cpp decode f16"]["median"] == pytest.approx(500)
    assert rows["llama2.c decode f32"]["median"] == pytest.approx(500)
    ours = [row for name, row in rows.items() if name.startswith("decode ")]
    assert [row["baseline"] for row in ours] == ["llama.cpp decode f16", "llama.cpp decode q8_0"]
    assert all(row["ratio"] == pytest.approx(row["median"] / 500) for row in ours)
    first = [row for name, row in rows.items() if name.startswith("first token")]
    assert [row["name"].endswith(", fp16 file") for row in first] == [False, True]
    assert all(row["unit"] == "ms" and row["median"] > 10 for row in first)
    whole, half = (row["notes"]["file_bytes"] for row in first)
    assert 0.4 < half / whole < 0.6
    crash = "'q8_0' in argv['-m'] and sys.exit(11)\nprint"
    half = script(tmp_path / "half", LLAMA_BENCH.replace("print", crash, 1))
    code, report, err = run(capsys, *argv, "--peer", f"llamacpp={half}")
    assert code == 0, err
    rows = {row["name"]: row for row in report["results"]}
    assert "llama.cpp decode f16" in rows and "llama.cpp decode q8_0" not in rows
    (int8,) = (row for name, row in rows.items() if "int8" in name)
    assert int8["ratio"] is None and "llama.cpp decode q8_0 does not run: " in int8["notes"]["said"]
    broken = script(tmp_path / "broken", "#!{python}\nprint('[]')\n")
    for peer, message in (
        ("llamacpp=nowhere", "--peer llamacpp=nowhere: no program there"),
        ("torch", "no peer 'torch'"),
        (f"llamacpp={broken}", "printed no result that we can read"),
        (f"llama2c={broken}", "printed no `achieved tok/s`"),
    ):
        code, _, err = run(capsys, *argv, "--peer", peer)
        assert code in (1, 2) and message in err
