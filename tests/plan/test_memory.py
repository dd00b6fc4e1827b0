"""The plan's memory against the tensors that are really alive in a training step."""

import json
from pathlib import Path

import pytest
from launching import ROOT, launch

SCRIPT = ROOT / "tests" / "helpers" / "memory_run.py"
ALONE = ["single", "full", "selective", "softmax", "tokens", "full-rank", "flow", "diffusion"]
TOGETHER = ["dp2", "tp2", "tp2-sp", "tp2-sp-softmax", "pp2", "pp2-virtual2"]


@pytest.fixture(scope="module")
def figures(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, int]]:
    """What each rank of each run predicted and measured, by run and rank."""
    out = tmp_path_factory.mktemp("memory")
    launch(1, SCRIPT, out, *ALONE, seconds=300)
    launch(2, SCRIPT, out, *TOGETHER, seconds=300)
    return {path.stem: json.loads(path.read_text()) for path in sorted(Path(out).glob("*.json"))}


@pytest.mark.slow
@pytest.mark.parametrize("name", [*(f"{n}-0" for n in ALONE), *(f"{n}-{r}" for n in TOGETHER for r in (0, 1))])
def test_the_predicted_peak_is_within_a_tenth_of_the_measured_one(figures: dict, name: str) -> None:
    found = figures[name]
    ratio = found["predicted"] / found["measured"]
    print(
        f"{name}: predicted {found['predicted'] / 2**20:.2f} MiB, measured {found['measured'] / 2**20:.2f}: {ratio:.3f}"
    )
    assert found["planned"] == found["parameters"]
    assert 0.9 < ratio < 1.1
