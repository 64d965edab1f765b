"""Plugins: a Plugin is an inert object that a script's decorators write into; the loader reads it. Nothing is global.

    plugin = Plugin("stories", api=1)

    @plugin.model("15m", Config(dim=288), steps=2000)      # stackable; the first declared preset is the default
    class Stories(Decoder): ...

A plugin is code, so it runs only when it is asked for: by its path, by its folder, or by the name under which an
installed package announces it (entry-point group `anert.plugins`), which is listed without importing anything.
"""

from __future__ import annotations

import sys
import types
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from anert.errors import PluginError

if TYPE_CHECKING:
    from importlib import metadata

API = 1
GROUP = "anert.plugins"

F = TypeVar("F", bound=Callable[..., Any])


@dataclass(frozen=True, slots=True)
class Preset:
    """One size of a model: its class, its config, and what else of TrainOptions is best for it."""

    name: str
    model: type
    config: Any
    dataset: str
    """Name of one of the plugin's datasets; empty: the first that it declares."""
    tokenizer: str
    """Name of one of the plugin's tokenizers; empty: a byte-level BPE trained on the data."""
    defaults: Mapping[str, Any]
    """TrainOptions fields that this preset sets otherwise."""


class Plugin:
    """What one plugin declares. Decorators only write here; `presets` keeps the order of the text."""

    def __init__(self, name: str, *, api: int) -> None:
        if not isinstance(name, str) or not name.replace("-", "_").isidentifier():
            raise PluginError(f"a plugin's name is letters, digits, - and _, got {name!r}")
        self.name = name
        self.api = api
        self.source = "<memory>"
        """Where it came from: the loader writes it."""
        self.datasets: dict[str, Callable[..., Any]] = {}
        self.tokenizers: dict[str, Callable[..., Any]] = {}
        self.optimizers: dict[str, Callable[..., Any]] = {}
        self.commands: dict[str, Callable[..., Any]] = {}
        self.train_with: Callable[..., Any] | None = None
        """Replaces anert.train.train, with its signature."""
        self.sample_with: Callable[..., Any] | None = None
        """Replaces anert.sample.generate, with its signature."""
        self._slots: list[Preset | None] = []
        self._default = ""

    def __repr__(self) -> str:
        return f"<Plugin {self.name!r} from {self.source}: {', '.join(self.presets) or 'no model'}>"

    @property
    def presets(self) -> dict[str, Preset]:
        """Every preset by name, in the order of the script."""
        return {p.name: p for p in self._slots if p is not None}

    @property
    def default_preset(self) -> str:
        """The preset declared with `default=True`, else the first; PluginError where there is no model."""
        if not self.presets:
            raise PluginError(f'{self.source}: plugin {self.name!r} has no model: add @plugin.model("tiny", Config())')
        return self._default or next(iter(self.presets))

    def preset(self, name: str = "") -> Preset:
        """The preset of this name, or the default one. PluginError suggests the nearest names."""
        name = name or self.default_preset
        found = self.presets.get(name)
        if found is None:
            raise PluginError(f"plugin {self.name!r} has no preset {name!r}: {suggest(name, self.presets)}")
        return found

    def model(
        self,
        preset: str,
        config: Any,
        *,
        default: bool = False,
        dataset: str = "",
        tokenizer: str = "",
        **defaults: Any,
    ) -> Callable[[type], type]:
        """Declare the class below as this preset. `config` is a frozen dataclass; `defaults` override TrainOptions.

        The place in the order is taken when the decorator's line is reached, which for stacked decorators is from
        top to bottom, although Python applies them from the bottom up.
        """
        if not is_dataclass(config) or isinstance(config, type):
            raise PluginError(f"preset {preset!r} of {self.name!r}: config is a dataclass instance, got {config!r}")
        place = len(self._slots)
        self._slots.append(None)

        def register(cls: type) -> type:
            if preset in self.presets:
                raise PluginError(f"plugin {self.name!r} declares preset {preset!r} twice")
            if default and self._default:
                raise PluginError(f"plugin {self.name!r} has two default presets: {self._default!r} and {preset!r}")
            self._slots[place] = Preset(preset, cls, config, dataset, tokenizer, types.MappingProxyType(defaults))
            if default:
                self._default = preset
            return cls

        return register

    def dataset(self, name: str) -> Callable[[F], F]:
        """Declare `f(path, megabytes, seed, progress=None)`: writes text to `path`, calls progress(done, all) in MB."""
        return self._named(self.datasets, "dataset", name)

    def tokenizer(self, name: str) -> Callable[[F], F]:
        """Declare `f(path, vocab_size) -> Tokenizer`: makes a tokenizer for the corpus at `path`."""
        return self._named(self.tokenizers, "tokenizer", name)

    def optimizer(self, name: str) -> Callable[[F], F]:
        """Declare an optimizer that `--optimizer name` chooses."""
        return self._named(self.optimizers, "optimizer", name)

    def command(self, name: str) -> Callable[[F], F]:
        """Declare `f(args, open_runtime) -> exit code or None`, run by `anert run PLUGIN name args...`."""
        if name in ("train", "sample"):
            raise PluginError(f"command {name!r} is anert's own: @plugin.{name}r replaces what it does")
        return self._named(self.commands, "command", name)

    def trainer(self, function: F) -> F:
        """Use `function` in place of anert.train.train, with its signature: a generator of events."""
        if self.train_with is not None:
            raise PluginError(f"plugin {self.name!r} declares two trainers")
        self.train_with = function
        return function

    def sampler(self, function: F) -> F:
        """Use `function` in place of anert.sample.generate, with its signature: a generator of text pieces."""
        if self.sample_with is not None:
            raise PluginError(f"plugin {self.name!r} declares two samplers")
        self.sample_with = function
        return function

    def _named(self, table: dict[str, Callable[..., Any]], kind: str, name: str) -> Callable[[F], F]:
        if name in table:
            raise PluginError(f"plugin {self.name!r} declares {kind} {name!r} twice")

        def register(function: F) -> F:
            table[name] = function
            return function

        return register


