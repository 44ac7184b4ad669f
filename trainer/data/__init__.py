"""Text to token windows: sources, tokenizers, memory-mapped token files and the order of samples.

Everything is loaded at first use: this package costs nothing until data is needed.
"""

from typing import TYPE_CHECKING

from twohop.comm.lazy import lazily

if TYPE_CHECKING:
    from twohop.trainer.data.build import Data, build_data, prepare
    from twohop.trainer.data.order import micro_batch, sample_index
    from twohop.trainer.data.tokenizer import Tokenizer, load_tokenizer
    from twohop.trainer.data.tokens import TokenWindows, unigram_entropy

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
__all__ = [
    "Data",
    "TokenWindows",
    "Tokenizer",
    "build_data",
    "load_tokenizer",
    "micro_batch",
    "prepare",
    "sample_index",
    "unigram_entropy",
]


__getattr__ = lazily(__name__, _HOME)
