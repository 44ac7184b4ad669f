"""Commands on the pages are accepted, up to the point where they would begin to work."""

import importlib.util
import json
import re
import shlex
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from importlib.machinery import SourceFileLoader
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from tests.docs.pages import PAGES, ROOT, blocks
from twohop.models import ModelConfig
from twohop.models.config import Activation, MoEConfig, RouterConfig
from twohop.models.interop import FAMILIES
from twohop.models.interop.family import write_config as write_hf_config
from twohop.trainer import cli
from twohop.trainer.config import Config
from twohop.trainer.run_folder import write_config

LAUNCHER_OPTIONS = {"--nnodes", "--nproc-per-node", "--rdzv-backend", "--rdzv-endpoint"}


def commands() -> list[Any]:
    """Every command line of every bash block once, and every entry of the map."""
    found: dict[tuple[str, ...], Any] = {}
    for page in PAGES:
        lines = "".join(blocks(page, "bash")).replace("\\\n", " ").splitlines()
        for line in lines + (map_entries() if page.name == "models.md" else []):
            if words := shlex.split(line, comments=True):
                found.setdefault(tuple(words), pytest.param(line, id=f"{page.name}: {line}"[:90]))
    return list(found.values())


def map_entries() -> list[str]:
    """The column "configuration" of the map in docs/models.md, as command lines."""
    top = (ROOT / "docs" / "models.md").read_text().split("\n## ")[0]
    cells = [row.strip("|").split("|")[3] for row in top.splitlines() if row[:1] == "|"]
    entries = re.findall(r"`([^`]+)`", " ".join(cells))
    return [entry if entry.startswith("twohop ") else f"twohop train {entry}" for entry in entries]


