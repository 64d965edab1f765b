"""What a run starts from: its directory, initial weights, tokenizer and data; and what it will need of memory and
disk."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable, Generator, Mapping
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
    tokenizer: Path | None = None


def open_weights(plugin: Plugin, config: Any, options: TrainOptions, out: Path) -> Generator[Event, None, Weights]:
    """Yields notices; returns the Weights that `--init` names. The config follows a checkpoint that is given."""
    from anert import checkpoint
    from anert.formats import llama2c

    if options.init == "scratch":
        return Weights(config)
    if options.init == "resume":
        found = checkpoint.load(out)
        for path, why in found.skipped:
            yield Notice("warning", f"skipped {path}: {why}")
        yield Notice("info", f"resuming {found.path} after step {found.step}")
        return Weights(_follow(config, found.state["config"]), found.model, found, found.tokenizer_path)
    path = Path(options.init)
    if not path.exists():
        raise InputError(f"--init {path}: no such file or directory (or `scratch`, `resume`)")
    if path.is_dir():
        found = checkpoint.load(path)
        yield Notice("info", f"weights from {found.path}, step {found.step}; optimizer and data start anew")
        return Weights(_follow(config, found.state["config"]), found.model, None, found.tokenizer_path)
    shape, tensors = llama2c.read(path)
    fields = _shared_fields(config, shape)
    changed = {k: v for k, v in fields.items() if getattr(config, k) != v}
    if changed:
        yield Notice("info", "the model follows the checkpoint: " + ", ".join(f"{k} {v}" for k, v in changed.items()))
    return Weights(dataclasses.replace(config, **fields), tensors)


def open_model(plugin: Plugin, path: Path, tokenizer: str) -> tuple[Decoder, Mapping[str, np.ndarray], Tokenizer]:
    """The model, its weights and its tokenizer, from a run directory, a step of one, or a llama2.c file."""
    from anert import checkpoint
    from anert.formats import llama2c
    from anert.tokenizer import load_tokenizer

    if path.is_dir() or path.name in ("last", "best"):
        found = checkpoint.load(path)
        preset = plugin.preset(found.state["preset"])
        config, tensors, beside = _follow(preset.config, found.state["config"]), found.model, found.tokenizer_path
    else:
        shape, tensors = llama2c.read(path)
        preset, beside = plugin.preset(), None
        config = dataclasses.replace(preset.config, **_shared_fields(preset.config, shape))
    source = Path(tokenizer) if tokenizer else beside
    if source is None:
        raise InputError(f"{path} brings no tokenizer: pass --tokenizer FILE, the one that it was trained with")
    vocabulary = load_tokenizer(source)
    if vocabulary.vocab_size > config.vocab_size:
        raise InputError(f"{source} has {vocabulary.vocab_size} tokens, the model {config.vocab_size}: another's?")
    return preset.model(config), tensors, vocabulary


def _shared_fields(config: Any, shape: Any) -> dict[str, Any]:
    """The fields of a llama2.c header that this model's config has."""
    return {f.name: getattr(shape, f.name) for f in dataclasses.fields(shape) if f.name in _names(config)}


def _names(config: Any) -> set[str]:
    return {f.name for f in dataclasses.fields(config)}


def _follow(config: Any, recorded: Mapping[str, Any]) -> Any:
    """`config` with the values of a checkpoint's. InputError if that one is of another model."""
    unknown = set(recorded) - _names(config)
    if unknown:
        raise InputError(
            f"the checkpoint's config has {', '.join(sorted(unknown))}, which this model does not: another plugin's?"
        )
    return dataclasses.replace(config, **recorded)


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
    from anert.train import waited

    cache = out / "data"
    if options.data:
        source = Path(options.data)
        data.sniff(source)  # refuse a missing or unreadable file before anything is made
    else:
        source = yield from _own_corpus(plugin, preset, options, cache)
    tokenizer_path = Path(options.tokenizer) if options.tokenizer else weights.tokenizer
    if tokenizer_path is not None:
        tokenizer = load_tokenizer(tokenizer_path)
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
        lambda report: data.prepare(source, tokenizer, cache, config.seq_len, options.val, config.vocab_size, report),
    )  # fmt: skip
    if dataset.note:
        yield Notice("warning", dataset.note)
    name = tokenizer_path.name if tokenizer_path else "trained here"
    return Data(dataset, tokenizer, f"{tokenizer.kind} {tokenizer.vocab_size} ({name})", source.name, config)


def _own_corpus(plugin: Plugin, preset: Preset, options: TrainOptions, cache: Path) -> Generator[Event, None, Path]:
    from anert.train import waited

    name = preset.dataset or next(iter(plugin.datasets), "")
    if not name:
        raise InputError(f"plugin {plugin.name!r} brings no data of its own: pass --data FILE")
    path = cache / f"{name}.txt"
    if not path.exists():
        cache.mkdir(parents=True, exist_ok=True)
        write = plugin.datasets[name]
        part = path.with_suffix(".part")
        yield from waited(f"write {name}", "MB", lambda progress: write(part, CORPUS_MB, options.seed, progress))
        publish(part, path)
    return path


def _own_tokenizer(source: Path, vocab_size: int, cache: Path) -> Generator[Event, None, Tokenizer]:
    """A byte-level BPE trained on the text, kept in the run's cache."""
    from anert import data
    from anert.tokenizer import ByteBPETokenizer, load_tokenizer
    from anert.train import waited

    path = cache / "tokenizer.json"
    if not path.exists():
        if data.sniff(source) != "text":
            raise InputError(f"{source} holds tokens, not text: pass the --tokenizer FILE that made it")

        def learn(progress: Callable[[float, float], None]) -> Any:
            return ByteBPETokenizer.train(data.documents(source), vocab_size, progress=progress)

        tokenizer = yield from waited("train tokenizer", "merges", learn)
        cache.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(".part")
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
