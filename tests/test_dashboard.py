"""What shows a run: figures, drawings, the board's layout at every size, the dashboard on a real terminal."""

from __future__ import annotations

import dataclasses
import fcntl
import io
import json
import math
import os
import pty
import re
import struct
import subprocess
import sys
import termios
import threading
import time
from pathlib import Path
from typing import Any

import fake_run
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from anert import events as ev
from anert import plot, report
from anert.board import Board, State, cell_len, clean, clip, clip_text, frame, wrap
from anert.dashboard import STYLES, Dashboard, Frame

HERE = Path(__file__).parent


def board(events: Any) -> Board:
    b = Board()
    for event in events:
        b.update(event)
    return b


def text(lines: list[plot.Line]) -> str:
    return "\n".join("".join(part for part, _ in line) for line in lines)


# ---- figures ----


@pytest.mark.parametrize(
    ("value", "shown"),
    [(0, "0 B"), (512, "512 B"), (0.25, "0.250 B"),
     (999.6, "1.00 kB"), (1536, "1.54 kB"), (1_312_768, "1.31 MB"), (2.1e10, "21.0 GB"),
     (math.inf, "inf B"), (-2048, "-2.05 kB")],
)  # fmt: skip
def test_si(value: float, shown: str) -> None:
    assert report.si(value, "B") == shown


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [(0, "0:00"), (38.4, "0:38"), (725, "12:05"), (3753, "1:02:33"), (90000, "1 d 01:00"), (math.nan, "-"), (-1, "-")],
)
def test_clock(seconds: float, shown: str) -> None:
    assert report.clock(seconds) == shown


def test_flops_change_their_unit_at_one_teraflop() -> None:
    assert (report.flops(61.34e9), report.flops(1.234e12)) == ("61.3 GFLOP/s", "1.23 TFLOPS")


@given(st.floats(min_value=1e-5, max_value=1e9))
def test_significant_keeps_three_digits(x: float) -> None:
    assert float(report.significant(x)) == pytest.approx(x, rel=6e-3, abs=6e-7)
    assert "e" not in report.significant(x)


def test_dumps_is_strict_json() -> None:
    record = {"a": math.nan, "b": [math.inf, 1.5], "c": Path("x"), "d": {"e": (-math.inf,)}}
    assert json.loads(report.dumps(record)) == {"a": None, "b": [None, 1.5], "c": "x", "d": {"e": [None]}}


# ---- drawings ----


@given(st.lists(st.floats(-1e3, 1e3), min_size=1, max_size=3000), st.sampled_from([4, 16, 64]))
def test_history_is_bounded_and_keeps_the_mean(values: list[float], capacity: int) -> None:
    h = plot.History(capacity)
    for i, v in enumerate(values):
        h.add(i, v)
    assert len(h.x) == len(h.y) < capacity
    kept = len(h.y) * h.stride
    if h.y:
        assert sum(h.y) / len(h.y) == pytest.approx(sum(values[:kept]) / kept, rel=1e-9, abs=1e-6)
    assert list(h.x) == sorted(h.x) and len(values) - kept < 2 * h.stride


def test_history_leaves_out_what_is_not_finite() -> None:
    h = plot.History()
    for v in (1.0, math.nan, math.inf, 2.0):
        h.add(0, v)
    assert list(h.y) == [1.0, 2.0]


def test_ema_is_unbiased_from_its_first_value() -> None:
    ema = plot.Ema(0.9)
    assert [ema.add(3.0), ema.add(3.0), ema.add(math.nan)] == [3.0, 3.0, 3.0]
    other = plot.Ema(0.5)
    for x in (1.0, 4.0):
        other.add(x)
    assert other.value == pytest.approx((0.25 * 1 + 0.5 * 4) / 0.75)


@given(st.floats(allow_nan=True), st.integers(0, 60))
def test_bars_are_as_wide_as_asked(fraction: float, width: int) -> None:
    drawn = plot.bar(fraction, width)
    assert cell_len(drawn) == max(width, int(math.isfinite(fraction) and fraction > 0))
    assert ("━" in drawn or "╸" in drawn) == (math.isfinite(fraction) and fraction > 0)


@given(st.lists(st.floats(-1e6, 1e6), max_size=300), st.integers(0, 60))
def test_sparklines_never_leave_their_width(values: list[float], width: int) -> None:
    assert len(plot.sparkline(values, width)) == (width if values and width else 0)


