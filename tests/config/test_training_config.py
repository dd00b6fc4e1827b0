"""Settings of model, layout and training that are refused, each by a sentence that names the key."""

from collections.abc import Callable

import pytest

from calm_core.config.data_config import DataConfig
from calm_core.config.experiment import PlanConfig
from calm_core.config.model_config import BackboneConfig, HeadConfig
from calm_core.config.training_config import OptimizerConfig, ParallelConfig, TrainingConfig
from calm_core.errors import UserError


def batch(global_batch: int, micro_batch: int, ranks: int, multiple: int = 1) -> int:
    return TrainingConfig(global_batch=global_batch, micro_batch=micro_batch).micro_batches(ranks, multiple)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: ParallelConfig(tensor=0), r"parallel\.tensor=0 must be at least 1"),
        (lambda: ParallelConfig(zero=2), r"parallel\.zero=2 is not supported: .* set parallel\.zero=1"),
        (lambda: ParallelConfig(zero=3), r"parallel\.zero=3"),
        (lambda: ParallelConfig(zero=0), r"parallel\.zero=0"),
        (lambda: ParallelConfig(sequence=True), r"parallel\.sequence=true needs parallel\.tensor of at least 2"),
        (
            lambda: ParallelConfig(tensor=2, head="replicated"),
            r"parallel\.head=replicated needs parallel\.sequence=true",
        ),
        (lambda: ParallelConfig(virtual=2), r"set parallel\.pipeline of at least 2"),
        (lambda: ParallelConfig(recompute="some"), r"parallel\.recompute='some' is unknown: choose none"),
        (lambda: ParallelConfig(tensor=2, pipeline=3).data_parallel(8), "8 ranks .* start a multiple of 6"),
        (lambda: ParallelConfig(timeout_minutes=0.0), r"parallel\.timeout_minutes=0\.0 must be above 0"),
        (lambda: BackboneConfig(hidden=30, heads=4), r"model\.heads=4 does not divide model\.hidden=30"),
        (lambda: BackboneConfig(heads=4, hidden=32, kv_groups=3), r"model\.kv_groups=3 does not divide model\.heads=4"),
        (lambda: BackboneConfig(layers=0), r"model\.layers=0"),
        (lambda: BackboneConfig(heads=0), r"model\.heads=0"),
        (lambda: BackboneConfig(hidden=12, heads=4), "leaves heads of an odd width"),
        (lambda: HeadConfig(kind="gan"), r"head\.kind='gan' is unknown"),
        (lambda: HeadConfig(samples=1), r"head\.samples=1 .* needs at least 2"),
        (lambda: HeadConfig(beta=2.0), r"head\.beta=2\.0 is outside 0 < beta < 2"),
        (lambda: HeadConfig(target_group=17), r"head\.target_group=17"),
        (lambda: HeadConfig(target_samples=0), r"head\.target_samples=0"),
        (lambda: HeadConfig(noise=0), r"head\.noise=0"),
        (lambda: HeadConfig(blocks=-1), r"head\.blocks=-1"),
        (lambda: OptimizerConfig(learning_rate=0.0), r"optimizer\.learning_rate=0\.0 must be above 0"),
        (lambda: OptimizerConfig(beta2=1.0), r"optimizer\.beta2=1\.0"),
        (lambda: OptimizerConfig(clip=-1.0), r"optimizer\.clip=-1\.0"),
        (lambda: TrainingConfig(steps=0), r"training\.steps=0 must be at least 1"),
        (lambda: TrainingConfig(save_every=-1), r"training\.save_every=-1"),
        (lambda: TrainingConfig(precision="fp16"), r"training\.precision='fp16' is unknown: choose bf16"),
        (lambda: TrainingConfig(resume="yes"), r"training\.resume='yes' is unknown: choose auto"),
        (lambda: DataConfig(vocabulary=-1), r"data\.vocabulary=-1"),
        (lambda: DataConfig(vocabulary=9).require_vocabulary(8, "runs/x"), r"vocabulary=9, but runs/x has .* of 8"),
        (lambda: PlanConfig(world=-1), r"plan\.world=-1"),
        (lambda: PlanConfig(peak_tflops=0), r"plan\.peak_tflops=0 must be above 0"),
        (lambda: PlanConfig(mfu=40), r"plan\.mfu=40 is not a share"),
        (lambda: batch(10, 4, 1), r"training\.global_batch=10 .* the nearest that is, is 8"),
        (lambda: batch(16, 4, 3), r"4 x 3 data-parallel ranks: the nearest that is, is 12"),
        (lambda: batch(4, 2, 1, 4), r"x 4 \(interleaved stages\): the nearest that is, is 8"),
    ],
)
def test_bad_settings(make: Callable[[], object], words: str) -> None:
    with pytest.raises(UserError, match=words) as refused:
        make()
    assert "\n" not in str(refused.value)


def test_micro_batches() -> None:
    assert batch(16, 4, 2) == 2
    assert batch(16, 2, 2, 4) == 4
