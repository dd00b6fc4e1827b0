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
    return "calm_core.distributed.zero.Zero._sum_over_positions", lambda zero, bucket: None


def _mark_backbone() -> tuple[str, Any]:
    """The backbone's norms are marked as held whole."""
    return "calm_core.model.backbone.replicated", lambda parameter, config: parameter


def _mark_rest() -> tuple[str, Any]:
    """So are norms and whole linear layers of compression and head."""
    return "calm_core.model.layers.replicate_all", lambda module, config: module


def _count_once() -> tuple[str, Any]:
    """What tensor-parallel ranks hold whole counts once in the gradient norm."""
    return "calm_core.distributed.zero.is_split", lambda parameter: True


def _all_stages() -> tuple[str, Any]:
    """The gradient norm is that of all stages."""
    from calm_core.megatron import parallel_state

    def one_stage(ranks: Any) -> Any:
        return parallel_state.get_tensor_and_data_parallel_group()

    return "calm_core.distributed.zero.NormRanks.get_model_parallel_group", one_stage


def _gather() -> tuple[str, Any]:
    """The softmax head gathers the gradients of the losses that it has handed out along the sequence."""
    from calm_core.megatron import parallel_state

    def shared_out(losses: Any, config: Any) -> Any:
        ranks = parallel_state.get_tensor_model_parallel_world_size()
        return losses.chunk(ranks)[parallel_state.get_tensor_model_parallel_rank()]

    return "calm_core.model.heads.softmax.split_positions", shared_out


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
    "gather": _gather,
    "own-noise": _own_noise,
}
