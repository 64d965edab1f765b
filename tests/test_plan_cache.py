"""The plan cache: what it gives back is what was compiled, and nothing that was damaged is ever run."""

import dataclasses
import random
from pathlib import Path

import numpy as np
import pytest
from cpu_run import run_program

from anert.backend import plan as plans
from anert.backend.cpu import CpuBackend
from anert.backend.plan import MAGIC, Plan, PlanCache, decode, encode
from anert.blocks import build_blocks
from anert.capabilities import CPU
from anert.errors import InputError
from anert.ffi import Pool
from anert.kernel import Kernel
from anert.plugin import load_file
from anert.runtime import plan_cache

STORIES = Path(__file__).resolve().parents[1] / "plugins" / "stories.py"


@pytest.fixture(scope="module")
def kernels() -> list[Kernel]:
    """Of a small model, training: regions, tile programs, GEMMs and constants (rotation, mask)."""
    preset = load_file(STORIES).preset("260k")
    model = preset.model(dataclasses.replace(preset.config, seq_len=64))
    return [k for block in build_blocks(model, 64, 1, True, "ports", CPU) for k in block.kernels]


def backend(folder: Path | None, pool: Pool) -> CpuBackend:
    return CpuBackend(pool, cache=PlanCache(folder) if folder else None)


@pytest.fixture(scope="module")
def pool() -> Pool:
    return Pool(1)


def test_a_cached_plan_is_the_compiled_one(kernels, pool, tmp_path, monkeypatch):
    rng = np.random.default_rng(0)
    cold, never = backend(tmp_path / "plans", pool), backend(None, pool)
    for kernel in kernels:
        cold.compile(kernel.text, kernel.blobs)
    monkeypatch.setattr(CpuBackend, "_planned", lambda *_: pytest.fail("a second start compiled"))
    warm = backend(tmp_path / "plans", pool)
    loaded = [warm.compile(k.text, k.blobs) for k in kernels]
    monkeypatch.undo()
    for kernel, program in zip(kernels, loaded, strict=True):
        made = never.compile(kernel.text, kernel.blobs)
        assert (program.inputs, program.outputs) == (made.inputs, made.outputs)
        assert dataclasses.replace(program.stats, compile_ms=0) == dataclasses.replace(made.stats, compile_ms=0)
        feed = {p.name: rng.standard_normal(p.type.shape).astype(np.float16) for p in made.inputs}
        want, got = run_program(never, made, feed), run_program(warm, program, feed)
        assert all(got[name].tobytes() == want[name].tobytes() for name in want), kernel.name
    assert warm.compiles == len({k.text for k in kernels})


def test_precision_instruction_set_and_code_are_part_of_the_key(kernels, tmp_path, monkeypatch):
    kernel = kernels[0]
    for pool, precision in ((Pool(1), "fp32"), (Pool(1), "bf16"), (Pool(1, "scalar"), "fp32")):
        CpuBackend(pool, precision, cache=PlanCache(tmp_path)).compile(kernel.text, kernel.blobs)
    assert len(list(tmp_path.iterdir())) == 3
    monkeypatch.setattr("anert.backend.cpu.code_identity", lambda: "other code")
    backend(tmp_path, Pool(1)).compile(kernel.text, kernel.blobs)
    assert len(list(tmp_path.iterdir())) == 4


def test_damaged_files_are_compiled_again(kernels, pool, tmp_path):
    kernel = kernels[0]
    backend(tmp_path, pool).compile(kernel.text, kernel.blobs)
    (path,) = tmp_path.iterdir()
    good = path.read_bytes()
    rng = random.Random(1)
    cuts = [b"", good[:7], good[: len(MAGIC) + 20], good[:-1], good + b"x", bytes(len(good))]
    flips = [good[:at] + bytes([good[at] ^ 1 << rng.randrange(8)]) + good[at + 1 :]
             for at in (rng.randrange(len(good)) for _ in range(40))]  # fmt: skip
    for bad in (*cuts, *flips):
        path.write_bytes(bad)
        assert PlanCache(tmp_path).get(path.stem) is None
        assert not path.exists()
    path.write_bytes(good)
    assert PlanCache(tmp_path).get("another") is None
    (tmp_path / "another.plan").write_bytes(good)
    assert PlanCache(tmp_path).get("another") is None, "a plan under another name is not that program"


