"""Compiled pointwise work computes what the eager one does, in far fewer kernels."""

from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from calm_core.config.model_config import BackboneConfig, HeadConfig, ModelShape
from calm_core.config.training_config import ParallelConfig
from calm_core.distributed.topology import distributed
from calm_core.model import pointwise
from calm_core.model.backbone import transformer_config
from calm_core.model.calm import CalmModel
from calm_core.model.heads import Target
from calm_core.model.noise import SampleNoise
from calm_core.model.parameters import initialize

S, B, K, LATENT = 16, 2, 4, 8

# Operations of a step of `calm_m` before its pointwise work was fused, on a CPU: 1,970 with widths of any size.
THIRD = 1970 // 3

# Composed of other operations, or done without a kernel.
NO_KERNEL = """
    linear matmul layer_norm rms_norm scaled_dot_product_attention contiguous to reshape flatten unflatten view t
    transpose _unsafe_view expand permute slice split split_with_sizes unsqueeze squeeze detach as_strided select
    alias unbind chunk narrow _reshape_alias empty empty_like empty_strided new_empty item _local_scalar_dense
    result_type view_as expand_as type_as lift_fresh mT square linalg_vecdot
"""


def shape(kind: str = "energy", layers: int = 2) -> ModelShape:
    head = HeadConfig(kind, samples=8, target_samples=8, target_group=4)
    backbone = BackboneConfig(layers=layers, hidden=32, ffn=80, heads=4, kv_groups=2)
    return ModelShape(backbone, head, vocabulary=128, k=K, latent=LATENT)


def model(of: ModelShape, layout: ParallelConfig, compiled: bool) -> CalmModel:
    """A model none of whose weights is zero."""
    built = CalmModel(transformer_config(of.backbone, layout, compiled=compiled), of)
    for parameter in built.parameters():
        parameter.starts_at_zero = False
    initialize([built], std=0.05, seed=0)
    return built


def step(model: CalmModel) -> dict[str, torch.Tensor]:
    """Loss and gradients by name."""
    model.zero_grad()
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(model.shape.vocabulary, (B, S, K), generator=generator)
    mean = torch.randn(S, B, LATENT, generator=generator)
    target = Target(tokens.transpose(0, 1), mean, torch.full_like(mean, -1.0))
    loss = model(tokens, target, SampleNoise(0, range(B), torch.device("cpu"))).loss.mean()
    loss.backward()
    return {"loss": loss.detach(), **{name: p.grad for name, p in model.named_parameters()}}


def assert_equal(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> None:
    assert found.keys() == wanted.keys()
    apart = {name: float((found[name] - value).norm() / value.norm()) for name, value in wanted.items()}
    assert max(apart.values()) < 2e-6, apart


@pytest.fixture(autouse=True)
def compiler() -> Iterator[None]:
    """A compiler without functions of earlier tests."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    pointwise.compiled.cache_clear()
    yield
    pointwise.compiled.cache_clear()


@pytest.mark.parametrize("kind", ["energy", "diffusion"])
def test_traced_functions_are_those_of_eager_training(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the tracer alone, without generated code; recomputation, layer by layer or of attention, changes nothing."""
    traced = set()

    def trace(function: Any) -> Any:
        traced.add(function.__name__)
        return torch.compile(function, backend="aot_eager", fullgraph=True, dynamic=False)

    monkeypatch.setattr(pointwise, "compiled", trace)
    with distributed(ParallelConfig()):
        wanted = step(model(shape(kind), ParallelConfig(), compiled=False))
        assert not traced
        for recompute in ("none", "selective", "full"):
            assert_equal(step(model(shape(kind), ParallelConfig(recompute=recompute), compiled=True)), wanted)
    assert traced >= {"rms_norm", "rotated_heads", "add_rms_norm", "swiglu", "silu"}


def test_evaluation_is_not_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(function: Any) -> Any:
        raise AssertionError(f"{function} is compiled")

    monkeypatch.setattr(pointwise, "compiled", refuse)
    with distributed(ParallelConfig()):
        built = model(shape(), ParallelConfig(), compiled=True)
        with pytest.raises(AssertionError, match="is compiled"):
            step(built)
        step(built.eval())


@pytest.mark.parametrize(("chosen", "device", "compiles"), [("auto", "cuda", True), ("auto", "cpu", False)])
def test_a_gpu_compiles_by_default(chosen: str, device: str, compiles: bool) -> None:
    assert ParallelConfig(compile=chosen).compiles(device) is compiles
    assert ParallelConfig(compile="always").compiles(device)
    assert not ParallelConfig(compile="never").compiles(device)


@pytest.mark.slow
@pytest.mark.timeout(900)  # a minute of the C++ compiler's on a quiet machine
def test_generated_kernels_are_a_third_of_the_operations(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a forward and a backward pass of CALM-M's layers and blocks."""
    monkeypatch.setattr("torch._inductor.config.cpp.enable_kernel_profile", True)
    of = shape(layers=16)
    with distributed(ParallelConfig()):
        wanted, compiled = step(model(of, ParallelConfig(), compiled=False)), model(of, ParallelConfig(), compiled=True)
        assert_equal(step(compiled), wanted)
        with profile(activities=[ProfilerActivity.CPU]) as profiled:
            step(compiled)
    kernels = launches(profiled)
    print(kernels.total(), kernels)
    assert kernels.total() <= THIRD
    assert not torch._dynamo.utils.counters["graph_break"]


def launches(profiled: profile) -> Counter[str]:
    """How often each kernel is started: operations of torch by name, generated kernels by that of their graph."""
    found: Counter[str] = Counter()

    def walk(event: Any) -> None:
        name = event.name.removeprefix("aten::")
        if event.name.startswith("graph_") or (name != event.name and name not in NO_KERNEL.split()):
            found[name] += 1
        else:
            for inner in event.cpu_children:
                walk(inner)

    for event in profiled.events():
        if event.cpu_parent is None:
            walk(event)
    return found
