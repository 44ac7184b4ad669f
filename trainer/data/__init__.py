"""Data sets as numbered samples: sources, tokenizers, memory-mapped token files and the order of samples.

Everything is loaded at first use: this package costs nothing until data is needed.
"""

from typing import TYPE_CHECKING

from twohop.comm.lazy import lazily

if TYPE_CHECKING:
    from twohop.trainer.data.build import Data, build_data, prepare
    from twohop.trainer.data.loader import Loader
    from twohop.trainer.data.order import sample_index, sample_numbers, step_numbers
    from twohop.trainer.data.samples import IGNORED, Batch, Samples
    from twohop.trainer.data.tokenizer import Tokenizer, load_tokenizer
    from twohop.trainer.data.tokens import TokenWindows

_HOME = {
    "Data": "build",
    "build_data": "build",
    "prepare": "build",
    "Loader": "loader",
    "TokenWindows": "tokens",
    "IGNORED": "samples",
    "Batch": "samples",
    "Samples": "samples",
    "Tokenizer": "tokenizer",
    "load_tokenizer": "tokenizer",
    "sample_index": "order",
    "sample_numbers": "order",
    "step_numbers": "order",
}
__all__ = [
    "IGNORED",
    "Batch",
    "Data",
    "Loader",
    "Samples",
    "TokenWindows",
    "Tokenizer",
    "build_data",
    "load_tokenizer",
    "prepare",
    "sample_index",
    "sample_numbers",
    "step_numbers",
]


__getattr__ = lazily(__name__, _HOME)
