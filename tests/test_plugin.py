"""Plugins: an inert object, loading with one-line reasons, isolation, discovery, names."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from anert import plugin as plugins
from anert.errors import PluginError
from anert.plugin import Plugin, discover, load, split_name

GOOD = """
from dataclasses import dataclass
from anert.plugin import Plugin
plugin = Plugin("{name}", api=1)

@dataclass(frozen=True)
class Config:
    dim: int = 8

@plugin.model("tiny", Config(), steps=5)
@plugin.model("110m", Config(dim=768), default={default})
class Model: ...

@plugin.model("260k", Config(dim=64))
class Other: ...

@plugin.command("hello")
def hello(args, open_runtime): ...
"""


@dataclass(frozen=True)
class Config:
    dim: int = 8


def write(folder: Path, name: str, text: str) -> Path:
    path = folder / f"{name}.py"
    path.write_text(text)
    return path


def good(folder: Path, name: str = "good", default: bool = False) -> Path:
    return write(folder, name, GOOD.format(name=name, default=default))


def test_presets_keep_the_order_of_the_text(tmp_path: Path) -> None:
    found = load(good(tmp_path))
    assert list(found.presets) == ["tiny", "110m", "260k"]
    assert found.default_preset == "tiny"
    tiny = found.preset()
    assert (tiny.name, tiny.model.__name__, tiny.config.dim, dict(tiny.defaults)) == ("tiny", "Model", 8, {"steps": 5})
    assert found.preset("260k").model.__name__ == "Other"
    assert list(found.commands) == ["hello"]
    assert found.source.endswith("good.py")


def test_default_true_wins_over_the_first(tmp_path: Path) -> None:
    assert load(good(tmp_path, default=True)).default_preset == "110m"


def test_loading_twice_gives_two_objects_and_leaves_nothing_behind(tmp_path: Path) -> None:
    path, before = good(tmp_path), list(sys.path)
    a, b = load(path), load(path)
    assert a is not b and a.preset().model is not b.preset().model
    assert sys.path == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["good.py"]  # no bytecode beside it


def test_string_annotations_and_relative_paths_load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    good(tmp_path)
    path = tmp_path / "good.py"
    path.write_text("from __future__ import annotations\nfrom typing import ClassVar\n" + path.read_text())
    monkeypatch.chdir(tmp_path)
    assert load("good.py").name == "good"


IMPORT = "from anert.plugin import Plugin\n"
BROKEN = {
    "syntax": ("def f(:\n", r"syntax\.py:1: SyntaxError"),
    "raises": ("x = 1\nraise ValueError('no\\nsuch luck')\n", r"raises\.py:2: ValueError: no such luck$"),
    "deep": ("def f():\n    return 1 / 0\n\nf()\n", r"deep\.py:2: ZeroDivisionError"),
    "missing": ("import nonexistent_module_x\n", r"missing\.py:1: ModuleNotFoundError: .*nonexistent_module_x"),
    "exits": ("import sys\nsys.exit(3)\n", r"exits\.py: it calls sys\.exit\(3\) on load"),
    "nothing": ("x = 1\n", r'nothing\.py: no name `plugin` in it: write plugin = Plugin\("nothing", api=1\)'),
    "other": ("plugin = 'stories'\n", r"other\.py: `plugin` is a str, expected an anert\.Plugin"),
    "newer": (f'{IMPORT}plugin = Plugin("n", api=7)\n', r"api 7, this anert speaks 1: update anert"),
    "older": (f'{IMPORT}plugin = Plugin("n", api=0)\n', r"api 0, this anert speaks 1: update the"),
    "newer_use": (f'{IMPORT}plugin = Plugin("n", api=2)\nplugin.kernel("x")\n', r"api 2, this anert"),
    "wants": (
        f'{IMPORT}from dataclasses import make_dataclass\nplugin = Plugin("w", api=1)\n'
        'plugin.dataset("tales")(print)\nplugin.model("t", make_dataclass("C", [])(), dataset="tale")(int)\n',
        r"preset 't' wants dataset 'tale': did you mean tales\?",
    ),
    "nul": ("x = '\0'\n", r"nul\.py"),
}  # fmt: skip


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_plugin_is_one_line_and_a_row(name: str, tmp_path: Path) -> None:
    text, reason = BROKEN[name]
    path = write(tmp_path, name, text)
    modules = set(sys.modules)
    with pytest.raises(PluginError, match=reason) as caught:
        load(path)
    assert "\n" not in str(caught.value) and caught.value.exit_code == 2
    assert not {m for m in set(sys.modules) - modules if m.startswith("anert_plugin_")}
    good(tmp_path)
    rows = {row.name: row for row in discover([tmp_path])}
    assert rows["good"].status == "ok" and rows["good"].presets == ("tiny", "110m", "260k")
    assert rows[name].status == "broken" and rows[name].reason == str(caught.value)


def test_keyboard_interrupt_passes_through(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        load(write(tmp_path, "k", "raise KeyboardInterrupt\n"))


def test_what_is_not_there_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(PluginError, match=r"no\.py: no plugin there"):
        load("no.py")
    with pytest.raises(PluginError, match="no installed plugin is named 'stories': installed: none"):
        load("stories")
    (tmp_path / "plugins").mkdir()
    good(tmp_path / "plugins", "stories")
    with pytest.raises(PluginError, match=r"there is plugins/stories\.py: name it by that path"):
        load("stories")
    with pytest.raises(PluginError, match=r"got a folder; it has stories\.py"):
        load("plugins")
    assert [row.name for row in discover([])] == []  # nothing here is loaded unasked


def test_two_plugins_of_one_name_are_both_broken_and_named(tmp_path: Path) -> None:
    good(tmp_path, "a")
    (tmp_path / "b.py").write_text(GOOD.format(name="a", default=False))
    rows = discover([tmp_path])
    assert [row.status for row in rows] == ["broken", "broken"]
    for row in rows:
        assert "a.py" in row.reason and "b.py" in row.reason and "rename one" in row.reason


def test_near_names_are_suggested(tmp_path: Path) -> None:
    found = load(good(tmp_path))
    with pytest.raises(PluginError, match=r"no preset '100m': did you mean 110m\?"):
        found.preset("100m")
    with pytest.raises(PluginError, match="no preset 'xxxx': it has tiny, 110m, 260k"):
        found.preset("xxxx")


def test_declarations_that_clash_are_refused() -> None:
    p = Plugin("p", api=1)
    p.model("a", Config(), default=True)(int)
    with pytest.raises(PluginError, match="declares preset 'a' twice"):
        p.model("a", Config())(int)
    with pytest.raises(PluginError, match="two default presets: 'a' and 'b'"):
        p.model("b", Config(), default=True)(int)
    with pytest.raises(PluginError, match="config is a dataclass instance"):
        p.model("c", Config)
    p.dataset("d")(print)
    with pytest.raises(PluginError, match="declares dataset 'd' twice"):
        p.dataset("d")
    p.trainer(print)
    with pytest.raises(PluginError, match="two trainers"):
        p.trainer(print)
    p.sampler(print)
    with pytest.raises(PluginError, match="two samplers"):
        p.sampler(print)
    with pytest.raises(PluginError, match="anert's own"):
        p.command("train")
    with pytest.raises(PluginError, match="letters, digits"):
        Plugin("no spaces", api=1)
    assert (p.train_with, p.sample_with, p.datasets["d"]) == (print, print, print)


def test_a_plugin_without_a_model_says_so() -> None:
    with pytest.raises(PluginError, match=r"has no model: add @plugin\.model"):
        Plugin("p", api=1).preset()


@given(
    st.from_regex(r"[a-z][a-z0-9_/.]{0,12}", fullmatch=True),
    st.from_regex(r"[a-z0-9][a-z0-9_.-]{0,8}", fullmatch=True),
)
def test_qualified_names_come_apart(head: str, preset: str) -> None:
    assert split_name(f"{head}:{preset}") == (head, preset)
    assert split_name(head) == (head, "")


@pytest.mark.parametrize("text", [":x", "x:", ":"])
def test_half_a_qualified_name_is_refused(text: str) -> None:
    with pytest.raises(PluginError, match="expected PLUGIN or PLUGIN:PRESET"):
        split_name(text)


def install(folder: Path, module: str, text: str, value: str) -> None:
    """A distribution with one entry point, as pip would leave it in site-packages."""
    (folder / f"{module}.py").write_text(text)
    info = folder / f"{module}-1.2.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {module}\nVersion: 1.2\n")
    (info / "entry_points.txt").write_text(f"[anert.plugins]\n{module} = {value}\n")


def test_entry_points_are_listed_unimported_and_loaded_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(tmp_path, "fables", GOOD.format(name="fables", default=False), "fables")
    install(tmp_path, "sagas", GOOD.format(name="sagas", default=False), "sagas:plugin")
    install(tmp_path, "ruins", "raise RuntimeError('in ruins')\n", "ruins")
    monkeypatch.syspath_prepend(str(tmp_path))
    rows = {row.name: row for row in discover()}
    assert {name: rows[name].status for name in ("fables", "sagas", "ruins")} == dict.fromkeys(
        ("fables", "sagas", "ruins"), "installed"
    )
    assert not {"fables", "sagas", "ruins"} & set(sys.modules)
    try:
        assert load("fables").source == "fables 1.2 (fables)"
        assert load("sagas").default_preset == "tiny"
        with pytest.raises(PluginError, match=r"ruins 1\.2 \(ruins\): RuntimeError: in ruins"):
            load("ruins")
        with pytest.raises(PluginError, match=r"did you mean fables\?"):
            load("fabels")
    finally:
        for name in ("fables", "sagas", "ruins"):
            sys.modules.pop(name, None)
    assert isinstance(plugins.installed()[0], metadata.EntryPoint)
