"""The demo as it is shipped: from the packaged corpus to figures that show learning."""

import json
import sys

import pytest
from launching import ROOT, finish

pytestmark = [pytest.mark.slow, pytest.mark.timeout(2400)]


def test_the_demo_learns(tmp_path):
    run = tmp_path / "demo"
    command = [
        sys.executable,
        str(ROOT / "pretrain" / "pipeline.py"),
        str(ROOT / "configs" / "demo.yaml"),
        f"run={run}",
    ]
    code, output = finish(command, seconds=2300)
    assert code == 0, output[-5000:]
    summary = json.loads((run / "summary.json").read_text())
    assert summary["autoencoder"]["token_accuracy"] >= 0.995
    assert summary["autoencoder"]["token_accuracy_sigma_0.3"] >= 0.98
    calm = summary["calm"]
    first, error = calm["brier"][0]["value"], calm["brier"][0]["standard_error"]
    assert first > 5 * error
    # What the bigram table of the same vocabulary scores: 7.0, 0.50 and 0.036 per cent.
    assert first >= 2 * 0.070
    assert calm["brier"][1]["value"] >= 2 * 0.0050
    assert calm["brier"][2]["value"] >= 2 * 0.00036
    assert calm["brier_lm"] is not None  # all four are significant
    assert calm["brier_lm"] >= 1.4
    assert calm["loss_shuffled"]["value"] > calm["loss"]["value"]
    assert all(sample["text"].strip() for sample in summary["samples"])
