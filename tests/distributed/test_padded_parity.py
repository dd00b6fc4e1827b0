"""Chunks of nothing but padding count for nothing, alike in every layout."""

import json
import sys
from pathlib import Path

import pytest
import torch
from launching import finish, launch

WALK = Path(__file__).parent / "padding_walk.py"
SPREAD = ["dp", "tp2-sp", "pp2"]


@pytest.mark.slow
def test_every_layout_leaves_out_the_same_positions(tiny_experiment: Path, tmp_path: Path) -> None:
    alone = ["single", "single-micro1"]
    code, output = finish([sys.executable, str(WALK), str(tiny_experiment), str(tmp_path), *alone], seconds=200)
    assert code == 0, output
    launch(2, WALK, tiny_experiment, tmp_path, *SPREAD)
    wanted = json.loads((tmp_path / "single.json").read_text())
    for name in ("single-micro1", *SPREAD):
        found = json.loads((tmp_path / f"{name}.json").read_text())
        for (loss, norm), (wanted_loss, wanted_norm) in zip(found, wanted, strict=True):
            assert loss == pytest.approx(wanted_loss, rel=1e-6), name
            assert norm == pytest.approx(wanted_norm, rel=1e-5), name


def test_the_weights_are_the_mean_over_samples_of_the_mean_over_their_text() -> None:
    from calm_core.training.calm import position_weights

    tokens = torch.ones(6, 3, 4, dtype=torch.int64)
    tokens[2:, 1] = 0
    tokens[:, 2] = 0
    tokens[0, 0, 1:] = 0  # a partial chunk is a target as any other
    weights, losses = position_weights(tokens, 0), torch.rand(6, 3)
    assert torch.allclose((losses * weights).sum(), (losses[:, 0].mean() + losses[:2, 1].mean()) / 3)
    assert torch.allclose((losses * position_weights(tokens, None)).sum(), losses.mean())
