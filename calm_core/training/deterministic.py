"""The same bits from the same run."""

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch

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
