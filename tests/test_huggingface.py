"""Hugging Face directories: against transformers and the safetensors package, both ways; and damaged ones."""

import json
import random
import shutil

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from model_files import SMALL, configs, damaged, draw, model, refused, same_tensors

from anert.errors import InputError
from anert.formats import LlamaConfig, find, huggingface, open_model_file, tensor_file
from anert.formats.base import narrow_bf16, widen_bf16
from anert.tokenizer import load_tokenizer


@pytest.fixture(scope="module")
def real(shared_data):
    """stories260K with its tokenizer."""
    source = open_model_file(shared_data / "llama2c" / "stories260K.bin")
    source.tokenizer = lambda: load_tokenizer(shared_data / "llama2c" / "tok512.bin")
    return source


@pytest.fixture(scope="module")
def exported(real, tmp_path_factory):
    path = tmp_path_factory.mktemp("hf") / "stories260K"
    huggingface.write(path, real)
    return path


def test_transformers_computes_the_same_logits(exported, shared_data):
    """The golden ones were made by transformers from the original file; float32 both times, 1e-5 of the largest."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    golden = np.load(shared_data / "golden" / "stories260K_hf_logits_greedy.npz")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(exported, dtype=torch.float32)
    assert theirs.config.num_key_value_heads == 4 and theirs.config.tie_word_embeddings
    with torch.no_grad():
        got = theirs(torch.tensor(golden["ids"].reshape(1, -1))).logits[0].numpy()
    want = golden["logits"].reshape(-1, 512)
    assert np.abs(got - want).max() / np.abs(want).max() < 1e-5


def test_transformers_reads_the_tokenizer(exported, real, shared_data):
    transformers = pytest.importorskip("transformers")
    theirs, ours = transformers.AutoTokenizer.from_pretrained(exported), real.tokenizer()
    text = (shared_data / "text" / "tinystories_10k.txt").read_text("utf-8")[:20000]
    assert theirs.bos_token_id == 1 and theirs.eos_token_id == 2
    for line in [*text.split("\n"), " two  spaces", "tab\tand ünïcode \U0001f600", ""]:
        assert theirs(line, add_special_tokens=False).input_ids == ours.encode(line)


def test_what_transformers_saves_is_read(tmp_path):
    """An untied model with grouped queries and wide heads, in bfloat16 and in shards; equal to its own tensors."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    theirs = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            hidden_size=24, intermediate_size=40, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
            head_dim=8, vocab_size=50, max_position_embeddings=64, rms_norm_eps=1e-6, tie_word_embeddings=False,
            rope_parameters={"rope_type": "default", "rope_theta": 5e5},
        )
    ).to(torch.bfloat16)  # fmt: skip
    theirs.save_pretrained(tmp_path / "m", max_shard_size="10KB")
    assert len(list((tmp_path / "m").glob("*.safetensors"))) > 1
    found = open_model_file(tmp_path / "m")
    assert found.llama() == LlamaConfig(24, 40, 3, 4, 2, 50, 64, False, 1e-6, 5e5, 8)
    state = {name: w.float().numpy() for name, w in theirs.state_dict().items()}
    assert (found.tensors["layers.2.w2"] == state["model.layers.2.mlp.down_proj.weight"]).all()
    assert (found.tensors["output"] == state["lm_head.weight"]).all()
    for ours, name, n in (("wq", "q_proj", 4), ("wk", "k_proj", 2)):
        w, got = state[f"model.layers.1.self_attn.{name}.weight"], found.tensors[f"layers.1.{ours}"]
        for head in range(n):
            for i in range(4):  # channel i turns with i + 4 there, 2i with 2i + 1 here
                assert (got[head * 8 + 2 * i] == w[head * 8 + i]).all()
                assert (got[head * 8 + 2 * i + 1] == w[head * 8 + i + 4]).all()
    huggingface.write(tmp_path / "again", found)
    again = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "again", dtype=torch.bfloat16)
    for name, w in again.state_dict().items():
        assert (w == theirs.state_dict()[name]).all(), name


