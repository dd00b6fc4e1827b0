"""Named random streams that follow the sample.

Every random draw of a training step belongs to one sample and one purpose: it is a function of
(seed, name of the stream, global index of the sample) and of nothing else. So any layout of ranks, any
micro-batch size, any resume and any recomputation sees the same noise for the same sample, and no two
data-parallel ranks share noise by accident.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import Protocol

import torch
from torch import Tensor


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
    """A 63-bit seed for the stream `name` of one sample: a hash, so neighbouring samples are unrelated."""
    digest = blake2b(f"{seed}/{name}/{sample}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


@dataclass(frozen=True)
class SampleNoise:
    """The streams of one micro-batch: `samples` holds the global index of each of its B samples.

    `purpose` keeps streams apart that share seed and indices, such as those of training and of evaluation.
    """

    seed: int
    samples: Sequence[int]
    device: torch.device
    purpose: str = "training"

    def uniform(self, name: str, rows: int, *shape: int) -> Tensor:
        """Draws of U[0, 1), `[rows, B, *shape]` float32."""
        return self._stack(name, lambda generator: self._empty(rows, *shape).uniform_(generator=generator))

    def normal(self, name: str, rows: int, *shape: int) -> Tensor:
        """Standard normal draws, `[rows, B, *shape]` float32."""
        return self._stack(name, lambda generator: self._empty(rows, *shape).normal_(generator=generator))

    def integers(self, name: str, high: int, rows: int, *shape: int) -> Tensor:
        """Integers in [0, high), `[rows, B, *shape]` int64."""
        size = (rows, *shape)
        return self._stack(name, lambda generator: torch.randint(high, size, generator=generator, device=self.device))

    def _seed(self, name: str, sample: int) -> int:
        return stream_seed(self.seed, f"{self.purpose}/{name}", int(sample))

    def _empty(self, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float32, device=self.device)

    def _stack(self, name: str, draw: Callable[[torch.Generator], Tensor]) -> Tensor:
        generator = torch.Generator(self.device)
        columns = [draw(generator.manual_seed(self._seed(name, sample))) for sample in self.samples]
        return torch.stack(columns, dim=1)
