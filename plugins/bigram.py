"""The smallest model: the next token from this one alone, through a table of rank `dim`."""

from dataclasses import dataclass

from anert import Decoder, Plugin

plugin = Plugin("bigram", api=1)


@dataclass(frozen=True)
class Config:
    dim: int = 64
    vocab_size: int = 512
    seq_len: int = 128
    n_layers: int = 0


@plugin.model("tiny", Config(), steps=500, batch=8, lr=1e-2, warmup=20, time_budget=30)
class Bigram(Decoder):
    tied = False  # the classifier is a table of its own: p(next | token) = softmax(output @ tok_embeddings[token])
    final_norm = False
