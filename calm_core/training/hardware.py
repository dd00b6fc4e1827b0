"""What this machine can do, what of it is in use, and how it is made to repeat itself."""

import importlib.util
import os
import resource
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch

# Dense bf16 peak in FLOP/s, by the vendor's data sheets.
_BF16_PEAKS = {
    "GB200": 2500e12,
    "B200": 2250e12,
    "H200": 989e12,
    "GH200": 989e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40": 181e12,
    "A10": 125e12,
}


def peak_flops(device: torch.device, dtype: torch.dtype) -> tuple[float, str]:
    """FLOP/s that one rank could reach at best, and where the figure is from.

    A known GPU has its data sheet's bf16 peak; anything else is measured by a large matrix product.
    """
    if device.type == "cuda" and dtype == torch.bfloat16:
        name = torch.cuda.get_device_name(device)
        for part, peak in _BF16_PEAKS.items():
            if part in name:
                return peak, f"data sheet of {part}"
    return _measured_peak(device, dtype), "measured matrix product"


def _measured_peak(device: torch.device, dtype: torch.dtype, size: int = 1024, seconds: float = 0.3) -> float:
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    best, end = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < end:
        start = time.perf_counter()
        a @ b
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best


def peak_memory(device: torch.device) -> int:
    """Bytes this process has held at most: of the GPU's allocator, or resident on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def backends(device: torch.device) -> str:
    """Which implementation of norms, attention and Adam is active, and which optional packages were found."""
    found = [n for n in ("apex", "transformer_engine") if importlib.util.find_spec(n) is not None]
    attention = (
        "scaled_dot_product_attention (FlashAttention)" if device.type == "cuda" else "scaled_dot_product_attention"
    )
    return (
        f"norms: torch rms_norm; attention: torch {attention}; Adam: torch fused AdamW under DeepSpeed ZeRO-1; "
        f"optional packages found: {', '.join(found) or 'none'}"
    )


# Space of its own for each stream of cuBLAS, without which its sums may be ordered differently from run to run.
_CUBLAS = {"CUBLAS_WORKSPACE_CONFIG": ":4096:8"}


@contextmanager
def deterministic(wanted: bool) -> Iterator[None]:
    """Within the block, only algorithms that give the same bits each time, if `wanted`.

    A CPU with a fixed number of threads does so anyway. A GPU does not: attention, embeddings and cuBLAS add in an
    order that varies, so that two runs drift apart from the last bit on. Must be entered before the first matrix
    product on the GPU, for cuBLAS reads its setting once.
    """
    if not wanted:
        yield
        return
    os.environ.update({name: value for name, value in _CUBLAS.items() if name not in os.environ})
    before = torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory
    torch.utils.deterministic.fill_uninitialized_memory = False  # every buffer here is written before it is read
    torch.use_deterministic_algorithms(True, warn_only=True)  # what has no such form is named in a warning
    warnings.filterwarnings("once", message=".*deterministic.*")
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0])
        torch.utils.deterministic.fill_uninitialized_memory = before[1]