def test_a_whole_file_with_a_wrong_plan_is_refused(kernels, pool, tmp_path):
    """The checksum fits and the tables do not: anert_plan_new and the checks of parts stand behind it."""
    kernel = kernels[0]
    first = backend(tmp_path, pool)
    want = first.compile(kernel.text, kernel.blobs)
    (path,) = tmp_path.iterdir()
    plan = PlanCache(tmp_path).get(path.stem)
    assert plan is not None
    views = np.frombuffer(plan.tables["views"], np.int32).copy()
    views[::2] += 1 << 20
    tables = {**plan.tables, "views": views.tobytes()}
    with pytest.raises(InputError, match="step"):
        dataclasses.replace(plan, tables=tables).make()
    path.write_bytes(encode(dataclasses.replace(plan, tables=tables), path.stem))
    again = backend(tmp_path, pool).compile(kernel.text, kernel.blobs)
    assert again.stats.steps == want.stats.steps
    kept = PlanCache(tmp_path).get(path.stem)
    assert kept is not None and kept.tables == plan.tables, "the good plan took its place"


@pytest.mark.parametrize("change", ["larger", "unknown", "arena", "cut"])
def test_parts_that_do_not_belong_together_are_refused(kernels, pool, tmp_path, change):
    backend(tmp_path, pool).compile(kernels[0].text, kernels[0].blobs)
    (path,) = tmp_path.iterdir()
    plan = PlanCache(tmp_path).get(path.stem)
    assert plan is not None
    port = next(b for b in plan.buffers if b is not None and b.place == "input")
    if change == "larger":
        port.nbytes *= 2
    elif change == "unknown":
        port.name = "nobody"
    elif change == "arena":
        plan.buffers = plan.buffers[1:]
    else:
        plan.tables = {**plan.tables, "steps": plan.tables["steps"][:-3]}
    data = encode(plan, path.stem)
    with pytest.raises((ValueError, KeyError, InputError)):
        decode(data, path.stem).make()


def test_a_folder_that_cannot_be_is_an_empty_cache(kernels, pool, tmp_path):
    (tmp_path / "file").write_text("in the way")
    cache = PlanCache(tmp_path / "file" / "plans")
    program = CpuBackend(pool, cache=cache).compile(kernels[0].text, kernels[0].blobs)
    assert program.stats.steps > 0 and cache.get("x") is None


def test_the_oldest_plans_go(tmp_path, monkeypatch):
    monkeypatch.setattr(plans, "MAX_FILES", 3)
    cache, empty = PlanCache(tmp_path), Plan((), (), [None], dict.fromkeys(plans.TABLES, b""), ())
    for i in range(5):
        cache.put(f"k{i}", empty)
        stamp = 1_700_000_000 + i
        __import__("os").utime(cache.path(f"k{i}"), (stamp, stamp))
    assert sorted(p.stem for p in tmp_path.iterdir()) == ["k2", "k3", "k4"]


def test_where_the_cache_lies(tmp_path, monkeypatch):
    monkeypatch.setenv("ANERT_CACHE", "off")
    assert plan_cache() is None
    monkeypatch.setenv("ANERT_CACHE", str(tmp_path / "here"))
    assert plan_cache().folder == tmp_path / "here"
    monkeypatch.delenv("ANERT_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert plan_cache().folder == tmp_path / "anert" / "plans"
    assert not list(tmp_path.iterdir()), "nothing is made before something is kept"
