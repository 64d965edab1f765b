"""Breaks the shim in every way that its contract knows, and sees that a test notices.

A row of MUTANTS: the rule, the edits (file, old text, new text), the tests of which one must fail. Only the edited file
is compiled again; the tests run in a forked child, where a crash counts as noticed.
"""

from __future__ import annotations

import faulthandler
import os
import signal
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest
import test_ane_open as opening
import test_ane_shim as shim
from _pytest.outcomes import OutcomeException
from ane_mutants import MUTANTS
from fake_ane import build, run, stand_in

import build_ffi
from anert.errors import AnertError

FILES = ("ane.m", "ane_framework.m", "surface_iosurface.m", "ane_apple.h")
NOTICED, SURVIVED, BROKEN = 40, 41, 42  # exit codes; any other is the run time's own way out
SECONDS = 40  # of one test; a lock that nobody gives back ends here


@dataclass(frozen=True)
class Case:
    """A test of test_ane_shim or test_ane_open by name, "name" or "name[argument]"."""

    name: str

    def call(self) -> Callable[..., None]:
        name, _, arguments = self.name.partition("(")
        module = shim if hasattr(shim, f"test_{name}") else opening
        function = getattr(module, f"test_{name}")
        return partial(function, **eval(f"dict({arguments}")) if arguments else function


def link(folder: Path, edits: tuple[tuple[str, str, str], ...]) -> Path:
    """The shim with `edits`, each of which must match once."""
    base = build()[0].parent
    texts = {name: (build_ffi.NATIVE / name).read_text() for name in FILES}
    for name, old, new in edits:
        assert texts[name].count(old) == 1, f"{texts[name].count(old)} times in {name}: {old}"
        texts[name] = texts[name].replace(old, new)
    for name, text in texts.items():
        (folder / name).write_text(text)
    changed = {name for name, _, _ in edits}
    sources = [n for n in FILES if n.endswith(".m") and (n in changed or "ane_apple.h" in changed)]
    compile_args, link_args = build_ffi.objc_flags(folder / "include")
    flags = [*compile_args, "-std=gnu11", "-O0", "-fPIC", "-DANERT_ANE_TESTING", f"-I{build_ffi.NATIVE}"]
    objects = []
    for name in sources:
        objects.append(str(folder / f"{Path(name).stem}.o"))
        run(["clang", *flags, "-c", str(folder / name), "-o", objects[-1]])
    kept = [str(p) for p in (base / "temp").rglob("*.o") if f"{p.stem}.m" not in sources]
    run(["clang", "-shared", *objects, *kept, *link_args, "-o", str(folder / "_ane.so")])
    return folder / "_ane.so"


def child(path: Path, cases: list[Case]) -> tuple[int, str]:
    """What the tests make of this build of the shim: NOTICED and how, SURVIVED, or BROKEN if the harness is."""
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        code, word = BROKEN, "the child did not come to its end"
        try:
            code, word = attempt(path, cases)
        except BaseException as error:
            word = repr(error)
        finally:
            os.write(write, word.encode()[:4000])
            os._exit(code)
    os.close(write)
    with os.fdopen(read, errors="replace") as pipe:
        word = pipe.read()
    status = os.waitpid(pid, 0)[1]
    if os.WIFSIGNALED(status):
        return NOTICED, signal.Signals(os.WTERMSIG(status)).name
    code = os.WEXITSTATUS(status)
    return (code, word) if code in (NOTICED, SURVIVED, BROKEN) else (NOTICED, f"exit code {code}")


def attempt(path: Path, cases: list[Case]) -> tuple[int, str]:
    faulthandler.disable()
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)
    os.dup2(null, 2)
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    for case in cases:
        signal.alarm(SECONDS)
        try:
            with stand_in(path) as make:
                case.call()(make)
        except (AssertionError, AnertError, OutcomeException) as error:
            return NOTICED, f"{case.name}: {type(error).__name__}: {error}"
    return SURVIVED, ""


@pytest.mark.parametrize(("rule", "edits", "cases"), MUTANTS, ids=[rule.replace(" ", "-") for rule, _, _ in MUTANTS])
def test_a_broken_shim_is_noticed(tmp_path, rule, edits, cases):
    outcome, how = child(link(tmp_path, edits), [Case(name) for name in cases])
    assert outcome != BROKEN, how
    assert outcome == NOTICED, f"{rule}: {', '.join(cases)} did not notice"
    print(how)


def test_the_whole_shim_passes_where_mutants_fail(tmp_path):
    """The harness itself fails nothing: the same build, without an edit, through every test of the table."""
    names = sorted({name for _, _, cases in MUTANTS for name in cases})
    path = link(tmp_path, (("ane.m", "/* ane.m: MIL text", "/* ane.m : MIL text"),))
    outcome, how = child(path, [Case(name) for name in names])
    assert outcome == SURVIVED, how


def test_rules_are_named_once():
    rules = [rule for rule, _, _ in MUTANTS]
    assert len(set(rules)) == len(rules)