@given(st.floats(-1e4, 1e4), st.floats(1e-3, 1e4), st.integers(1, 9))
def test_ticks_are_few_round_and_inside(low: float, span: float, most: int) -> None:
    marks = plot.ticks(low, low + span, most)
    assert 1 <= len(marks) <= most
    if len(marks) > 1:
        step = marks[1] - marks[0]
        mantissa = step / 10 ** math.floor(math.log10(step) + 1e-9)
        assert min(abs(mantissa - m) for m in (1, 2, 5, 10)) < 1e-6
        assert low - step * 1e-6 <= marks[0] and marks[-1] <= low + span + step * 1e-6


def test_canvas_sets_the_right_dots() -> None:
    canvas = plot.Canvas(2, 1)
    for x, y in ((0, 0), (1, 3), (2, 1), (9, 0), (0, -1)):
        canvas.dot(x, y, "train")
    assert canvas.rows()[0] == [("⢁⠂", "train")]  # bits 0x01 | 0x80, and 0x02
    canvas.mark(3, 3, "●", "val")
    assert canvas.rows()[0] == [("⢁", "train"), ("●", "val")]


def test_a_falling_loss_is_drawn_falling() -> None:
    h = plot.History()
    for i in range(100):
        h.add(i, 10.0 - 0.05 * i)
    lines = plot.chart(plot.History(), h, [(50, 7.5)], 40, 12)
    with_dots = ["".join(part for part, style in line if style == "train") for line in lines]
    first = next(i for i, line in enumerate(with_dots) if line)
    assert first <= 1 and with_dots[-2]
    assert [i for i, line in enumerate(lines) if any(s == "val" for _, s in line)] == [5]
    assert all(sum(cell_len(t) for t, _ in line) == 40 for line in lines) and len(lines) == 12


# ---- cells ----


@given(st.text(max_size=80), st.integers(1, 40))
def test_clipped_text_fits(s: str, width: int) -> None:
    assert cell_len(clip_text(clean(s), width)) <= width
    line = clip([(clean(s), "dim"), ("tail", "")], width)
    assert sum(cell_len(t) for t, _ in line) <= width


def test_wide_and_combining_characters_have_their_cells() -> None:
    assert [cell_len(s) for s in ("abc", "日本", "e\u0301", "━●⠿…", "🙂")] == [3, 4, 1, 4, 2]


@given(st.text(max_size=300), st.integers(4, 60), st.integers(1, 6))
def test_wrapped_text_fits_and_keeps_its_words(s: str, width: int, rows: int) -> None:
    lines = wrap(s, width, rows)
    assert len(lines) <= rows and all(sum(cell_len(t) for t, _ in line) <= width for line in lines)


def test_a_model_cannot_steer_the_terminal() -> None:
    b = board([fake_run.started(), fake_run.step(1), ev.Sampled(1, "a\x1b[2Jb\rc\x07\x9b31md", 1.0)])
    b.update(ev.Notice("info", "n\x1b]0;title\x07"))
    shown = text(frame(b.snapshot(), 100, 30))
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f]", shown) and "a [2Jb\nc 31md" in shown


# ---- layout ----

SIZES = [(80, 24), (100, 30), (140, 40), (200, 50), (79, 23), (119, 60), (120, 30), (60, 16), (59, 40), (200, 15),
         (40, 10), (20, 3), (1, 1), (300, 100)]  # fmt: skip


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("upto", [-1, 0, 1, 437, 1000])
def test_every_frame_has_its_size(size: tuple[int, int], upto: int) -> None:
    width, height = size
    state = State() if upto < 0 else board(fake_run.run(1000, upto)).snapshot()
    lines = frame(state, width, height)
    assert len(lines) == max(height, 3)
    assert max(sum(cell_len(t) for t, _ in line) for line in lines) <= max(width, 20)
    assert {style for line in lines for _, style in line} <= set(STYLES)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 220), st.integers(1, 70))
def test_any_size_is_laid_out(width: int, height: int) -> None:
    lines = frame(board(fake_run.run(60, 60)).snapshot(), width, height)
    assert len(lines) == max(height, 3) and max(sum(cell_len(t) for t, _ in line) for line in lines) <= max(width, 20)


REQUIRED = (
    "stories:tiny", "1.31 M params", "cpu bf16 avx512", "2 threads", "6/1000 compiles", "step   437 of 1,000", "44%",
    "elapsed", "left", "train 2.", "validation 2.", "forward", "head", "backward", "weight grads", "optimizer", "sync",
    "data", "dashboard", "learning rate", "gradient norm", "loss scale", "65,536", "skipped", "tok/s", "GFLOP/s", "46%",
    "212 MB", "Once upon a time", "story at step 400",
)  # fmt: skip


