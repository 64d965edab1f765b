"""What the dashboard shows: a Board folds events into figures, and lays them out as lines for a terminal of any size.

Pure but for the clock: no terminal and no rich here. `update` puts steps aside; who looks at the board folds them in.
`snapshot` and `frame` run in the drawing thread.
"""

from __future__ import annotations

import math
import re
import threading
import time
import unicodedata
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from anert import events as ev
from anert.plot import Ema, History, Line, Span, bar, chart, sparkline
from anert.report import PARTS, SOMETIMES, clock, count, flops, log_line, progress_text, rank_text, si, significant

PART_STYLES = dict.fromkeys(PARTS, "engine") | {"optimizer": "weights", "sync": "weights"}
PART_STYLES |= {"data": "rest", "dashboard": "rest", "other": "rest"}
GAP = 3
PUT_ASIDE = 4096
"""Steps, while nobody looks."""
NOT_NARROW = re.compile(
    "[\u0300-\u036f\u0483-\u0489\u0590-\u1fff\u200b-\u200f\u20d0-\u20ff\u231a-\u24ff\u2600-\u27ff\u2900-\U0010ffff]"
)
"""Characters that may take none or two cells; what the board itself draws is outside."""


@dataclass(slots=True)
class State:
    """Everything that a frame needs."""

    start: ev.RunStarted | None = None
    step: ev.StepDone | None = None
    done: ev.RunDone | None = None
    raw: History = field(default_factory=History)
    smooth: History = field(default_factory=History)
    lr: History = field(default_factory=lambda: History(128))
    norm: History = field(default_factory=lambda: History(128))
    scale: History = field(default_factory=lambda: History(128))
    speed: History = field(default_factory=lambda: History(128))
    ms: dict[str, float] = field(default_factory=dict)
    """Mean milliseconds a step, lately, by part; `step` is the whole."""
    loss: float = 0.0
    points: list[tuple[float, float]] = field(default_factory=list)
    best: tuple[float, float] | None = None
    skipped: int = 0
    clamped: int = 0
    story: str = ""
    story_step: int = -1
    log: list[tuple[str, str, str]] = field(default_factory=list)
    """(time of day, level, text)"""
    busy: str = ""
    asked: str = ""
    seen_s: float = 0.0
    """time.monotonic() at the last step."""


class Board:
    """The state of a run on show. `update` by the training thread, `snapshot` by the drawing one."""

    def __init__(self) -> None:
        self._state = State()
        self._lock = threading.Lock()
        self._loss = Ema(0.95)
        self._means: dict[str, Ema] = {}
        self._log: deque[tuple[str, str, str]] = deque(maxlen=64)
        self._points: deque[tuple[float, float]] = deque(maxlen=256)
        self._asked = ""
        self._steps: deque[ev.StepDone] = deque()

    def ask(self, text: str) -> None:
        """Show that a stop was asked for. No lock: a signal handler calls it, perhaps inside update."""
        self._asked = text

    def update(self, event: ev.Event) -> None:
        """Take an event in."""
        if isinstance(event, ev.StepDone):
            self._steps.append(event)
            self._state.seen_s = time.monotonic()
            if len(self._steps) < PUT_ASIDE:
                return
        with self._lock:
            self._catch_up()
            if not isinstance(event, ev.StepDone):
                self._fold(event)

    def snapshot(self) -> State:
        """A copy that no event changes."""
        with self._lock:
            self._catch_up()
            s = self._state
            series = {name: getattr(s, name).copy() for name in ("raw", "smooth", "lr", "norm", "scale", "speed")}
            means = {name: mean.value for name, mean in self._means.items()}
            return State(
                s.start, s.step, s.done, **series, ms=means, loss=s.loss, points=list(self._points), best=s.best,
                skipped=s.skipped, clamped=s.clamped, story=s.story, story_step=s.story_step, log=list(self._log),
                busy=s.busy, asked=self._asked, seen_s=s.seen_s,
            )  # fmt: skip

    def _catch_up(self) -> None:
        """Fold in the steps that were put aside."""
        while self._steps:
            self._step(self._steps.popleft())

    def _fold(self, event: ev.Event) -> None:
        s = self._state
        match event:
            case ev.RunStarted():
                s.start, s.seen_s = event, time.monotonic()
            case ev.Progress():
                s.busy = f"{event.task}: {progress_text(event)}"
            case ev.Validated():
                s.busy = ""
                if math.isfinite(event.loss):
                    self._points.append((event.step, event.loss))
                    if event.best or s.best is None:
                        s.best = (event.step, event.loss)
            case ev.Sampled():
                s.story, s.story_step = event.text, event.step
            case ev.RunDone():
                s.done = event
        line = log_line(event)
        if line:
            level = event.level if isinstance(event, ev.Notice) else "info"
            self._log.append((time.strftime("%H:%M:%S"), level, line))

    def _step(self, event: ev.StepDone) -> None:
        s = self._state
        s.step, s.busy = event, ""
        s.skipped += event.skipped
        s.clamped += event.clamped
        if math.isfinite(event.loss):
            s.loss = self._loss.add(event.loss)
            s.raw.add(event.step, event.loss)
            s.smooth.add(event.step, s.loss)
        s.lr.add(event.step, event.lr)
        s.norm.add(event.step, event.grad_norm)
        s.scale.add(event.step, event.loss_scale)
        s.speed.add(event.step, event.tokens_per_s)
        for name, value in (*event.ms.items(), ("step", event.step_ms), ("flops", float(event.flops))):
            mean = self._means.get(name)
            if mean is None:
                mean = self._means[name] = Ema(0.9)
            mean.add(value)


