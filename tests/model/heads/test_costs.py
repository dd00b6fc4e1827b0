"""What every head says it costs, against what its network does."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from calm_core.config.model_config import HEADS, BackboneConfig, HeadConfig, ModelShape
from calm_core.config.training_config import ParallelConfig
from calm_core.distributed.topology import Topology
from calm_core.model.backbone import transformer_config
from calm_core.model.costs import Load, target_bytes
from calm_core.model.heads import GenerativeHead, HeadLoss, Target, head_module
from calm_core.model.noise import SampleNoise
from calm_core.plan import flops, memory, step_time
from calm_core.reference.names import calm_links

S, B, D, L, V = 32, 2, 64, 16, 128
BACKBONE = BackboneConfig(layers=2, hidden=D, ffn=96, heads=4)
WIDTHS = {torch.float32: 4, torch.bfloat16: 2}


def shape_of(kind: str, samples: int = 4) -> ModelShape:
    reads_tokens = HEADS[kind].reads_tokens
    head = HeadConfig(kind=kind, blocks=2, samples=samples, target_samples=8, target_group=4)
    return ModelShape(BACKBONE, head, V, k=1 if reads_tokens else 4, latent=0 if reads_tokens else L)


def build(shape: ModelShape, dtype: torch.dtype = torch.float32) -> GenerativeHead:
    head = head_module(shape.head.kind).build(transformer_config(BACKBONE, ParallelConfig(), dtype), shape)
    for parameter in head.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return head


def target_of(shape: ModelShape) -> Target:
    mean = torch.randn(S, B, shape.latent)
    return Target(torch.randint(V, (S, B, shape.k)), mean, torch.full_like(mean, -1.2))


def loss_of(head: GenerativeHead, hidden: Tensor, target: Target) -> HeadLoss:
    return head.loss(hidden, target, SampleNoise(0, range(B), torch.device("cpu")))


@pytest.mark.parametrize("dtype", WIDTHS)
@pytest.mark.parametrize("samples", [2, 8])
@pytest.mark.parametrize("kind", HEADS)
def test_the_activations_kept_are_the_tensors_that_autograd_saves(
    topology: Topology, kind: str, samples: int, dtype: torch.dtype
) -> None:
    shape = shape_of(kind, samples)
    head, target = build(shape, dtype), target_of(shape)
    others = [*head.parameters(), target.tokens, target.mean, target.log_std]
    known, saved = {tensor.untyped_storage()._cdata for tensor in others}, {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in known:
            saved[storage._cdata] = storage
        return tensor

    hidden = torch.randn(S, B, D, dtype=dtype, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = loss_of(head, hidden, target)
    assert output.loss.shape == (S, B)
    load = Load(S, B, ParallelConfig(), WIDTHS[dtype], "cpu")
    measured = sum(storage.nbytes() for storage in saved.values()) + load.rms_norm(D) + target_bytes(shape, load)
    predicted = head_module(kind).activations(shape, load).kept
    print(f"{kind}, {samples} samples, {dtype}: predicted {predicted}, measured {measured}")
    assert predicted == pytest.approx(measured, rel=0.015)  # norms keep two numbers of each vector as well


@pytest.mark.parametrize("kind", HEADS)
def test_weights_and_flops_are_those_of_the_network(topology: Topology, kind: str) -> None:
    shape = shape_of(kind)
    head, target, costs = build(shape), target_of(shape), head_module(kind).costs(shape)
    assert costs.weights.parameters == sum(parameter.numel() for parameter in head.parameters())
    split = sum(p.numel() for p in head.parameters() if getattr(p, "tensor_model_parallel", False))
    assert costs.weights.split == split
    # With gradients, the cross-entropy computes them in the forward pass.
    with torch.set_grad_enabled(kind != "softmax"), FlopCounterMode(display=False) as counter:
        loss_of(head, torch.randn(S, B, D), target)
    assert counter.get_total_flops() == S * B * (costs.training_weights.forward + costs.loss_forward)


@pytest.mark.parametrize("kind", ["energy", "diffusion", "flow"])
def test_costs_grow_with_the_samples_of_the_loss(kind: str) -> None:
    few, many = (head_module(kind).costs(shape_of(kind, samples)) for samples in (2, 8))
    assert few.weights == many.weights
    assert (few.training_evaluations, many.training_evaluations) == (2, 8)
    assert few.training_weights.forward < many.training_weights.forward < 4 * few.training_weights.forward


def test_a_kind_that_is_not_registered_is_an_error_everywhere() -> None:
    head = shape_of("energy").head
    object.__setattr__(head, "kind", "unheard-of")
    shape = replace(shape_of("energy"), head=head)
    load = Load(S, B, ParallelConfig())
    for asked in (
        lambda: flops.parameters(shape),
        lambda: memory.activations(shape, load),
        lambda: step_time.unit_kernels(shape, load),
        lambda: step_time.unit_messages(shape, load),
        lambda: calm_links(shape),
    ):
        with pytest.raises(KeyError, match="unheard-of"):
            asked()