@pytest.mark.parametrize("size", [(80, 24), (100, 30), (140, 40), (200, 50)])
def test_everything_that_matters_is_on_every_usual_screen(size: tuple[int, int]) -> None:
    shown = text(frame(board(fake_run.run(1000, 437)).snapshot(), *size))
    for word in REQUIRED:
        assert word in shown, (word, shown)


def test_the_layout_does_not_jump_between_steps() -> None:
    a, b = (frame(board(fake_run.run(1000, n)).snapshot(), 100, 30) for n in (437, 438))
    titles = [[i for i, line in enumerate(f) if line and line[0][1] == "title"] for f in (a, b)]
    assert titles[0] == titles[1] and len(titles[0]) == 3


def test_more_compiles_than_kernels_raise_the_alarm() -> None:
    for compiles, style in ((6, "dim"), (7, "bad")):
        b = board([fake_run.started(), fake_run.step(1, compiles=compiles)])
        header = frame(b.snapshot(), 100, 30)[0]
        assert (f"  {compiles}/1000 compiles", style) in header


def test_parts_that_overlap_and_copies_are_shown_where_there_are_any() -> None:
    ms = {
        "data": 1.0,
        "forward": 30.0,
        "head": 4.0,
        "backward": 40.0,
        "weight_grads": 50.0,
        "optimizer": 9.0,
        "copy": 5.0,
    }
    one = fake_run.step(1, ms={**ms, "overlapped": 60.0}, step_ms=82.0)
    lines = text(frame(board([fake_run.started(), one]).snapshot(), 140, 40))
    assert "60.0 ms side by side  82.0 ms" in lines
    assert re.search(r"copy +\S+ +5\.0 ms +6\.1%", lines) and re.search(r"other +\S+ +3\.0 ms", lines)
    plain = text(frame(board([fake_run.started(), fake_run.step(1)]).snapshot(), 140, 40))
    assert "side by side" not in plain and "copy" not in plain


def test_a_loss_that_is_nan_and_an_unknown_peak_are_survived() -> None:
    odd = fake_run.step(1, loss=math.nan, grad_norm=math.inf, step_ms=0.0, flops=0, tokens_per_s=0.0, eta_s=math.nan)
    b = board([fake_run.started(peak_gflops=0.0, steps=0, time_budget_s=0.0), odd, ev.Validated(1, math.nan, 1, False)])
    for size in SIZES:
        assert len(frame(b.snapshot(), *size)) == max(size[1], 3)
    for step in (odd, fake_run.step(1)):
        plain = report.Plain(io.StringIO())
        plain.show(fake_run.started(peak_gflops=0.0))
        plain.show(step)
        assert "step" in plain.stream.getvalue() and "of peak" not in plain.stream.getvalue()


def test_a_peak_that_a_step_passes_is_none() -> None:
    """It was measured beside other work."""
    for peak, shown in ((1000.0, True), (1.0, False)):
        plain, begun = report.Plain(io.StringIO()), fake_run.started(peak_gflops=peak)
        plain.show(begun)
        plain.show(fake_run.step(1))
        lines = text(frame(board([begun, fake_run.step(1)]).snapshot(), 140, 40))
        assert ("of peak" in plain.stream.getvalue()) == ("of peak" in lines) == shown


# ---- cost ----


def test_an_event_costs_microseconds() -> None:
    b, steps = board([fake_run.started()]), [fake_run.step(n) for n in range(1, 2001)]
    start = time.thread_time()
    for step in steps:
        b.update(step)
    assert (time.thread_time() - start) / len(steps) < 50e-6


# ---- plain ----


def test_plain_lines_are_a_second_apart_and_aligned() -> None:
    out = io.StringIO()
    plain = report.Plain(out)
    for event in fake_run.run(1000):
        plain.show(event)
    lines = out.getvalue().splitlines()
    steps = [line for line in lines if re.match(r"step +\d", line)]
    assert 80 < len(steps) < 100  # 86 s of run
    assert len({line.index("tok/s") for line in steps}) == 1 and re.search(r"GFLOP/s +4\d% of peak", steps[-1])
    assert "skipped: not usable" in steps[1]
    assert any(line.startswith("validation at step 100: loss") for line in lines)
    assert any(line.startswith("saved runs/") for line in lines) and "  Once upon a time" in out.getvalue()
    waits = [line for line in lines if line.startswith("writing the corpus")]
    assert 2 <= len(waits) <= 6 and waits[-1].endswith("5.00 MB of 5.00 MB, 100%")


