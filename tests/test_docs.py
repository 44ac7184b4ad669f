"""What the documents promise: their commands are accepted, their code runs, their links and pictures are true."""

import importlib.util
import json
import math
import re
import shlex
import sys
from collections.abc import Callable
from dataclasses import make_dataclass, replace
from importlib.machinery import SourceFileLoader
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from tests.distributed import run_distributed
from tests.tiny import tiny_config
from twohop.comm import Topology, build_dispatcher
from twohop.comm.cost import Workload, distinct_subtrees
from twohop.comm.routes import ROUTES
from twohop.comm.wire import FORMATS
from twohop.comm.wiring import Wires
from twohop.models import ModelConfig
from twohop.models.attention import build_attention
from twohop.models.attention.attend import dense_mask
from twohop.models.attention.masks import PATTERNS
from twohop.models.config import Activation, MoEConfig, RouterConfig
from twohop.models.config.attention import OPTIONS, AttentionConfig
from twohop.models.interop import FAMILIES, differences
from twohop.models.interop.family import read_config as read_hf_config
from twohop.models.interop.family import write_config as write_hf_config
from twohop.models.routers import ROUTERS, TokenInfo, build_router
from twohop.models.routers.losses import LOSSES
from twohop.trainer import cli
from twohop.trainer.config import Config
from twohop.trainer.data.build import CORPORA
from twohop.trainer.engines import ENGINES
from twohop.trainer.metrics import read_metrics
from twohop.trainer.run_folder import write_config
from twohop.trainer.trackers import TRACKERS
from twohop.trainer.workers import train

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
LAUNCHER_OPTIONS = {"--nnodes", "--nproc-per-node", "--rdzv-backend", "--rdzv-endpoint"}


def blocks(page: Path, language: str) -> list[str]:
    """Contents of the page's fenced blocks of a language."""
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)


def commands() -> list[Any]:
    """Every command line of every bash block, as (page, words)."""
    found = []
    for page in PAGES:
        lines = "".join(blocks(page, "bash")).replace("\\\n", " ").splitlines()
        found += [
            pytest.param(line, id=f"{page.name}: {line}"[:90]) for line in lines if shlex.split(line, comments=True)
        ]
    return found


# Code on the pages. Its first line names the file where it would stand.


def snippet(page: str, file: str) -> str:
    """The python block of a page that begins with `# file`, without this line."""
    (code,) = [b for b in blocks(ROOT / page, "python") if b.startswith(f"# {file}\n")]
    return code.split("\n", 1)[1]


def in_module_of(file: str) -> dict[str, Any]:
    """What a function added to that file could use."""
    name = "twohop." + file.removesuffix("/__init__.py").removesuffix(".py").replace("/", ".")
    return dict(vars(importlib.import_module(name)))


def example(file: str) -> dict[str, Any]:
    """The names that CONTRIBUTING.md's code for a file defines there."""
    code = compile(snippet("CONTRIBUTING.md", file), file, "exec")
    names = in_module_of(file) if (ROOT / file).exists() else {"__name__": f"example.{Path(file).stem}"}
    exec(code, names)
    return names


def entry(file: str, names: dict[str, Any]) -> dict[str, Any]:
    """The line that CONTRIBUTING.md adds to a dictionary in that file, as a dictionary."""
    return eval("{" + snippet("CONTRIBUTING.md", file) + "}", in_module_of(file) | names)


@pytest.fixture
def examples(monkeypatch: pytest.MonkeyPatch) -> None:
    """What CONTRIBUTING.md adds to the registries, as if it were there."""
    added = {
        "models/routers/__init__.py": (ROUTERS, example("models/routers/cosine.py")),
        "models/attention/masks.py": (PATTERNS, {}),
        "models/config/attention.py": (OPTIONS, {}),
        "models/interop/__init__.py": (FAMILIES, example("models/interop/mistral.py")),
        "comm/wire.py": (FORMATS, {}),
        "trainer/engines/__init__.py": (ENGINES, example("trainer/engines/single.py")),
        "trainer/trackers/__init__.py": (TRACKERS, {"__name__": "example.trackers"}),
        "trainer/data/build.py": (CORPORA, example("trainer/data/corpus.py")),
    }
    for file, (registry, names) in added.items():
        for key, value in entry(file, names).items():
            monkeypatch.setitem(registry, key, value)
    monkeypatch.setitem(ROUTES, "outwards", example("comm/routes.py")["outwards"])
    tracker = ModuleType("example.trackers.table")
    exec(snippet("CONTRIBUTING.md", "trainer/trackers/table.py"), vars(tracker))
    monkeypatch.setitem(sys.modules, tracker.__name__, tracker)


