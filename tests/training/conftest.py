"""A run that the tests of this folder compare with."""

import shutil
from pathlib import Path

import pytest
from tiny_runs import train

from calm_core.errors import ExitCode


@pytest.fixture(scope="session")
def whole(tiny_experiment: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of six steps that nothing disturbed."""
    folder = Path(shutil.copytree(tiny_experiment, tmp_path_factory.mktemp("whole") / "tiny"))
    assert train(folder, "training.save_every=2", "training.keep=9") == ExitCode.OK
    return folder
