"""The command line: options from TrainOptions, precedence, exit codes, views, signals. Trainers here are made up."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from anert import __version__, options
from anert.cli import VERBS, main
from anert.cli.parser import normalized
from anert.errors import InputError, PluginError
from anert.plugin import load
from anert.train import TrainOptions

HERE = Path(__file__).parent
ROOT = HERE.parent
PLUGIN = """
import sys, time
from dataclasses import dataclass
from anert import events as ev
from anert.errors import BackendUnavailable, InputError
from anert.plugin import Plugin
sys.path.insert(0, {tests!r})
import fake_run

plugin = Plugin("fake", api=1)

@dataclass(frozen=True)
class Config:
    dim: int = 8
    eps: float = 1e-5
    tied: bool = True
    name: str = "x"
    sizes: tuple = (1, 2)

    def __post_init__(self):
        if self.dim % 2:
            raise ValueError("dim must be even")

@plugin.model("tiny", Config(), steps=30, lr=0.002, time_budget=45)
@plugin.model("110m", Config(dim=768), stpes=3)
class Model: ...

@plugin.trainer
def trainer(plugin, preset, config, options, stop):
    if options.data == "missing.txt":
        raise InputError("missing.txt: no such file")
    if options.data == "ane":
        raise BackendUnavailable("no Neural Engine\\non this machine")
    if options.data == "bug":
        raise RuntimeError("a bug")
    yield ev.Progress("writing the corpus", 1, 1, "B")
    yield fake_run.started(options.steps, out_dir=options.out or ".")
    reason = "diverged" if options.data == "nan" else "steps"
    for n in range(1, options.steps + 1):
        yield fake_run.step(n, options.steps, **({{"loss": float("nan")}} if options.data == "nan" else {{}}))
        if options.data == "slow":
            print("stepping", n, file=sys.stderr, flush=True)
            time.sleep(0.05)
        if options.data == "stuck":
            print("stepping", n, file=sys.stderr, flush=True)
            time.sleep(60)
        if stop():
            reason = "interrupted"
            yield ev.Saved(n, "there", False, 1.0)
            break
    seen = [preset, config.dim, options.lr, options.grad_accum, options.time_budget_s]
    yield ev.RunDone(reason, fake_run.summary(n) | {{"seen": seen}})

@plugin.sampler
def sampler(checkpoint, prompt, *, plugin, max_tokens, seed, **settings):
    yield prompt
    for i in range(max_tokens):
        yield f" {{seed + i}}"

@plugin.command("corpus")
def corpus(args, open_runtime):
    print("corpus", *args)
    return 1 if "fail" in args else None
