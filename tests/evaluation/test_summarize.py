import math

import pytest
import torch

from calm_core.evaluation.clustered import BrierAccumulator
from calm_core.evaluation.summarize import ClusteredScores, summarize

BRIER = tuple(f"brier_{n}" for n in range(1, 5))


def part(values: torch.Tensor, documents: list[int], names: tuple[str, ...] = BRIER) -> ClusteredScores:
    accumulator = BrierAccumulator(values.shape[1])
    accumulator.add(values, torch.tensor(documents))
    return names, accumulator.state()


def test_parts_merge_to_the_whole():
    values = torch.rand(12, 4, dtype=torch.float64)
    documents = [0, 0, 1, 1, 1, 2, 2, 3, 3, 3, 3, 0]
    whole = summarize([part(values, documents)])
    split = summarize([part(values[:5], documents[:5]), part(values[5:], documents[5:])])
    assert whole.keys() == split.keys()
    assert all(whole[name] == pytest.approx(split[name]) for name in whole if whole[name] is not None)
    assert whole["brier_1"] == pytest.approx(values[:, 0].mean().item())
    assert whole["scored_positions"] == 12
    assert whole["documents"] == 4


def test_brier_lm_is_of_the_brier_scores_alone_wherever_they_stand():
    values = torch.tensor([[9.0, 0.4, 0.3, 0.2, 0.1], [8.0, 0.41, 0.31, 0.21, 0.11]], dtype=torch.float64)
    result = summarize([part(values, [0, 1], ("loss", *BRIER))])
    assert result["brier_lm"] == pytest.approx(100 * math.prod([0.405, 0.305, 0.205, 0.105]) ** 0.25)
    assert result["brier_lm_reason"] is None
    assert result["loss"] == 8.5


def test_a_single_document_has_no_error_and_no_brier_lm():
    result = summarize([part(torch.full((3, 4), 0.5), [7, 7, 7])])
    assert result["brier_1_error"] is None
    assert result["brier_lm"] is None
    assert "two documents" in result["brier_lm_reason"]


def test_a_single_document_has_errors_by_blocks_of_its_positions():
    values = torch.rand(40, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 0.1 + 0.4
    blocks = torch.arange(40) // 4
    accumulator = BrierAccumulator(4)
    accumulator.add(values, torch.full((40,), 7), blocks=blocks)
    result = summarize([(BRIER, accumulator.state())])
    means = values.unflatten(0, (10, 4)).mean(1)
    assert result["brier_1_error"] == pytest.approx((means[:, 0].std() / 10**0.5).item())
    assert result["brier_lm"] is not None
    assert result["documents"] == 1
    assert result["standard_errors"] == {"clusters": 10, "of": "blocks", "interval_factor": pytest.approx(2.2622, 1e-4)}
    two = summarize([(BRIER, accumulator.state()), part(values, [8] * 40)])
    assert two["standard_errors"]["of"] == "documents"
    assert (two["documents"], two["standard_errors"]["clusters"]) == (2, 2)