@pytest.mark.usefixtures("examples")
def test_router_engine_tracker_and_data_source_of_the_guide_train_a_model(tmp_path: Path) -> None:
    (tmp_path / "text").mkdir()
    for name in ("CONTRIBUTING", "README"):
        (tmp_path / "text" / f"{name}.md").write_text((ROOT / f"{name}.md").read_text())
    losses = {}
    for engine in ("single", "ddp"):
        run_dir = tmp_path / engine
        run_dir.mkdir()
        config = tiny_config(
            tmp_path,
            f"engine.name={engine}",
            "tracker.name=table",
            "model.moe.router.name=cosine",
            "model.moe.router.jitter=0",
            "data.source=markdown",
            f"data.files={tmp_path / 'text'}",
            "train.steps=3",
        )
        train(config, run_dir)
        losses[engine] = [record["loss"] for record in read_metrics(run_dir) if record["kind"] == "train"]
        assert f"3,train/loss,{losses[engine][-1]}" in (run_dir / "numbers.csv").read_text()
    assert losses["single"] == pytest.approx(losses["ddp"], rel=1e-5)
    assert len(set(losses["single"])) == 3


def test_loss_of_the_guide_is_added_to_those_of_a_router(monkeypatch: pytest.MonkeyPatch) -> None:
    exec(snippet("CONTRIBUTING.md", "models/routers/losses.py"), names := in_module_of("models/routers/losses.py"))
    added = eval("{" + snippet("CONTRIBUTING.md", "LOSSES of models/routers/losses.py") + "}", names)
    for name, loss in added.items():
        monkeypatch.setitem(LOSSES, name, loss)
    monkeypatch.setattr(ROUTERS["softmax_topk"], "options", ROUTERS["softmax_topk"].options | {"entropy_loss"})
    config = make_dataclass("WithEntropy", [("entropy_loss", float, 0.0)], bases=(RouterConfig,))(entropy_loss=0.5)
    router = build_router(config, 8, 4)
    torch.nn.init.zeros_(router.gate.weight)  # hesitates as much as it can
    assert router(torch.randn(6, 8), TokenInfo(1)).losses["entropy"].item() == pytest.approx(0.5 * math.log(4))


@pytest.mark.usefixtures("examples")
def test_attention_pattern_of_the_guide_is_one_of_chunks() -> None:
    config = ModelConfig(attention=AttentionConfig(kind="chunked", window=3))
    mask = dense_mask(build_attention(config).mask, torch.empty(1, 1, 7, 1), 7, 0, 0)
    assert mask[0, 0].sum(-1).tolist() == [1, 2, 3, 1, 2, 3, 1]


def route_against_flat(route: str) -> bool:
    """Outputs and gradients of tokens, on this rank."""
    exec(route, names := in_module_of("comm/routes.py"))
    topology = Topology.discover(ranks_per_node=2, timeout_s=20)
    torch.manual_seed(topology.rank)
    x_ND, weights_NK = torch.randn(24, 8), torch.rand(24, 3)
    ids_NK = torch.rand(24, 8).topk(3).indices
    results = []
    with pytest.MonkeyPatch.context() as patch:  # this process serves other tests as well
        patch.setitem(ROUTES, "outwards", names["outwards"])
        for name in ("flat", "outwards"):
            tokens_ND = x_ND.clone().requires_grad_()
            dispatcher = build_dispatcher(name, topology, 8)
            y_ND, _ = dispatcher.run(tokens_ND, ids_NK, weights_NK, lambda rows, counts: rows**2)
            y_ND.backward(x_ND)
            assert tokens_ND.grad is not None
            results.append(torch.stack([y_ND.detach(), tokens_ND.grad]))
    return torch.equal(*results)