@dataclass(frozen=True, slots=True)
class Row:
    """One line of `anert plugins`. status: `ok`, `broken` (with its reason) or `installed` (listed, not loaded)."""

    name: str
    source: str
    status: str
    presets: tuple[str, ...] = ()
    commands: tuple[str, ...] = ()
    reason: str = ""
    plugin: Plugin | None = field(default=None, repr=False, compare=False)


def load(target: str | Path) -> Plugin:
    """The plugin at this path, or the installed one of this name. PluginError says in one line why there is none."""
    path = Path(target)
    if path.suffix == ".py" or path.exists() or len(path.parts) > 1:
        return load_file(path)
    entries = {e.name: e for e in installed()}
    if str(target) in entries:
        return load_entry(entries[str(target)])
    here = Path("plugins") / f"{target}.py"
    hint = f"there is {here}: name it by that path" if here.is_file() else suggest(str(target), entries, "installed:")
    raise PluginError(f"no installed plugin is named {str(target)!r}: {hint}")


def split_name(target: str) -> tuple[str, str]:
    """`stories:110m` or `plugins/stories.py:110m` -> (plugin, preset); no preset: `""`."""
    head, colon, tail = target.rpartition(":")
    if not colon or Path(target).exists() or "/" in tail:
        return target, ""
    if not head or not tail:
        raise PluginError(f"expected PLUGIN or PLUGIN:PRESET, got {target!r}")
    return head, tail


def load_file(path: Path) -> Plugin:
    """Run this one file and return its `plugin`. No bytecode is written and sys.path stays as it is."""
    if path.is_dir():
        names = ", ".join(p.name for p in _scripts(path)) or "no .py file"
        raise PluginError(f"{path}: expected a plugin's file, got a folder; it has {names}")
    try:
        source = path.read_bytes()
    except OSError as error:
        raise PluginError(f"{path}: no plugin there: {error.strerror or error}") from error
    # A dataclass looks its module up in sys.modules while its decorator runs, and so does pickle later.
    module = types.ModuleType(f"anert_plugin_{zlib.crc32(str(path.resolve()).encode()):08x}_{path.stem}")
    module.__file__ = str(path)
    previous = sys.modules.get(module.__name__)
    sys.modules[module.__name__] = module
    try:
        with _guard(str(path), module.__dict__):
            exec(compile(source, str(path), "exec"), module.__dict__)
        return _checked(module.__dict__, str(path))
    except PluginError:
        sys.modules.pop(module.__name__, None)
        if previous is not None:
            sys.modules[module.__name__] = previous
        raise


def load_entry(entry: metadata.EntryPoint) -> Plugin:
    """The plugin that an installed package announces, as `package.module` or `package.module:plugin`."""
    source = f"{entry.dist.name} {entry.dist.version} ({entry.value})" if entry.dist else entry.value
    with _guard(source, {}):
        found = entry.load()
    names = dict(vars(found)) if isinstance(found, types.ModuleType) else {"plugin": found}
    return _checked(names, source)


