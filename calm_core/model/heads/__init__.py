"""What a generative head is: a network that learns and draws, the target it learns from, and its costs.

A head is one module of this package, named in `config.model_config.HEADS`. It has the functions of `HeadModule`:
everything else in the project reaches a head through them.
"""

from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, NamedTuple, Protocol

from torch import Tensor

from calm_core.config.model_config import HEADS, ModelShape
from calm_core.model.costs import Activations, HeadCosts, Kernels, Load
from calm_core.model.noise import Noise

if TYPE_CHECKING:
    from calm_core.megatron import TransformerConfig


@dataclass(frozen=True)
class Target:
    """The chunk that follows each position: its tokens, and the autoencoder's posterior of them.

    Attributes:
        tokens: `[S, B, K]` int64.
        mean: `[S, B, l]`, or None where only tokens are known (the softmax head needs no more).
        log_std: `[S, B, l]`, or None likewise.
        weights: of the positions in the loss that is minimised, `[S, B]`, up to a factor; None if all weigh the same.
    """

    tokens: Tensor
    mean: Tensor | None = None
    log_std: Tensor | None = None
    weights: Tensor | None = None

    def latents(self, draws: Tensor) -> Tensor:
        """Draws of the posterior `[S, B, N, l]` from standard normal `draws` `[S, B, N, l]`."""
        return self.mean.unsqueeze(2) + self.log_std.exp().unsqueeze(2) * draws


class HeadLoss(NamedTuple):
    """The loss at each position this rank works on, and further terms to report.

    Attributes:
        loss: `[S', B]` float32, S' the rank's own positions.
        terms: further `[S', B]` tensors by name, detached.
        side: `[S', B]`, minimised in addition where the model has a side loss; no part of the head's loss.
    """

    loss: Tensor
    terms: dict[str, Tensor]
    side: Tensor | None = None


class GenerativeHead(Protocol):
    """A head's network. It makes no random draws of its own: all noise is an argument."""

    def loss(self, hidden: Tensor, target: Target, noise: Noise) -> HeadLoss:
        """The training loss of hidden states `[S', B, d]` against the chunk that follows each position."""
        ...

    def sample(self, hidden: Tensor, noise: Noise, samples: int) -> Tensor:
        """`samples` draws of the next chunk per position: latents `[S', B, N, l]`, or tokens `[S', B, N, 1]`."""
        ...


class HeadModule(Protocol):
    """The functions of a head's module."""

    def build(self, config: "TransformerConfig", shape: ModelShape) -> GenerativeHead:
        """The network of a model of this shape."""
        ...

    def costs(self, shape: ModelShape) -> HeadCosts:
        """Weights, evaluations and FLOPs of the head of a model of this shape, without its final norm."""
        ...

    def activations(self, shape: ModelShape, load: Load) -> Activations:
        """Bytes of the final norm, the head and its loss for one micro-batch."""
        ...

    def kernels(self, shape: ModelShape, load: Load) -> Kernels:
        """Kernels of the final norm, the head and its loss for one micro-batch, and the bytes they move."""
        ...


def head_module(kind: str) -> HeadModule:
    """The module of this kind of head.

    Raises:
        KeyError: if the kind is not registered.
    """
    return import_module(HEADS[kind].module)