def test_a_full_disk_turns_the_log_off_and_not_the_run(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    out = io.StringIO()
    done = report.follow(fake_run.run(5), report.Plain(out), report.EventLog(tmp_path / "file" / "x.jsonl"))
    assert done.reason == "steps" and out.getvalue().count("the event log is off from here on") == 1


def test_a_trainer_without_an_end_is_reported() -> None:
    with pytest.raises(Exception, match="without a RunDone"):
        report.follow(fake_run.run(5, 5), report.Off(), report.EventLog(Path(os.devnull)))


def test_the_cost_of_showing_lands_in_the_next_step(tmp_path: Path) -> None:
    class Slow(report.Off):
        def show(self, event: ev.Event) -> None:
            time.sleep(0.002)

        def overhead_ms(self) -> float:
            return 1000.0

    log = tmp_path / "e.jsonl"
    report.follow(fake_run.run(3), Slow(), report.EventLog(log))
    steps = [json.loads(line) for line in log.read_text().splitlines() if '"StepDone"' in line]
    assert all(1002 < s["ms"]["dashboard"] < 2000 for s in steps)


# ---- on a terminal ----

SCRIPT = """
import sys, time
sys.path[:0] = {paths!r}
import fake_run
from pathlib import Path
from anert import events as ev
from anert.dashboard import Dashboard
from anert.report import EventLog, follow
def paced():
    for event in fake_run.run({steps}):
        time.sleep(0.01)
        yield event
view = Dashboard(sys.stdout)
try:
    follow(paced(), view, EventLog(Path({log!r})))
finally:
    view.close()
"""


def resize(fd: int, width: int, height: int) -> None:
    fcntl.ioctl(fd, termios.TIOCSWINSZ, struct.pack("HHHH", height, width, 0, 0))


def drained(fd: int, until: Any, during: Any = None) -> str:
    """Everything that comes out of a terminal until `until()`; `during(seconds)` is called as time passes."""
    out, start = b"", time.monotonic()
    os.set_blocking(fd, False)
    while True:
        over = until()
        try:
            out += os.read(fd, 65536)
        except (BlockingIOError, OSError):
            if over:
                return out.decode("utf-8", "replace")
            time.sleep(0.01)
        if during is not None:
            during(time.monotonic() - start)
        assert time.monotonic() - start < 60


def test_a_run_on_a_terminal_from_bars_to_the_last_story(tmp_path: Path) -> None:
    master, slave = pty.openpty()
    resize(slave, 100, 30)
    script = SCRIPT.format(paths=[str(HERE.parent), str(HERE)], steps=250, log=str(tmp_path / "e.jsonl"))
    env = {k: v for k, v in os.environ.items() if k not in ("COLUMNS", "LINES", "NO_COLOR")} | {
        "TERM": "xterm-256color"
    }
    run = subprocess.Popen([sys.executable, "-c", script], stdout=slave, stderr=subprocess.PIPE, env=env)
    smaller = []

    def during(seconds: float) -> None:
        if seconds > 2 and not smaller:
            smaller.append(seconds)
            resize(slave, 80, 24)

    out = drained(master, lambda: run.poll() is not None, during)
    assert run.returncode == 0 and run.stderr is not None and run.stderr.read() == b""
    before, rest = out.split("\x1b[?1049h", 1)
    during_run, after = rest.split("\x1b[?1049l", 1)
    assert "writing the corpus" in before and "━" in before
    assert "stories:tiny" in during_run and "\x1b[30;1H" in during_run
    assert "\x1b[?25h" in after  # the cursor is back
    plain = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", after)
    assert "100%" in plain and "done: all steps" in plain and plain.rstrip().endswith("so they gave it \r\nback.")
    assert max(len(line) for line in plain.split("\r\n")) <= 80
    frames = during_run.count("\x1b[?2026h")
    assert 2 <= frames <= 4 * 250 * 0.02 + 20


def test_a_stuck_terminal_does_not_stop_the_training_thread() -> None:
    master, slave = pty.openpty()
    resize(slave, 200, 60)
    with os.fdopen(slave, "w") as stream:
        view = Dashboard(stream)
        view.console._force_terminal = True
        view.show(fake_run.started())
        slowest, n, end = 0.0, 0, time.monotonic() + 3.0
        while time.monotonic() < end:  # nobody reads: the pseudo-terminal's buffer is full after a frame or two
            n += 1
            event = fake_run.step(n, 10**6, loss=5 + math.sin(n), amax=float(n))  # may collect garbage
            start = time.thread_time()
            view.show(event)
            slowest = max(slowest, time.thread_time() - start)
            time.sleep(0.002)
        assert n > 100 and slowest < 0.05
        reader = threading.Thread(target=drained, args=(master, view._quit.is_set), daemon=True)
        reader.start()
        view._quit.set()
        assert view._thread is not None
        view._thread.join(timeout=10)
        assert not view._thread.is_alive()


def test_drawing_takes_under_a_hundredth_of_a_core() -> None:
    from rich.console import Console

    stream = io.StringIO()
    view = Dashboard(stream, Console(file=stream, force_terminal=True, width=100, height=30, color_system="truecolor"))
    for event in fake_run.run(1000, 400):
        view.show(event)
    time.sleep(1.0)
    view.overhead_ms()
    start, n = time.monotonic(), 400
    frames: list[tuple[float, float]] = []
    while len(frames) < 3 and time.monotonic() - start < 60:  # a slow frame is followed by a long pause
        n += 1
        view.show(fake_run.step(n))
        time.sleep(0.03)
        if cost := view.overhead_ms():
            frames.append((time.monotonic(), cost / 1e3))
    view.close()
    spent = sum(cost for _, cost in frames[:-1])
    assert len(frames) == 3 and spent < 0.01 * (frames[-1][0] - frames[0][0])


def test_the_last_frame_can_be_exported() -> None:
    from rich.console import Console

    console = Console(record=True, width=100, height=30, file=io.StringIO(), force_terminal=True)
    console.print(Frame(board(fake_run.run(1000, 500)), 30))
    svg = console.export_svg(title="anert")
    assert svg.startswith("<svg") and "stories:tiny" in svg


def test_an_interruption_is_shown_at_once_and_the_terminal_given_back(capfd: pytest.CaptureFixture[str]) -> None:
    master, slave = pty.openpty()
    resize(slave, 80, 24)
    with os.fdopen(slave, "w") as stream:
        view = Dashboard(stream)
        view.interrupt("stopping")  # before the run: straight to stderr
        view.show(fake_run.started())
        view.show(fake_run.step(1))
        view.interrupt("stopping")
        assert "stopping and saving" in text(frame(view.board.snapshot(), 80, 24))
        view.restore()
        view.close()
        view.close()
    out = drained(master, lambda: True)
    assert "\x1b[?1049l\x1b[?25h" in out
    assert capfd.readouterr().err == "anert: stopping\n"


@pytest.mark.parametrize("steps", [3, 9000])
def test_a_board_that_nobody_looks_at_shows_what_one_would_that_is_watched(steps: int) -> None:
    """And puts no more than so many steps aside."""
    from anert.board import PUT_ASIDE

    watched, alone = Board(), Board()
    for event in (fake_run.started(), *(fake_run.step(n, 10**6, loss=5 + math.sin(n)) for n in range(1, steps + 1))):
        watched.update(event)
        watched.snapshot()
        alone.update(event)
        assert len(alone._steps) < PUT_ASIDE
    a, b = watched.snapshot(), alone.snapshot()
    assert (a.step, a.loss, a.ms, a.skipped, a.clamped) == (b.step, b.loss, b.ms, b.skipped, b.clamped)
    for name in ("raw", "smooth", "lr", "norm", "scale", "speed"):
        assert (getattr(a, name).x, getattr(a, name).y) == (getattr(b, name).x, getattr(b, name).y)


@pytest.mark.parametrize("size", [(80, 24), (140, 40)])
def test_a_weight_sync_that_the_optimizer_does_is_said_to_be_there(size: tuple[int, int]) -> None:
    done = fake_run.step(1)
    fused = dataclasses.replace(done, ms={k: v for k, v in done.ms.items() if k != "sync"})
    for step, words in ((done, " ms "), (fused, "in optimizer")):
        shown = text(frame(board([fake_run.started(), step]).snapshot(), *size))
        row = next(line for line in shown.splitlines() if "weight sync" in line)
        assert words in row, row


def test_the_log_writes_steps_together_and_everything_else_behind_them_at_once(tmp_path: Path) -> None:
    log = report.EventLog(tmp_path / "e.jsonl")

    def names() -> list[str]:
        return [json.loads(line)["event"] for line in (tmp_path / "e.jsonl").read_text().splitlines()]

    log.write(fake_run.started())
    log.write(fake_run.step(1))
    log.write(fake_run.step(2))
    assert names() == ["RunStarted"]
    log.write(ev.Notice("info", "x"))
    assert names() == ["RunStarted", "StepDone", "StepDone", "Notice"]
    log.write(fake_run.step(3))
    log.close()
    assert names()[-1] == "StepDone"
    slow = report.EventLog(tmp_path / "slow.jsonl")
    slow.EVERY_S = 0.0  # steps that take longer than that are written one by one
    slow.write(fake_run.step(1))
    assert (tmp_path / "slow.jsonl").read_text().count("\n") == 1