def load_script(name: str) -> ModuleType:
    """A script without ending, as a module."""
    loader = SourceFileLoader(name, str(ROOT / "scripts" / name))
    spec = importlib.util.spec_from_loader(name, loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    return module


class Shell:
    """Accepts a command as the machine would, up to the point where it would begin to work."""

    def __init__(self, stored_run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.stored_run, self.monkeypatch = stored_run, monkeypatch
        self.started: list[Any] = []

    def check(self, words: list[str]) -> None:
        """Raises, or fails an assertion, if this is no command that works."""
        if words[0] == "sudo":
            words = words[1:]
        program, *args = words
        known: dict[str, Callable[[list[str]], None]] = {
            "make": self.make,
            "twohop": self.twohop,
            "torchrun": self.torchrun,
            ".venv/bin/python": self.python,  # under sudo, which knows no environment
            "pytest": lambda args: self.exist([arg for arg in args if "/" in arg]),
            "source": lambda args: None,  # .venv is there once `make` has run
            "srun": self.srun,
            "pip": lambda args: self.extra(args[-1]),
            "docker": lambda args: self.exist(["Dockerfile"]),
        }
        assert program in known, f"{program}: the tests know no such command"
        known[program](args)

    def make(self, targets: list[str]) -> None:
        for target in targets:
            assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.MULTILINE), target

    def exist(self, paths: list[str]) -> None:
        for path in paths:
            assert (ROOT / path).exists(), path

    def python(self, args: list[str]) -> None:
        self.exist(args[:1])
        if args[0] == "scripts/netlab":
            self.netlab(args[1:])

    def twohop(self, args: list[str]) -> None:
        args = [arg.replace("$RUN", str(self.stored_run)) for arg in args]
        before = len(self.started)
        if "--help" in args:  # Hydra leaves by itself
            with pytest.raises(SystemExit) as stop:
                cli.run(args)
            assert not stop.value.code
            return
        assert cli.run(args) == 0, args
        silent = {"--cfg", "dry_run=true"} & set(args)
        assert len(self.started) > before or silent, f"{args} started nothing"

    def torchrun(self, args: list[str]) -> None:
        options: dict[str, str] = {}
        while args[0] in LAUNCHER_OPTIONS:
            options[args[0]] = args[1]
            args = args[2:]
        if args[0] != "-m":
            assert args == ["example.py"] or (ROOT / args[0]).is_file()
            return
        assert args[1] == "twohop.trainer"
        ranks = int(options.get("--nnodes", 1)) * int(options["--nproc-per-node"])
        named = len(args) > 2 and "=" not in args[2]
        with self.monkeypatch.context() as environment:
            environment.setenv("RANK", "0")
            environment.setenv("WORLD_SIZE", str(ranks))
            self.twohop(args[2:] if named else ["train", *args[2:]])

    def srun(self, args: list[str]) -> None:
        nodes, tasks = (arg.split("=")[1] for arg in args[:2])
        with self.monkeypatch.context() as environment:
            for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
                environment.setenv(name, "")  # so that it is taken back
                environment.delenv(name)
            step = {"JOB_ID": "1", "STEP_ID": "0", "PROCID": "0", "NODEID": "0", "LOCALID": "0"}
            step |= {"STEP_NODELIST": "localhost", "STEP_TASKS_PER_NODE": f"{tasks}(x{nodes})"}
            for name, value in step.items():
                environment.setenv(f"SLURM_{name}", value)
            self.check(args[2:])

    def extra(self, package: str) -> None:
        name = package.split("[")[1].rstrip("]")
        assert re.search(rf"^{name} = \[", (ROOT / "pyproject.toml").read_text(), re.MULTILINE), name

    def netlab(self, args: list[str]) -> None:
        with self.monkeypatch.context() as patch:
            patch.syspath_prepend(ROOT / "scripts")
            patch.setattr(sys, "argv", ["netlab", *args])
            parsed = load_script("netlab").parse_arguments()
        if parsed.command[0] == "twohop":
            ranks = str(parsed.nodes * parsed.ranks_per_node)
            self.torchrun(["--nproc-per-node", ranks, "-m", "twohop.trainer", *parsed.command[1:]])
        else:
            self.check(parsed.command)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, examples: None) -> Path:
    """The files that the commands name, and a run in runs/stored."""
    folder = tmp_path_factory.mktemp("commands")
    (folder / "corpus").mkdir()
    for name in ("book.txt", "corpus/one.txt", "tokenizer.json"):
        (folder / name).write_text("some text\n")
    for family in ("mixtral", "llama", "mistral"):
        (folder / family).mkdir()
        swiglu = ModelConfig(vocab_size=257, activation=Activation.swiglu)
        sparse = replace(swiglu, moe=MoEConfig([4], every=1, router=RouterConfig(renormalize=True)))
        values = write_hf_config(FAMILIES[family], sparse if family == "mixtral" else swiglu)
        (folder / family / "config.json").write_text(json.dumps(values))
    stored = folder / "runs" / "stored"
    (stored / "checkpoints" / "step-00000001").mkdir(parents=True)
    write_config(stored, Config())
    return folder


@pytest.fixture
def shell(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, nothing_starts: None) -> Shell:
    """In a copy of the folder, with its run as $RUN."""
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    made = Shell(tmp_path / "runs" / "stored", monkeypatch)

    def started(*args: Any) -> dict:
        made.started.append(args)
        return {"valid_loss": 1.0}

    for place in ("commands.train", "commands.bench", "stored"):
        monkeypatch.setattr(f"twohop.trainer.{place}.start", started)
    launcher = importlib.import_module("hydra_plugins.hydra_submitit_launcher.submitit_launcher").BaseSubmititLauncher
    monkeypatch.setattr(launcher, "launch", lambda *args, **options: started(args) and [])
    monkeypatch.setattr("twohop.trainer.data.prepare", lambda *args: started(*args) or tmp_path)
    monkeypatch.setattr("twohop.trainer.reports.report.write_report", lambda run_dir: started(run_dir))
    monkeypatch.setattr("twohop.trainer.plan.run.make_plan", lambda config: started(config)["valid_loss"])
    return made


@pytest.mark.parametrize("line", commands())
def test_command_is_accepted(line: str, shell: Shell) -> None:
    if not line.startswith("RUN="):
        shell.check(shlex.split(line, comments=True))


def test_the_map_names_configurations_of_most_systems() -> None:
    assert len(map_entries()) > 15


def test_a_wrong_command_is_not_accepted(shell: Shell) -> None:
    for line in ("make tea", "twohop tran", "twohop train modle=moe", "python scripts/none.py", "torchrun -m twohop"):
        with pytest.raises((AssertionError, IndexError, KeyError)):
            shell.check(shlex.split(line))
