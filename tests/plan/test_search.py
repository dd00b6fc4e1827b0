"""Layouts and micro-batches that fit."""

from dataclasses import replace

import pytest

from calm_core.config.experiment import PlanConfig
from calm_core.config.model_config import BackboneConfig, HeadConfig, ModelShape
from calm_core.config.training_config import ParallelConfig, TrainingConfig
from calm_core.errors import UserError
from calm_core.plan.account import account
from calm_core.plan.search import GIB, USED, candidates, largest_micro_batch, micro_batches_of

CALM_M = ModelShape(BackboneConfig(), HeadConfig(), 128_257, k=4, latent=128)
AUTO = TrainingConfig(micro_batch="auto")
PLAN = PlanConfig(world=8)


def test_micro_batches_divide_the_samples_of_a_rank() -> None:
    assert micro_batches_of(AUTO, ParallelConfig(), 8) == [32, 16, 8, 4, 2, 1]
    assert micro_batches_of(AUTO, ParallelConfig(pipeline=2, virtual=2), 8) == [32, 16, 8, 4, 2, 1]
    assert micro_batches_of(replace(AUTO, global_batch=255), ParallelConfig(), 8) == []


@pytest.mark.parametrize("memory", [80.0, 40.0])
def test_auto_is_the_largest_that_fits(memory: float) -> None:
    plan = replace(PLAN, device_memory_gib=memory)
    chosen = largest_micro_batch(CALM_M, AUTO, ParallelConfig(), plan, 8).micro_batch

    def peak(micro_batch: int) -> int:
        return account(CALM_M, replace(AUTO, micro_batch=micro_batch), ParallelConfig(), plan, 8).peak_memory

    assert peak(chosen) <= USED * memory * GIB < peak(2 * chosen)
    given = replace(AUTO, micro_batch=2)
    assert largest_micro_batch(CALM_M, given, ParallelConfig(), plan, 8) is given


def test_nothing_fits() -> None:
    with pytest.raises(UserError, match=r"training\.micro_batch=auto: .* parallel\.recompute=full, or spread"):
        largest_micro_batch(CALM_M, AUTO, ParallelConfig(), replace(PLAN, device_memory_gib=2.0), 8)


def test_the_search_finds_the_fastest_of_what_fits() -> None:
    found = candidates(CALM_M, AUTO, PLAN, 8)
    assert len({(each.layout.tensor, each.layout.pipeline) for each in found}) == len(found) > 5
    assert [each.account.step.total for each in found] == sorted(each.account.step.total for each in found)
    assert all(each.account.peak_memory <= USED * 80 * GIB for each in found)
    assert (found[0].layout.tensor, found[0].layout.pipeline) == (1, 1)
    divided = [each for each in found if each.layout.sequence]
    assert {each.layout.head for each in divided} >= {"replicated"}  # at 8 ranks of a node, its messages cost more
    for each in divided:
        other = replace(each.layout, head="split" if each.layout.head == "replicated" else "replicated")
        training = replace(AUTO, micro_batch=each.micro_batch)
        rival = account(CALM_M, training, other, PLAN, 8)
        assert each.account.step.total <= rival.step.total or rival.peak_memory > USED * 80 * GIB
    small = candidates(CALM_M, AUTO, replace(PLAN, device_memory_gib=6.0), 8)
    assert small
    assert small[0].account.step.total >= found[0].account.step.total
