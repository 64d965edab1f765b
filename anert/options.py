"""From what a user wrote to one checked Job: defaults < preset < resumed run < TOML file < flags.

Flags are made from TrainOptions, so a new field is a new flag, a new TOML key and a new preset default at once.
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
import itertools
import math
import re
import textwrap
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from anert.errors import InputError, PluginError
from anert.plugin import Plugin, suggest
from anert.train import TrainOptions

SECONDS = {"ms": 1e-3, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
AT_LEAST_ONE = ("steps", "batch", "grad_accum", "keep")
BELOW_ONE = ("beta1", "beta2")


@dataclass(frozen=True, slots=True)
class Job:
    """What a training run is: everything that anert.train.train is called with."""

    plugin: Plugin
    preset: str
    config: Any
    options: TrainOptions


def duration(text: str) -> float:
    """Seconds of `90`, `90s`, `5m`, `1h30m`, `250ms`. Raises ValueError."""
    if re.fullmatch(r"\d+(\.\d*)?|\.\d+", text):
        return float(text)
    parts = re.findall(r"(\d+\.?\d*|\.\d+)(ms|s|m|h|d)", text)
    if not parts or "".join(n + u for n, u in parts) != text:
        raise ValueError(f"a duration is a number with ms, s, m, h or d, as 90s or 1h30m, got {text!r}")
    return sum(float(n) * SECONDS[u] for n, u in parts)


def flag(name: str) -> str:
    """The flag of a TrainOptions field: `grad_accum` -> `--grad-accum`, `time_budget_s` -> `--time-budget`."""
    return "--" + key(name).replace("_", "-")


def key(name: str) -> str:
    """The TOML key and preset keyword of a field: its name without the unit of a duration."""
    return name.removesuffix("_s")


def fields() -> dict[str, dataclasses.Field[Any]]:
    """TrainOptions' fields by key."""
    return {key(f.name): f for f in dataclasses.fields(TrainOptions)}


def field_notes(cls: type) -> dict[str, str]:
    """The sentence that stands under each field of a dataclass, by field name; read from the source for --help."""
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(cls))).body[0]
    except OSError:  # no source beside the bytecode: --help then has the defaults alone
        return {}
    notes = {}
    body = tree.body if isinstance(tree, ast.ClassDef) else []
    for line, below in itertools.pairwise(body):
        if isinstance(line, ast.AnnAssign) and isinstance(line.target, ast.Name) and isinstance(below, ast.Expr):
            text = ast.literal_eval(below.value) if isinstance(below.value, ast.Constant) else ""
            notes[line.target.id] = " ".join(str(text).split()).replace("%", "%%")
    return notes


def resolve(plugin: Plugin, flags: Mapping[str, Any]) -> Job:
    """The Job of these flags. `flags`: TrainOptions fields that were given, and `preset`, `set`, `config`, `resume`."""
    given = {name: flags[name] for name in (f.name for f in fields().values()) if name in flags}
    preset, settings, source = flags.get("preset") or "", list(flags.get("set") or ()), flags.get("config")
    if flags.get("resume"):
        if given.get("out", flags["resume"]) != flags["resume"]:
            raise InputError(f"--resume {flags['resume']} goes on in that folder: leave out --out {given['out']}")
        given |= {"init": "resume", "out": flags["resume"]}
    from_file, config_file = _read_toml(Path(source)) if source else ({}, {})
    preset = preset or from_file.pop("preset", "")
    values, config = {}, dict(config_file)
    out = given.get("out") or from_file.get("out")
    if {**from_file, **given}.get("init") == "resume":
        if not out:
            raise InputError("--init resume needs --out RUN_DIR; --resume RUN_DIR says both")
        recorded = recorded_run(Path(out))
        preset = preset or recorded.get("preset", "")
        if preset == recorded.get("preset"):
            config = {**recorded.get("config", {}), **config}
            values = {k: v for k, v in recorded.get("options", {}).items() if k in _names()}
    chosen = plugin.preset(preset)
    merged = {**_preset_defaults(plugin, chosen.name), **values, **from_file, **given}
    options = _checked(TrainOptions(**merged))
    return Job(plugin, chosen.name, _configured(chosen.config, config, settings), options)


