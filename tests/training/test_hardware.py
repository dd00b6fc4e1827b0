import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from calm_core.config.training_config import ParallelConfig
from calm_core.errors import UserError
from calm_core.training.hardware import backends, deterministic, explain_out_of_memory, known_model


def test_it_is_on_within_the_block_alone() -> None:
    from torch._inductor import config as compiler

    assert not torch.are_deterministic_algorithms_enabled()
    with deterministic(True):
        assert compiler.deterministic
        assert torch.are_deterministic_algorithms_enabled()
        assert not torch.is_deterministic_algorithms_warn_only_enabled()  # attention's backward would not be
    assert not torch.are_deterministic_algorithms_enabled()
    assert not compiler.deterministic
    with deterministic(False):
        assert not torch.are_deterministic_algorithms_enabled()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="a CPU gives the same bits anyway")
def test_a_gpu_adds_in_one_order() -> None:
    """Gradients of an embedding whose rows are used thousands of times each: atomic additions without the switch."""

    def gradient() -> Tensor:
        generator = torch.Generator("cuda").manual_seed(0)
        table = torch.zeros(8, 64, device="cuda", requires_grad=True)
        rows = torch.randint(8, (200_000,), device="cuda", generator=generator)
        (table[rows] * torch.randn(200_000, 64, device="cuda", generator=generator)).sum().backward()
        return table.grad

    with deterministic(True):
        assert torch.equal(gradient(), gradient())


def test_out_of_memory_names_the_key_to_lower() -> None:
    words = r"out of memory .*lower autoencoder_training\.micro_batch\.$"
    with pytest.raises(UserError, match=words), explain_out_of_memory("autoencoder_training"):
        torch.empty(1 << 55, dtype=torch.uint8)
    words = r"lower training\.micro_batch, set parallel\.recompute=full, or spread"
    with pytest.raises(UserError, match=words), explain_out_of_memory("training"):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.")
    with pytest.raises(UserError, match=r"out of memory \(MemoryError\): lower"), explain_out_of_memory("training"):
        raise MemoryError
    with pytest.raises(UserError, match=r"lower training\.micro_batch"), explain_out_of_memory("training"):
        raise dist.DistBackendError("ncclUnhandledCudaError: Call to CUDA failed.\nCuda failure 2 'out of memory'")


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("another failure"),
        dist.DistBackendError("NCCL communicator was aborted on rank 3"),
        torch.AcceleratorError("CUDA error: uncorrectable ECC error encountered"),
        NotImplementedError("no such kernel"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_an_error_that_is_no_lack_of_memory_stays_as_it_is(error: RuntimeError) -> None:
    """Its exit code asks for a retry; each of these is a `RuntimeError`."""
    with pytest.raises(type(error), match=str(error)), explain_out_of_memory("training"):
        raise error


@pytest.mark.parametrize(
    ("name", "model"),
    [
        ("NVIDIA H100 80GB HBM3", "H100"),
        ("NVIDIA H100 PCIe", "H100 PCIe"),
        ("NVIDIA H100 NVL", "H100 NVL"),
        ("NVIDIA H200", "H200"),
        ("NVIDIA GH200 480GB", "GH200"),
        ("NVIDIA A100-SXM4-80GB", "A100"),
        ("NVIDIA A100 80GB PCIe", "A100"),
        ("NVIDIA A10G", "A10G"),
        ("NVIDIA A10", "A10"),
        ("NVIDIA L40S", "L40S"),
        ("NVIDIA L4", "L4"),
        ("Tesla T4", None),
    ],
)
def test_cards_of_one_name_have_their_own_peaks(name: str, model: str | None) -> None:
    assert known_model(name) == model


def test_the_log_says_whether_training_compiles() -> None:
    cpu = torch.device("cpu")
    assert "torch, eager" in backends(cpu, ParallelConfig())
    assert "torch, compiled" in backends(cpu, ParallelConfig(compile="always"))