# ---- layout ----


def frame(s: State, width: int, height: int) -> list[Line]:
    """`height` lines of at most `width` cells. Sections give way from the bottom as the terminal shrinks."""
    width, height = max(width, 20), max(height, 3)
    head = [_header(s, width), _progress(s, width)]
    if height < 16 or width < 60:
        lines = [*head, *_small(s, width, height - len(head))]
    elif width >= 120 and height >= 30:
        lines = [*head, [], *_wide(s, width, height - len(head) - 1)]
    else:
        lines = [*head, *_narrow(s, width, height - len(head))]
    return [clip(line, width) for line in (lines + [[]] * height)[:height]]


def _small(s: State, width: int, height: int) -> list[Line]:
    if height < 8:
        return [_title("loss", width, _loss_legend(s, width)), *_numbers(s, width)][:height]
    plot = height - 5
    return [*_loss(s, width, plot + 1), *_numbers(s, width)[-4:]]


def _narrow(s: State, width: int, height: int) -> list[Line]:
    """Loss over all the width; step and numbers side by side; story; log."""
    parts = _parts(s, 0)
    room = height - len(parts) - 1
    air = 1 if room >= 20 else 0
    story = max(2, min(8, room // 5)) + 1
    log = max(1, min(8, room // 7)) + air
    plot = room - story - log - 3 * air
    half = (width - GAP) // 2
    metrics = _beside(
        [_title("step", half, _step_legend(s)), *_parts(s, half)],
        [_title("run", width - GAP - half, []), *_numbers(s, width - GAP - half)],
        half,
    )
    blank: list[Line] = [[]] * air
    title = [_title("log", width, [])] * air
    return [
        *blank, *_loss(s, width, plot), *blank, *metrics, *blank, *_story(s, width, story),
        *title, *_log(s, width, log - air),
    ]  # fmt: skip


def _wide(s: State, width: int, height: int) -> list[Line]:
    """Loss, story and log on the left; the step's split and the numbers on the right."""
    right = min(max(width // 3, 44), 60)
    left = width - right - GAP
    log = max(3, height // 7) + 1
    story = max(4, height // 6) + 1
    plot = height - log - story - 2
    a = [
        *_loss(s, left, plot), [], *_story(s, left, story), [],
        _title("log", left, []), *_log(s, left, log - 1),
    ]  # fmt: skip
    b = [
        _title("step", right, _step_legend(s)), *_parts(s, right), [],
        _title("optimizer", right, []), *_numbers(s, right)[:6], [],
        _title("throughput", right, []), *_numbers(s, right)[6:], [],
        _title("model", right, []), *_model(s, right),
    ]  # fmt: skip
    return _beside(a, b, left)


def _beside(a: Sequence[Line], b: Sequence[Line], width: int) -> list[Line]:
    rows = max(len(a), len(b))
    a, b = [*a, *[[]] * (rows - len(a))], [*b, *[[]] * (rows - len(b))]
    return [[*_fit(x, width), (" " * GAP, ""), *y] for x, y in zip(a, b, strict=True)]


def _header(s: State, width: int) -> Line:
    """What runs and on what; the least important words give way first."""
    if s.start is None:
        return [("anert", "name")]
    r = s.start
    spent = r.compiles if s.step is None else s.step.compiles
    compiles: Line = [(f"  {spent}/{r.compile_budget} compiles", "bad" if spent > r.kernels else "dim")]
    engine: Line = [(f"{r.backend} {r.precision} {r.isa}", "name")]
    ranks = f"{r.ranks} ranks x " if r.ranks > 1 else ""
    engine.append((f"  {ranks}{r.threads} thread{'s' * (r.threads != 1)}", "dim"))
    size: Line = [(f"  {si(r.n_params)} params", "")]
    model: Line = [(f"{r.plugin}:{r.preset}", "name")]
    layout: Line = [(f"  {r.layout}", "dim")]
    for left, right in (
        ([("anert ", "dim"), *model, *size], [*engine, *layout, *compiles]),
        ([*model, *size], [*engine, *layout, *compiles]),
        ([*model, *size], [*engine, *compiles]),
    ):
        if _cells(left) + _cells(right) + 2 <= width:
            return _ends(left, right, width)
    return _ends(model, [*engine[:1], *compiles], width)


def _progress(s: State, width: int) -> Line:
    if s.start is None:
        return [(s.busy, "dim")]
    r, step = s.start, s.step
    at = step.step if step else r.first_step
    elapsed = step.elapsed_s if step else 0.0
    running = time.monotonic() - s.seen_s if s.done is None and s.seen_s else 0.0
    by_steps = at / r.steps if r.steps else 0.0
    by_time = (elapsed + running) / r.time_budget_s if r.time_budget_s else 0.0
    share = min(max(by_steps, by_time), 1.0)
    left: Line = [(f"step {count(at):>{len(count(r.steps))}} of {count(r.steps)} ", "")]
    eta = clock(max(step.eta_s - running, 0.0)) if step and s.done is None else "-"
    right: Line = [(f" {share:4.0%}", ""), (f"   {clock(elapsed + running)} elapsed", "dim")]
    right.append((f"   {eta} left", "") if s.done is None else (f"   {s.done.reason}", "name"))
    if s.asked and s.done is None:
        right = [("  stopping and saving; Ctrl-C again quits at once", "val")]
    room = width - _cells(left) - _cells(right)
    full = round(share * room)
    return [*left, ("━" * full, "train"), ("─" * (room - full), "faint"), *right]


def _title(text: str, width: int, legend: Line) -> Line:
    """`text ──────── legend`: a section begins."""
    rule = width - len(text) - 1 - (_cells(legend) + 1 if legend else 0)
    return [(text + " ", "title"), ("─" * max(rule, 0), "faint"), *([(" ", ""), *legend] if legend else [])]


def _loss_legend(s: State, width: int) -> Line:
    line: Line = []
    if s.step is not None:
        line += [("━ ", "train"), ("train ", "dim"), (f"{s.loss:.3f}", "train")]
    if s.points:
        line += [("  ● ", "val"), ("validation ", "dim"), (f"{s.points[-1][1]:.3f}", "val")]
        if s.best is not None and width >= 70:
            line.append((f"  best {s.best[1]:.3f} at {count(s.best[0])}", "dim"))
    return line


def _loss(s: State, width: int, height: int) -> list[Line]:
    return [_title("loss", width, _loss_legend(s, width)), *chart(s.raw, s.smooth, s.points, width, max(height - 1, 2))]


def _step_legend(s: State) -> Line:
    ranks: Line = [(f"ranks {rank_text(s.step)}  ", "dim")] if s.step and s.step.rank_ms else []
    saved: Line = [(f"{s.ms['overlapped']:,.1f} ms side by side  ", "dim")] if "overlapped" in s.ms else []
    return [*ranks, *saved, (f"{s.ms['step']:,.1f} ms", "")] if "step" in s.ms else []


def _parts(s: State, width: int) -> list[Line]:
    """A row each: name, bar (the longest part fills it), milliseconds, share of the step."""
    whole = s.ms.get("step", 0.0)
    times = {name: s.ms.get(name, 0.0) for name in PARTS if name not in SOMETIMES or name in s.ms}
    times["other"] = max(whole + s.ms.get("overlapped", 0.0) - sum(times.values()), 0.0)
    longest = max(times.values()) or 1.0
    rows: list[Line] = []
    for name, value in times.items():
        if name == "sync" and name not in s.ms:  # the pass that steps a weight writes its copies
            rows.append([("weight sync  ", "dim"), (f"{'in optimizer':>{max(width - 13, 12)}}", "dim")])
            continue
        share = value / whole if whole else 0.0
        percent = f"{share:.0%}" if share >= 0.0995 or not share else f"{share:.1%}"
        figures = f" {value:8,.1f} ms {percent:>5}"
        stroke = bar(value / longest, max(width - 13 - len(figures), 0))
        label = "weight sync" if name == "sync" else name.replace("_", " ")
        rows.append([(f"{label:<13}", "dim"), (stroke, PART_STYLES[name]), (figures, "")])
    return rows


def _numbers(s: State, width: int) -> list[Line]:
    """A row each: name, figure, unit, and its course or a remark."""
    step, r = s.step, s.start
    if step is None or r is None:
        return [[("-", "dim")]] + [[]] * 8
    rate = s.ms["flops"] / s.ms["step"] * 1e3 if s.ms.get("step") else 0.0
    peak = r.peak_gflops * 1e9
    if rate > peak:  # measured while others worked: no peak
        peak = 0.0
    amount, unit = flops(rate).split(" ")
    resident, prefix = si(step.rss_bytes, "B").split(" ")
    room = max(width - 32, 0)
    remark = f"{rate / peak:.0%}" if peak else ""
    for longer in (f"{remark} of peak", f"{remark} of {flops(peak)} measured"):
        remark = longer if peak and len(longer) <= room else remark
    spark = min(room, 40)
    rows: list[tuple[str, str, str, str, str]] = [
        ("learning rate", f"{step.lr:.2e}", "", sparkline(s.lr.y, spark), "spark"),
        ("gradient norm", significant(step.grad_norm), "", sparkline(s.norm.y, spark), "spark"),
        ("loss scale", count(step.loss_scale), "", sparkline(s.scale.y, spark), "spark"),
        ("skipped", count(s.skipped), "steps", "", "dim"),
        ("residual max", significant(step.amax), "", "", "dim"),
        ("clamped", count(s.clamped), "weights", "", "dim"),
        ("tokens", count(step.tokens_per_s), "tok/s", sparkline(s.speed.y, spark), "spark"),
        ("arithmetic", amount, unit, remark, "dim"),
        ("memory", resident, prefix, "resident" if room >= 8 else "RSS", "dim"),
    ]
    alarm = {"skipped": s.skipped, "clamped": s.clamped}
    return [
        [
            (f"{n:<13}", "dim"),
            (f"{v:>9}", "val" if alarm.get(n) else ""),
            (f" {u:<9}", "dim"),
            (e if len(e) <= room else "", style),
        ]
        for n, v, u, e, style in rows
    ]


def _model(s: State, width: int) -> list[Line]:
    """What RunStarted says of the data and the config, the config in two columns."""
    if s.start is None:
        return []
    r = s.start
    rows = [("dataset", r.dataset), ("tokens", f"{si(r.train_tokens)} to train, {si(r.val_tokens)} to validate")]
    rows += [("tokenizer", r.tokenizer), ("kernels", f"{r.kernels}, compiled in {r.compile_ms:,.0f} ms")]
    rows += [("a step", f"{count(r.tokens_per_step)} tokens"), ("out", r.out_dir)]
    lines = [_pair(name, text, width) for name, text in rows]
    half = (width - GAP) // 2
    config = [_pair(k, f"{v:g}" if isinstance(v, float) else str(v), half) for k, v in r.config.items()]
    return [*lines, *_beside(config[::2], config[1::2], half)]


def _pair(name: str, text: str, width: int) -> Line:
    return _ends([(name, "dim")], [(clip_text(clean(text), width - len(name) - 2), "")], width)


def _story(s: State, width: int, height: int) -> list[Line]:
    at = f"after {count(s.story_step)} steps" if s.story_step >= 0 else ""
    body = wrap(s.story, width, height - 1) if s.story else [[("none yet", "dim")]]
    return [_title("story", width, [(at, "dim")] if at else []), *(body + [[]] * height)[: height - 1]]


def _log(s: State, width: int, height: int) -> list[Line]:
    entries = [*s.log]
    lines: list[Line] = []
    if s.busy:
        lines.append([("        ", "dim"), (" " + s.busy, "dim")])
    for at, level, text in reversed(entries):
        style = {"warning": "val", "error": "bad"}.get(level, "")
        lines.append([(at + " ", "dim"), (clip_text(clean(text), width - 9), style)])
    return [*reversed(lines[:height])] + [[]] * (height - len(lines))


# ---- cells ----


def clean(text: str) -> str:
    """`text` without control characters: a model's output cannot steer the terminal."""
    return "".join(c if c.isprintable() else " " for c in text)


def cell_len(text: str) -> int:
    """Cells that a terminal gives to `text`."""
    if text.isascii() or NOT_NARROW.search(text) is None:
        return len(text)
    return sum(_char_cells(c) for c in text)


def _char_cells(c: str) -> int:
    if unicodedata.combining(c):
        return 0
    return 2 if unicodedata.east_asian_width(c) in "WF" else 1


def clip_text(text: str, width: int) -> str:
    """At most `width` cells, the last an ellipsis where something was cut."""
    if cell_len(text) <= width:
        return text
    kept, used = "", 0
    for c in text:
        used += _char_cells(c)
        if used > width - 1:
            break
        kept += c
    return kept + "…" if width > 0 else ""


def clip(line: Line, width: int) -> Line:
    """The line cut to `width` cells."""
    if _cells(line) <= width:
        return line
    kept: Line = []
    for text, style in line:
        room = width - _cells(kept)
        if cell_len(text) > room:
            return [*kept, (clip_text(text, room), style)]
        kept.append((text, style))
    return kept


def wrap(text: str, width: int, rows: int) -> list[Line]:
    """Words in at most `rows` lines; the last ends in an ellipsis where text is left over."""
    lines: list[str] = []
    for paragraph in text.splitlines():
        current = ""
        for word in clean(paragraph).split():
            longer = f"{current} {word}" if current else word
            if cell_len(longer) <= width:
                current = longer
            else:
                lines.append(current)
                current = clip_text(word, width)
        lines.append(current)
    shown = [line for line in lines if line]
    if len(shown) > rows > 0:
        shown[rows - 1] = clip_text(shown[rows - 1] + " …", width)
    return [[(line, "")] for line in shown[:rows]]


def _cells(line: Sequence[Span]) -> int:
    return sum(cell_len(text) for text, _ in line)


def _fit(line: Line, width: int) -> Line:
    """The line cut or padded to exactly `width` cells."""
    line = clip(line, width)
    return [*line, (" " * (width - _cells(line)), "")]


def _ends(left: Line, right: Line, width: int) -> Line:
    """`left` at the left edge, `right` at the right one; the right gives way from its end."""
    room = width - _cells(left) - 2
    while right and _cells(right) > room:
        right = right[:-1]
    space = width - _cells(left) - _cells(right)
    return [*left, (" " * max(space, 0), ""), *right]
