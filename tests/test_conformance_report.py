"""The report, looked at in a browser; and what documents say about results, which is generated from them."""

import json
import re
from html import unescape
from pathlib import Path

import browser
import numpy as np
import pytest
from laser_conformance import html, report
from laser_conformance.cases import LEVELS, all_cases
from laser_conformance.judge import Verdict, judge
from laser_conformance.run import Setup
from laser_conformance.sabotage import FLAWS
from matplotlib.image import imread

import laser_core

ROOT = Path(__file__).parents[1]


def verdicts(setup: Setup, *names: str) -> list[Verdict]:
    cases = {case.id: case for case in all_cases()}
    return [v for name in names for v in judge(setup.subject(), cases[name])]


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The report on one run that passes, and on one that fails here and refuses there."""
    flawed = FLAWS["lse-in-base-two"].backend()
    laser_core.backends()[flawed.name] = flawed
    try:
        sweep = [case.id for case in all_cases() if case.id.startswith("precision/range-") and "+" not in case.id]
        good = verdicts(Setup("streaming", "numpy"), *sweep, "masks/groups")
        bad = verdicts(Setup(flawed.name, "numpy"), "masks/groups", "options/lse", "precision/range-1")
    finally:
        del laser_core.backends()[flawed.name]
    refused = Verdict("options/bias", "options", flawed.name, "numpy", "float32", "refused", None, "no bias <yet>", 0.0)
    path = tmp_path_factory.mktemp("report") / "report.html"
    path.write_text(html.page([report.record(good), report.record([*bad, refused])]))
    return path


def test_page_is_one_file(page):
    """It loads nothing: no address but the fragments of its own links."""
    text = page.read_text()
    assert not re.search(r"https?:|//[a-z]|\bsrc=|url\(|@import", text)
    assert {link[0] for link in re.findall(r'href="(.)', text)} == {"#"}
    ids = re.findall(r'id="([^"]+)"', text)
    assert len(ids) == len(set(ids))
    assert set(re.findall(r'href="#([^"]+)"', text)) <= set(ids)
    assert "no bias &lt;yet&gt;" in text


def test_page_draws_the_recipe_beside_ours(page):
    """A plot for each dtype, a dashed line that leaves the plot, and ours below the limit."""
    figures = re.findall(r"<figure>.*?</figure>", page.read_text(), re.DOTALL)
    assert [re.search(r"error against range, (\w+)", f)[1] for f in figures] == [
        "float64",
        "float32",
        "bfloat16",
        "float16",
    ]
    for figure in figures:
        assert figure.count("stroke-dasharray") == 1
        assert "published recipe, σ = 400: ∞ of what is allowed" in figure
        ours = re.findall(r"streaming on numpy, σ = [\d.]+: (\d+)% of what is allowed", figure)
        assert len(ours) == 9
        assert max(map(int, ours)) <= 100


@pytest.fixture
def chromium(tmp_path: Path) -> browser.Browser:
    if browser.find() is None:
        pytest.skip(f"needs one of {', '.join(browser.NAMES)}")
    return browser.Browser(tmp_path / "profile")


def test_page_in_a_browser(page, chromium, tmp_path):
    """A script that clicks, appended to a copy of the page, sees what a person sees."""
    steps = """<script>
    addEventListener("load", () => setTimeout(() => {
      const told = {};
      const seen = (e) => e !== null && e.checkVisibility();
      const cells = [...document.querySelectorAll(".matrix tbody tr")].map(
        (row) => [...row.querySelectorAll("td")].map((cell) => cell.className).join(" "));
      told.cells = cells;
      const own = document.getElementById("streaming-on-numpy-masks/groups-float32");
      told.before = seen(own);
      document.querySelector('a[href="#streaming-on-numpy-masks"]').click();
      setTimeout(() => {
        told.after = seen(own);
        told.command = own.querySelector("code").textContent;
        const point = document.querySelector('a[href="#streaming-on-numpy-precision/range-20-bfloat16"]');
        location.hash = point.getAttribute("href");
        setTimeout(() => {
          told.point = seen(document.querySelector(":target"));
          told.failure = document.querySelector("tr.failed").innerText;
          told.wide = document.documentElement.scrollWidth <= innerWidth;
          document.title = JSON.stringify(told);
        }, 100);
      }, 100);
    }, 100));
    </script>"""
    copy = tmp_path / "clicked.html"
    copy.write_text(page.read_text() + steps)
    title = re.search(r"<title>(.*?)</title>", chromium.dom(copy.as_uri()), re.DOTALL)[1]
    told = json.loads(unescape(title))
    levels = list(LEVELS)
    good, bad = (row.split() for row in told["cells"])
    assert {level for level, cell in zip(levels, good, strict=True) if cell == "pass"} == {"masks", "precision"}
    assert dict(zip(levels, bad, strict=True))["options"] == "fail"
    assert set(good) == {"pass", "none"}
    assert not told["before"]
    assert told["after"]
    assert told["command"] == (
        "laser-conformance run --backend streaming --arrays numpy --only masks/groups --dtype float32"
    )
    assert told["point"]
    assert "options/lse" in told["failure"]
    assert "lse: " in told["failure"]
    assert told["wide"]


def test_screenshot(page, chromium, tmp_path):
    """What is drawn has the colours of the page: the line of the recipe, ours, and cells that pass and fail."""
    picture = tmp_path / "report.png"
    chromium.screenshot(page.as_uri(), picture, (1250, 1500))
    pixels = np.round(255 * imread(picture)[..., :3]).astype(int)
    assert pixels.shape == (1500, 1250, 3)
    for colour, least in ((html.RECIPE, 400), (html.COLOURS[0], 400)):
        wanted = [int(colour[i : i + 2], 16) for i in (1, 3, 5)]
        assert (pixels == wanted).all(axis=-1).sum() >= least, colour
    red, green, blue = np.moveaxis(pixels, -1, 0)
    assert ((green > red + 12) & (green > blue + 6)).sum() > 3000  # cells that pass
    assert ((red > green + 12) & (red > blue + 12)).sum() > 3000  # cells that fail
