"""anert's own run directories and steps (anert/checkpoint.py), as one format among the others."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from anert import checkpoint
from anert.errors import InputError
from anert.formats import tensor_file
from anert.formats.base import Pretrained, Tensors
from anert.tokenizer import load_tokenizer


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


def write(path: Path, model: Pretrained, plugin: str = "") -> None:
    """A run directory of one step, its weights in float32, without optimizer state: to sample from, or to `--init` a
    run with."""
    tensors = {name: model.tensors[name].astype("f4", copy=False) for name in model.tensors}
    known = model.about if model.format == "anert" else {}
    state = {
        "plugin": plugin or known.get("plugin", "stories"),
        "preset": known.get("preset", ""),
        "config": model.config,
        "source": {"format": model.format, **model.about},
    }
    checkpoint.save(path, max(model.step, 0), tensors, {}, state, model.tokenizer() if model.tokenizer else None)
