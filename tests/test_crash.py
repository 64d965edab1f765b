"""SIGKILL and power cuts at random moments of training: what is resumed ends with the bits of the run that was never
killed."""

from __future__ import annotations

import os
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest
from power import Disk, build_shim
from small_run import ROOT, bits, flags, write_text

from anert import checkpoint

STEPS = 150
KILLS = 25


@pytest.fixture(scope="module")
def shim(tmp_path_factory):
    return build_shim(tmp_path_factory.mktemp("shim"))


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return write_text(tmp_path_factory.mktemp("text") / "small.txt")


def spawn(arguments: list[str], env: dict[str, str] | None = None) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "anert", "run", *arguments]
    return subprocess.Popen(command, env={**os.environ, "PYTHONPATH": str(ROOT), **(env or {})}, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE)  # fmt: skip


@pytest.fixture(scope="module")
def straight(text, tmp_path_factory):
    """The run that nobody kills."""
    out = tmp_path_factory.mktemp("straight") / "run"
    done = spawn(flags(text, out, steps=STEPS))
    _, err = done.communicate()
    assert done.returncode == 0, err
    return bits(out)


def test_the_shim_forgets_what_was_not_fsynced(shim, tmp_path):
    """Else the tests below prove nothing."""
    code = """
import os, sys
def put(name, sync):
    with open(f"{sys.argv[1]}/{name}", "w") as f:
        f.write(name)
        f.flush()
        sync and os.fsync(f.fileno())
put("whole", True); put("empty", False)
os.fsync(os.open(sys.argv[1], os.O_RDONLY))
put("nameless", True)
os.rename(f"{sys.argv[1]}/whole", f"{sys.argv[1]}/renamed")
"""
    disk = Disk(shim, tmp_path / "run", tmp_path)
    subprocess.run([sys.executable, "-c", code, str(disk.root)], env={**os.environ, **disk.env}, check=True)
    disk.cut()
    assert {p.name: p.read_text() for p in disk.root.iterdir()} == {"whole": "whole", "empty": ""}


SAVES = """
import sys, numpy as np
from anert import checkpoint, files
if sys.argv[2] == "forgets":
    checkpoint.fsync = files.fsync = lambda path: None
for step in range(1, 4):
    checkpoint.save(sys.argv[1], step, {"w": np.full(9, step, np.float32)}, {}, {}, keep=2)
"""


@pytest.mark.parametrize(("how", "last"), [("as it is", 3), ("forgets", None)])
def test_fsync_is_what_saves_a_checkpoint(shim, tmp_path, how, last):
    disk = Disk(shim, tmp_path / "run", tmp_path)
    env = {**os.environ, **disk.env, "PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-c", SAVES, str(disk.root), how], env=env, check=True)
    disk.cut()
    if last:
        assert checkpoint.load(disk.root).step == last
    else:
        assert list(disk.root.iterdir()) == []


def test_killed_runs_end_with_the_bits_of_the_run_that_was_never_killed(shim, text, straight, tmp_path, pytestconfig):
    kills, chain, seed = 0, 0, 0
    wanted = pytestconfig.getoption("soak") or KILLS
    while kills < wanted:
        chain += 1
        disk = Disk(shim, tmp_path / f"{chain}" / "run", tmp_path / f"{chain}")
        done = False
        while not done:
            seed += 1
            killed = kill_once(disk, text, random.Random(seed)) if kills < wanted else run_on(disk, text)
            kills += killed
            done = not killed
        assert bits(disk.root) == straight, f"chain {chain}, seed {seed}"
    print(f"{kills} kills in {chain} runs")


def arguments(disk: Disk, text: Path) -> list[str]:
    """Resume where there is something to resume, as its user would."""
    there = any(disk.root.glob("step-*/state.json"))
    return flags(text, disk.root, steps=STEPS, **({"init": "resume"} if there else {}))


def run_on(disk: Disk, text: Path) -> bool:
    process = spawn(arguments(disk, text), disk.env)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    return False


def kill_once(disk: Disk, text: Path, rng: random.Random) -> bool:
    """Run until a random moment, the n-th operation on the disk or a point in time; then cut the power. Returns whether
    it was killed; else it had ended well."""
    on_disk = rng.random() < 0.6
    env = {**disk.env, **({"FORGETFUL_KILL": str(rng.randrange(1, 900))} if on_disk else {})}
    process = spawn(arguments(disk, text), env)
    if not on_disk:
        assert process.stdout is not None
        for _ in range(12):  # it trains, or nearly so
            process.stdout.readline()
        time.sleep(rng.uniform(0, 0.5))
        process.kill()
    _, err = process.communicate(timeout=120)
    assert process.returncode in (0, -9), err
    disk.cut(None if rng.random() < 0.5 else rng)
    return process.returncode == -9
