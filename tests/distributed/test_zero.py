"""The reduction of gradients into shards: what is sent, when, and what it costs in memory."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from launching import ROOT, launch
from stepped_engine import engine
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from calm_core.distributed.optimizer import buckets
from calm_core.distributed.topology import Topology

SCRIPT = ROOT / "tests" / "helpers" / "reduction.py"


@pytest.mark.parametrize(
    ("ranks", "dtype"),
    [(2, "bfloat16"), *(pytest.param(*case, marks=pytest.mark.slow) for case in ((2, "float32"), (8, "bfloat16")))],
)
def test_a_rank_sends_half_of_an_all_reduce_and_begins_in_the_last_backward_pass(
    ranks: int, dtype: str, tmp_path: Path
) -> None:
    launch(ranks, SCRIPT, tmp_path, dtype)
    for rank in range(ranks):
        record = json.loads((tmp_path / f"{rank}.json").read_text())
        print(record)
        assert record["all_reduce"] > 1.9 * 4 * 240_000 * (ranks - 1) / ranks  # float32, there and back
        assert record["sent"] <= 0.55 * record["all_reduce"]
        # Three buckets of two matrices, of which the last is complete at the end, and one of the six biases.
        assert record["begun"] == [[3, 8], [3, 4], [3, 0], [3, 0]]
        assert record["error"] < 1e-6


class Operations(TorchDispatchMode):
    """The operations of torch that are called, with the types of their tensors, and where their first one begins."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[str, tuple[torch.dtype, ...], int]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        tensors = [x for x in args if isinstance(x, Tensor)]
        if tensors:
            self.seen.append((func._schema.name, tuple(x.dtype for x in tensors), tensors[0].data_ptr()))
        return func(*args, **(kwargs or {}))


def test_a_bf16_gradient_is_added_without_a_copy_and_gradients_are_zeroed_once(topology: Topology) -> None:
    one = engine(topology, 0, torch.bfloat16)
    parameters = list(one.model_parts[0].parameters())
    with Operations() as backward:
        for parameter in parameters:
            parameter.sum().backward()
    added = [(name, types) for name, types, _ in backward.seen if types[0] == torch.float32 or "_to_copy" in name]
    assert added == [("aten::add_", (torch.float32, torch.bfloat16))] * len(parameters)
    with Operations() as step:
        assert one.step(1e-2, loss=1.0).applied
    gradients = [whole.data_ptr() for whole in one.zero.fp32_groups_gradients_flat]
    zeroed = [where for name, _, where in step.seen if name == "aten::zero_" and where in gradients]
    assert sorted(zeroed) == sorted(gradients)
    assert all(not p.main_grad.any() and p.grad is None for p in parameters)


def test_a_gradient_after_the_reduction_is_an_error(topology: Topology) -> None:
    one = engine(topology)
    one.zero.expect(1)
    parameters = list(one.model_parts[0].parameters())
    sum(parameter.sum() for parameter in parameters).backward()
    with pytest.raises(RuntimeError, match="has come after its bucket was reduced"):
        parameters[0].sum().backward()


def test_buckets_hold_parameters_of_one_kind_the_last_ones_first() -> None:
    def parameter(*shape: int, **marks: bool) -> nn.Parameter:
        made = nn.Parameter(torch.zeros(shape))
        made.__dict__.update(marks)
        return made

    first, second, third = (parameter(2, size, tensor_model_parallel=True) for size in (50, 3, 3))
    whole, bias, norm = parameter(2, 3), parameter(5), parameter(4, sequence_parallel=True)
    found = buckets([first, bias, norm, second, whole, third], size=12)
    # The two small matrices fill a bucket; what waits for a sum over tensor-parallel ranks is last.
    wanted = [[third, second], [first], [whole], [bias], [norm]]
    assert [[id(p) for p in members] for members in found] == [[id(p) for p in members] for members in wanted]
    assert len(buckets([first, second], size=1)) == 2
    assert len(buckets([first, second], size=10**9)) == 1
