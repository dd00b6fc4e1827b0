"""A page as headless Chromium shows it."""

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


def figures(page: Path) -> dict[str, Any]:
    """What the page draws, by the names of its figures."""
    found = re.search(r'<script type="application/json" id="figures">(.*?)</script>', page.read_text(), re.DOTALL)
    assert found
    return json.loads(found[1])


def check_that_it_draws(page: Path, profile: Path) -> None:
    """Open the page: every figure is drawn, nothing is fetched, and nothing is complained of."""
    dom, console = opened(page, profile)
    assert console == []
    named = figures(page)
    assert named
    for name, figure in named.items():
        assert figure["data"], name
        assert re.search(
            rf'id="{name}"[^>]*class="[^"]*js-plotly-plot|class="[^"]*js-plotly-plot[^"]*" id="{name}"', dom
        ), name
    assert dom.count('class="main-svg"') >= len(named)
    assert 'src="http' not in dom