@settings(max_examples=25)
@given(configs, st.sampled_from(["fp32", "fp16", "bf16"]), st.sampled_from([0, 200, 1000]))
def test_round_trip(tmp_path_factory, config, dtype, shard):
    """Bit for bit, in every dtype that holds the values, sharded or not."""
    path = tmp_path_factory.mktemp("hf") / "m"
    kept = {"fp32": lambda w: w, "fp16": lambda w: w.astype("f2"), "bf16": lambda w: widen_bf16(narrow_bf16(w))}[dtype]
    source = model(config, {n: kept(w) for n, w in draw(config).items()})
    huggingface.write(path, source, dtype, **({"shard_bytes": shard} if shard else {}))
    again = open_model_file(path)
    assert again.llama() == config and same_tensors(again, source)
    assert set(again.tensors.encodings()) == {tensor_file.ENCODINGS[dtype]}
    huggingface.write(path.with_name("second"), again, **({"shard_bytes": shard} if shard else {}))
    names = sorted(p.name for p in path.iterdir())
    assert names == sorted(p.name for p in path.with_name("second").iterdir())
    assert all((path / n).read_bytes() == (path.with_name("second") / n).read_bytes() for n in names)


def test_the_safetensors_package_reads_our_files(tmp_path):
    from safetensors.numpy import load_file

    tensors = draw(SMALL)
    huggingface.write(tmp_path / "m", model(SMALL, tensors))
    found = load_file(tmp_path / "m" / "model.safetensors")
    assert (found["model.layers.1.self_attn.v_proj.weight"] == tensors["layers.1.wv"]).all()
    assert "lm_head.weight" not in found and len(found) == len(tensors)


@given(st.lists(st.floats(width=32), min_size=1, max_size=40))
def test_bfloat16_rounds_as_ml_dtypes_does(values):
    import ml_dtypes

    x = np.array(values, "f4")
    with np.errstate(invalid="ignore", over="ignore"):
        want = x.astype(ml_dtypes.bfloat16)
    got = widen_bf16(narrow_bf16(x))
    assert np.array_equal(got, want.astype("f4"), equal_nan=True)


def test_fp16_that_does_not_hold_is_refused(tmp_path):
    tensors = draw(SMALL)
    tensors["layers.0.w1"][0, 0] = 7e4
    with pytest.raises(InputError, match="past 65504"):
        huggingface.write(tmp_path / "m", model(SMALL, tensors), "fp16")
    assert not list(tmp_path.iterdir())


def test_a_tokenizer_model_travels_with_it(real, shared_data, tmp_path):
    real = open_model_file(real.path)
    real.config["vocab_size"] = 512
    real.tokenizer = lambda: load_tokenizer(shared_data / "llama2c" / "tokenizer.model")
    huggingface.write(tmp_path / "m", real)
    kept = (tmp_path / "m" / "tokenizer.model").read_bytes()
    assert kept == (shared_data / "llama2c" / "tokenizer.model").read_bytes()


# ---- damage ----


@pytest.fixture
def folder(tmp_path):
    huggingface.write(tmp_path / "m", model(SMALL), shard_bytes=700)
    assert (tmp_path / "m" / huggingface.INDEX).is_file()
    return tmp_path / "m"


