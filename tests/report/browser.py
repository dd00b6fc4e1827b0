"""A page as headless Chromium shows it."""

import os
import re
import shutil
import subprocess
from pathlib import Path

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
