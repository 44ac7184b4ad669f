"""Text to token ids and back: bytes, a BPE trained on the corpus, or any tokenizer.json."""

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from pathlib import Path

import tokenizers

from twohop.trainer.config import TokenizerConfig, TokenizerKind
from twohop.trainer.errors import DataError

TOKENIZER_FILE = "tokenizer.json"
END_OF_DOCUMENT = "<|endoftext|>"
# The token that a foreign tokenizer.json ends a document with: the first of these that it knows.
_KNOWN_ENDS = (END_OF_DOCUMENT, "<|end_of_text|>", "</s>", "<eos>", "<|eos|>", "[SEP]")


class Tokenizer(ABC):
    """Text ↔ token ids in [0, vocab_size); `end_of_document` is the id that closes every document."""

    vocab_size: int
    end_of_document: int

    @abstractmethod
    def encode(self, text: str) -> list[int]:
        """Token ids of `text`, without any special token: text cannot spell an end of document."""

    @abstractmethod
    def decode(self, ids: Iterable[int]) -> str:
        """Text of `ids`; special tokens vanish and broken UTF-8 becomes U+FFFD."""

    @abstractmethod
    def save(self, directory: Path) -> None:
        """Write `directory`/tokenizer.json, which `load_tokenizer` reads."""

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode` of every text."""
        return [self.encode(text) for text in texts]


class ByteTokenizer(Tokenizer):
    """One token a byte of UTF-8, and one more for the end of a document."""

    vocab_size = 257
    end_of_document = 256

    def encode(self, text: str) -> list[int]:
        """See `Tokenizer`."""
        return list(text.encode())

    def decode(self, ids: Iterable[int]) -> str:
        """See `Tokenizer`."""
        return bytes(i for i in ids if i < 256).decode(errors="replace")

    def save(self, directory: Path) -> None:
        """See `Tokenizer`."""
        (directory / TOKENIZER_FILE).write_text(json.dumps({"kind": "bytes"}) + "\n")


class LibraryTokenizer(Tokenizer):
    """A tokenizer of the `tokenizers` library, trained here or read from a file."""

    def __init__(self, library: tokenizers.Tokenizer) -> None:
        self._library = library
        # A document is never cut or filled up, and special tokens in a text are plain text.
        library.no_truncation()
        library.no_padding()
        library.encode_special_tokens = True
        end = next((token for token in _KNOWN_ENDS if library.token_to_id(token) is not None), END_OF_DOCUMENT)
        library.add_special_tokens([end])
        ids = library.get_vocab(with_added_tokens=True)
        self.end_of_document = ids[end]
        self.vocab_size = max(ids.values()) + 1

    def encode(self, text: str) -> list[int]:
        """See `Tokenizer`."""
        return self._library.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Iterable[int]) -> str:
        """See `Tokenizer`."""
        return self._library.decode(list(ids), skip_special_tokens=True)

    def save(self, directory: Path) -> None:
        """See `Tokenizer`."""
        self._library.save(str(directory / TOKENIZER_FILE))

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """See `Tokenizer`; runs on all cores."""
        return [encoding.ids for encoding in self._library.encode_batch_fast(list(texts), add_special_tokens=False)]


def build_tokenizer(config: TokenizerConfig, texts: Iterable[str]) -> Tokenizer:
    """The tokenizer that `config` asks for; `texts` is the training split, read only to train a BPE.

    Raises:
        DataError: the vocabulary is too small, or `config.file` is missing or no tokenizer.json.
    """
    if config.kind is TokenizerKind.bytes:
        return ByteTokenizer()
    if config.kind is TokenizerKind.bpe:
        return _train_bpe(config.vocab_size, texts)
    return _read_library_tokenizer(_tokenizer_file(config))


def tokenizer_settings(config: TokenizerConfig) -> dict[str, str | int]:
    """What decides the tokenizer beside the corpus, and nothing else: a part of the cache key."""
    if config.kind is TokenizerKind.bpe:
        return {"kind": "bpe", "vocab_size": config.vocab_size}
    if config.kind is TokenizerKind.file:
        return {"kind": "file", "sha256": hashlib.sha256(_tokenizer_file(config).read_bytes()).hexdigest()}
    return {"kind": "bytes"}


def load_tokenizer(directory: Path) -> Tokenizer:
    """The tokenizer that `Tokenizer.save` wrote to `directory`.

    Raises:
        DataError: the file is missing or damaged.
    """
    path = Path(directory) / TOKENIZER_FILE
    try:
        description = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: no readable tokenizer ({error}); prepare the data again") from None
    return ByteTokenizer() if description == {"kind": "bytes"} else _read_library_tokenizer(path)


def _train_bpe(vocab_size: int, texts: Iterable[str]) -> Tokenizer:
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    if vocab_size <= len(alphabet):
        raise DataError(
            f"data.tokenizer.vocab_size={vocab_size}: a BPE starts from 256 bytes and an end-of-document token; "
            "use at least 257, or data.tokenizer.kind=bytes"
        )
    library = tokenizers.Tokenizer(tokenizers.models.BPE())
    library.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=[END_OF_DOCUMENT], initial_alphabet=alphabet, show_progress=False
    )
    library.train_from_iterator(texts, trainer)
    return LibraryTokenizer(library)


def _tokenizer_file(config: TokenizerConfig) -> Path:
    path = Path(config.file or "").expanduser()
    if not path.is_file():
        raise DataError(f"data.tokenizer.file={config.file}: no such file; name an existing tokenizer.json")
    return path


def _read_library_tokenizer(path: Path) -> Tokenizer:
    try:
        library = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises nothing narrower
        raise DataError(f"{path}: not a tokenizer.json of the `tokenizers` library ({error})") from None
    return LibraryTokenizer(library)