def test_route_of_the_guide_agrees_with_flat_to_the_bit() -> None:
    assert run_distributed(route_against_flat, 4, snippet("CONTRIBUTING.md", "comm/routes.py")) == [True] * 4


@pytest.mark.usefixtures("examples")
def test_wire_format_of_the_guide_keeps_its_bound() -> None:
    x_RD = torch.randn(64, 33)
    back_RD = FORMATS["fp16"].decode(FORMATS["fp16"].encode(x_RD), torch.float32)
    error_RD = (back_RD - x_RD).abs() / x_RD.abs()
    assert FORMATS["fp16"].error / 4 < error_RD.max() <= FORMATS["fp16"].error
    build_dispatcher("dedup", Topology.one_process(), 4, wires=Wires.uniform("fp32", "fp16"))


def test_test_of_the_guide_passes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "guide_example.py").write_text(snippet("CONTRIBUTING.md", "tests/comm/test_example.py"))
    monkeypatch.syspath_prepend(tmp_path)
    importlib.import_module("guide_example").test_every_rank_has_the_sum()


def run_script(code: str) -> None:
    exec(code, {})


def test_communication_layer_alone_works_as_printed() -> None:
    code = snippet("README.md", "example.py: torchrun --nproc-per-node 4 example.py")
    run_distributed(run_script, 4, code, init=False)


@pytest.mark.usefixtures("examples")
def test_family_of_the_guide_reads_what_it_writes() -> None:
    config = ModelConfig(vocab_size=257, activation=Activation.swiglu, num_kv_heads=2)
    written = write_hf_config(FAMILIES["mistral"], config)
    assert written["architectures"] == ["MistralForCausalLM"]
    assert not differences(config, read_hf_config(FAMILIES["mistral"], written, "config.json"))


# Commands.


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


@pytest.fixture
def shell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, examples: None) -> Shell:
    """In a folder with the files that the commands name, and a run folder as $RUN."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "corpus").mkdir()
    for name in ("book.txt", "corpus/one.txt", "tokenizer.json"):
        (tmp_path / name).write_text("some text\n")
    for family in ("mixtral", "llama", "mistral"):
        (tmp_path / family).mkdir()
        swiglu = ModelConfig(vocab_size=257, activation=Activation.swiglu)
        sparse = replace(swiglu, moe=MoEConfig([4], every=1, router=RouterConfig(renormalize=True)))
        values = write_hf_config(FAMILIES[family], sparse if family == "mixtral" else swiglu)
        (tmp_path / family / "config.json").write_text(json.dumps(values))
    stored = tmp_path / "runs" / "stored"
    (stored / "checkpoints" / "step-00000001").mkdir(parents=True)
    write_config(stored, Config())
    made = Shell(stored, monkeypatch)

    def started(*args: Any) -> dict:
        made.started.append(args)
        return {"valid_loss": 1.0}

    for place in ("commands.train", "commands.bench", "stored"):
        monkeypatch.setattr(f"twohop.trainer.{place}.start", started)
    launcher = importlib.import_module("hydra_plugins.hydra_submitit_launcher.submitit_launcher").BaseSubmititLauncher
    monkeypatch.setattr(launcher, "launch", lambda *args, **options: started(args) and [])
    monkeypatch.setattr("twohop.trainer.commands.prepare.prepare", lambda *args: started(*args) or tmp_path)
    monkeypatch.setattr("twohop.trainer.commands.report.write_report", lambda run_dir: started(run_dir))
    monkeypatch.setattr("twohop.trainer.plan.run.make_plan", lambda config: started(config)["valid_loss"])
    return made


@pytest.mark.parametrize("line", commands())
def test_command_is_accepted(line: str, shell: Shell) -> None:
    if not line.startswith("RUN="):
        shell.check(shlex.split(line, comments=True))


def configurations() -> list[str]:
    """Every entry of the column "configuration" of the map in docs/models.md, as a command line."""
    top = (ROOT / "docs" / "models.md").read_text().split("\n## ")[0]
    cells = [row.strip("|").split("|")[3] for row in top.splitlines() if row[:1] == "|"]
    entries = re.findall(r"`([^`]+)`", " ".join(cells))
    return [entry if entry.startswith("twohop ") else f"twohop train {entry}" for entry in entries]


@pytest.mark.parametrize("line", configurations())
def test_configuration_of_the_map_is_accepted(line: str, shell: Shell) -> None:
    shell.check(shlex.split(line))


def test_the_map_names_configurations_of_most_systems() -> None:
    assert len(configurations()) > 15


def test_a_wrong_command_is_not_accepted(shell: Shell) -> None:
    for line in ("make tea", "twohop tran", "twohop train modle=moe", "python scripts/none.py", "torchrun -m twohop"):
        with pytest.raises((AssertionError, IndexError, KeyError)):
            shell.check(shlex.split(line))


# Links, names and pictures.


def slug(heading: str) -> str:
    """The anchor of a heading."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if target.startswith("http"):
            continue
        path, _, anchor = target.partition("#")
        there = (page.parent / path) if path else page
        assert there.exists(), target
        if anchor:
            assert anchor in map(slug, re.findall(r"^#+ (.*)$", there.read_text(), re.MULTILINE)), target


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_that_are_named_exist(page: Path) -> None:
    prose = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    folders = "comm|models|trainer|configs|scripts|tests|docs"
    for path in re.findall(rf"`((?:{folders})/[\w./]*)`", prose):
        assert (ROOT / path).exists(), path


