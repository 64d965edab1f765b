"""Tokenizers in Python and `regex`: Llama (SentencePiece BPE) and byte-level BPE (GPT-2, tiktoken), exact to the id."""

from anert.tokenizer.base import END_OF_TEXT, StreamDecoder, Tokenizer
from anert.tokenizer.byte_bpe import ByteBPETokenizer
from anert.tokenizer.llama import LlamaTokenizer
from anert.tokenizer.load import load_tokenizer
from anert.tokenizer.split import PATTERNS

__all__ = [
    "END_OF_TEXT",
    "PATTERNS",
    "ByteBPETokenizer",
    "LlamaTokenizer",
    "StreamDecoder",
    "Tokenizer",
    "load_tokenizer",
]
