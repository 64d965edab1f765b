"""A Hugging Face directory of a Llama: config.json, model.safetensors or its shards with their index, tokenizer.

Their RoPE turns channel i with i + head_dim/2, ours (llama2.c's, Meta's) 2i with 2i + 1: rows of q and k are permuted
within each head on the way in and out (transformers, convert_llama_weights_to_hf.py).
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

from anert.errors import InputError
from anert.formats import tensor_file
from anert.formats.base import Array, Entry, LlamaConfig, Pretrained, Tensors, check_shapes, read_head

CONFIG, SINGLE, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
SHARD_BYTES = 5 << 30
LARGEST_JSON = 64 << 20
MODEL_TYPES = ("llama", "mistral", "smollm")
"""Model types that are this architecture; mistral only without a sliding window."""

KINDS = {
    "attn_norm": "input_layernorm",
    "wq": "self_attn.q_proj",
    "wk": "self_attn.k_proj",
    "wv": "self_attn.v_proj",
    "wo": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "w1": "mlp.gate_proj",
    "w2": "mlp.down_proj",
    "w3": "mlp.up_proj",
}
TOP = {"tok_embeddings": "model.embed_tokens.weight", "norm": "model.norm.weight", "output": "lm_head.weight"}


def sniff(path: Path) -> bool:
    """Whether a directory is one of these."""
    return (path / CONFIG).is_file()


def read(path: Path) -> Pretrained:
    """Raises InputError: damaged or missing files, or an architecture that is not plain Llama, by what differs."""
    settings = _json(path / CONFIG)
    config = _config(settings, path)
    found = _open(path)
    if config.tied:
        found.pop(TOP["output"], None)  # some files repeat the embedding
    found = {n: e for n, e in found.items() if not n.endswith("rotary_emb.inv_freq")}  # old files' buffers
    entries: dict[str, Entry] = {}
    back = {_theirs(name): name for name, _ in islice(config.shapes(), len(found) + 1)}
    for theirs, entry in found.items():
        ours = back.get(theirs, theirs)
        entries[ours] = _ours(entry, _heads(config, ours), config.head_dim)
    check_shapes(config, {n: e.shape for n, e in entries.items()}, path)
    about = {"architectures": settings.get("architectures") or [], "files": len(_files(path))}
    model = Pretrained("hf", path, config.describe(), Tensors(entries), about=about)
    tokenizer = next((n for n in ("tokenizer.json", "tokenizer.model", "vocab.json") if (path / n).is_file()), "")
    if tokenizer:
        from anert.tokenizer import load_tokenizer

        model.tokenizer, model.tokenizer_name = lambda: load_tokenizer(path), tokenizer
    return model


def write(path: Path, model: Pretrained, dtype: str = "", shard_bytes: int = SHARD_BYTES) -> None:
    """Write the directory; it appears whole or not at all. dtype `fp32`, `fp16`, `bf16`; "": that of most weights
    (what was quantized as fp32). Shards are whole tensors of at most `shard_bytes` together, where one is not more."""
    config = model.llama()
    if not config.rope_theta:
        raise InputError(f"{model.path}: a model without RoPE: Hugging Face's Llama cannot say that; convert to anert")
    dtype = dtype or _dtype_of(model)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.mkdir(parents=True)
        _write_into(temporary, config, model, dtype, shard_bytes)
        os.replace(temporary, path)
    except OSError as e:
        raise InputError(f"{path}: cannot write the model: {e.strerror}") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def permuted(w: Array, n_heads: int, head_dim: int, to_halves: bool) -> Array:
    """Rows of w (n_heads * head_dim, dim): adjacent pairs -> halves, or back."""
    split = (head_dim // 2, 2) if to_halves else (2, head_dim // 2)
    return w.reshape(n_heads, *split, -1).swapaxes(1, 2).reshape(w.shape)


def _write_into(folder: Path, config: LlamaConfig, model: Pretrained, dtype: str, shard_bytes: int) -> None:
    ours = {_theirs(name): name for name, _ in config.shapes()}
    shapes = {_theirs(name): shape for name, shape in config.shapes()}
    source = _Permuted(model.tensors, ours, config)
    width = 4 if dtype == "fp32" else 2
    shards = list(_shards(shapes, width, shard_bytes))
    where: dict[str, str] = {}
    total = 0
    for i, names in enumerate(shards, 1):
        file = SINGLE if len(shards) == 1 else f"model-{i:05d}-of-{len(shards):05d}.safetensors"
        total += tensor_file.write(folder / file, [(n, shapes[n]) for n in names], source, dtype)
        where |= dict.fromkeys(names, file)
    if len(shards) > 1:
        _write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": where})
    tokenizer = model.tokenizer() if model.tokenizer else None
    ids = {k: i for k in ("bos", "eos") if tokenizer and (i := getattr(tokenizer, f"{k}_id")) >= 0}
    _write_json(folder / CONFIG, _settings(config, dtype, {f"{k}_token_id": i for k, i in ids.items()}))
    if tokenizer is not None:
        from anert.tokenizer.hf_files import write_directory

        write_directory(tokenizer, folder)


class _Permuted(Mapping[str, Array]):
    """Hugging Face's names -> tensors as they want them, one at a time."""

    def __init__(self, tensors: Tensors, ours: Mapping[str, str], config: LlamaConfig) -> None:
        self.tensors, self.ours, self.config = tensors, ours, config

    def __getitem__(self, name: str) -> Array:
        ours = self.ours[name]
        w, heads = self.tensors[ours], _heads(self.config, ours)
        return permuted(w, heads, self.config.head_dim, to_halves=True) if heads else w

    def __iter__(self) -> Iterator[str]:
        return iter(self.ours)

    def __len__(self) -> int:
        return len(self.ours)


