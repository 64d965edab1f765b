"""Crash-safe checkpoints: a directory a step, whole or absent; design.md section 9.

A run directory holds `step-00001000/{model.safetensors, optim.safetensors, tokenizer.*, state.json}` and the pointer
files `last` and `best` (a directory's name). A step is written under a temporary name, state.json last, with size and
sha256 of the rest; files and directory are fsynced before the rename. Whatever is killed, what was there stays whole.
"""

from __future__ import annotations

import errno
import functools
import json
import math
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from anert.errors import AnertError, InputError, NativeError, NonFiniteError
from anert.files import fsync, publish, sha256
from anert.tokenizer import Tokenizer

VERSION = 1
STATE, MODEL, OPTIM = "state.json", "model.safetensors", "optim.safetensors"
OWN_KEYS = ("format_version", "step", "files")
"""Keys of state.json that belong to this module; the rest is the caller's state."""

ASIDE = ".old.tmp"

Tensors = dict[str, NDArray[Any]]


class NewerFormatError(InputError):
    """A checkpoint that a newer anert wrote."""


@dataclass
class Checkpoint:
    """A verified checkpoint; `model` and `optim` are read when asked for. skipped: newer ones that did not verify."""

    path: Path
    step: int
    state: dict[str, Any]
    tokenizer_path: Path | None
    skipped: list[tuple[Path, str]] = field(default_factory=list)

    @functools.cached_property
    def model(self) -> Tensors:
        """Weights by name."""
        return _read_tensors(self.path / MODEL)

    @functools.cached_property
    def optim(self) -> Tensors:
        """Optimizer state by name; may be empty."""
        return _read_tensors(self.path / OPTIM)


def save(
    run_dir: Path | str,
    step: int,
    model: Mapping[str, NDArray[Any]],
    optim: Mapping[str, NDArray[Any]],
    state: Mapping[str, Any],
    tokenizer: Tokenizer | None = None,
    best: bool = False,
    keep: int = 3,
) -> Path:
    """Write a step and point `last` (and `best`) at it; then drop all but the newest `keep`, never `best` or `last`.

    state: what JSON holds; NaN and inf become null. Raises NonFiniteError before anything is written if a tensor has
    NaN or inf; InputError or NativeError where the disk refuses. Older checkpoints stay as they were.
    """
    run_dir = Path(run_dir)
    _require_finite({**model, **{f"optimizer state {name}": t for name, t in optim.items()}})
    if clash := set(state) & set(OWN_KEYS):
        raise ValueError(f"state has {', '.join(sorted(clash))}, which the checkpoint itself writes")
    final = run_dir / f"step-{step:08d}"
    temporary = run_dir / f".{final.name}.{os.getpid()}.tmp"
    with _disk(run_dir, sum(t.nbytes for t in (*model.values(), *optim.values()))):
        run_dir.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(run_dir)
        try:
            temporary.mkdir()
            _write_step(temporary, step, model, optim, state, tokenizer)
            _replace_directory(temporary, final)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
        for pointer in ("last", "best") if best else ("last",):
            _point(run_dir / pointer, final.name)
        _prune(run_dir, keep)
    return final


def load(path: Path | str, before: int | None = None, hashed: bool = True) -> Checkpoint:
    """A step's directory, or of a run's directory the newest step that verifies, with the skipped ones and why.

    Pointer files (`runs/x/best`) lead to their step. before: only steps of a run's directory with smaller numbers.
    hashed False: files need their sizes alone, not their sha256, which takes longer than to read the weights.
    Raises InputError: nothing there, nothing that verifies, or a checkpoint of a newer format, by its name.
    """
    path = Path(path)
    if path.is_file() and path.name in ("last", "best"):
        path = pointed(path)
    if path.name.startswith("step-") or (path / STATE).exists():
        if not path.is_dir():
            raise InputError(f"{path}: no such checkpoint")
        return _load_step(path, hashed)
    if not path.is_dir():
        raise InputError(f"{path}: no run directory or checkpoint there")
    skipped: list[tuple[Path, str]] = []
    for step in reversed(_steps(path, before)):
        try:
            found = _load_step(step, hashed)
        except NewerFormatError:
            raise
        except InputError as e:
            skipped.append((step, str(e).removeprefix(f"{step}: ")))
            continue
        found.skipped = skipped
        return found
    if not skipped:
        raise InputError(f"{path}: no checkpoint (step-*) in it")
    step, why = skipped[0]
    raise InputError(f"{path}: none of {len(skipped)} checkpoints is whole; the newest, {step.name}: {why}")


def pointed(pointer: Path) -> Path:
    """The step that a pointer file (`runs/x/best`) leads to."""
    return pointer.parent / _pointed_at(pointer)


