"""Named random streams that follow the sample.

Every random draw of a training step belongs to one sample and one purpose: it is a function of (seed, name of the
stream, global index of the sample) and of the kind of device. So any layout of ranks, any micro-batch size, any resume
and any recomputation has the same noise for the same sample, and no two data-parallel ranks have the same noise by
accident. CPU and CUDA generators are different, so the noise of a run on a CPU is not that of a run on a GPU.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import Protocol

import torch
from torch import Tensor

from calm_core.model.costs import CUDA_BLOCK


class Noise(Protocol):
    """A source of named draws for a micro-batch of B samples.

    Each method returns `[rows, B, *shape]`: `rows` along the sequence (positions, or groups of positions),
    one column per sample. The same name always yields the same draws: use one name per purpose.
    """

    def uniform(self, name: str, rows: int, *shape: int) -> Tensor:
        """float32 in [0, 1)."""
        ...

    def normal(self, name: str, rows: int, *shape: int) -> Tensor:
        """float32, standard normal."""
        ...

    def integers(self, name: str, high: int, rows: int, *shape: int) -> Tensor:
        """int64 in [0, high)."""
        ...


def stream_seed(seed: int, name: str, sample: int) -> int:
    """A 63-bit seed for the stream `name` of one sample: a hash, so that neighbouring samples are unrelated.

    CUDA generators use all its bits, torch's CPU generator (mt19937) the lower 32. So on a CPU two given streams are
    equal with probability 2^-32, and among n samples about n^2 / 2^33 pairs have the same draws of one name: of the 64
    million samples in 250,000 steps of 256, one in 67 has the draws of some other sample, and two samples of the same
    step do in about 2 of the steps. The distribution of the draws is not affected.
    """
    digest = blake2b(f"{seed}/{name}/{sample}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


@dataclass(frozen=True)
class SampleNoise:
    """The streams of one micro-batch: `samples` holds the global index of each of its B samples.

    `purpose` separates streams that share seed and indices, such as those of training and of evaluation.
    """

    seed: int
    samples: Sequence[int]
    device: torch.device
    purpose: str = "training"

    def uniform(self, name: str, rows: int, *shape: int) -> Tensor:
        """Draws of U[0, 1), `[rows, B, *shape]` float32."""
        return self._stack(name, (rows, *shape), torch.float32, Tensor.uniform_)

    def normal(self, name: str, rows: int, *shape: int) -> Tensor:
        """Standard normal draws, `[rows, B, *shape]` float32."""
        return self._stack(name, (rows, *shape), torch.float32, Tensor.normal_)

    def integers(self, name: str, high: int, rows: int, *shape: int) -> Tensor:
        """Integers in [0, high), `[rows, B, *shape]` int64."""

        def fill(block: Tensor, generator: torch.Generator) -> None:
            block.random_(high, generator=generator)

        return self._stack(name, (rows, *shape), torch.int64, fill)

    def _seed(self, name: str, sample: int) -> int:
        return stream_seed(self.seed, f"{self.purpose}/{name}", int(sample))

    def _stack(self, name: str, shape: tuple[int, ...], dtype: torch.dtype, fill: Callable[..., object]) -> Tensor:
        """One column per sample, filled in place by `fill(block, generator=...)`."""
        generator = torch.Generator(self.device)
        columns = []
        for sample in self.samples:
            generator.manual_seed(self._seed(name, sample))
            column = torch.empty(shape, dtype=dtype, device=self.device)
            for block in blocks(column, self.device.type):
                fill(block, generator=generator)
            columns.append(column)
        return torch.stack(columns, dim=1)


def blocks(tensor: Tensor, device: str) -> Sequence[Tensor]:
    """The blocks of a contiguous tensor to draw one by one, flat: of `CUDA_BLOCK` numbers on "cuda", one on "cpu"."""
    flat = tensor.view(-1)
    return flat.split(CUDA_BLOCK) if device == "cuda" else [flat]