def _theirs(name: str) -> str:
    if name in TOP:
        return TOP[name]
    _, layer, kind = name.split(".")
    return f"model.layers.{layer}.{KINDS[kind]}.weight"


def _heads(config: LlamaConfig, name: str) -> int:
    """Heads of a tensor whose rows are rotated; 0: of no other."""
    return {"wq": config.n_heads, "wk": config.n_kv_heads}.get(name.rpartition(".")[2], 0)


def _ours(entry: Entry, heads: int, head_dim: int) -> Entry:
    if not heads:
        return entry
    return Entry(entry.shape, entry.encoding, lambda: permuted(entry.read(), heads, head_dim, to_halves=False))


def _files(path: Path) -> list[Path]:
    """Safetensors files of a directory: the shards that its index names, or the only one."""
    if (path / INDEX).is_file():
        weight_map = _json(path / INDEX).get("weight_map")
        if not isinstance(weight_map, dict) or not all(
            isinstance(n, str) and Path(n).name == n and "\0" not in n for n in weight_map.values()
        ):
            raise InputError(f"{path / INDEX}: no weight_map of file names in it: damaged index")
        return [path / n for n in sorted(set(weight_map.values()))]
    if (path / SINGLE).is_file():
        return [path / SINGLE]
    hint = "; pytorch_model.bin is not read (a pickle runs code)" if list(path.glob("pytorch_model*.bin")) else ""
    raise InputError(f"{path}: no {SINGLE} and no {INDEX} in it{hint}")


def _open(path: Path) -> dict[str, Entry]:
    found: dict[str, Entry] = {}
    for file in _files(path):
        read_head(file, 8)
        found |= tensor_file.read(file)
    return found


def _config(s: Mapping[str, Any], path: Path) -> LlamaConfig:
    where = path / CONFIG
    rope = s.get("rope_parameters") or {}
    scaling = s.get("rope_scaling") or {}
    differs = [
        f"{key} {s.get(key)!r}"
        for key, plain in (("hidden_act", ("silu", "swish")), ("model_type", MODEL_TYPES))
        if s.get(key, plain[0]) not in plain
    ]
    differs += [key for key in ("attention_bias", "mlp_bias", "sliding_window", "quantization_config") if s.get(key)]
    try:
        kinds = {r.get("rope_type", r.get("type", "default")) for r in (rope, scaling)} - {"default"}
        differs += [f"RoPE scaling {kind!r}" for kind in kinds]
        if differs:
            raise InputError(f"{where}: {', '.join(differs)}: not a plain Llama, which is what anert reads")
        config = LlamaConfig(
            dim=s["hidden_size"],
            hidden_dim=s["intermediate_size"],
            n_layers=s["num_hidden_layers"],
            n_heads=s["num_attention_heads"],
            n_kv_heads=s.get("num_key_value_heads") or s["num_attention_heads"],
            vocab_size=s["vocab_size"],
            seq_len=s["max_position_embeddings"],
            tied=bool(s.get("tie_word_embeddings", False)),
            norm_eps=float(s.get("rms_norm_eps", 1e-6)),
            rope_theta=float(rope.get("rope_theta") or s.get("rope_theta") or 10000.0),
            head_dim=s.get("head_dim") or 0,
        )
    except KeyError as e:
        raise InputError(f"{where}: no {e.args[0]} in it: not the config of a Llama") from None
    except (TypeError, ValueError, AttributeError) as e:
        raise InputError(f"{where}: not the config of a Llama ({e})") from None
    if problem := config.problem():
        raise InputError(f"{where}: no model can have {problem}")
    return config


def _settings(c: LlamaConfig, dtype: str, ids: Mapping[str, int]) -> dict[str, Any]:
    name = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}[dtype]
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": c.dim,
        "intermediate_size": c.hidden_dim,
        "num_hidden_layers": c.n_layers,
        "num_attention_heads": c.n_heads,
        "num_key_value_heads": c.n_kv_heads,
        "head_dim": c.head_dim,
        "vocab_size": c.vocab_size,
        "max_position_embeddings": c.seq_len,
        "rms_norm_eps": c.norm_eps,
        "rope_theta": c.rope_theta,
        "rope_parameters": {"rope_type": "default", "rope_theta": c.rope_theta},
        "tie_word_embeddings": c.tied,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "torch_dtype": name,
        "dtype": name,
        "bos_token_id": None,
        "eos_token_id": None,
        **ids,
    }


def _dtype_of(model: Pretrained) -> str:
    first = next(iter(model.tensors.encodings()), "F32")
    return {theirs: ours for ours, theirs in tensor_file.ENCODINGS.items()}.get(first, "fp32")


def _shards(shapes: Mapping[str, tuple[int, ...]], width: int, limit: int) -> Iterator[list[str]]:
    names: list[str] = []
    held = 0
    for name, shape in shapes.items():
        size = width
        for n in shape:
            size *= n
        if names and held + size > limit:
            yield names
            names, held = [], 0
        names.append(name)
        held += size
    yield names


def _json(path: Path) -> dict[str, Any]:
    _, size = read_head(path, 1)
    if size > LARGEST_JSON:
        raise InputError(f"{path}: {size:,} bytes are too many for a {path.name}")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as e:
        raise InputError(f"{path}: damaged JSON: {e}") from None
    if not isinstance(content, dict):
        raise InputError(f"{path}: a JSON {type(content).__name__}, not a {path.name}")
    return content


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
