"""What a benchmark can be told; every benchmark takes the same, and says what it cannot use."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from anert.errors import InputError

if TYPE_CHECKING:
    from anert.model import Decoder
    from anert.runtime import Runtime


@dataclass(frozen=True, slots=True)
class BenchOptions:
    """plugin, preset: the model whose shapes are measured. seq_len 0: the preset's. threads 0: what the machine grants.
    size: elements of an array benchmark, 0: past the last-level cache. peers: (name, path or empty). steps, seconds:
    length of a run, 0: the benchmark's own. axis, values: what a scaling varies. compile_budget: of a run that bakes
    its weights. overrides: fields of the model's config. texts, tokenizers: files that tokenizers are
    measured on."""

    plugin: str = ""
    preset: str = ""
    seq_len: int = 0
    batch: int = 1
    precision: str = "auto"
    backend: str = "auto"
    layout: str = "auto"
    threads: int = 0
    isa: str = "auto"
    size: int = 0
    data: str = ""
    peers: tuple[tuple[str, str], ...] = ()
    steps: int = 0
    seconds: float = 0.0
    axis: str = ""
    values: tuple[int, ...] = ()
    compile_budget: int = 0
    overrides: tuple[tuple[str, int], ...] = ()
    texts: tuple[str, ...] = ()
    tokenizers: tuple[str, ...] = ()

    def runtime(self) -> Runtime:
        from anert.runtime import Runtime

        return Runtime(self.backend, self.precision, self.layout, self.threads, isa=self.isa)

    def model(self) -> tuple[Decoder, Any]:
        """(model, its config) of the plugin's preset, with seq_len as asked for."""
        import dataclasses

        from anert.plugin import load, split_name

        if not self.plugin:
            raise InputError(
                "this benchmark needs a model: anert bench NAME PLUGIN[:PRESET], as plugins/stories.py:15m"
            )
        name, preset = split_name(self.plugin)
        chosen = load(name).preset(self.preset or preset)
        config = chosen.config
        changed = {**({"seq_len": self.seq_len} if self.seq_len else {}), **dict(self.overrides)}
        if missing := [name for name in changed if not hasattr(config, name)]:
            raise InputError(f"the config of {self.plugin} has no {missing[0]}")
        if changed:
            config = dataclasses.replace(config, **changed)
        model: Decoder = chosen.model(config)
        return model, config