def test_pictures_are_what_the_code_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT / "docs" / "pictures")
    pictures = importlib.import_module("draw").PICTURES
    for name, draw in pictures.items():
        assert (ROOT / "docs" / "pictures" / f"{name}.svg").read_text() == draw().svg(), f"{name}: run draw.py again"
    shown = {name for page in PAGES for name in re.findall(r"pictures/(\w+)\.svg", page.read_text())}
    assert shown >= set(pictures)


# Tables.


def rows_of_tables(first_cell: str) -> list[tuple[str, list[str]]]:
    """(first cell, other cells) of every table row of docs/communication.md that begins with a match."""
    page = (ROOT / "docs" / "communication.md").read_text()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in page.splitlines() if line[:1] == "|"]
    return [(cells[0], cells[1:]) for cells in rows if re.fullmatch(first_cell, cells[0])]


def test_savings_of_deduplication_are_as_computed() -> None:
    tables = rows_of_tables(r"\d+, \d+")
    assert len(tables) == 5
    for i, (sizes, cells) in enumerate(tables):
        num_experts, top_k = map(int, sizes.split(", "))
        work = Workload(1, top_k, num_experts, 0, 0, 0)
        for nodes, cell in zip((2, 4, 8, 16), cells, strict=True):
            against_flat = i >= 3
            parts = [("node", nodes)] + [("local", 8)] * against_flat
            if num_experts % math.prod(size for _, size in parts):
                assert cell == "–"
                continue
            copies = distinct_subtrees(work, parts) if against_flat else top_k
            assert cell == f"{copies / distinct_subtrees(work, parts[:1]):.2f}"


def test_sizes_and_errors_of_wire_formats_are_as_computed() -> None:
    x_RD = torch.randn(2048, 512, generator=torch.Generator().manual_seed(0))
    rows = {name.strip("`"): cells for name, cells in rows_of_tables("`(fp|bf|int).*`")}
    assert set(rows) == set(FORMATS)
    for name, (row_bytes, _, error) in rows.items():
        wire = FORMATS[name]
        assert row_bytes == f"{wire.row_bytes(512, torch.float32):,}"
        measured = (wire.decode(wire.encode(x_RD), torch.float32) - x_RD).square().mean().sqrt() * 100
        assert error == ("0" if measured == 0 else f"{measured:.2g} %")
