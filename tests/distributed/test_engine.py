"""The engine on one rank, against plain torch; what the reduction of gradients sends, when, and its memory."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from launching import ROOT, launch
from stepped_engine import engine as small_engine
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from calm_core.config.training_config import OptimizerConfig
from calm_core.distributed.engine import Engine, Pass
from calm_core.distributed.optimizer import Verdict
from calm_core.distributed.topology import Topology
from calm_core.megatron import MegatronModule, ModelType, TransformerConfig

SHAPE = Pass(positions=3, micro_batch=2)
OPTIMIZER = OptimizerConfig(learning_rate=1e-2, weight_decay=0.3, clip=0.5)


class Regression(MegatronModule):
    """A small network as one stage of the schedule."""

    model_type = ModelType.encoder_or_decoder

    def __init__(self) -> None:
        super().__init__(TransformerConfig(num_layers=1, hidden_size=8, num_attention_heads=1))
        self.net = nn.Sequential(nn.Linear(8, 16), nn.SiLU(), nn.Linear(16, 1))

    def set_input_tensor(self, input_tensor: Any) -> None:
        pass

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


def build(dtype: torch.dtype = torch.float32) -> Regression:
    torch.manual_seed(0)
    return Regression().to(dtype)


def forward_step(micro_batches: Iterator[Tensor], model: Regression) -> tuple[Tensor, Callable[[Tensor], Any]]:
    x = next(micro_batches)

    def loss(out: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        value = (out.float() - x.float().sum(-1, keepdim=True)).square().mean()
        return value, {"loss": value.detach().clone()}

    return model(x.to(next(model.parameters()).dtype)), loss


def batches(step: int, count: int = 4) -> list[Tensor]:
    return list(torch.randn(count, 2, 8, generator=torch.Generator().manual_seed(step)))


def run(engine: Engine, step: int, x: Any = None) -> Any:
    engine.forward_backward(forward_step, batches(step) if x is None else x, SHAPE)
    return engine.step(1e-2, loss=1.0)


def state(engine: Engine) -> list[Tensor]:
    masters = [flat for group in engine.optimizer.param_groups for flat in group["params"]]
    moments = [value for each in engine.optimizer.state.values() for value in each.values()]
    return [x.detach().clone() for x in (*engine.model_parts[0].parameters(), *masters, *moments)]


def test_it_is_adamw_with_clipping_and_decay_of_matrices_alone(topology: Topology) -> None:
    engine, plain = Engine([build()], OPTIMIZER, topology), build()
    matrices, vectors = ([p for p in plain.parameters() if (p.dim() > 1) == wanted] for wanted in (True, False))
    groups = [{"params": matrices, "weight_decay": 0.3}, {"params": vectors, "weight_decay": 0.0}]
    adam = torch.optim.AdamW(groups, lr=1e-2, betas=(0.9, 0.95), eps=1e-8)
    for step in range(6):
        update = run(engine, step)
        sum(forward_step(iter([x]), plain)[1](plain(x))[0] / 4 for x in batches(step)).backward()
        norm = nn.utils.clip_grad_norm_(plain.parameters(), 0.5)
        adam.step()
        adam.zero_grad()
        assert update.applied
        assert update.gradient_norm == pytest.approx(norm.item(), rel=1e-6)
        assert norm > 0.5
    for found, wanted in zip(engine.model_parts[0].parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("first", [True, False])
def test_a_skipped_step_changes_nothing_and_is_forgotten(
    topology: Topology, dtype: torch.dtype, first: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, undisturbed = (Engine([build(dtype)], OPTIMIZER, topology) for _ in range(2))
    if not first:
        run(engine, 0)
        run(undisturbed, 0)
    before, norms = state(engine), []

    def reject(loss: float, norm: float) -> Verdict:
        norms.append(norm)
        return Verdict.SPIKE

    with monkeypatch.context() as patch:
        patch.setattr(engine.optimizer.detector, "judge", reject)
        assert not run(engine, 1).applied
    assert len(norms) == 1
    assert norms[0] > 0
    for value in (torch.nan, torch.inf):
        x = batches(2)
        x[1][0, 0] = value
        update = run(engine, 2, x=x)
        assert not update.applied
        assert not torch.tensor(update.gradient_norm).isfinite()
    assert all(map(torch.equal, before, state(engine)))
    assert run(engine, 3) == run(undisturbed, 3)
    assert all(map(torch.equal, state(engine), state(undisturbed)))
    assert not all(map(torch.equal, before, state(engine)))


def summed_gradients(model: Regression, micro_batches: list[Tensor]) -> list[Tensor]:
    """The gradients of the mean loss, each micro-batch's computed by itself and added in float32."""
    totals = [torch.zeros(p.shape) for p in model.parameters()]
    for x in micro_batches:
        loss = forward_step(iter([x]), model)[1](model(x.to(torch.bfloat16)))[0] / len(micro_batches)
        for total, gradient in zip(totals, torch.autograd.grad(loss, model.parameters()), strict=True):
            total += gradient
    return totals


def test_bf16_weights_accumulate_and_step_in_float32(topology: Topology) -> None:
    """Steps far below bf16's resolution add up, and so do gradients of many micro-batches."""
    engine = Engine([build(torch.bfloat16)], OPTIMIZER, topology)
    small = {id(p): p.detach().clone() for p in engine.model_parts[0].parameters()}
    masters = [flat for group in engine.optimizer.param_groups for flat in group["params"]]
    assert all(flat.dtype == torch.float32 for flat in masters)
    assert all(len(engine.optimizer.moments(flat)) == OPTIMIZER.moments for flat in masters)  # as the plan counts
    engine.forward_backward(forward_step, batches(0, 16), SHAPE)
    gradients = [p.main_grad for p in engine.model_parts[0].parameters()]
    for found, wanted in zip(gradients, summed_gradients(build(torch.bfloat16), batches(0, 16)), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-7)  # a sum in bf16 is off in the third digit
    before = [flat.clone() for flat in masters]
    engine.step(1e-6, loss=1.0)
    assert all(torch.equal(p, small[id(p)]) for p in engine.model_parts[0].parameters() if p.dim() > 1)
    assert not any(map(torch.equal, before, masters))


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
    one = small_engine(topology, 0, torch.bfloat16)
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
    one = small_engine(topology)
    one.zero.expect(1)
    parameters = list(one.model_parts[0].parameters())
    sum(parameter.sum() for parameter in parameters).backward()
    with pytest.raises(RuntimeError, match="has come after its bucket was reduced"):
        parameters[0].sum().backward()