def edit(path, **changes):
    content = json.loads(path.read_text())
    for key, value in changes.items():
        content.pop(key, None) if value is None else content.update({key: value})
    path.write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"hidden_size": None}, "no hidden_size"),
        ({"hidden_size": "8"}, "not the config of a Llama|dim"),
        ({"hidden_size": 16}, r"tok_embeddings is \(5, 8\), its config says \(5, 16\)"),
        ({"num_attention_heads": 3, "head_dim": None}, "dim = 8 for 3 heads"),
        ({"num_hidden_layers": 3}, r"layers\.2\.attn_norm is missing"),
        ({"num_hidden_layers": 1}, "have no place in this architecture"),
        ({"num_hidden_layers": 1 << 24}, "is missing"),
        ({"num_hidden_layers": -1}, "n_layers = -1"),
        ({"tie_word_embeddings": False}, "output is missing"),
        ({"model_type": "qwen3"}, "model_type 'qwen3'.*not a plain Llama"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu'"),
        ({"attention_bias": True}, "attention_bias"),
        ({"model_type": "mistral", "sliding_window": 4096}, "sliding_window"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "RoPE scaling 'llama3'"),
        ({"rope_parameters": {"rope_type": "yarn"}}, "RoPE scaling 'yarn'"),
        ({"rope_parameters": []}, None),
        ({"rms_norm_eps": "x"}, "not the config"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
    ],
)
def test_configs_that_do_not_fit(folder, changes, says):
    edit(folder / "config.json", **changes)
    if says is None:
        assert open_model_file(folder).llama() == SMALL
        return
    with pytest.raises(InputError, match=says):
        open_model_file(folder)
    refused(folder, open_model_file)


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("config.json", b"{", "damaged JSON"),
        ("config.json", b"[]", "a JSON list"),
        ("config.json", b"", "empty"),
        ("config.json", b"\xff\xfe", "damaged JSON"),
        (huggingface.INDEX, b"{}", "no weight_map"),
        (huggingface.INDEX, b'{"weight_map": {"a": "../../etc/passwd"}}', "no weight_map of file names"),
        (huggingface.INDEX, b'{"weight_map": {"a": "none.safetensors"}}', "none.safetensors: cannot read"),
        ("*.safetensors", b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
    ],
)
def test_files_that_are_damaged(folder, name, content, says):
    next(folder.glob(name)).write_bytes(content)
    with pytest.raises(InputError, match=says):
        open_model_file(folder)


def test_missing_files(folder):
    shutil.copytree(folder, folder.parent / "b")
    next((folder.parent / "b").glob("*.safetensors")).unlink()
    with pytest.raises(InputError, match="No such file"):
        open_model_file(folder.parent / "b")
    for file in [*folder.glob("*.safetensors"), folder / huggingface.INDEX]:
        file.unlink()
    (folder / "pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(InputError, match=r"pytorch_model\.bin is not read"):
        open_model_file(folder)
    (folder / "config.json").unlink()
    assert find(folder) is None
    with pytest.raises(InputError, match="no model in this directory"):
        open_model_file(folder)


def test_every_prefix_of_a_file_is_refused(tmp_path):
    huggingface.write(tmp_path / "m", model(SMALL))
    path, rng = tmp_path / "m" / "model.safetensors", random.Random(2)
    content = path.read_bytes()
    for n in [*range(40), *(rng.randrange(len(content)) for _ in range(40)), len(content) - 1]:
        path.write_bytes(content[:n])
        refused(path.parent, open_model_file, 1 << 20)
    for lie in (b"\xff" * 8, (1 << 40).to_bytes(8, "little"), (1 << 27).to_bytes(8, "little")):
        path.write_bytes(lie + content[8:])
        refused(path.parent, open_model_file, 1 << 20)


def test_damage_is_refused_or_reads_as_a_model_of_that_size(tmp_path):
    huggingface.write(tmp_path / "m", model(SMALL))
    path = tmp_path / "m" / "model.safetensors"
    for content in damaged(path.read_bytes(), 7, 80):
        path.write_bytes(content)
        try:
            found = open_model_file(path.parent)
            assert sum(found.tensors[n].size for n in found.tensors) == SMALL.n_params()
        except InputError as e:
            assert "model" in str(e)


def test_a_failed_write_leaves_nothing(tmp_path, monkeypatch):
    def full(fd):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("anert.formats.base.os.fsync", full)
    with pytest.raises(InputError, match="No space left"):
        huggingface.write(tmp_path / "m", model(SMALL))
    assert not list(tmp_path.iterdir())
