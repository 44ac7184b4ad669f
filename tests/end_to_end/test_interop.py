"""Runs that begin with weights from elsewhere, and runs that are exported."""

import json
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from tests.distributed import run_distributed
from tests.end_to_end import runs
from tests.tiny import ENGINES, tiny_config, write_corpus
from twohop.trainer.config import ExportConfig, InitConfig
from twohop.trainer.errors import CheckpointError, ConfigError
from twohop.trainer.initial import check_init, with_origin
from twohop.trainer.launching import workers
from twohop.trainer.run_folder import read_config

PLAIN = ("model.activation=swiglu", "model.moe.residual=none", "model.moe.shared_ffn_dim=0", "model.moe.every=1",
         "model.moe.capacity_factor=null", "model.moe.router.renormalize=true", "model.moe.router.jitter=0",
         "model.moe.router.z_loss=0", "generate.max_new_tokens=0")  # fmt: skip
MOE = (*PLAIN, "model.moe.experts=[4]", "train.steps=2")
DENSE = (*PLAIN, "model.moe.experts=[]", "train.steps=2")
STILL = ("train.steps=1", "optim.lr=1e-12", "optim.weight_decay=0")  # what is evaluated are the weights it began with


def export(run_dir: Path, **changes: object) -> dict:
    merged = OmegaConf.merge(OmegaConf.structured(ExportConfig), read_config(run_dir), OmegaConf.create(changes))
    return workers.export(OmegaConf.to_object(merged), run_dir)


def train(directory: Path, name: str, *overrides: str, ranks: int = 1) -> float:
    """The validation loss at the end of a run in directory/name."""
    given = [*overrides, f"run.dir={directory / name}"]
    if ranks == 1:
        return runs.train_run(directory, given)["valid_loss"]
    return run_distributed(runs.train_run, ranks, directory, given, init=False)[0]["valid_loss"]


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("interop")
    write_corpus(made)
    return made


@pytest.fixture(scope="module")
def exported(directory: Path) -> tuple[Path, float]:
    """What two ranks export of a run, and its validation loss."""
    loss = train(directory, "moe", *MOE)
    run_distributed(export_worker, 2, directory / "moe", str(directory / "hf"), init=False)
    return directory / "hf", loss


def export_worker(run_dir: Path, out: str) -> dict:
    return export(run_dir, out=out, shard_mib=0.01)


@pytest.mark.parametrize("engine", ["ddp", "fsdp", "zero-1"])
def test_training_goes_on_with_what_was_exported(directory, exported, engine):
    folder, loss = exported
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    files = {path.name for path in folder.glob("*.safetensors")}
    assert set(index["weight_map"].values()) == files
    assert len(files) > 2
    assert index["metadata"]["total_size"] < sum((folder / file).stat().st_size for file in files)
    tokenizer = (f"data.tokenizer.file={folder / 'tokenizer.json'}", "data.tokenizer.kind=file")
    given = (*MOE, *STILL, *ENGINES[engine], "comm.ep_size=1", f"init.from_hf={folder}", *tokenizer)
    again = train(directory, f"again by {engine}", *given, ranks=2)
    assert again == pytest.approx(loss, rel=1e-5)


@pytest.mark.parametrize("engine", ["ddp", "fsdp"])
def test_an_upcycled_run_begins_with_the_loss_of_the_dense_one(directory, engine):
    dense = directory / f"dense for {engine}"
    loss = train(directory, dense.name, *DENSE)
    upcycled = ("model.moe.experts=[2,4,2,4]", "model.moe.residual=learned", f"init.upcycle_from={dense}")
    given = (*MOE, *upcycled, *STILL, *ENGINES[engine])
    assert train(directory, f"upcycled by {engine}", *given, ranks=2) == pytest.approx(loss, rel=1e-5)


def test_bytes_are_read_as_the_tokenizer_of_bytes_reads_them(exported):
    import tokenizers

    library = tokenizers.Tokenizer.from_file(str(exported[0] / "tokenizer.json"))
    text = "def é\n\t<|x|> \x00ÿ漢"
    assert library.encode(text).ids == list(text.encode())
    assert library.decode(list(text.encode())) == text
    assert library.token_to_id("<|endoftext|>") == 256


def test_a_folder_in_use_is_left_alone(directory, exported):
    folder, _ = exported
    with pytest.raises(CheckpointError, match=r"holds something already: choose another folder"):
        export(directory / "moe", out=str(folder))


def test_what_no_class_of_transformers_computes_is_not_written(directory, tmp_path):
    train(directory, "pr_moe", "train.steps=1", "generate.max_new_tokens=0", "model.moe.capacity_factor=null")
    with pytest.raises(ConfigError, match=r"format=hf: transformers has no class for a PR-MoE model"):
        export(directory / "pr_moe", out=str(tmp_path / "out"))
    assert not list(tmp_path.iterdir())


def test_model_and_tokenizer_come_from_the_folder_unless_they_are_given(exported):
    folder, _ = exported
    init = f"init.from_hf={folder}"
    file = f"data.tokenizer.file='{folder / 'tokenizer.json'}'"
    assert with_origin([init]) == ["model=of_init", "data.tokenizer.kind=file", file, init]
    assert with_origin([init, "model=moe", "data=tokens"]) == [init, "model=moe", "data=tokens"]
    assert with_origin(["model=moe"]) == ["model=moe"]
    with pytest.raises(ConfigError, match="name one folder"):
        with_origin([f"init.from_hf={folder},other"])


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            (*MOE, "model.dim=32", "init.from_hf={hf}"),
            r"model\.dim=32, but init\.from_hf=.*/hf has 16: leave model\.dim",
        ),
        ((*MOE, "model.moe.router.top_k=1", "init.from_hf={hf}"), r"model\.moe\.router\.top_k=1, but"),
        ((*MOE, "init.from_hf=nowhere"), r"init\.from_hf: nowhere holds no config\.json"),
        ((*MOE, "init.upcycle_from={hf}"), r"init\.upcycle_from=.*hf has experts already: name a dense model"),
        ((*MOE, "init.upcycle_from={dense}", "model.num_heads=4"), r"model\.num_heads=4, but init\.upcycle_from="),
        ((*DENSE, "init.upcycle_from={dense}"), r"init\.upcycle_from=.*: model\.moe\.experts=\[\]: say how many"),
    ],
)
def test_what_contradicts_the_other_model_is_refused(directory, exported, overrides, message):
    if not (directory / "dense").exists():
        train(directory, "dense", *DENSE)
    given = [o.replace("{hf}", str(exported[0])).replace("{dense}", str(directory / "dense")) for o in overrides]
    config = tiny_config(directory, *given)
    config.model.vocab_size = 257
    with pytest.raises(ConfigError, match=message):
        check_init(config)


def test_weights_come_from_one_place():
    with pytest.raises(ValueError, match=r"init\.from_hf=a and init\.upcycle_from=b: weights come from one of them"):
        InitConfig(from_hf="a", upcycle_from="b")