def recorded_state(run_dir: Path) -> dict[str, Any]:
    """state.json of the newest step in a run directory whose state can be read; its tensors are not looked at.

    Raises InputError: no such directory, or no step in it with a state that can be read.
    """
    if not run_dir.is_dir():
        raise InputError(f"{run_dir}: no run to resume there")
    for step in reversed(_steps(run_dir)):
        try:
            return _read_state(step)[0]
        except NewerFormatError:
            raise
        except InputError:
            continue
    raise InputError(f"{run_dir}: no finished checkpoint (step-*/{STATE}) to resume from")


def set_aside(run_dir: Path, after: int) -> list[Path]:
    """Rename the steps after `after`, which led astray, to `diverged-*`, and point `last` at it; returns the new names.

    The one that `best` points at stays: it was good when it was validated.
    """
    best, moved = _pointed_at(run_dir / "best"), []
    with _disk(run_dir, 0):
        _point(run_dir / "last", f"step-{after:08d}")
        for step in _steps(run_dir):
            if _number(step) > after and step.name != best:
                to = run_dir / f"diverged-{_number(step):08d}"
                shutil.rmtree(to, ignore_errors=True)
                os.rename(step, to)
                moved.append(to)
        fsync(run_dir)
    return moved


def _write_step(
    into: Path,
    step: int,
    model: Mapping[str, NDArray[Any]],
    optim: Mapping[str, NDArray[Any]],
    state: Mapping[str, Any],
    tokenizer: Tokenizer | None,
) -> None:
    _write_tensors(into / MODEL, model)
    _write_tensors(into / OPTIM, optim)
    if tokenizer is not None:
        tokenizer.save(into / f"tokenizer{tokenizer.suffix}")
    files = {}
    for path in sorted(into.iterdir()):
        fsync(path)
        files[path.name] = {"size": path.stat().st_size, "sha256": sha256(path)}
    own = {"format_version": VERSION, "step": step, "files": files}
    text = json.dumps({**own, **_plain(dict(state))}, indent=1, allow_nan=False)
    (into / STATE).write_text(text + "\n", encoding="utf-8")
    fsync(into / STATE)
    fsync(into)


def _write_tensors(path: Path, tensors: Mapping[str, NDArray[Any]]) -> None:
    from safetensors import SafetensorError
    from safetensors.numpy import save_file

    try:
        save_file({name: np.ascontiguousarray(t) for name, t in tensors.items()}, path)
    except SafetensorError as e:
        for code in (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS, errno.EIO, errno.EFBIG):
            if f"os error {code}" in str(e):
                raise OSError(code, os.strerror(code), str(path)) from None
        raise NativeError(f"{path}: cannot write the tensors: {e}") from None


def _read_tensors(path: Path) -> Tensors:
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    try:
        return load_file(path)
    except (SafetensorError, OSError) as e:
        raise InputError(f"{path}: cannot read the tensors: {e}") from None


def _load_step(path: Path, hashed: bool) -> Checkpoint:
    """Raises InputError unless every file has the size and, `hashed`, the sha256 that state.json says."""
    state, step, files = _read_state(path)
    for name, entry in files.items():
        _verify(path, name, entry, hashed)
    tokenizer = next((path / name for name in files if name.startswith("tokenizer.")), None)
    return Checkpoint(path, step, state, tokenizer)


def _read_state(path: Path) -> tuple[dict[str, Any], int, dict[str, Any]]:
    """(the caller's state, step, files) of a step's state.json."""
    try:
        content = json.loads((path / STATE).read_text(encoding="utf-8"))
        version, step, files = (content.pop(key) for key in OWN_KEYS)
    except OSError as e:
        raise InputError(f"{path}: no {STATE} ({e.strerror}): it was not finished") from None
    except (ValueError, KeyError, AttributeError, TypeError, RecursionError):
        raise InputError(f"{path}: {STATE} is damaged") from None
    if isinstance(version, int) and version > VERSION:
        raise NewerFormatError(
            f"{path}: checkpoint format {version}, this anert reads up to {VERSION}: a newer one wrote it, update anert"
        )
    if version != VERSION or not isinstance(files, dict) or not isinstance(step, int) or MODEL not in files:
        raise InputError(f"{path}: {STATE} is damaged")
    return content, step, files


def _verify(path: Path, name: str, entry: Any, hashed: bool) -> None:
    file = path / name
    plain = Path(name).name == name and "\0" not in name
    if not plain or not isinstance(entry, dict) or not isinstance(entry.get("size"), int):
        raise InputError(f"{path}: {STATE} is damaged")
    try:
        size = file.stat().st_size
        if size != entry.get("size"):
            raise InputError(f"{path}: {name} has {size:,} bytes, {STATE} says {entry['size']:,}: truncated")
        if hashed and sha256(file) != entry.get("sha256"):
            raise InputError(f"{path}: {name} differs from its sha256 in {STATE}: damaged on disk")
    except OSError as e:
        raise InputError(f"{path}: {name}: {e.strerror}") from None


