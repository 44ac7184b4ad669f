"""Data sets that Hugging Face's `datasets` reads: parquet, json, csv or text on disk, or a name on the hub.

Versions of the library before 4.0 could run code of a data set; they are not accepted (see pyproject.toml).
"""

import hashlib
import os
from collections.abc import Generator, Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from logging import CRITICAL
from pathlib import Path
from threading import RLock
from typing import Any

import numpy as np

from twohop.trainer.config import DataConfig, HFConfig
from twohop.trainer.data.corpus import Corpus, expand, unit_hash
from twohop.trainer.errors import DataError


@dataclass(frozen=True)
class Row:
    """The text of a row: a `Document`."""

    name: str
    text: str

    def blocks(self) -> Iterator[str]:
        """See `Document`."""
        yield self.text


class Rows:
    """The rows of one split with these numbers, as documents. Arrow files are mapped into memory, and read in order."""

    def __init__(self, dataset: Any, config: HFConfig, numbers: np.ndarray) -> None:
        self._dataset, self._config, self._numbers = dataset, config, numbers

    def __len__(self) -> int:
        return len(self._numbers)

    def __iter__(self) -> Iterator[Row]:
        texts = texts_of(self._dataset.select(self._numbers), self._config)
        for number, text in zip(self._numbers, texts, strict=True):
            yield Row(f"row {number}", text)


def hf_corpus(config: DataConfig) -> Corpus:
    """The rows of `config.hf` as documents; of a split alone, those whose text's hash is small validate.

    So equal texts never stand on both sides. `data.max_mib` keeps the first rows of the training split.

    Raises:
        DataError: the data set, a split or the column is missing, holds no text or cannot be read.
    """
    assert config.hf is not None
    train = load_split(config, config.hf.train_split)
    numbers, places = _choose(train, config)
    if config.hf.valid_split is not None:
        valid = load_split(config, config.hf.valid_split)
        return Corpus("hf", Rows(train, config.hf, numbers), Rows(valid, config.hf, np.arange(len(valid))))
    is_valid = places < config.valid_fraction
    # Either split has a row at least.
    is_valid[places.argmin()] = True
    is_valid[places.argmax()] = False
    return Corpus("hf", Rows(train, config.hf, numbers[~is_valid]), Rows(train, config.hf, numbers[is_valid]))


def load_split(config: DataConfig, split: str, streaming: bool = False) -> Any:
    """A split as the library's `Dataset`, or as its `IterableDataset` if `streaming`, with the text column alone.

    Raises:
        DataError: it is missing, or has no such column.
    """
    import datasets  # takes seconds to import

    hf = config.hf
    assert hf is not None
    where: dict[str, Any] = {"path": hf.name, "revision": hf.revision}
    if hf.name is None:
        where = _local(config.files, split)
    cache = str(Path(config.cache_dir).expanduser() / "huggingface")
    datasets.disable_progress_bars()  # each rank would draw its own
    datasets.logging.set_verbosity(CRITICAL)  # errors are raised as well, and shown once
    datasets.utils.tqdm.set_lock(
        RLock()
    )  # bars that are not drawn have a lock across processes, which Python reports as leaked
    try:
        dataset = datasets.load_dataset(**where, name=hf.subset, split=split, streaming=streaming, cache_dir=cache)
        columns = dataset.column_names or list(next(iter(dataset), {}))
    except Exception as error:  # the library raises whatever its readers raise
        lines = str(error.__cause__ or error).strip().splitlines() or [type(error).__name__]
        raise DataError(
            f"{describe(config)}: split {split} cannot be loaded ({lines[0].rstrip('.')}); "
            "repair it, name another, or correct the split"
        ) from None
    if hf.text_key not in columns:
        raise DataError(f"data.hf.text_key={hf.text_key}: no such column; use one of {', '.join(map(str, columns))}")
    return dataset.select_columns([hf.text_key])


def texts_of(rows: Iterable[dict[str, Any]], config: HFConfig) -> Iterator[str]:
    """The text of every row; none is an empty text."""
    for row in rows:
        text = row[config.text_key]
        if text is not None and not isinstance(text, str):
            raise DataError(
                f"data.hf.text_key={config.text_key}: holds {type(text).__name__}, not text; name another column"
            )
        yield text or ""


