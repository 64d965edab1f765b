"""What a run starts from: its directory, initial weights, tokenizer and data; and what it will need of memory and
disk."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from anert.errors import DoesNotFit, InputError
from anert.events import Event, Notice
from anert.files import publish

if TYPE_CHECKING:
    from anert.checkpoint import Checkpoint
    from anert.data import TokenDataset
    from anert.dist import World
    from anert.model import Decoder
    from anert.param import Spec
    from anert.plugin import Plugin, Preset
    from anert.runtime import Runtime
    from anert.tokenizer import Tokenizer
    from anert.train import TrainOptions

CORPUS_MB = 4.0
"""Size of the corpus that a plugin writes when a run has no data."""


def run_dir(plugin: str, preset: str, options: TrainOptions) -> Path:
    """Where the run keeps everything: --out, else the next free runs/<plugin>-<preset>-<n>. A new run never takes a
    used one."""
    if options.out:
        out = Path(options.out)
        if options.init != "resume" and any(out.glob("step-*")):
            raise InputError(f"{out} already holds a run: go on with it by --resume {out}, or choose another --out")
        return out
    base = Path("runs")
    n = 1
    while (base / f"{plugin}-{preset}-{n}").exists():
        n += 1
    return base / f"{plugin}-{preset}-{n}"


@dataclass(slots=True)
class Weights:
    """Initial weights. `tensors` None: draw them. `checkpoint`: a run to be resumed, moments and cursor included."""

    config: Any
    tensors: Mapping[str, np.ndarray] | None = None
    checkpoint: Checkpoint | None = None
    tokenizer: Callable[[], Tokenizer] | None = None
    tokenizer_name: str = ""


def open_weights(
    plugin: Plugin, preset: Preset, config: Any, options: TrainOptions, out: Path
) -> Generator[Event, None, Weights]:
    """Yields notices; returns the Weights that `--init` names: a model file of any format. The config follows it, but
    for a seq_len that differs from the preset's: that one was asked for."""
    from anert import checkpoint
    from anert.formats import open_model_file
    from anert.tokenizer import load_tokenizer

    if options.init == "scratch":
        return Weights(config)
    if options.init == "resume":
        found = checkpoint.load(out)
        for path, why in found.skipped:
            yield Notice("warning", f"skipped {path}: {why}")
        if "optimizer_t" not in found.state:
            raise InputError(f"{found.path} holds weights but no run to go on with: start one by --init {found.path}")
        yield Notice("info", f"resuming {found.path} after step {found.step}")
        beside = found.tokenizer_path
        load = (lambda: load_tokenizer(beside)) if beside else None
        name = beside.name if beside else ""
        return Weights(_follow(config, found.state["config"], found.path), found.model, found, load, name)
    path = Path(options.init)
    if not path.exists():
        raise InputError(f"--init {path}: no such file or directory (or `scratch`, `resume`)")
    source = open_model_file(path)
    for note in source.notes:
        yield Notice("info", f"{path}: {note}")
    step = f", step {source.step}" if source.step >= 0 else ""
    yield Notice("info", f"weights from {source.path}{step}; optimizer and data start anew")
    followed = _follow(config, source.config, source.path)
    asked = getattr(config, "seq_len", 0)
    if asked != getattr(preset.config, "seq_len", 0) and asked < followed.seq_len:
        followed = dataclasses.replace(followed, seq_len=asked)
    changed = [k for k in sorted(_names(config)) if getattr(config, k) != getattr(followed, k)]
    if changed:
        said = ", ".join(f"{k} {getattr(followed, k)}" for k in changed)
        yield Notice("info", f"the model follows the checkpoint: {said}")
    return Weights(followed, source.tensors, None, source.tokenizer, source.tokenizer_name)


def plugin_of(path: Path) -> str:
    """Name of the plugin that trained a checkpoint; `stories`, whose model is Llama's, for another program's file."""
    from anert import checkpoint
    from anert.formats import run_dir

    if path.name in ("last", "best") or (path.is_dir() and run_dir.sniff(path)):
        return str(checkpoint.load(path, hashed=False).state.get("plugin", "stories"))
    return "stories"


def open_model(
    plugin: Plugin, path: Path, tokenizer: str, hashed: bool = True
) -> tuple[Decoder, Mapping[str, np.ndarray], Callable[[], Tokenizer]]:
    """The model, its weights (read when asked for) and what loads its tokenizer, from a model file of any format.
    hashed: see formats.open_model_file."""
    from anert.formats import open_model_file

    source = open_model_file(path, hashed)
    preset = plugin.preset(str(source.about.get("preset") or ""))
    config = _follow(preset.config, source.config, source.path)
    if not tokenizer and source.tokenizer is None:
        raise InputError(f"{path} brings no tokenizer: pass --tokenizer FILE, the one that it was trained with")

    def load() -> Tokenizer:
        from anert.tokenizer import load_tokenizer

        vocabulary = load_tokenizer(Path(tokenizer)) if tokenizer or not source.tokenizer else source.tokenizer()
        if vocabulary.vocab_size > config.vocab_size:
            name = tokenizer or source.tokenizer_name
            raise InputError(f"{name} has {vocabulary.vocab_size} tokens, the model {config.vocab_size}: another's?")
        return vocabulary

    return preset.model(config), source.tensors, load


