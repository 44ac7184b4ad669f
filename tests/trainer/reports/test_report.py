"""report.html from a made-up run: complete, self-contained, and true in what its captions say."""

import json
import re
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from twohop.trainer.errors import DataError
from twohop.trainer.monitoring.metrics import MetricsWriter, write_summary
from twohop.trainer.reports.layer_plots import BALANCE, _load_map, balance_plot, load_plot
from twohop.trainer.reports.plots import phase_plot, running_mean, svg, thin
from twohop.trainer.reports.report import write_report

PHASES = ("counts", "metadata", "dispatch", "combine", "combine backward", "dispatch backward")


def train_record(step: int, steps: int, experts: dict[str, int], drops: bool = True) -> dict[str, Any]:
    """A step of a run whose loss falls and whose first expert is twice as busy as its share."""
    loads = {layer: [2 / n] + [(1 - 2 / n) / (n - 1)] * (n - 1) for layer, n in experts.items()}
    traffic = {
        level: {phase: [scale * 1_000_000 + step, 12] for phase in PHASES}
        for level, scale in (("between nodes", 1), ("inside node", 2))
    }
    return {
        "loss": 5.5 - 3 * step / steps,
        "targets_per_s": 9000 + 100 * (step % 3),
        "step_s": 0.45,
        "phase_s": {"forward": 0.1, "backward": 0.2, "exposed communication": 0.09, "other": 0.06},
        "phase_max_s": {"forward": 0.15, "backward": 0.2, "exposed communication": 0.125, "other": 0.06},
        "peak_memory": 1_000_000_000 + 1_000_000 * step,
        "mfu": 0.4 + 0.01 * (step % 3),
        "moe": {layer: moe_record(load, drops) for layer, load in loads.items()},
        "traffic": traffic,
    }


def moe_record(load: list[float], drops: bool) -> dict[str, Any]:
    balance = {"entropy": 0.97, "max_violation": max(load) * len(load) - 1, "dead": 1, "confidence": 0.6}
    return {"load": load, "dropped": 0.25 * drops, **balance}


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    path = tmp_path / "pr_moe" / "<first> run"
    path.mkdir(parents=True)
    with MetricsWriter(path) as writer:
        for step in range(1, 61):
            writer.log(step, train_record(step, 60, {"blocks.1": 4, "blocks.3": 8}))
            if step % 20 == 0:
                writer.log(step, {"valid_loss": 2.75, "valid_perplexity": 15.64, "valid_accuracy": 0.25}, kind="eval")
    write_summary(path, {"valid_loss": 2.75, "parameters": {"total": 3312000}, "sample": "<b>def</b> & more"})
    (path / "config.yaml").write_text(
        "seed: 7\nrun: {root: runs}\nmodel:\n  dim: 128\n  moe: {experts: [4, 8]}\ncomm:\n  dispatcher: dedup\n"
    )
    return path


class Page(HTMLParser):
    """Headings, text, pictures and everything that would be fetched."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.headings: list[str] = []
        self.links: list[str] = []
        self.tags: list[str] = []
        self.feed(html)
        self.text = " ".join(re.sub(r"<[^>]*>", " ", re.sub(r"(?s)<(svg|style).*?</\1>", " ", html)).split())
        self.pictures = [ElementTree.fromstring(svg) for svg in re.findall(r"(?s)<svg.*?</svg>", html)]

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.links += [value or "" for name, value in attrs if name in ("src", "href", "xlink:href", "srcset", "data")]

    def handle_data(self, data: str) -> None:
        if self.tags and self.tags[-1] == "h2" and data.strip():
            self.headings.append(data)
            self.tags.append("")


def picture_words(picture: ElementTree.Element) -> set[str]:
    return {"".join(element.itertext()).strip() for element in picture.iter("{http://www.w3.org/2000/svg}text")}


def test_every_part_is_there_and_says_what_the_run_did(run_dir: Path) -> None:
    path = write_report(run_dir)
    assert path == run_dir / "report.html"
    page = Page(path.read_text())
    assert page.headings == [
        "Loss", "Throughput", "Time of a step", "Memory", "Expert load", "Balance", "Dropped tokens", "Bytes per hop",
        "Summary", "Configuration",
    ]  # fmt: skip
    for sentence in (
        "pr_moe",
        "&lt;first&gt; run",
        "went from 5.45 at step 1 to 2.5 at step 60",
        "ends at 2.75",
        "a step takes 0.45 s in the median",
        "needs 41.0% of the accelerators' peak",
        "20.0% is exposed communication",
        "exposed communication 0.09 20.0% 0.125",
        "up to a step, 1.1 GB at the end",
        "At the last step 2 of 12 experts got no token",
        "the busiest expert takes 2× its share",
        "the idlest of all layers 0.67×",
        "25.00% were dropped in the whole run",
        "between nodes 6.0 MB in 72 messages, inside node 12.0 MB in 72 messages",
        "dispatch backward 1.0 MB 12",
        "parameters.total 3,312,000",
        "&lt;b&gt;def&lt;/b&gt; &amp; more",
        "seed 7",
        "moe.experts [4, 8]",
        "dispatcher dedup",
    ):
        assert sentence in page.text
    loss, speed, mfu, phases, memory, load, balance, drops, traffic = map(picture_words, page.pictures)
    assert {"training", "validation", "step"} <= loss
    assert "targets per second" in speed
    assert "model FLOPs utilisation" in mfu
    assert {"forward", "backward", "exposed communication", "other", "seconds of a step"} <= phases
    assert "data" not in phases  # nothing of it was measured
    assert {"peak memory of a rank", "1 GB"} <= memory
    assert {"max violation", "entropy", "confidence", "blocks.1", "blocks.3"} <= balance
    assert {"blocks.1  ·  4 experts", "blocks.3  ·  8 experts", "1×", "2×"} <= load
    assert {"blocks.1", "blocks.3", "dropped assignments"} <= drops
    assert {"between nodes", "inside node", *PHASES, "6.0 MB", "12.0 MB"} <= traffic


def test_the_page_needs_nothing_else_and_runs_nothing(run_dir: Path) -> None:
    html = write_report(run_dir).read_text()
    page = Page(html)
    assert page.links
    assert all(link.startswith(("#", "data:")) for link in page.links)
    assert not {"script", "iframe", "object", "embed", "img"} & set(page.tags)
    assert "@import" not in html
    assert not re.search(r"url\((?!#)", html)
    ids = re.findall(r'\bid="([^"]+)"', html)
    assert len(ids) == len(set(ids))
    assert set(re.findall(r'(?:url\(|href=")#([^")]+)', html)) <= set(ids)


def test_the_same_run_gives_the_same_page(run_dir: Path) -> None:
    first = write_report(run_dir).read_bytes()
    assert write_report(run_dir).read_bytes() == first
    assert sorted(p.name for p in run_dir.iterdir()) == ["config.yaml", "metrics.jsonl", "report.html", "summary.json"]


def test_a_dense_run_after_its_first_step(tmp_path: Path) -> None:
    with MetricsWriter(tmp_path) as writer:
        writer.log(1, {"loss": float("nan"), "targets_per_s": 1.0, "step_s": 1.0, "moe": {}, "traffic": {}})
    page = Page(write_report(tmp_path).read_text())
    assert page.headings == ["Loss", "Throughput"]
    assert "went from not finite at step 1" in page.text


def test_a_dropless_run_says_so(tmp_path: Path) -> None:
    with MetricsWriter(tmp_path) as writer:
        writer.log(1, train_record(1, 1, {"blocks.1": 4}, drops=False))
    assert "No assignment was dropped in the whole run." in Page(write_report(tmp_path).read_text()).text


def test_a_folder_without_training_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"metrics\.jsonl: no training step to report"):
        write_report(tmp_path)


def test_heat_map_shows_the_load_in_balanced_shares_and_long_runs_are_averaged() -> None:
    load = np.random.default_rng(0).dirichlet([1.0] * 4, size=1200)  # [steps, experts]
    moe = [json.loads(json.dumps({"moe": {"a": {"load": row.tolist()}}})) for row in load]
    np.testing.assert_allclose(_load_map(moe[:100], "a"), 4 * load[:100].T)
    np.testing.assert_allclose(_load_map(moe, "a"), 4 * load.reshape(120, 10, 4).mean(axis=1).T)


def test_every_layer_has_its_own_map_and_curves(monkeypatch: pytest.MonkeyPatch) -> None:
    maps: list[tuple[np.ndarray, dict[str, Any]]] = []
    curves: list[tuple[np.ndarray, np.ndarray, str | None]] = []
    imshow, plot = Axes.imshow, Axes.plot
    monkeypatch.setattr(Axes, "imshow", lambda axes, z, **how: maps.append((z, how)) or imshow(axes, z, **how))
    monkeypatch.setattr(
        Axes, "plot", lambda axes, x, y, **how: curves.append((x, y, how["label"])) or plot(axes, x, y, **how)
    )
    draw, layers = np.random.default_rng(0), [f"blocks.{n}" for n in range(9)]
    moe = [
        {"step": step, "moe": {n: {"load": draw.dirichlet([1.0] * 4).tolist(), **dict.fromkeys(BALANCE, draw.random())}
                               for n in layers}}
        for step in range(3, 90)
    ]  # fmt: skip
    moe[5]["moe"]["blocks.2"]["entropy"] = None  # the layer was left out of the step
    load_plot(moe)
    assert len(maps) == 9
    for name, (shares, how) in zip(layers, maps, strict=True):
        np.testing.assert_allclose(shares, 4 * np.array([record["moe"][name]["load"] for record in moe]).T)
        assert how["extent"] == (3, 89, 3.5, -0.5)  # steps, and expert 0 at the top
        assert (how["norm"].vmin, how["norm"].vcenter) == (0, 1)
        assert 2 < how["norm"].vmax < max(shares.max() for shares, _ in maps)
    load_plot([{"step": 1, "moe": {"a": {"load": [0.5, 0.5]}}}])
    assert maps[-1][1]["extent"] == (1, 2, 1.5, -0.5)
    assert maps[-1][1]["norm"].vmax == 2
    balance_plot(moe)
    for number, (steps, values, label) in enumerate(curves):
        key, layer = divmod(number, 9)
        plain = [record["moe"][layers[layer]][list(BALANCE)[key]] for record in moe]
        np.testing.assert_array_equal(values, running_mean(np.array(plain, dtype=float)))
        assert steps.tolist() == list(range(3, 90))
        assert label == (layers[layer] if layer in (0, 8) else None)
    assert len(curves) == 27
    curves.clear()
    balance_plot([{"step": 1, "moe": {name: moe[0]["moe"][name] for name in layers[:8]}}])
    assert {label for *_, label in curves} == set(layers[:8])  # of few layers all are named


def test_pictures_of_one_page_share_no_ids() -> None:
    def draw(figure: Figure) -> None:
        figure.subplots().plot([1, 2], marker="o")

    ids = [set(re.findall(r'\bid="([^"]+)"', svg(name, draw, 2.0))) for name in ("a", "b", "a")]
    assert ids[0] == ids[2] != set()
    assert not ids[0] & ids[1]


@pytest.mark.parametrize("count", [1, 599, 600, 601, 1201, 5000])
def test_a_long_curve_is_thinned_by_means(count: int) -> None:
    steps, values = thin(np.arange(count), 2.0 * np.arange(count))
    assert len(steps) <= 600
    np.testing.assert_allclose(values, 2 * steps)
    every = -(-count // 600)
    assert steps[0] == (every - 1) / 2
    assert (len(steps) - 1) * every < count <= len(steps) * every


def test_phases_of_a_long_run_are_bars_of_means(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every bar is the mean of its steps, phases stand upon each other, and the tops are the time of a step."""
    bars: list[tuple[np.ndarray, np.ndarray, np.ndarray, str]] = []

    bar = Axes.bar

    def spy(axes: Axes, x: Any, height: Any, width: Any, bottom: Any, **style: Any) -> Any:
        bars.append((x, height, bottom.copy(), style["label"]))
        return bar(axes, x, height, width, bottom, **style)

    monkeypatch.setattr(Axes, "bar", spy)
    seconds = np.random.default_rng(0).random((600, 3))
    names = ("forward", "exposed communication", "something new")
    phase_plot([{"step": i + 1, "phase_s": dict(zip(names, row, strict=True))} for i, row in enumerate(seconds)])
    assert [label for *_, label in bars] == list(names)
    means = seconds.reshape(60, 10, 3).mean(axis=1)
    for number, (x, height, bottom, _) in enumerate(bars):
        np.testing.assert_allclose(x, 5.5 + 10 * np.arange(60))
        np.testing.assert_allclose(height, means[:, number])
        np.testing.assert_allclose(bottom, means[:, :number].sum(axis=1))


def test_a_record_without_what_later_versions_measure_is_reported(tmp_path: Path) -> None:
    record = train_record(1, 1, {"blocks.1": 4})
    old = {key: record[key] for key in ("loss", "targets_per_s", "step_s", "traffic")}
    old["moe"] = {"blocks.1": {key: record["moe"]["blocks.1"][key] for key in ("load", "dropped")}}
    with MetricsWriter(tmp_path) as writer:
        writer.log(1, old)
    headings = Page(write_report(tmp_path).read_text()).headings
    assert headings == ["Loss", "Throughput", "Expert load", "Dropped tokens", "Bytes per hop"]
