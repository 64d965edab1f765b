"""The rich view of a run: a thread of its own draws the Board, at most four times a second, for under 1% of a core.

Before the first step, waits are progress bars; then the alternate screen is the dashboard's; at the end the last
frame stays in the scrollback, with the summary and the last story below.
"""

from __future__ import annotations

import os
import threading
import time
from typing import TYPE_CHECKING, TextIO

from anert import events as ev
from anert.board import Board, clean, frame
from anert.plot import Line
from anert.report import Plain, amount, done_lines, log_line

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress, TaskID

STYLES = {
    "": "",
    "name": "bold",
    "title": "bold",
    "dim": "#7d8590",
    "faint": "#5a626e",
    "train": "#539bf5",
    "raw": "#6f87a3",
    "val": "#d9a441",
    "bad": "bold #e5534b",
    "engine": "#539bf5",
    "weights": "#4fa8a0",
    "rest": "#7d8590",
    "spark": "#4fa8a0",
}
"""Mid-tones that read on dark and on light terminals."""

INTERVAL_S = 0.25
SHARE = 0.0025
"""Of one core, that drawing may take: a slow terminal or a big frame is drawn less often."""
LONGEST_S = 4.0
"""Between frames that keep the share: a view that stands still looks dead."""
MOST = 0.004
"""Of one core, whatever a frame costs."""
REPAINT_S = 5.0
"""Whatever else wrote over the screen is painted over after this long."""


