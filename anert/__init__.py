"""anert: a thin Python runtime for Apple's Neural Engine, and a CPU engine that runs the same MIL text.

A plugin imports the names below and no others. Importing anert does nothing: each name loads its module when it is
first used, and no engine is opened before a Runtime is.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from anert import nn as nn
    from anert.errors import AnertError as AnertError
    from anert.errors import InputError as InputError
    from anert.errors import PluginError as PluginError
    from anert.model import Decoder as Decoder
    from anert.optim import Optimizer as Optimizer
    from anert.param import Spec as Spec
    from anert.plugin import Plugin as Plugin
    from anert.runtime import open_runtime as open_runtime
    from anert.train import TrainOptions as TrainOptions

__version__ = "0.1.0"

_HOMES = {
    "AnertError": "errors",
    "Decoder": "model",
    "InputError": "errors",
    "Optimizer": "optim",
    "Plugin": "plugin",
    "PluginError": "errors",
    "Spec": "param",
    "TrainOptions": "train",
    "nn": "",
    "open_runtime": "runtime",
}
"""Public name -> the submodule that defines it; `""`: it is a submodule itself."""

__all__ = ["__version__", *_HOMES]  # noqa: PLE0604 (every key is a string)


def __getattr__(name: str) -> Any:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module 'anert' has no public name {name!r}: it has {', '.join(sorted(_HOMES))}")
    module = importlib.import_module(f"anert.{home or name}")
    return getattr(module, name) if home else module


def __dir__() -> list[str]:
    return sorted(__all__)