def _names(config: Any) -> set[str]:
    return {f.name for f in dataclasses.fields(config)}


def _follow(config: Any, recorded: Mapping[str, Any], where: Path) -> Any:
    """`config` with the values of a model file's. InputError if that one is of another model: it has fields that this
    one lacks, and not as plain Llama has them."""
    from anert.formats import LlamaConfig

    plain = {f.name: f.default for f in dataclasses.fields(LlamaConfig)}
    unknown = {k: v for k, v in recorded.items() if k not in _names(config) and plain.get(k) != v}
    if unknown:
        said = ", ".join(f"{k} {v}" for k, v in sorted(unknown.items()))
        raise InputError(f"{where}: its config has {said}, which this model does not: another plugin's?")
    return dataclasses.replace(config, **{k: v for k, v in recorded.items() if k in _names(config)})


@dataclass(slots=True)
class Data:
    """Token windows to train and validate on; `config` is the model's, its vocab_size settled."""

    dataset: TokenDataset
    tokenizer: Tokenizer
    tokenizer_name: str
    name: str
    config: Any


def open_data(
    plugin: Plugin, preset: Preset, config: Any, options: TrainOptions, out: Path, weights: Weights
) -> Generator[Event, None, Data]:
    """Yields progress; returns the Data: tokenizer found or trained, text written or read, tokenized, mapped."""
    from anert import data
    from anert.tokenizer import load_tokenizer
    from anert.waiting import waited

    cache = out / "data"
    if options.data:
        source = Path(options.data)
        data.sniff(source)  # refuse a missing or unreadable file before anything is made
    else:
        source = yield from _own_corpus(plugin, preset, options, cache)
    name = "trained here"
    if options.tokenizer:
        tokenizer, name = load_tokenizer(Path(options.tokenizer)), Path(options.tokenizer).name
    elif weights.tokenizer is not None:
        tokenizer, name = weights.tokenizer(), weights.tokenizer_name
    elif weights.tensors is not None:
        raise InputError(f"--init {options.init} needs the tokenizer that it was trained with: pass --tokenizer FILE")
    else:
        tokenizer = yield from _own_tokenizer(source, config.vocab_size, cache)
    if weights.tensors is None and tokenizer.vocab_size != config.vocab_size:
        yield Notice("info", f"vocab_size follows the tokenizer: {tokenizer.vocab_size}")
        config = dataclasses.replace(config, vocab_size=tokenizer.vocab_size)
    if tokenizer.vocab_size > config.vocab_size:
        raise InputError(
            f"the tokenizer has {tokenizer.vocab_size} tokens, the model {config.vocab_size}: "
            "pass the tokenizer that it was trained with"
        )
    dataset = yield from waited(
        "tokenize", "B",
        lambda report: data.prepare(source, tokenizer, cache, config.seq_len, options.val, config.vocab_size, report,
                                    options.data_dtype),
    )  # fmt: skip
    if dataset.note:
        yield Notice("warning", dataset.note)
    return Data(dataset, tokenizer, f"{tokenizer.kind} {tokenizer.vocab_size} ({name})", source.name, config)


@dataclass(slots=True)
class Inputs:
    """What a run starts from. Weights of a rank other than 0 have neither tensors nor checkpoint: they are sent."""

    out: Path
    data: Data
    weights: Weights
    resumed: dict[str, Any] | None = None
    """Of a resumed run: `path`, `step` and `state` of its checkpoint."""


def open_inputs(
    plugin: Plugin, preset: Preset, config: Any, options: TrainOptions, world: World
) -> Generator[Event, None, Inputs]:
    """Rank 0 finds, makes or reads everything; the others get from it what they do not have. `data.config` is the
    model's."""
    found: Inputs | None = None
    if world.rank == 0:
        out = run_dir(plugin.name, preset.name, options)
        weights = yield from open_weights(plugin, preset, config, options, out)
        preset.model(weights.config)  # refuses what cannot be before anything is written
        data = yield from open_data(plugin, preset, weights.config, options, out, weights)
        found = Inputs(out, data, weights, place_of(weights.checkpoint))
    return found if found is not None and world.size == 1 else _shared(world, found, config)


def place_of(checkpoint: Checkpoint | None) -> dict[str, Any] | None:
    """What a rank without the checkpoint needs of it: `path`, `step`, `state`."""
    if checkpoint is None:
        return None
    return {"path": str(checkpoint.path), "step": checkpoint.step, "state": checkpoint.state}