class Dashboard:
    """A report.UI on a terminal. show() folds the event into the board and returns; only the thread draws."""

    def __init__(self, stream: TextIO, console: Console | None = None) -> None:
        from rich.console import Console

        self.console = console or Console(file=stream)
        self.board = Board()
        self._stream = stream
        self._plain = Plain(stream)
        self._waits: Progress | None = None
        self._tasks: dict[str, TaskID] = {}
        self._thread: threading.Thread | None = None
        self._quit = threading.Event()
        self._cpu_s = 0.0
        self._told_s = 0.0
        self._shown: list[str] = []
        self._codes: dict[str, tuple[str, str]] = {}
        self._painted = ((0, 0), 0.0)
        self._closed = False

    def show(self, event: ev.Event) -> None:
        self.board.update(event)
        if isinstance(event, ev.RunStarted):
            self._end_waits()
            self._begin()
        elif self._thread is None:
            self._before_run(event)

    def interrupt(self, text: str) -> None:
        self.board.ask(text)
        if self._thread is None:
            self._plain.interrupt(text)

    def restore(self) -> None:
        """Leave the alternate screen by one system call: a signal handler may call this, then exit."""
        if self._thread is not None and not self._closed:
            os.write(self._stream.fileno(), b"\x1b[?2026l\x1b[?1049l\x1b[?25h")

    def overhead_ms(self) -> float:
        """CPU time of the drawing thread since the last call."""
        cpu_s = self._cpu_s
        spent, self._told_s = (cpu_s - self._told_s) * 1e3, cpu_s
        return spent

    def close(self) -> None:
        if self._closed:
            return
        self._end_waits()
        if self._thread is not None:
            self._quit.set()
            self._thread.join(timeout=2.0)
            self.console.set_alt_screen(False)
            self.console.show_cursor(True)
            self._last_words()
        self._closed = True

    # ---- before the first step ----

    def _before_run(self, event: ev.Event) -> None:
        if isinstance(event, ev.Progress):
            self._wait(event)
        elif line := log_line(event):
            level = event.level if isinstance(event, ev.Notice) else "info"
            style = {"warning": STYLES["val"], "error": STYLES["bad"]}.get(level, STYLES["dim"])
            (self._waits.console if self._waits else self.console).print(line, style=style, markup=False)
        elif isinstance(event, ev.RunDone):
            self.console.print("\n".join(done_lines(event)), markup=False, highlight=False)

    def _wait(self, event: ev.Progress) -> None:
        if self._waits is None:
            self._waits = _progress_bars(self.console)
            self._waits.start()
        if event.task not in self._tasks:
            self._tasks[event.task] = self._waits.add_task(event.task, total=event.total or None, unit=event.unit)
        self._waits.update(self._tasks[event.task], completed=event.done, total=event.total or None)

    def _end_waits(self) -> None:
        if self._waits is not None:
            self._waits.stop()
            self._waits = None

    # ---- the drawing thread ----

    def _begin(self) -> None:
        self.console.set_alt_screen(True)
        self.console.show_cursor(False)
        self._thread = threading.Thread(target=self._draw_on, name="anert-dashboard", daemon=True)
        self._thread.start()

    def _draw_on(self) -> None:
        pause = 0.0
        while not self._quit.wait(pause):
            start = time.thread_time()
            try:
                self._draw()
            except OSError:  # the terminal is gone: the run goes on without a view
                return
            cost = time.thread_time() - start
            self._cpu_s += cost
            pause = max(INTERVAL_S, min(cost / SHARE, LONGEST_S), cost / MOST)

    def _draw(self) -> None:
        """Write the lines that differ from what the terminal shows, in one synchronized update."""
        size = self.console.size
        (width, height), painted_s = self._painted
        now = time.monotonic()
        if (width, height) != size or now - painted_s > REPAINT_S:
            self._shown, self._painted = [], ((size.width, size.height), now)
        lines = [self._ansi(line, size.width) for line in frame(self.board.snapshot(), size.width, size.height)]
        shown = self._shown or [""] * len(lines)
        moved = [f"\x1b[{i + 1};1H{new}" for i, (new, old) in enumerate(zip(lines, shown, strict=True)) if new != old]
        if moved:
            self._stream.write("\x1b[?2026h" + "".join(moved) + "\x1b[?2026l")
            self._stream.flush()
        self._shown = lines

    def _ansi(self, line: Line, width: int) -> str:
        """A line in the terminal's colors, padded to the width so that nothing of an older one remains."""
        from anert.board import cell_len

        text = "".join(self._paint(part, style) for part, style in line if part)
        return text + " " * (width - sum(cell_len(part) for part, _ in line))

    def _paint(self, text: str, style: str) -> str:
        if not style or self.console.no_color:
            return text
        if style not in self._codes:
            from rich.style import Style

            on, off = Style.parse(STYLES[style]).render("|", color_system=self.console._color_system).split("|")
            self._codes[style] = on, off
        on, off = self._codes[style]
        return f"{on}{text}{off}"

    # ---- the end ----

    def _last_words(self) -> None:
        state = self.board.snapshot()
        if state.step is not None:
            self.console.print(Frame(self.board, min(self.console.height - 1, 30)))
        if state.done is not None:
            self.console.print()
            for line in done_lines(state.done):
                self.console.print(line, markup=False, highlight=False)
        if state.story:
            self.console.print()
            for line in state.story.splitlines():
                self.console.print(clean(line), markup=False, highlight=False)


class Frame:
    """The board as a rich renderable of `height` lines; what the final frame and the SVG export print."""

    def __init__(self, board: Board, height: int) -> None:
        self.board, self.height = board, height

    def __rich_console__(self, console: Console, options: object) -> object:
        from rich.segment import Segment
        from rich.style import Style

        for line in frame(self.board.snapshot(), console.width, self.height):
            for text, style in line:
                yield Segment(text, Style.parse(STYLES[style]))
            yield Segment.line()


def _progress_bars(console: Console) -> Progress:
    from rich.progress import (
        BarColumn,
        Progress,
        ProgressColumn,
        Task,
        TaskProgressColumn,
        TextColumn,
        TimeElapsedColumn,
    )
    from rich.text import Text

    class Amount(ProgressColumn):
        """`3.10 MB of 12.0 MB`."""

        def render(self, task: Task) -> Text:
            text = amount(task.completed, task.total or 0, task.fields.get("unit", ""))
            return Text(text, style=STYLES["dim"])

    return Progress(
        TextColumn("{task.description:<24}"),
        BarColumn(bar_width=40, complete_style=STYLES["train"], finished_style=STYLES["weights"]),
        TaskProgressColumn(),
        Amount(),
        TimeElapsedColumn(),
        console=console,
        refresh_per_second=4,
    )
