"""The page to play with computes and shows the library's numbers."""

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from momentum_fix import corrected_momentum, effective_momentum
from momentum_fix.weights import batch_weights

SITE = Path(__file__).parents[1] / "docs" / "site"
SCRIPT = SITE / "static" / "play.js"
NODE = shutil.which("node")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
QUIET = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"]
QUIET += ["--disable-background-networking", "--disable-component-update", "--dump-dom"]
GRID = [(momentum, passes) for momentum in (0.01, 0.1, 0.37, 0.5) for passes in (1, 2, 3, 8)]


def computed(script):
    """Give what the page computes for each momentum and number of passes."""
    program = f"""
        const play = require({json.dumps(str(script))});
        const each = ([m, k]) => [play.corrected(m, k), play.effective(m, k), play.left(m, k, 3),
            ...[0, 1, 2].map((ago) => play.share(m, k, ago)), play.left(m, k, play.memory(m, k))];
        console.log(JSON.stringify({json.dumps(GRID)}.map(each)));
    """
    return json.loads(subprocess.run([NODE, "-e", program], capture_output=True, text=True, check=True).stdout)


def expected(momentum, passes):
    """Give the library's numbers: the two formulas, and the weights after three batches, the newest first."""
    initial, batches = batch_weights("ABC", momentum, passes)
    tenth = min(0.1, 1 - effective_momentum(momentum, passes))  # no less than one batch
    return [corrected_momentum(momentum, passes), effective_momentum(momentum, passes), initial,
            *(batches[batch] for batch in "CBA"), tenth]  # fmt: skip


def agrees(script):
    pairs = zip(computed(script), GRID, strict=True)
    return all(found == pytest.approx(expected(*case), rel=1e-12) for found, case in pairs)


needs_node = pytest.mark.skipif(NODE is None, reason="needs Node.js, to run what the page computes")


@needs_node
def test_the_page_computes_the_librarys_numbers():
    assert agrees(SCRIPT)


@needs_node
@pytest.mark.parametrize(
    "right", ["/ passes)", "* passes)", "* passes * batches", "* left(momentum, passes, ago)", "Math.log(0.1)"]
)
def test_a_wrong_formula_in_the_page_would_be_seen(right, tmp_path):
    text = SCRIPT.read_text(encoding="utf-8")
    assert right in text
    wrong = f"* 1.001 {right}" if right[0] in "/*" else f"1.01 * {right}"
    (tmp_path / "play.js").write_text(text.replace(right, wrong), encoding="utf-8")
    assert not agrees(tmp_path / "play.js")


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium, to open the page")
@pytest.mark.parametrize(("asked", "momentum", "passes"), [("", 0.1, 2), ("#momentum=0.03&passes=4", 0.03, 4)])
def test_a_browser_shows_them_and_draws_the_curves(asked, momentum, passes, tmp_path):
    page = (SITE / "play.md").read_text(encoding="utf-8")
    (body,) = re.findall(r"^```{raw} html\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    (tmp_path / "play.html").write_text(body.replace("../../_static/play.js", SCRIPT.as_uri()), encoding="utf-8")
    address = (tmp_path / "play.html").as_uri() + asked
    command = [CHROMIUM, *QUIET, f"--user-data-dir={tmp_path / 'profile'}", address]
    shown = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = dict(re.findall(r'<(?:b|output) id="([\w-]+)">([\d.]+)<', shown))
    assert (float(found["momentum-is"]), int(found["passes-is"])) == (momentum, passes)
    assert float(found["corrected"]) == pytest.approx(corrected_momentum(momentum, passes), rel=1e-5)
    assert float(found["effective"]) == pytest.approx(effective_momentum(momentum, passes), rel=1e-5)
    assert float(found["memory-corrected"]) == float(found["memory-right"]) > float(found["memory-wrong"])
    assert (shown.count("<polyline"), shown.count("<circle"), shown.count("<rect")) == (2, 21, 60)
