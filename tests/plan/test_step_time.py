"""The step-time model: its counts against those of a real micro-batch, and its sums."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from counted_kernels import LAYOUTS, counted, planned, shape_of
from launching import ROOT, launch

from calm_core.config.experiment import PlanConfig
from calm_core.config.model_config import HEADS, BackboneConfig, HeadConfig, ModelShape, TokenLossConfig
from calm_core.config.training_config import ParallelConfig
from calm_core.distributed.topology import Topology
from calm_core.model import costs, output_layer
from calm_core.model.costs import Kernels, Load, Product
from calm_core.plan import flops
from calm_core.plan.layout import pipeline_split
from calm_core.plan.step_time import Machine, Sent, StepTime, UnitWork, stage_pass, step_time, unit_kernels, unit_work

CALM_XL = ModelShape(BackboneConfig(hidden=2560, ffn=6880), HeadConfig(), 128_257, k=4, latent=128)
H100 = Machine.of(PlanConfig())
SIDES = [{"rank": 8}, {"rank": 0}, {"rank": 8, "tokens": "first"}, {"rank": 8, "tokens": "random", "every": 4}]


def moved_by_products(passes: dict[str, dict[str, int]]) -> int:
    """Bytes of a micro-batch. Of a cross-entropy the products of the gradients start in the forward pass."""
    return passes["forward"]["products"] + passes["backward"]["products"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", HEADS)
def test_the_kernels_of_a_micro_batch_are_those_that_start(topology: Topology, kind: str, dtype: torch.dtype) -> None:
    shape, layout = shape_of(kind), ParallelConfig()
    found, plan = counted(shape, layout, dtype), planned(shape, layout, dtype)
    for which in ("forward", "backward"):
        assert plan[which]["kernels"] == found[which]["kernels"]
        assert plan[which]["moved"] == pytest.approx(found[which]["moved"], rel=0.1)
    assert moved_by_products(plan) == pytest.approx(moved_by_products(found), rel=0.03)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("side", SIDES)
def test_so_are_those_of_a_token_loss_in_several_blocks(
    topology: Topology, side: dict, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(costs.LOGITS_AT_ONCE, "cpu", 64 * 256)
    shape, layout = shape_of(side=TokenLossConfig(weight=1.0, **side)), ParallelConfig()
    found, plan = counted(shape, layout, dtype), planned(shape, layout, dtype)
    for which in ("forward", "backward"):
        assert plan[which]["kernels"] == found[which]["kernels"]
        assert plan[which]["moved"] == pytest.approx(found[which]["moved"], rel=0.05)
    assert moved_by_products(plan) == pytest.approx(moved_by_products(found), rel=0.03)


@pytest.mark.parametrize("shape", [*map(shape_of, HEADS), *(shape_of(side=TokenLossConfig(1.0, **x)) for x in SIDES)])
def test_the_products_have_all_flops_of_the_model(shape: ModelShape) -> None:
    kernels = sum(unit_kernels(shape, Load(32, 2, ParallelConfig())), Kernels())
    products = (*kernels.products_forward, *kernels.products_backward)
    assert sum(each.flops for each in products) == 2 * flops.executed_training(shape, 32)
    forward = sum(unit.forward for unit in flops.unit_costs(shape, 32))
    if not shape.token_loss:
        assert sum(each.flops for each in kernels.products_forward) == 2 * forward


def test_a_product_takes_the_longer_of_its_flops_and_its_bytes() -> None:
    wide, narrow = Product.of(2, 1 << 16, 1024, 4096), Product.of(2, 1 << 16, 64, 4096)
    assert wide.flops / H100.matrices > wide.moved / H100.memory
    by_hand = wide.flops / H100.matrices + 2 * (65536 * (64 + 4096) + 64 * 4096) / H100.memory
    work = UnitWork(Kernels(products_forward=(wide,), products_backward=(narrow,)), Sent())
    step = stage_pass(H100, Load(2048, 1, ParallelConfig()), [work])
    assert step.matrices == pytest.approx(by_hand)


@pytest.mark.parametrize("rank", [64, 1024])
def test_logits_of_few_features_take_the_time_of_their_bytes(rank: int) -> None:
    inputs, rows = 2048 * 4, 128_384
    kernels = output_layer.kernels(Load(2048, 1, ParallelConfig()), inputs, rank, rows)
    found = H100.products((*kernels.products_forward, *kernels.products_backward))
    by_hand = {64: 3 * 2 * inputs * rows / H100.memory, 1024: 3 * 2 * inputs * rows * rank / H100.matrices}
    assert found == pytest.approx(by_hand[rank], rel=0.03)


def test_tensor_parallel_ranks_send_what_the_plan_says(tmp_path: Path) -> None:
    vocabularies = ("tp2/softmax", "tp2-sp/softmax", "tp2/tokens", "tp2-sp/tokens")
    launch(2, ROOT / "tests" / "helpers" / "counted_kernels.py", tmp_path, *LAYOUTS, *vocabularies)
    for path in tmp_path.glob("*.json"):
        figures = json.loads(path.read_text())
        for which in ("forward", "backward"):
            plan, found = figures["planned"][which], figures["counted"][which]
            # Beside what the plan counts, the parts of a vocabulary exchange three numbers for each loss.
            tolerance = 0.02 if "softmax" in path.name or "tokens" in path.name else 0
            assert plan["messages"] == found["messages"], path.name
            assert plan["sent"] == pytest.approx(found["sent"], rel=tolerance), path.name
            assert (plan["beside"], plan["sent_beside"]) == (found["beside"], found["sent_beside"]), path.name
            assert plan["kernels"] == pytest.approx(found["kernels"], rel=0.06), path.name
        moved = [moved_by_products(figures[of]) for of in ("planned", "counted")]
        assert moved[0] == pytest.approx(moved[1], rel=0.03), path.name
    assert len(list(tmp_path.glob("*.json"))) == 2 * (len(LAYOUTS) + len(vocabularies))


def time_of(layout: ParallelConfig, micro_batch: int, micro_batches: int, data: int, machine: Machine) -> StepTime:
    load = Load(2048, micro_batch, layout)
    return step_time(CALM_XL, load, machine, pipeline_split(CALM_XL, 2048, layout), micro_batches, data)


def test_a_step_of_calm_xl_on_512_gpus_by_hand() -> None:
    layout = ParallelConfig(tensor=4, sequence=True)
    step = time_of(layout, 1, 2, 128, H100)
    parameters = 462.7e6  # of a rank
    alone = time_of(layout, 1, 2, 128, replace(H100, asynchronous=False))
    assert alone.gradients == pytest.approx(4 * parameters * 127 / 128 / 80e9, rel=0.01)  # two devices of a node
    # Two micro-batches, and of the last one the backward pass: two thirds.
    last_backward = (step.matrices + step.memory + step.host + step.tensor) / 2 * 2 / 3
    table = 128_384 * 2560 / 4  # its gradient is complete when nothing is left to hide its sum
    assert step.gradients > 4 * table * 127 / 128 / 80e9
    assert step.gradients == pytest.approx(max(alone.gradients - last_backward, 4 * table / 80e9), abs=2e-3)
    assert step.weights == pytest.approx(2 * parameters * 127 / 128 / 80e9, rel=0.01)
    assert step.matrices == pytest.approx(8.03e15 / 512 / H100.matrices, rel=0.01)
    assert 0.06 < step.total < 0.12
    parts = (step.matrices, step.memory, step.host, step.tensor, step.gradients, step.weights, step.update)
    assert step.total == pytest.approx(sum(parts))


def test_a_link_is_that_of_the_node_or_the_share_of_its_network_devices() -> None:
    assert H100.link(8, 1) == 300e9
    assert H100.link(16, 1) == 300e9  # eight network devices of 40 GB/s
    assert H100.link(128, 4) == 80e9
    assert H100.link(64, 8) == 40e9


def test_a_pipeline_waits_and_a_slow_host_is_seen() -> None:
    two = time_of(ParallelConfig(pipeline=2), 1, 4, 64, H100)
    interleaved = time_of(ParallelConfig(pipeline=2, virtual=2), 1, 4, 64, H100)
    one_pass = (two.matrices + two.memory + two.host) / 4
    assert two.bubble == pytest.approx(one_pass, rel=0.01)
    assert interleaved.bubble == pytest.approx(two.bubble / 2, rel=0.1)
    slow = replace(H100, launch=1e-3)
    assert time_of(ParallelConfig(), 1, 1, 1, slow).host > 5 * time_of(ParallelConfig(), 1, 1, 1, H100).total


@pytest.mark.parametrize("sequence", [False, True])
def test_products_hide_no_other_messages_than_those_beside_them(sequence: bool) -> None:
    d, shape = 64, shape_of("softmax")
    load = Load(32, 2, ParallelConfig(tensor=2, sequence=sequence))
    slow = replace(H100, matrices=1.0, message=0.0)  # its products hide all that they can
    _, layer, _, head = unit_work(shape, load)
    one = 64 * d * 2 / 2 / H100.node  # a gather, or half of a sum, of 64 positions
    # Forward two sums, or with sequence parallelism as many bytes; then backward the gradients of two `row` outputs.
    assert stage_pass(slow, load, [layer]).tensor == pytest.approx((6 if sequence else 4) * one)
    # The cross-entropy sums the gradient of its inputs when its products are done; forward it gathers the inputs.
    assert stage_pass(slow, load, [head]).tensor == pytest.approx(2 * one)


def test_a_message_that_takes_longer_than_the_product_beside_it_is_seen() -> None:
    load, product = Load(32, 2, ParallelConfig(tensor=2)), Product(int(1e-3 * H100.matrices), 0)
    machine = replace(H100, message=0.0, launch=0.0)
    for sent, seen in ((0.9, 0.0), (1.5, 0.5)):  # milliseconds
        size = int(sent * 1e-3 * H100.node)
        work = UnitWork(Kernels(messages_backward=1, beside=(product,)), Sent(backward=size, beside=size))
        assert stage_pass(machine, load, [work]).tensor == pytest.approx(seen * 1e-3)


def test_on_a_cpu_nothing_overlaps() -> None:
    layout = ParallelConfig(tensor=2)
    apart, together = (time_of(layout, 1, 1, 1, replace(H100, asynchronous=on)) for on in (False, True))
    assert apart.tensor > together.tensor > 0
    assert apart.host > together.host
    assert apart.matrices == together.matrices