def installed() -> list[metadata.EntryPoint]:
    """Entry points of the group `anert.plugins`, by name; none is imported."""
    from importlib import metadata

    return sorted(metadata.entry_points(group=GROUP), key=lambda e: e.name)


def discover(targets: Iterable[str | Path] = ()) -> list[Row]:
    """One row a plugin: what `targets` (files or folders) hold, loaded, then what is installed, not loaded.

    A broken file is a row with its reason and never breaks another. Two plugins of one name are both broken.
    """
    rows = []
    for target in targets:
        path = Path(target)
        if path.is_dir():
            rows += [_row(script) for script in _scripts(path)]
        else:
            rows.append(_row(path))
    rows += [Row(e.name, f"{e.dist.name if e.dist else ''} ({e.value})", "installed") for e in installed()]
    return list(_clashes(rows))


def suggest(name: str, known: Iterable[str], lead: str = "it has") -> str:
    """`did you mean 110m?` where a known name is near, else what there is."""
    names = [str(k) for k in known]
    import difflib

    near = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    if near:
        return f"did you mean {near[0]}?"
    return f"{lead} {', '.join(names) or 'none'}"


def _scripts(folder: Path) -> list[Path]:
    return sorted(p for p in folder.glob("*.py") if not p.name.startswith(("_", ".")))


def _row(path: Path) -> Row:
    try:
        plugin = load_file(path)
    except PluginError as error:
        return Row(path.stem, str(path), "broken", reason=str(error))
    return Row(plugin.name, str(path), "ok", tuple(plugin.presets), tuple(plugin.commands), plugin=plugin)


def _clashes(rows: list[Row]) -> Iterator[Row]:
    sources: dict[str, list[str]] = {}
    for row in rows:
        if row.status != "broken":
            sources.setdefault(row.name, []).append(row.source)
    for row in rows:
        others = sources.get(row.name, [])
        if row.status == "broken" or len(others) < 2:
            yield row
        else:
            reason = f"{len(others)} plugins are named {row.name!r}: {' and '.join(others)}; rename one"
            yield Row(row.name, row.source, "broken", row.presets, row.commands, reason)


@contextmanager
def _guard(source: str, names: Mapping[str, Any]) -> Iterator[None]:
    """Turns whatever a plugin's code raises while it loads into one sentence with its file and line."""
    try:
        yield
    except (KeyboardInterrupt, MemoryError):
        raise
    except BaseException as error:
        _check_api(names.get("plugin"), source)  # a newer api explains more than what failed for lack of it
        if isinstance(error, SystemExit):
            raise PluginError(f"{source}: it calls sys.exit({error.code!r}) on load; a plugin only declares") from error
        if isinstance(error, SyntaxError) and error.filename == source:
            raise PluginError(f"{source}:{error.lineno}: SyntaxError: {error.msg}") from error
        import traceback

        frames = [f.lineno for f in traceback.extract_tb(error.__traceback__) if f.filename == source]
        line = f":{frames[-1]}" if frames else ""
        text = " ".join(str(error).split())
        raise PluginError(f"{source}{line}: {type(error).__name__}: {text}") from error


def _checked(names: Mapping[str, Any], source: str) -> Plugin:
    if "plugin" not in names:
        stem = Path(source).stem
        raise PluginError(f'{source}: no name `plugin` in it: write plugin = Plugin("{stem}", api={API})')
    plugin = names["plugin"]
    if not isinstance(plugin, Plugin):
        raise PluginError(f"{source}: `plugin` is a {type(plugin).__name__}, expected an anert.Plugin")
    _check_api(plugin, source)
    for preset in plugin.presets.values():
        for kind, name, table in (
            ("dataset", preset.dataset, plugin.datasets),
            ("tokenizer", preset.tokenizer, plugin.tokenizers),
        ):
            if name and name not in table:
                raise PluginError(f"{source}: preset {preset.name!r} wants {kind} {name!r}: {suggest(name, table)}")
    plugin.source = source
    return plugin


def _check_api(plugin: object, source: str) -> None:
    if isinstance(plugin, Plugin) and plugin.api != API:
        older = isinstance(plugin.api, int) and plugin.api < API
        todo = "update the plugin" if older else "update anert"
        raise PluginError(f"{source}: written for plugin api {plugin.api}, this anert speaks {API}: {todo}")
