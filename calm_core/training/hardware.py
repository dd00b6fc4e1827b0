"""The machine: its peak, its memory, the implementations in use, deterministic algorithms, and a profile of steps."""

import os
import re
import resource
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from types import TracebackType

import psutil
import torch
from torch.profiler import ProfilerActivity, profile

from calm_core.config.experiment import ProfileConfig
from calm_core.config.training_config import ParallelConfig
from calm_core.distributed.topology import Topology
from calm_core.errors import UserError

# Dense bf16 peak in FLOP/s by the vendor's data sheets, for devices whose name has these words: the first that fits.
_BF16_PEAKS = {
    "GB200": 2500e12,
    "B200": 2250e12,
    "H200 NVL": 835e12,
    "H200": 989e12,
    "GH200": 989e12,
    "H100 NVL": 835e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "L40": 181e12,
    "L4": 121e12,
    "A10G": 70e12,
    "A10": 125e12,
}

ROWS = 30  # operators in the table


def peak_flops(device: torch.device, dtype: torch.dtype) -> tuple[float, str]:
    """The peak FLOP/s of one rank, and the source of the figure.

    For a known GPU it is the bf16 peak of its data sheet; anything else is measured by a large matrix product.
    """
    if device.type == "cuda" and dtype == torch.bfloat16:
        model = known_model(torch.cuda.get_device_name(device))
        if model:
            return _BF16_PEAKS[model], f"data sheet of {model}"
    return _measured_peak(device, dtype, 8192 if device.type == "cuda" else 1024), "measured matrix product"


def known_model(name: str) -> str | None:
    """The model of a GPU with this device name, as the table of peaks has it."""
    words = set(re.split(r"[ -]", name))
    return next((model for model in _BF16_PEAKS if words.issuperset(model.split())), None)


@cache
def _measured_peak(device: torch.device, dtype: torch.dtype, size: int, seconds: float = 0.3) -> float:
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    best, end = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < end:
        start = time.perf_counter()
        a @ b
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best


def device_name(device: torch.device) -> str:
    """The name of a GPU, or "CPU"."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"


def peak_memory(device: torch.device) -> int:
    """The peak memory of this process in bytes: of the GPU's allocator, or resident on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def free_memory(device: torch.device) -> int:
    """Bytes that this rank may take: what is free on its GPU, or its share of what is available on the host."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return psutil.virtual_memory().available // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def backends(device: torch.device, layout: ParallelConfig) -> str:
    """Which implementation of attention, pointwise work and Adam is active."""
    attention, pointwise = "", "compiled" if layout.compiles(device.type) else "eager"
    if device.type == "cuda":
        kernels = {"cuDNN": torch.backends.cuda.cudnn_sdp_enabled(), "Flash": torch.backends.cuda.flash_sdp_enabled()}
        attention = f" (of {' and '.join(name for name, enabled in kernels.items() if enabled) or 'math'}, by shape)"
    return (
        f"attention: torch scaled_dot_product_attention{attention}; norms and activations: torch, {pointwise} in the "
        "CALM network; Adam: torch fused AdamW under DeepSpeed ZeRO-1"
    )


# What says so where an error has no class of its own: the CPU's allocator, CUDA and NCCL, cuBLAS.
_OUT_OF_MEMORY = ("can't allocate memory", "out of memory", "CUBLAS_STATUS_ALLOC_FAILED")


@contextmanager
def explain_out_of_memory(section: str) -> Iterator[None]:
    """Raise a failure to allocate memory as a `UserError`: another try with the same settings would fail the same way.

    Any other error passes: a lost connection to another rank, for example, is worth a retry.

    Args:
        section: section of the configuration with the training settings.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        known = isinstance(error, torch.OutOfMemoryError | MemoryError)
        if not known and not any(words in str(error) for words in _OUT_OF_MEMORY):
            raise
        first, *_ = str(error).splitlines() or [type(error).__name__]
        advice = [f"lower {section}.micro_batch"]
        if section == "training":  # the autoencoder has no other layout
            advice += ["set parallel.recompute=full", "or spread the model by parallel.tensor or parallel.pipeline"]
        raise UserError(f"out of memory ({first}): {', '.join(advice)}.") from error


# A workspace for each cuBLAS stream; without it the order of its sums may differ between runs.
_CUBLAS = {"CUBLAS_WORKSPACE_CONFIG": ":4096:8"}


@contextmanager
def deterministic(wanted: bool) -> Iterator[None]:
    """Within the block, use only algorithms that give the same bits each time, if `wanted`.

    A CPU with a fixed number of threads always does. On a GPU attention, embeddings and cuBLAS add in varying order.
    Must be entered before the first matrix product on the GPU, because cuBLAS reads its setting once. An operation that
    has no deterministic form raises an error: with `warn_only` PyTorch would silently run attention's non-deterministic
    backward. Compiled kernels take their block sizes, and so the order of their sums, by rule and not by trial.
    """
    if not wanted:
        yield
        return
    from torch._inductor import config as compiler  # takes a second

    os.environ.update({name: value for name, value in _CUBLAS.items() if name not in os.environ})
    before = torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory
    torch.utils.deterministic.fill_uninitialized_memory = False  # every buffer here is written before it is read
    torch.use_deterministic_algorithms(True)
    try:
        with compiler.patch(deterministic=True):
            yield
    finally:
        torch.use_deterministic_algorithms(before[0])
        torch.utils.deterministic.fill_uninitialized_memory = before[1]


class StepProfiler:
    """Profiles those steps of the configuration that are not done yet.

    Each rank writes `rank-R.json.gz`, which chrome://tracing and Perfetto open, and `rank-R.txt` into the folder.
    """

    def __init__(self, config: ProfileConfig, folder: Path, topology: Topology, done: int) -> None:
        self._first, self._last = config.steps or (0, 0)
        self._folder, self._topology = folder, topology
        self._done = done  # steps done when the run starts or resumes
        self._profile: profile | None = None
        self._profiled: list[int] = []

    def __enter__(self) -> "StepProfiler":
        if 0 < self._last <= self._done:
            steps = f"profile.steps=[{self._first}, {self._last}]"
            self._topology.say(f"{steps}: nothing is profiled, the run resumes after step {self._done}")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._profile is not None:  # the run ends inside the range
            self._finish(self._profile)

    def begin(self, step: int) -> None:
        """Called before step `step`."""
        if not self._first <= step <= self._last:
            return
        if self._profile is None:
            activities = [ProfilerActivity.CPU]
            if self._topology.device.type == "cuda":
                activities.append(ProfilerActivity.CUDA)
            self._profile = profile(activities=activities)
            self._profile.start()
        self._profiled.append(step)

    def end(self, step: int) -> None:
        """Called after step `step`."""
        if self._profile is not None and step == self._last:
            self._finish(self._profile)

    def _finish(self, profiled: profile) -> None:
        profiled.stop()
        self._profile = None
        self._folder.mkdir(parents=True, exist_ok=True)
        name = f"rank-{self._topology.rank}"
        profiled.export_chrome_trace(str(self._folder / f"{name}.json.gz"))
        heaviest = f"self_{self._topology.device.type}_time_total"
        (self._folder / f"{name}.txt").write_text(profiled.key_averages().table(sort_by=heaviest, row_limit=ROWS))
        self._topology.say(f"profile of steps {self._profiled[0]} to {self._profiled[-1]}: {self._folder}")
