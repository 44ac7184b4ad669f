"""The wheel: everything is in it, and it works without the checkout."""

import os
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FOLDERS = ("comm", "configs", "models", "trainer")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """Built from a copy, so that no build folder appears in the checkout or comes from an earlier build."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for folder in FOLDERS:
        shutil.copytree(ROOT / folder, source / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    options = ["--no-build-isolation", "--no-deps", "--no-index", "--quiet"]
    run([sys.executable, "-m", "pip", "wheel", *options, "--wheel-dir", out, source], cwd=out)
    (path,) = out.glob("twohop-*.whl")
    return path


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory) -> Path:
    """Folder of executables of an environment that holds the wheel, and shares only what it depends on."""
    home = tmp_path_factory.mktemp("environment")
    venv.create(home, with_pip=True)
    python = home / "bin" / "python"
    run([python, "-m", "pip", "install", "--no-deps", "--no-index", "--quiet", wheel], cwd=home)
    # A .pth file adds the folder of torch & co.; those that lie in it, as of an editable install, are not read.
    own = sysconfig.get_path("purelib", vars={"base": str(home)})
    Path(own, "shared.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return home / "bin"


def test_wheel_holds_every_module_and_every_configuration(wheel):
    wanted = {
        f"twohop/{path.relative_to(ROOT)}"
        for folder in FOLDERS
        for path in (ROOT / folder).rglob("*")
        if path.suffix in (".py", ".yaml")
    }
    packed = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    assert packed == wanted


def test_wheel_holds_the_licence_and_the_command(wheel):
    archive = zipfile.ZipFile(wheel)
    texts = {name.split(".dist-info/")[-1]: name for name in archive.namelist() if ".dist-info/" in name}
    assert archive.read(texts["licenses/LICENSE"]) == (ROOT / "LICENSE").read_bytes()
    assert b"twohop = twohop.trainer.cli:main" in archive.read(texts["entry_points.txt"])
    metadata = archive.read(texts["METADATA"]).decode()
    for dependency in ("torch", "deepspeed", "hydra-core", "wandb"):
        assert f"Requires-Dist: {dependency}" in metadata


def test_installed_wheel_answers_without_the_checkout(installed, tmp_path):
    where = run([installed / "python", "-c", "import twohop.trainer; print(twohop.trainer.__file__)"], cwd=tmp_path)
    assert Path(where.strip()).is_relative_to(installed.parent)
    assert "usage: twohop <command>" in run([installed / "twohop", "--help"], cwd=tmp_path)
    assert "pr_moe_350m" in run([installed / "twohop", "train", "--help"], cwd=tmp_path)


def test_installed_wheel_trains_two_steps(installed, tmp_path):
    (tmp_path / "book.txt").write_text("To be, or not to be, that is the question. " * 200)
    overrides = """
        launch.nproc=2 comm.ranks_per_node=1 data=text data.files=book.txt data.cache_dir=cache run.dir=run
        model.dim=32 model.ffn_dim=64 model.num_layers=2 model.moe.experts=[2] train.steps=2 train.seq_len=32
        train.global_batch=4 train.micro_batch=2 eval.batches=1 generate.max_new_tokens=4
    """
    run([installed / "twohop", "train", *overrides.split()], cwd=tmp_path)
    present = {path.name for path in (tmp_path / "run").iterdir()}
    assert {"config.yaml", "metrics.jsonl", "summary.json", "checkpoints", "report.html"} <= present


def run(command: list, cwd: Path) -> str:
    """Standard output of a command that must succeed, in an environment that knows nothing of the checkout."""
    names = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    done = subprocess.run(list(map(str, command)), cwd=cwd, env=names, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout
