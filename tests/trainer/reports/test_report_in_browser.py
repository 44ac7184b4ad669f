"""report.html as a browser shows it: nothing on the console, and pictures that can be decoded and show something."""

import html
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.trainer.reports.test_report import train_record
from twohop.trainer.monitoring.metrics import MetricsWriter
from twohop.trainer.reports.report import write_report

BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
# Draws every picture of the page on a canvas and leaves what it looks like in the page. `ink`: the part of the pixels
# that are neither transparent nor white.
PROBE = """<script>
addEventListener("load", async () => {
  const seen = [];
  for (const svg of document.querySelectorAll("figure svg")) {
    const box = svg.getBoundingClientRect(), image = new Image(), canvas = document.createElement("canvas");
    image.src = "data:image/svg+xml," + encodeURIComponent(new XMLSerializer().serializeToString(svg));
    await image.decode();
    canvas.width = 400;
    canvas.height = Math.round(400 * box.height / box.width);
    const pen = canvas.getContext("2d");
    pen.drawImage(image, 0, 0, canvas.width, canvas.height);
    const pixels = new Uint32Array(pen.getImageData(0, 0, canvas.width, canvas.height).data.buffer);
    const ink = pixels.filter(pixel => pixel !== 0 && pixel !== 0xffffffff);
    seen.push({title: svg.closest("figure").ariaLabel, left: box.left, right: box.right, height: box.height,
               ink: ink.length / pixels.length, colours: new Set(ink).size});
  }
  const page = {seen, width: innerWidth, needed: document.documentElement.scrollWidth};
  document.body.dataset.probe = JSON.stringify(page);
});
</script>"""
BLANK = '<figure aria-label=blank><svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 4 1"></svg></figure>'


def opened(page: Path, profile: Path) -> tuple[dict[str, Any], list[str]]:
    """What the probe has seen on a page, and the lines of its console."""
    options = ["--headless=new", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"]
    options += ["--disable-component-update", "--disable-dev-shm-usage", "--window-size=1200,900"]
    options += [f"--user-data-dir={profile}", "--enable-logging=stderr", "--virtual-time-budget=20000", "--dump-dom"]
    assert BROWSER is not None
    shown = subprocess.run(
        [BROWSER, *options, page.as_uri()], capture_output=True, text=True, timeout=240, check=True, cwd=profile.parent
    )
    found = re.search(r'data-probe="([^"]+)"', shown.stdout)
    assert found, shown.stderr
    console = [line for line in shown.stderr.splitlines() if ":CONSOLE" in line]
    return json.loads(html.unescape(found.group(1))), console


@pytest.mark.skipif(BROWSER is None, reason="no Chromium: apt-get install chromium")
def test_a_browser_shows_every_picture_and_says_nothing(tmp_path: Path) -> None:
    with MetricsWriter(tmp_path) as writer:
        for step in range(1, 61):
            writer.log(step, train_record(step, 60, {"blocks.1": 4, "blocks.3": 8}))
            if step % 20 == 0:
                writer.log(step, {"valid_loss": 2.75, "valid_perplexity": 15.64, "valid_accuracy": 0.25}, kind="eval")
    report = write_report(tmp_path)
    page = report.with_name("probed.html")
    page.write_text(report.read_text().replace("</body>", f"{BLANK}{PROBE}</body>"))
    probe, console = opened(page, tmp_path / "profile")
    assert console == []
    *pictures, blank = probe["seen"]
    assert [picture["title"] for picture in pictures] == [
        "Loss", "Throughput", "Throughput", "Time of a step", "Memory", "Expert load", "Balance", "Dropped tokens",
        "Bytes per hop",
    ]  # fmt: skip
    for picture in pictures:
        assert 0.01 < picture["ink"] < 0.95, picture
        assert picture["colours"] >= 20, picture  # a curve with its smoothed edges
        assert picture["right"] - picture["left"] > 600, picture
        assert picture["height"] > 100, picture
    assert (blank["ink"], blank["colours"]) == (0, 0)  # the probe knows a blank picture
    assert probe["needed"] <= probe["width"]  # nothing sticks out to the side
