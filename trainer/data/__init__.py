"""Text to token windows: sources, tokenizers, memory-mapped token files and the order of samples.

Everything is loaded at first use: this package costs nothing until data is needed.
"""

from importlib import import_module
from typing import Any

_HOME = {
    "Data": "build",
    "build_data": "build",
    "prepare": "build",
    "TokenWindows": "tokens",
    "unigram_entropy": "tokens",
    "Tokenizer": "tokenizer",
    "load_tokenizer": "tokenizer",
    "micro_batch": "order",
    "sample_index": "order",
}
__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