def _require_finite(tensors: Mapping[str, NDArray[Any]]) -> None:
    for name, tensor in tensors.items():
        if tensor.dtype.kind != "f":
            continue
        # A float64 sum of finite fp32 or fp16 values is finite; NaN and inf survive it. It needs no memory of its own.
        with np.errstate(invalid="ignore"):
            total = float(tensor.sum(dtype=np.float64))
        if not math.isfinite(total):
            at = np.unravel_index(int(np.argmin(np.isfinite(tensor))), tensor.shape)
            where = ", ".join(map(str, at))
            raise NonFiniteError(f"{name}[{where}] is {tensor[at]}: not saved, the last checkpoint stays as it is")


def _plain(value: Any) -> Any:
    """State as JSON holds it: NumPy scalars as numbers, paths as text, non-finite numbers as null."""
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return str(value) if isinstance(value, Path) else value


def _steps(run_dir: Path, before: int | None = None) -> list[Path]:
    """Step directories, oldest first; one that a killed save had put aside (`_replace_directory`) counts."""
    found = {_number(p): p for p in run_dir.glob(".step-*" + ASIDE)}
    found |= {_number(p): p for p in run_dir.glob("step-*") if p.is_dir()}
    return [found[step] for step in sorted(found) if step >= 0 and (before is None or step < before)]


def _number(step: Path) -> int:
    """The number in a step's name, -1 where there is none."""
    number = step.name.removeprefix(".").removeprefix("step-").removesuffix(ASIDE)
    return int(number) if number.isdigit() else -1


def _pointed_at(pointer: Path) -> str:
    """The directory name in a pointer file; "" where there is none."""
    try:
        name = pointer.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError):
        return ""
    return name if name.startswith("step-") and Path(name).name == name and "\0" not in name else ""


def _point(pointer: Path, name: str) -> None:
    temporary = pointer.with_name(f".{pointer.name}.{os.getpid()}.tmp")
    temporary.write_text(name + "\n", encoding="utf-8")
    publish(temporary, pointer)


def _replace_directory(temporary: Path, final: Path) -> None:
    """Rename; a step that is there already (a run that went back and came again) makes way first."""
    if final.exists():
        aside = final.with_name(f".{final.name}{ASIDE}")
        os.rename(final, aside)
        os.rename(temporary, final)
        shutil.rmtree(aside, ignore_errors=True)
    else:
        os.rename(temporary, final)
    fsync(final.parent)


def _prune(run_dir: Path, keep: int) -> None:
    spared = {_pointed_at(run_dir / "last"), _pointed_at(run_dir / "best")}
    steps = _steps(run_dir)
    for step in steps[: max(0, len(steps) - max(1, keep))]:
        if step.name not in spared:
            # Unnamed first: what is half deleted is no checkpoint.
            gone = step.with_name(f".{step.name}.gone.tmp")
            os.rename(step, gone)
            shutil.rmtree(gone, ignore_errors=True)


def _remove_leftovers(run_dir: Path) -> None:
    """What a killed save left. A run directory belongs to one run, so nobody else is writing there."""
    for aside in run_dir.glob(".step-*" + ASIDE):
        whole = aside.with_name(aside.name[1:].removesuffix(ASIDE))
        if not whole.exists():
            os.rename(aside, whole)
    for path in run_dir.glob(".step-*.tmp"):
        shutil.rmtree(path, ignore_errors=True)
    for path in (*run_dir.glob(".last.*.tmp"), *run_dir.glob(".best.*.tmp")):
        path.unlink(missing_ok=True)


@contextmanager
def _disk(run_dir: Path, nbytes: int) -> Iterator[None]:
    """What the disk refuses, as a sentence."""
    try:
        yield
    except AnertError:
        raise
    except OSError as e:
        kept = "older checkpoints are untouched"
        if e.errno in (errno.ENOSPC, errno.EDQUOT):
            raise NativeError(
                f"{run_dir}: no space for a checkpoint of {nbytes / 2**20:.1f} MiB; {kept}: free some, or another --out"
            ) from None
        if e.errno in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST):
            raise InputError(
                f"{run_dir}: cannot write a checkpoint: {e.strerror}; {kept}: choose another --out"
            ) from None
        raise NativeError(f"{run_dir}: cannot write a checkpoint: {e.strerror}; {kept}") from None
