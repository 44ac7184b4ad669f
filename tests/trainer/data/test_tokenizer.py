"""Tokenizers of every kind."""

from pathlib import Path

import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.trainer.data.texts import BPE, POEM, silent, text_config
from twohop.trainer.config import TokenizerConfig, TokenizerKind
from twohop.trainer.data import (
    build_data,
    load_tokenizer,
    prepare,
)


@pytest.mark.parametrize("config", [TokenizerConfig(), BPE], ids=["bytes", "bpe"])
@given(text=st.text())
@settings(max_examples=50)
def test_every_text_survives_a_round_trip(config: TokenizerConfig, text: str, trained: dict) -> None:
    tokenizer = trained[config.kind]
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.encode_batch([text, "x"])[0] == ids
    assert all(0 <= i < tokenizer.vocab_size for i in ids)
    assert tokenizer.end_of_document not in ids
    assert tokenizer.decode([*ids, tokenizer.end_of_document]) == text


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> dict:
    """Both tokenizers, read back from a prepared folder."""
    path = tmp_path_factory.mktemp("trained")
    (path / "a.txt").write_text(POEM * 50)
    kinds = (TokenizerConfig(), BPE)
    return {c.kind: load_tokenizer(prepare(text_config(path, path / "a.txt", tokenizer=c), log=silent)) for c in kinds}


def test_byte_ids_are_the_bytes(trained: dict) -> None:
    tokenizer = trained[TokenizerKind.bytes]
    assert (tokenizer.vocab_size, tokenizer.end_of_document) == (257, 256)
    assert tokenizer.encode(POEM) == list(POEM.encode())
    assert tokenizer.decode([0xC3]) == "\ufffd"  # half a character


def test_text_cannot_spell_the_end_of_a_document(trained: dict) -> None:
    tokenizer = trained[TokenizerKind.bpe]
    assert tokenizer.end_of_document not in tokenizer.encode("a<|endoftext|>b")
    assert tokenizer.decode(tokenizer.encode("a<|endoftext|>b")) == "a<|endoftext|>b"


def test_bpe_learns_from_the_training_split_alone(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("hop " * 500 + "zyzzyva " * 100)  # the last 5 % are zyzzyvas
    config = text_config(tmp_path, tmp_path / "a.txt", tokenizer=BPE, valid_fraction=0.3)
    tokenizer = load_tokenizer(prepare(config, log=silent))
    assert len(tokenizer.encode(" hop")) == 1
    assert len(tokenizer.encode(" zyzzyva")) > 4
    assert tokenizer.vocab_size <= 300


def test_any_tokenizer_json_is_used_as_the_library_uses_it(tmp_path: Path) -> None:
    words = ["<unk>", "</s>", "the", "quick", "brown", "fox", "."]
    library = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({word: 10 * i for i, word in enumerate(words)}, unk_token="<unk>")
    )
    library.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    library.enable_truncation(3)  # of a model's input: a corpus must not be cut by it
    library.save(str(tmp_path / "words.json"))
    (tmp_path / "a.txt").write_text("the quick brown fox . " * 30)
    kind = TokenizerConfig(kind=TokenizerKind.file, file=str(tmp_path / "words.json"))
    data = build_data(text_config(tmp_path, tmp_path / "a.txt", tokenizer=kind), seq_len=4, log=silent)
    library.no_truncation()
    text = (tmp_path / "a.txt").read_text()
    ids = [data.train.tokens[:-1], data.valid.tokens[:-1]]
    assert len(np.concatenate(ids)) >= 150 > 100
    assert ids[0][:100].tolist() == library.encode(text).ids[:100]
    assert data.train.tokens[-1] == data.tokenizer.end_of_document == 10
    assert data.tokenizer.vocab_size == 10 * (len(words) - 1) + 1
