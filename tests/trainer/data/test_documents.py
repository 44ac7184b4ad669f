"""Windows that keep their documents apart, and training with them."""

import math
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.distributed import run_distributed
from tests.end_to_end.runs import records
from tests.tiny import tiny_config
from twohop.trainer.data import IGNORED
from twohop.trainer.data.documents import DocumentWindows
from twohop.trainer.errors import ConfigError
from twohop.trainer.validate.groups import validate

END = 9


@given(
    tokens=st.lists(st.sampled_from([1, 2, 3, END]), min_size=9, max_size=60), seq_len=st.integers(1, 8), data=st.data()
)
def test_batches_are_what_a_plain_loop_makes(tokens: list[int], seq_len: int, data: st.DataObject) -> None:
    windows = DocumentWindows(np.array(tokens, dtype=np.uint16), seq_len, "train", END)
    numbers = data.draw(st.lists(st.integers(0, len(windows) - 1), min_size=1, max_size=4))
    batch = windows.batch(numbers)
    assert set(batch.inputs) == {"ids_BT", "sample_B", "document_BT"}
    for row, number in enumerate(numbers):
        document, documents, targets = 0, [], []
        for place in range(number * seq_len, (number + 1) * seq_len):
            is_end = tokens[place] == END
            documents.append(document)
            targets.append(IGNORED if is_end else tokens[place + 1])
            document += is_end
        assert batch.inputs["ids_BT"][row].tolist() == tokens[number * seq_len : (number + 1) * seq_len]
        assert batch.inputs["document_BT"][row].tolist() == documents
        assert batch.targets[row].tolist() == targets
    assert windows.num_targets(numbers) == (batch.targets != IGNORED).sum()


@pytest.mark.parametrize("last", [END, 13])  # 13: comes once, and begins no document
def test_entropy_is_that_of_the_targets(monkeypatch: pytest.MonkeyPatch, last: int) -> None:
    monkeypatch.setattr("twohop.trainer.data.documents._SEARCH_BLOCK", 7)
    tokens = np.array([*np.random.default_rng(0).integers(0, 12, 300), 1, last], dtype=np.uint16)
    # As everywhere, the first token of all counts too.
    targets = [int(token) for place, token in enumerate(tokens) if place == 0 or tokens[place - 1] != END]
    expected = -sum(n / len(targets) * math.log(n / len(targets)) for n in Counter(targets).values())
    assert DocumentWindows(tokens, 4, "train", END).target_entropy() == pytest.approx(expected, rel=1e-12)


def write_lines(directory: Path) -> str:
    """A folder of many documents that are shorter than a window."""
    folder = directory / "lines"
    folder.mkdir()
    for number in range(120):
        (folder / f"{number:03d}.txt").write_text(f"hop {number} " * (number % 3 + 1))
    return f"data.files={folder}"


def test_training_does_not_depend_on_ranks(tmp_path: Path) -> None:
    settings = [write_lines(tmp_path), "data.document_mask=true", "train.steps=3", "train.seq_len=32"]
    (expected,) = run_distributed(records, 1, tmp_path, settings, init=False)
    assert all(record["targets"] < 8 * 32 for record in expected)
    for ours in run_distributed(records, 2, tmp_path, settings, init=False):
        for key in ("loss", "grad_norm", "targets"):
            assert [record[key] for record in ours] == pytest.approx([record[key] for record in expected], rel=1e-5)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["model.attention.kind=linear"], "data.document_mask=true: model.attention.kind=linear sees across documents"),
        (["model.attention.kind=memory"], "data.document_mask=true: model.attention.kind=memory sees across documents"),
    ],
)
def test_what_cannot_keep_documents_apart_is_refused(tmp_path: Path, overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        validate(tiny_config(tmp_path, "data.document_mask=true", *overrides), 1)
