"""The softmax head: a distribution over the next token; with chunks of one token, the autoregressive baseline."""

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.tensor_parallel import scatter_to_sequence_parallel_region, vocab_parallel_cross_entropy
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from calm_core.config.model_config import padded_vocabulary
from calm_core.model.heads.protocol import HeadLoss, Target
from calm_core.model.layers import all_positions, column, own_positions
from calm_core.model.noise import Noise


class SoftmaxHead(MegatronModule):
    """log P(token | h) = log softmax(W h) over the vocabulary, whose rows tensor-parallel ranks share out.

    With sequence parallelism the matrix gathers the hidden states, so each rank has its share of the logits of all
    positions, but hands out losses for its own positions only. The loss of one position needs gradients in
    every rank's share; so where the losses are handed out, the backward pass gathers their gradients: each rank then
    takes the gradient of the whole loss for its rows of W, and the hidden states' gradients are summed over the ranks
    and shared out by the matrix.
    """

    def __init__(self, config: TransformerConfig, vocabulary: int) -> None:
        super().__init__(config=config)
        self.vocabulary = vocabulary
        self.out = column(config, config.hidden_size, padded_vocabulary(vocabulary), bias=False)

    def loss(self, hidden: Tensor, target: Target, noise: Noise) -> HeadLoss:
        """Cross-entropy in nats of the next token; it takes no noise."""
        return HeadLoss(-self.log_probabilities(hidden, target.tokens.squeeze(-1)), {})

    def log_probabilities(self, hidden: Tensor, tokens: Tensor) -> Tensor:
        """log P of one token at each position, float32 `[S', B]`: hidden `[S', B, d]`, tokens `[S, B]`."""
        losses = vocab_parallel_cross_entropy(self._logits(hidden), tokens.contiguous())
        return -(scatter_to_sequence_parallel_region(losses) if self.config.sequence_parallel else losses)

    @torch.no_grad()
    def sample(self, hidden: Tensor, noise: Noise, samples: int) -> Tensor:
        """`samples` independent tokens per position, `[S', B, N, 1]`."""
        draws = noise.uniform("softmax/sample", all_positions(hidden, self.config), samples)
        return own_positions(_draw(self._logits(hidden), draws), self.config).unsqueeze(-1)

    def _logits(self, hidden: Tensor) -> Tensor:
        """This rank's share of the logits of all positions, float32 `[S, B, V / TP]`; padding is impossible."""
        logits, _ = self.out(hidden)
        first = parallel_state.get_tensor_model_parallel_rank() * logits.shape[-1]
        padding = torch.arange(first, first + logits.shape[-1], device=logits.device) >= self.vocabulary
        return logits.float().masked_fill(padding, -torch.inf)


def _draw(logits: Tensor, draws: Tensor) -> Tensor:
    """Tokens `[S, B, N]` where the cumulative distribution passes the uniform draws `[S, B, N]`.

    No rank sees all the logits `[S, B, V / TP]`: each counts how many of its tokens a draw has passed, and the sum of
    the counts is the token.
    """
    group, rank = parallel_state.get_tensor_model_parallel_group(), parallel_state.get_tensor_model_parallel_rank()
    largest = logits.max(dim=-1, keepdim=True).values
    dist.all_reduce(largest, dist.ReduceOp.MAX, group)
    # float64: in float32 the sum over a large vocabulary would swallow rare tokens.
    passed = (logits - largest).double().exp().cumsum(dim=-1)
    totals = passed.new_empty(dist.get_world_size(group), *passed.shape[:-1], 1)
    dist.all_gather(list(totals), passed[..., -1:].contiguous(), group)
    sought = draws.double() * totals.sum(0) - totals[:rank].sum(0)
    tokens = torch.searchsorted(passed, sought, right=True)
    dist.all_reduce(tokens, group=group)
    return tokens