"""


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    path = tmp_path / "fake.py"
    path.write_text(PLUGIN.format(tests=str(HERE)))
    monkeypatch.chdir(tmp_path)
    return "fake.py"


def run(capsys: pytest.CaptureFixture[str], *argv: str) -> tuple[int, str, str]:
    code = main(argv)
    out, err = capsys.readouterr()
    return code, out, err


# ---- options ----


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("90", 90), ("90s", 90), ("5m", 300), ("1h30m", 5400), ("250ms", 0.25), ("1.5h", 5400), ("2d", 172800)],
)
def test_durations(text: str, seconds: float) -> None:
    assert options.duration(text) == pytest.approx(seconds)


@pytest.mark.parametrize("text", ["", "s", "5x", "5m3", "-5s", "1h 30m", "nan"])
def test_what_is_no_duration(text: str) -> None:
    with pytest.raises(ValueError):
        options.duration(text)


@given(st.integers(0, 99), st.integers(0, 59), st.integers(0, 59))
def test_durations_add_up(h: int, m: int, s: int) -> None:
    assert options.duration(f"{h}h{m}m{s}s") == 3600 * h + 60 * m + s


def test_both_spellings_of_a_flag() -> None:
    given = ["--grad_accum=4", "--set", "n_heads=3", "--time_budget", "5m", "--", "--a_b"]
    assert normalized(given) == ["--grad-accum=4", "--set", "n_heads=3", "--time-budget", "5m", "--", "--a_b"]


def test_every_train_option_is_a_flag_with_its_default(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "run", "--help")
    assert code == 0
    for f in dataclasses.fields(TrainOptions):
        assert re.search(rf"{options.flag(f.name)} [A-Z]+", out), f.name
    assert "Where the cosine ends. [0.0]" in out  # the sentence under the field


def test_precedence_defaults_preset_file_flags(fake: str) -> None:
    Path("run.toml").write_text('grad-accum = 4\nlr = 0.003\ntime_budget = "2m"\n[config]\ndim = 16\neps = 1\n')
    plugin = load(fake)
    job = options.resolve(plugin, {"config": "run.toml", "lr": 0.5, "set": ["dim=32", "sizes=(1,)"][:1]})
    o = job.options
    assert (job.preset, o.steps, o.grad_accum, o.lr, o.time_budget_s, o.batch) == ("tiny", 30, 4, 0.5, 120.0, 1)
    assert (job.config.dim, job.config.eps, type(job.config.eps)) == (32, 1.0, float)
    assert options.resolve(plugin, {}).options.time_budget_s == 45


def test_resume_goes_on_with_what_was_recorded(fake: str) -> None:
    for step, lr in ((5, 0.1), (20, 0.7)):
        folder = Path(f"r/step-{step:08}")
        folder.mkdir(parents=True)
        state = {"preset": "tiny", "config": {"dim": 64, "sizes": [3]}, "options": {"lr": lr, "steps": 9, "out": "old"}}
        own = {"format_version": 1, "step": step, "files": {"model.safetensors": {}}}
        (folder / "state.json").write_text(json.dumps({**own, **state}))
    damaged = Path("r/step-00000030")
    damaged.mkdir()
    (damaged / "state.json").write_text("{")
    job = options.resolve(load(fake), {"resume": "r", "steps": 50})
    assert (job.options.lr, job.options.steps, job.options.init, job.options.out) == (0.7, 50, "resume", "r")
    assert (job.config.dim, job.config.sizes) == (64, (3,))
    with pytest.raises(InputError, match="no run to resume there"):
        options.resolve(load(fake), {"resume": "nowhere"})
    Path("empty").mkdir()
    with pytest.raises(InputError, match="no finished checkpoint"):
        options.resolve(load(fake), {"resume": "empty"})
    with pytest.raises(InputError, match="leave out --out"):
        options.resolve(load(fake), {"resume": "r", "out": "q"})
    with pytest.raises(InputError, match="needs --out"):
        options.resolve(load(fake), {"init": "resume"})


BAD = {
    "unknown flag": (["--stpes", "3"], r"no option '--stpes': did you mean --steps\?"),
    "abbreviation": (["--stop"], r"no option '--stop'"),
    "not a number": (["--steps", "many"], r"--steps: expected a whole number, got 'many'"),
    "not a time": (["--time-budget", "soon"], r"expected a time as 90s or 5m, got 'soon'"),
    "negative": (["--lr", "-1"], r"--lr: expected a number"),
    "zero": (["--grad_accum", "0"], r"--grad-accum: expected a number at least 1, got 0"),
    "nan": (["--lr", "nan"], r"--lr: expected a number"),
    "beta": (["--beta1", "1"], r"--beta1: expected a number in \[0, 1\), got 1"),
    "preset": (["--preset", "tinny"], r"no preset 'tinny': did you mean tiny\?"),
    "preset default": (["--preset", "110m"], r"preset '110m' sets 'stpes', which is no option of train: did you"),
    "set key": (["--set", "dmi=3"], r"no such field: did you mean dim\?"),
    "set form": (["--set", "dim"], r"expected key=value"),
    "set type": (["--set", "dim=x"], r"--set dim: expected a whole number, got 'x'"),
    "set bool": (["--set", "tied=maybe"], r"--set tied: expected true or false"),
    "set tuple": (["--set", "sizes=3"], r"a tuple cannot be given as text"),
    "set inconsistent": (["--set", "dim=3"], r"does not hold together: dim must be even"),
    "no file": (["-c", "no.toml"], r"no\.toml: no such config file"),
    "action": (["trian"], r"no command 'trian': did you mean train\?"),
    "stray": (["train", "more"], r"no option 'more': an option starts with --"),
    "ui": (["--ui", "fancy"], r"invalid choice: 'fancy'"),
    "data": (["--data", "missing.txt"], r"^anert: missing\.txt: no such file$"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line_and_exit_code_2(case: str, fake: str, capsys: pytest.CaptureFixture[str]) -> None:
    argv, message = BAD[case]
    code, out, err = run(capsys, "run", fake, *argv)
    assert code == 2 and out == ""
    assert err.count("\n") == 1 and err.startswith("anert: ")
    assert re.search(message, err.strip())


TOML = {
    "stpes = 3": "no option 'stpes': did you mean steps",
    "steps = 'x'": "steps: expected a whole number",
    "steps = 1.5": "steps: expected a whole number",
    "steps = true": "steps: expected a whole number",
    "data = [1]": "data: expected text",
    "config = 3": r"\[config\] is a table",
    "steps = ": "not TOML",
    "[config]\nsizes = 'a'": "a tuple cannot be given as text",
}


@pytest.mark.parametrize("text", TOML)
def test_bad_toml(text: str, fake: str) -> None:
    Path("a.toml").write_text(text)
    with pytest.raises(InputError, match=TOML[text]):
        options.resolve(load(fake), {"config": "a.toml"})


# ---- verbs ----


def test_train_in_plain_lines(fake: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run(capsys, "run", fake, "--steps", "40", "--set", "dim=10")
    assert (code, err) == (0, "")
    lines = out.splitlines()
    steps = [line for line in lines if line.startswith("step ")]
    assert re.match(r"step  1/40  loss +\d+\.\d{4}  lr .*tok/s .*left +0:03", steps[0])
    assert steps[-1].startswith("step 40/40")
    assert len(steps) < 10  # skipped steps, then one a second of the run's own clock
    assert len({line.index("tok/s") for line in steps}) == 1  # aligned
    assert "done: all steps (40 steps)" in lines
    events = [json.loads(line) for line in Path("events.jsonl").read_text().splitlines()]
    assert [e["event"] for e in events[:2]] == ["Progress", "RunStarted"]
    assert sum(e["event"] == "StepDone" for e in events) == 40 and events[-1]["event"] == "RunDone"
    assert events[-1]["summary"]["seen"] == ["tiny", 10, 0.002, 1, 45]


def test_train_json_is_one_object_on_the_last_line(fake: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run(capsys, "run", f"{fake}:tiny", "train", "--json", "--out", "r")
    assert code == 0 and out.count("\n") == 1
    summary = json.loads(out)
    keys = "steps train_loss val_loss_first val_loss compiles kernels tokens_per_s ms_per_step skipped_steps checkpoint"
    assert set(f"{keys} backend precision threads rss_mb reason".split()) <= set(summary)
    assert "step 30/30" in err and Path("r/events.jsonl").is_file()


def test_ui_json_is_an_event_a_line_and_ui_off_is_silence(fake: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "run", fake, "--ui", "json", "--log", "a/b.jsonl")
    assert code == 0
    shown = [json.loads(line) for line in out.splitlines()]
    logged = [json.loads(line) for line in Path("a/b.jsonl").read_text().splitlines()]
    assert shown == [{k: v for k, v in e.items() if k != "time"} for e in logged]
    assert run(capsys, "run", fake, "--ui", "off") == (0, "", "")
    assert run(capsys, "run", fake, "--ui", "rich")[1].startswith("writing the corpus")  # no terminal: plain lines


def test_a_loss_that_is_nan_is_strict_json_and_exit_code_1(fake: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "run", fake, "--data", "nan", "--ui", "json")
    assert code == 1
    steps = [json.loads(line, parse_constant=pytest.fail) for line in out.splitlines() if '"StepDone"' in line]
    assert steps[0]["loss"] is None


def test_exit_codes_of_errors(fake: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run(capsys, "run", fake, "--data", "ane", "--json")
    assert code == 3 and err.endswith("anert: no Neural Engine on this machine\n")
    assert json.loads(out) == {"error": "no Neural Engine on this machine", "exit_code": 3}
    with pytest.raises(RuntimeError, match="a bug"):  # not ours to soften: it keeps its traceback
        main(["run", fake, "--data", "bug"])
    with pytest.raises(InputError):
        main(["run", fake, "--data", "missing.txt", "--debug"])
    capsys.readouterr()


def test_preset_by_name_and_by_flag(fake: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(capsys, "run", f"{fake}:tiny", "--preset", "tiny", "--ui", "off")[0] == 0
    code, _, err = run(capsys, "run", f"{fake}:tiny", "--preset", "110m")
    assert code == 2 and "leave one out" in err
    assert run(capsys, "run", f"{fake}:tinny")[0] == 2


def test_help_and_usage(fake: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(capsys, "run")[0] == 2
    assert run(capsys, "run", "--preset", "tiny")[2].startswith("anert: PLUGIN comes before the options")
    for argv in (["run", fake, "--help"], ["run", fake, "sample", "--help"], ["plugins", "--help"]):
        with pytest.raises(SystemExit) as caught:
            main(argv)
        assert caught.value.code == 0
    assert main(["--help"]) == main(["--version"]) == 0
    out = capsys.readouterr().out
    assert all(f"\n  {verb} " in out for verb in VERBS)
    assert "Presets: tiny, 110m. Commands: train, sample, corpus." in out and f"anert {__version__}" in out
    assert "--top-p X" in out
    assert run(capsys)[0] == 2
    assert run(capsys, "plgins")[0] == 2


def test_sample_streams_and_reports(fake: str, capsys: pytest.CaptureFixture[str]) -> None:
    Path("c").mkdir()
    argv = [
        "run",
        fake,
        "sample",
        "--checkpoint",
        "c",
        "--prompt",
        "one",
        "-n",
        "2",
        "--seed",
        "5",
        "--num_samples",
        "2",
    ]
    assert run(capsys, *argv) == (0, "one 5 6\n---\none 6 7\n", "")
    code, out, err = run(capsys, *argv, "--json")
    result = json.loads(out)
    assert code == 0 and err == "one 5 6\n---\none 6 7\n"
    assert result["samples"] == ["one 5 6", "one 6 7"] and result["temperature"] == 0.8
    for bad, message in (
        (["--checkpoint", "no"], "no checkpoint there"),
        (["--checkpoint", "c", "-n", "0"], "at least 1"),
        (["--checkpoint", "c", "--temperature", "-1"], "at least 0"),
        (["--checkpoint", "c", "--temperature", "nan"], "at least 0"),
        ([], "required: --checkpoint"),
    ):
        code, out, err = run(capsys, "run", fake, "sample", *bad)
        assert code == 2 and message in err


def test_a_plugins_own_command(fake: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(capsys, "run", fake, "corpus", "a", "--b") == (0, "corpus a --b\n", "")
    assert run(capsys, "run", fake, "corpus", "fail")[0] == 1


def test_plugins_lists_good_and_broken(fake: str, capsys: pytest.CaptureFixture[str]) -> None:
    Path("broken.py").write_text("raise OSError('gone')\n")
    code, out, _ = run(capsys, "plugins", ".")
    assert code == 1 and re.search(r"fake +ok +tiny, 110m +fake\.py", out) and "broken.py:1: OSError: gone" in out
    code, out, _ = run(capsys, "plugins", "fake.py", "--json")
    row = json.loads(out)["plugins"][0]
    assert code == 0 and (row["name"], row["presets"], row["commands"]) == ("fake", ["tiny", "110m"], ["corpus"])
    assert run(capsys, "plugins")[0] == 0


# ---- new ----


def test_new_writes_a_plugin_that_declares_two_presets(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "new", "sums", "--out", str(tmp_path / "p"), "--json")
    assert code == 0
    path = Path(json.loads(out)["path"])
    plugin = load(path)
    assert plugin.name == "sums" and list(plugin.presets) == ["tiny", "small"] and list(plugin.datasets) == ["sums"]
    job = options.resolve(plugin, {})
    assert job.options.batch == 8 and job.config.vocab_size == 320
    calls: list[tuple[float, float]] = []
    for name in ("a", "b"):
        plugin.datasets["sums"](tmp_path / name, 0.01, 7, lambda done, total: calls.append((done, total)))
    text = (tmp_path / "a").read_text()
    assert text == (tmp_path / "b").read_text() and 10_000 <= len(text) < 10_100
    assert re.fullmatch(r"(\w+ plus \w+ is \w+\.\n)+", text) and calls[-1][0] >= calls[-1][1] == 0.01
    assert run(capsys, "new", "sums", "--out", str(tmp_path / "p"))[2].count("exists already") == 1


@pytest.mark.parametrize("name", ["a-b", "class", "1a", "_x", "a b", "../x", ""])
def test_new_refuses_names_that_python_cannot_have(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(capsys, "new", name, "--out", str(tmp_path))[0] == 2
    assert list(tmp_path.iterdir()) == []


# ---- processes ----


def spawn(*argv: str, **settings: Any) -> subprocess.Popen[str]:
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "anert", *argv]
    pipes: dict[str, Any] = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env)
    return subprocess.Popen(command, **{**pipes, **settings})


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_one_signal_saves_and_exits_130(number: signal.Signals, fake: str) -> None:
    process = spawn("run", fake, "--data", "slow", "--steps", "10000", "--json")
    assert process.stderr is not None
    while "stepping 2" not in process.stderr.readline():
        pass
    process.send_signal(number)
    out, err = process.communicate(timeout=30)
    assert process.returncode == 130
    assert json.loads(out.splitlines()[-1])["reason"] == "interrupted"
    assert "saved there" in err and "Ctrl-C again quits at once" in err


def test_a_second_signal_exits_at_once(fake: str) -> None:
    process = spawn("run", fake, "--data", "stuck", "--json")
    assert process.stderr is not None
    while "stepping" not in process.stderr.readline():
        pass
    process.send_signal(signal.SIGINT)
    while "again quits at once" not in process.stderr.readline():
        pass
    start = time.monotonic()
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=30)
    assert process.returncode == 130 and time.monotonic() - start < 10


def test_a_broken_pipe_is_quiet_and_ends_the_run_saved(fake: str) -> None:
    process = spawn("run", fake, "--data", "slow", "--steps", "1000", "--ui", "json")
    assert process.stdout is not None and process.stderr is not None
    process.stdout.readline()
    process.stdout.close()
    err = process.stderr.read()
    assert process.wait(timeout=30) == 130
    assert "Traceback" not in err and "BrokenPipe" not in err
    assert '"reason": "interrupted"' in Path("events.jsonl").read_text()  # the run itself ended well


def test_preset_defaults_must_be_options(fake: str) -> None:
    with pytest.raises(PluginError, match="sets 'stpes'"):
        options.resolve(load(fake), {"preset": "110m"})
