"""A page as headless Chromium shows it."""

import html
import json
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--disable-sync",
    "--disable-dev-shm-usage",
    "--disable-component-update",
    "--disable-background-networking",
    "--no-first-run",
    "--virtual-time-budget=20000",
    "--enable-logging=stderr",
]


def opened(page: Path, profile: Path) -> tuple[str, list[str]]:
    """The DOM after the page's scripts have run, and what they wrote to the console."""
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if chromium is None:
        assert "CI" not in os.environ, "the pages are tested in Chromium: install the Debian package chromium"
        pytest.skip("Chromium is not installed")
    command = [chromium, *FLAGS, f"--user-data-dir={profile}", "--dump-dom", page.absolute().as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    return done.stdout, re.findall(r"CONSOLE.*", done.stderr)


# Plotly's own numbers of each figure's lines, after it has drawn them, as text in the document.
DRAWN = """
addEventListener("load", () => {
  const shown = document.createElement("pre");
  shown.id = "drawn";
  const lines = (plot) => plot.calcdata.map((points) => [points[0].trace.name, points.map(({x, y}) => [x, y])]);
  shown.textContent = JSON.stringify(
    Object.fromEntries([...document.querySelectorAll(".js-plotly-plot")].map((plot) => [plot.id, lines(plot)])));
  document.body.append(shown);
});
"""


def with_script(page: Path, script: str) -> Path:
    """A copy of a page, beside it, that runs one more script in the end."""
    copy = page.with_name(f"{page.stem}-scripted.html")
    copy.write_text(page.read_text().replace("</body></html>", f"<script>{script}</script></body></html>"))
    return copy


def drawn(page: Path, profile: Path) -> dict[str, dict[str, list[list[float | None]]]]:
    """The points that Plotly has drawn, [x, y], by figure and name of the line; those of a gap have no y."""
    dom, console = opened(with_script(page, DRAWN), profile)
    assert not console, console
    [shown] = re.findall(r'<pre id="drawn">(.*?)</pre>', dom, re.DOTALL)
    return {figure: dict(lines) for figure, lines in json.loads(html.unescape(shown)).items()}


def figures(page: Path) -> dict[str, Any]:
    """What the page draws, by the names of its figures."""
    found = re.search(r'<script type="application/json" id="figures">(.*?)</script>', page.read_text(), re.DOTALL)
    assert found
    return json.loads(found[1])


def check_that_it_draws(page: Path, profile: Path) -> None:
    """Open the page: every figure is drawn, nothing is fetched, and nothing is complained of."""
    dom, console = opened(page, profile)
    assert not console, console
    named = figures(page)
    assert named
    for name, figure in named.items():
        assert figure["data"], name
        assert re.search(
            rf'id="{name}"[^>]*class="[^"]*js-plotly-plot|class="[^"]*js-plotly-plot[^"]*" id="{name}"', dom
        ), name
    assert dom.count('class="main-svg"') >= len(named)
    assert 'src="http' not in dom
