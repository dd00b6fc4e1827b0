"""The rules by which ranks agree, each with a way to drop it: the comparison of layouts must notice every one."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch


@contextmanager
def dropped(rule: str) -> Iterator[None]:
    """Train without this rule; with "" nothing is dropped."""
    if not rule:
        yield
        return
    target, stand_in = RULES[rule]()
    with patch(target, stand_in):
        yield


def _sum() -> tuple[str, Any]:
    """Sequence-parallel ranks sum the gradients of what each holds whole."""
    return "calm_core.distributed.engine.Zero._sum_over_positions", lambda zero, bucket: None


def _mark_backbone() -> tuple[str, Any]:
    """The backbone's norms are marked as held whole."""
    return "calm_core.model.backbone.replicated", lambda parameter, config: parameter


def _mark_rest() -> tuple[str, Any]:
    """So are norms and whole linear layers of compression and head."""
    return "calm_core.model.layers.replicate_all", lambda module, config: module


def _count_once() -> tuple[str, Any]:
    """What tensor-parallel ranks hold whole counts once in the gradient norm."""
    return "calm_core.distributed.engine.is_split", lambda parameter: True


def _all_stages() -> tuple[str, Any]:
    """The gradient norm is that of all stages."""
    from calm_core.megatron import parallel_state

    def one_stage(ranks: Any) -> Any:
        return parallel_state.get_tensor_and_data_parallel_group()

    return "calm_core.distributed.engine.NormRanks.get_model_parallel_group", one_stage


def _parts() -> tuple[str, Any]:
    """The gradient of what ranks with parts of the vocabulary read is the sum over the parts."""
    from calm_core.megatron import gather_from_sequence_parallel_region

    def gathered(x: Any, config: Any) -> Any:
        return gather_from_sequence_parallel_region(x, tensor_parallel_output_grad=False)

    return "calm_core.model.layers.shared_positions", gathered


def _own_noise() -> tuple[str, Any]:
    """Noise follows the sample, not its place in the micro-batch."""
    from calm_core.model.noise import SampleNoise

    def by_place(seed: int, samples: Any, *rest: Any) -> SampleNoise:
        return SampleNoise(seed, range(len(samples)), *rest)

    return "calm_core.training.calm_task.SampleNoise", by_place


RULES: dict[str, Callable[[], tuple[str, Any]]] = {
    "sum": _sum,
    "mark-backbone": _mark_backbone,
    "mark-rest": _mark_rest,
    "count-once": _count_once,
    "all-stages": _all_stages,
    "parts": _parts,
    "own-noise": _own_noise,
}
