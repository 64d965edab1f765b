"""anert's own run directories and steps (anert/checkpoint.py), as one format among the others."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from anert import checkpoint
from anert.errors import InputError
from anert.formats import tensor_file
from anert.formats.base import Pretrained, Tensors
from anert.tokenizer import load_tokenizer

DTYPES = ("fp32", "fp16")
"""What a step's matrices are written in."""


def sniff(path: Path) -> bool:
    """Whether a directory is a run's or a step's."""
    return path.name.startswith("step-") or (path / checkpoint.STATE).is_file() or any(path.glob("step-*"))


def read(path: Path, hashed: bool = True) -> Pretrained:
    """The newest step that verifies, or the step that `path` or a pointer file is. hashed: see checkpoint.load. Raises
    InputError."""
    found = checkpoint.load(path, hashed=hashed)
    state = found.state
    if not isinstance(state.get("config"), dict):
        raise InputError(f"{found.path}: its {checkpoint.STATE} has no config: damaged, or not a training run's")
    about: dict[str, Any] = {k: state[k] for k in ("plugin", "preset", "train_loss", "val_loss") if k in state}
    notes = [f"skipped {skipped}: {why}" for skipped, why in found.skipped]
    tensors = Tensors(tensor_file.read(found.path / checkpoint.MODEL))
    model = Pretrained("anert", found.path, dict(state["config"]), tensors, step=found.step, about=about, notes=notes)
    if (tokenizer := found.tokenizer_path) is not None:
        model.tokenizer, model.tokenizer_name = lambda: load_tokenizer(tokenizer), tokenizer.name
    return model


def write(path: Path, model: Pretrained, plugin: str = "", dtype: str = "fp32") -> None:
    """A run directory of one step, without optimizer state: to sample from, or to `--init` a run with. dtype: `fp32`,
    or `fp16`: its matrices, which programs of backend cpu read where they lie in the file; what is computed with in
    fp32 (norm gains) stays so, hence the same text comes out. InputError: another one, or a value past 65504."""
    if dtype not in DTYPES:
        raise InputError(f"--to anert holds {' or '.join(DTYPES)}, not {dtype}: choose one of them, or --to hf")
    kinds = {name: dtype if len(e.shape) > 1 else "fp32" for name, e in model.tensors.entries.items()}
    tensors = {name: tensor_file.encoded(model.tensors[name], kind, name) for name, kind in kinds.items()}
    known = model.about if model.format == "anert" else {}
    state = {
        "plugin": plugin or known.get("plugin", "stories"),
        "preset": known.get("preset", ""),
        "config": model.config,
        "source": {"format": model.format, **model.about},
    }
    checkpoint.save(path, max(model.step, 0), tensors, {}, state, model.tokenizer() if model.tokenizer else None)
