from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from known_law import LAW

from calm_core.config.model_config import HeadConfig
from calm_core.config.scaling_config import FitConfig, GridConfig, LadderConfig, ScalingConfig
from calm_core.scaling.points import points
from calm_core.scaling.results import Row, _row


@pytest.fixture
def study(tmp_path: Path) -> ScalingConfig:
    """Twelve sizes and families that a known law governs."""
    config = ScalingConfig(
        run=str(tmp_path / "study"),
        ladder=LadderConfig(depths=[4, 6, 8, 12], aspect=32, head_width=32, batch_tokens=1 << 15),
        grid=GridConfig(k=[2, 4], context=512, budgets=[1e15, 2e15, 4e15, 8e15]),
        fit=FitConfig(measures=["brier_1", "brier_lm", "cross_entropy"], draws=30),
    )
    return replace(config, base=replace(config.base, head=HeadConfig()))


@pytest.fixture
def rows(study: ScalingConfig) -> Iterator[list[Row]]:
    """What its runs would have measured, without noise."""
    made = []
    for point in points(study):
        for budget, step in enumerate(point.budget_steps):
            size, tokens, k = (np.array([float(x)]) for x in (point.size, point.tokens(step), point.k))
            brier = 1 - LAW(size, tokens, k)[0]
            record = {"brier_1": brier, "brier_1_error": 1e-4, "loss": 5 - 10 * brier, "loss_error": 1e-3}
            made.append(_row(point, budget, step, 0.0, record))
    return made
