"""What every generative head can do, and the target it learns from."""

from dataclasses import dataclass
from typing import NamedTuple, Protocol

from torch import Tensor

from calm_core.model.noise import Noise


@dataclass(frozen=True)
class Target:
    """The chunk that follows each position: its tokens, and the autoencoder's posterior of them.

    Attributes:
        tokens: `[S, B, K]` int64.
        mean: `[S, B, l]`, or None where only tokens are known (the softmax head needs no more).
        log_std: `[S, B, l]`, or None likewise.
    """

    tokens: Tensor
    mean: Tensor | None = None
    log_std: Tensor | None = None

    def latent(self, draws: Tensor) -> Tensor:
        """A sample of the posterior from standard normal draws `[S, B, l]`."""
        return self.mean + self.log_std.exp() * draws


class HeadLoss(NamedTuple):
    """The loss at each position this rank works on, and the named terms worth watching.

    Attributes:
        loss: `[S', B]` float32, S' the rank's own positions.
        terms: further `[S', B]` tensors by name, detached.
    """

    loss: Tensor
    terms: dict[str, Tensor]


class GenerativeHead(Protocol):
    """A head: learns by `loss`, speaks by `sample`. It never draws by itself: all noise is an argument."""

    def loss(self, hidden: Tensor, target: Target, noise: Noise) -> HeadLoss:
        """The training loss of hidden states `[S', B, d]` against the chunk that follows each position."""
        ...

    def sample(self, hidden: Tensor, noise: Noise, samples: int) -> Tensor:
        """`samples` draws of the next chunk per position: latents `[S', B, N, l]`, or tokens `[S', B, N, 1]`."""
        ...