def _shared(world: World, mine: Inputs | None, config: Any) -> Inputs:
    """Rank 0's inputs on every rank."""
    from anert.data import TokenDataset
    from anert.tokenizer import load_tokenizer

    told = vocabulary = None
    if mine is not None:
        d = mine.data
        val = d.dataset.held_out
        told = {
            "out": str(mine.out), "config": dataclasses.asdict(d.config), "resumed": mine.resumed, "name": d.name,
            "val": float(val) if isinstance(val, (int, float)) else "", "tokenizer_name": d.tokenizer_name,
            "label": d.dataset.name, "hash": d.dataset.tokenizer_hash, "dtype": d.dataset.dtype,
        }  # fmt: skip
        vocabulary = mine.out / "data" / f"tokenizer-of-ranks{d.tokenizer.suffix}"
        with _writing(vocabulary.parent):
            d.tokenizer.save(vocabulary)
    told = world.share(told)
    cache = Path(told["out"]) / "data"
    vocabulary = world.share_file(vocabulary, cache)
    tokens = world.share_file(mine.data.dataset.path if mine else None, cache)
    held_out: Any = told["val"]
    if held_out == "":
        held_out = world.share_file(Path(str(mine.data.dataset.held_out)) if mine else None, cache)
    if mine is not None:
        return mine
    config = _follow(config, told["config"], Path(told["out"]))
    dataset = TokenDataset(tokens, config.seq_len, held_out, config.vocab_size, told["hash"], told["label"],
                           dtype=told["dtype"])  # fmt: skip
    data = Data(dataset, load_tokenizer(vocabulary), told["tokenizer_name"], told["name"], config)
    return Inputs(Path(told["out"]), data, Weights(config), told["resumed"])


def _own_corpus(plugin: Plugin, preset: Preset, options: TrainOptions, cache: Path) -> Generator[Event, None, Path]:
    from anert.waiting import waited

    name = preset.dataset or next(iter(plugin.datasets), "")
    if not name:
        raise InputError(f"plugin {plugin.name!r} brings no data of its own: pass --data FILE")
    path = cache / f"{name}.txt"
    if not path.exists():
        write = plugin.datasets[name]
        part = path.with_suffix(".part")
        with _writing(cache):
            yield from waited(f"write {name}", "MB", lambda progress: write(part, CORPUS_MB, options.seed, progress))
            publish(part, path)
    return path


@contextmanager
def _writing(cache: Path) -> Iterator[None]:
    """Makes the directory; what the disk refuses in the block is an InputError."""
    try:
        cache.mkdir(parents=True, exist_ok=True)
        yield
    except OSError as error:
        raise InputError(f"{cache}: cannot write there: {error.strerror}: choose another --out") from None


def _own_tokenizer(source: Path, vocab_size: int, cache: Path) -> Generator[Event, None, Tokenizer]:
    """A byte-level BPE trained on the text, kept in the run's cache."""
    from anert import data
    from anert.tokenizer import ByteBPETokenizer, load_tokenizer
    from anert.waiting import waited

    path = cache / "tokenizer.json"
    if not path.exists():
        if data.sniff(source) != "text":
            raise InputError(f"{source} holds tokens, not text: pass the --tokenizer FILE that made it")

        def learn(progress: Callable[[float, float], None]) -> Any:
            return ByteBPETokenizer.train(data.documents(source), vocab_size, progress=progress)

        tokenizer = yield from waited("train tokenizer", "merges", learn)
        part = path.with_suffix(".part")
        with _writing(cache):
            tokenizer.save(part)
            publish(part, path)
    return load_tokenizer(path)


def estimate_run(runtime: Runtime, model: Decoder, specs: Mapping[str, Spec], options: TrainOptions, out: Path) -> int:
    """Bytes of memory that the run needs; DoesNotFit, with the figures, if the machine or the disk does not grant them.

    Weights: master, gradient, two moments (16 bytes) and fp16 copies; activations: what blocks of this shape keep.
    """
    n_params = sum(s.size for s in specs.values())
    copies = 2 * (2 if runtime.backend.capabilities.both_orientations or runtime.layout == "packed" else 1)
    cfg = model.config
    positions = cfg.seq_len * options.batch
    widest = max([max(s.shape) for name, s in specs.items() if name.startswith("layers.")] or [cfg.dim])
    activations = 2 * positions * (len(model.blocks) * cfg.n_layers) * (2 * cfg.dim + 2 * widest)
    head = 4 * cfg.vocab_size * min(positions, 256) + 8 * cfg.dim * positions
    need = n_params * (16 + copies) + activations + head
    runtime.check_memory(need, f"{n_params / 1e6:.1f} M parameters with gradients and moments, and activations,")
    need += 12 * n_params  # the snapshot that a save writes from; where it does not fit, training waits for the save
    disk = 12 * n_params * (options.keep + 2)
    anchor = next(p for p in (out.absolute(), *out.absolute().parents) if p.exists())
    free = shutil.disk_usage(anchor).free
    if disk > free:
        raise DoesNotFit(
            f"{options.keep} checkpoints and one being written need {disk / 2**20:.0f} MiB, "
            f"{anchor} has {free / 2**20:.0f} MiB free: choose another --out or a smaller --keep"
        )
    return need