def recorded_run(run_dir: Path) -> dict[str, Any]:
    """`preset`, `config` and `options` of the newest checkpoint in a run directory whose state.json can be read."""
    from anert import checkpoint

    state = checkpoint.recorded_state(run_dir)
    return {name: state[name] for name in ("preset", "config", "options") if name in state}


def kind(read: Any) -> str:
    """What a reader (`int`, `duration`, ...) expects, in words."""
    return {int: "a whole number", float: "a number", bool: "true or false", duration: "a time as 90s or 5m"}.get(
        read, "text"
    )


def _names() -> set[str]:
    return {f.name for f in fields().values()}


def _preset_defaults(plugin: Plugin, name: str) -> dict[str, Any]:
    known, found = fields(), plugin.presets[name].defaults
    for k in found:
        if k not in known and k not in _names():
            where = f"{plugin.source}: preset {name!r}"
            raise PluginError(f"{where} sets {k!r}, which is no option of train: {suggest(k, known)}")
    return {k if k in _names() else known[k].name: v for k, v in found.items()}


def _read_toml(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """(train options and `preset`, model config) of a TOML file; keys as flags, with - or _."""
    try:
        table = tomllib.loads(path.read_text("utf-8"))
    except OSError as error:
        raise InputError(f"{path}: no such config file: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: not TOML: {error}") from error
    config = table.pop("config", {})
    if not isinstance(config, dict):
        raise InputError(f"{path}: [config] is a table of the model's fields, got {config!r}")
    known, options = fields(), {}
    for raw, value in table.items():
        name = raw.replace("-", "_")
        if name == "preset":
            options["preset"] = str(value)
            continue
        if name not in known:
            raise InputError(f"{path}: no option {raw!r}: {suggest(name, ['preset', 'config', *known])}")
        options[known[name].name] = _typed(f"{path}: {raw}", value, known[name].default, name=known[name].name)
    return options, config


def _typed(where: str, value: Any, like: Any, name: str = "") -> Any:
    """`value`, from TOML or as text, as the type of `like`. InputError names the place."""
    read: Any = duration if name.endswith("_s") else type(like)
    try:
        if isinstance(like, bool):
            return value if isinstance(value, bool) else {"true": True, "false": False}[str(value).lower()]
        if isinstance(value, bool):
            raise ValueError
        if isinstance(like, str) and not isinstance(value, (str, int, float)):
            raise ValueError
        if isinstance(like, int) and isinstance(value, float):
            raise ValueError
        return read(str(value) if read is duration else value)
    except (ValueError, KeyError, TypeError):
        raise InputError(f"{where}: expected {kind(bool if isinstance(like, bool) else read)}, got {value!r}") from None


def _configured(config: Any, values: Mapping[str, Any], settings: Iterable[str]) -> Any:
    """`config` with fields replaced: `values` from a file or a resumed run, `settings` as `key=value`."""
    changes = dict(values)
    for setting in settings:
        name, equals, text = setting.partition("=")
        if not equals:
            raise InputError(f"--set {setting}: expected key=value, as --set dim=288")
        changes[name.strip().replace("-", "_")] = text.strip()
    known = {f.name: getattr(config, f.name) for f in dataclasses.fields(config)}
    for name, value in changes.items():
        if name not in known:
            raise InputError(f"--set {name}: the model's config has no such field: {suggest(name, known)}")
        if isinstance(known[name], (bool, int, float, str)):
            changes[name] = _typed(f"--set {name}", value, known[name])
        elif isinstance(known[name], tuple) and isinstance(value, list):
            changes[name] = tuple(value)
        elif isinstance(value, str):
            raise InputError(f"--set {name}: a {type(known[name]).__name__} cannot be given as text; edit the preset")
    try:
        return dataclasses.replace(config, **changes)
    except ValueError as error:
        raise InputError(f"the config does not hold together: {error}") from error


def _checked(options: TrainOptions) -> TrainOptions:
    for f in fields().values():
        value = getattr(options, f.name)
        if isinstance(f.default, str) or isinstance(value, str):
            if not isinstance(value, str):
                raise InputError(f"{flag(f.name)}: expected text, got {value!r}")
            continue
        low = 1 if f.name in AT_LEAST_ONE else 0
        high = 1.0 if f.name in BELOW_ONE else math.inf
        if not (low <= value < high):
            span = f"at least {low}" if high == math.inf else f"in [{low}, {high:g})"
            raise InputError(f"{flag(f.name)}: expected a number {span}, got {value}")
    return options