def open_lane(dataset: Any, lane: int, lanes: int) -> Any:
    """Part `lane` of `lanes` of a stream: whole files if they can be shared out evenly, or else every so many rows."""
    from datasets.distributed import split_dataset_by_node

    return split_dataset_by_node(dataset, lane, lanes)


def training_texts(rows: Iterable[dict[str, Any]], config: DataConfig) -> Generator[str, None, None]:
    """The texts of a stream that train: those that `hf_corpus` would have trained on."""
    assert config.hf is not None
    for text in texts_of(rows, config.hf):
        if config.hf.valid_split is not None or row_place(text) >= config.valid_fraction:
            yield text


def stream_validation(config: DataConfig) -> list[Row]:
    """The first `data.hf.valid_mib` of a stream's texts that validate.

    Raises:
        DataError: there are none.
    """
    assert config.hf is not None
    split = config.hf.valid_split or config.hf.train_split
    rows: list[Row] = []
    left = config.hf.valid_mib * 2**20
    for number, text in enumerate(texts_of(load_split(config, split, streaming=True), config.hf)):
        if config.hf.valid_split is None and row_place(text) >= config.valid_fraction:
            continue
        rows.append(Row(f"row {number}", text))
        left -= len(text.encode())
        if left <= 0:
            break
    if not rows:
        raise DataError(f"{describe(config)}: no row validates; raise data.valid_fraction or set data.hf.valid_split")
    return rows


def pinned_revision(config: DataConfig) -> DataConfig:
    """`config` with the commit that the hub has now, so that a stream cannot change while it is read."""
    import huggingface_hub

    hf = config.hf
    assert hf is not None
    if hf.name is None or Path(hf.name).exists():
        return config
    try:
        commit = huggingface_hub.HfApi().dataset_info(hf.name, revision=hf.revision).sha
    except Exception as error:  # of the network, of the hub, or of its answer
        raise DataError(f"data.hf.name={hf.name}: the hub does not answer ({str(error).splitlines()[0]})") from None
    return replace(config, hf=replace(hf, revision=commit))


def stream_identity(config: DataConfig) -> dict[str, Any]:
    """What tells a stream from any other: settings, and the commit or the names and sizes of files, not their bytes."""
    files = [path for entry in config.files for path in expand(entry)]
    return {
        "hf": asdict(config.hf) if config.hf else None,
        "valid_fraction": config.valid_fraction,
        "files": sorted([path.name, path.stat().st_size] for path in files),
    }


def describe(config: DataConfig) -> str:
    """Where the data set is, as the key and value that say so."""
    assert config.hf is not None
    return f"data.hf.name={config.hf.name}" if config.hf.name else f"data.files={','.join(config.files)}"


def _local(files: list[str], split: str) -> dict[str, Any]:
    """What `load_dataset` needs: a single folder is the library's to look through, with the splits it finds there."""
    paths = [Path(entry).expanduser() for entry in files]
    if len(paths) == 1 and paths[0].is_dir():
        return {"path": str(paths[0])}
    found = sorted({path.absolute() for entry in files for path in expand(entry)})
    names = [str(path) for path in found]
    return {"path": os.path.commonpath([path.parent for path in found]), "data_files": {split.split("[")[0]: names}}


def _choose(dataset: Any, config: DataConfig) -> tuple[np.ndarray, np.ndarray]:
    """The rows that take part, and each one's place in [0, 1), a hash of its text."""
    assert config.hf is not None
    left = np.inf if config.max_mib is None else config.max_mib * 2**20
    places: list[float] = []
    for text in texts_of(dataset, config.hf):
        left -= len(text.encode())
        if left < 0 and len(places) >= 2:
            break
        places.append(row_place(text))
    if len(places) < 2 and config.hf.valid_split is None:
        raise DataError(f"{describe(config)}: a split of {len(places)} rows cannot be split; set data.hf.valid_split")
    return np.arange(len(places)), np.array(places)


def row_place(text: str) -> float:
    """Where a text stands in [0, 1): below data.valid_fraction it validates."""
    return unit_hash("split", hashlib.sha256(text.encode()).hexdigest())
