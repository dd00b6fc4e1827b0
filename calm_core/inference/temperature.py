"""Sampling at a temperature with nothing but a sampler: no probabilities, no logits (paper, section 5).

The aim is P(x)^(1/T) / Z for chunks x of a sampler of P and T in (0, 1]. With 1/T = n + a, n whole and 0 <= a < 1,
`sample_exact` is exact for every T and costs many draws unless P is peaked; `sample_batch` takes T = 1/n and a
fixed number of draws, and is exact only as their number grows.
"""

import math
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import count
from typing import NamedTuple

import torch
from torch import Tensor

from calm_core.config.generation_config import inverse_parts, whole_inverse
from calm_core.errors import UserError

Sampler = Callable[[int, torch.Generator], Tensor]

"""`sampler(count, generator)`: independent draws for one context, `[count, K]` int64."""


class CallLimitError(UserError):
    """Exact sampling used up its draws before it accepted one."""


class ExactSample(NamedTuple):
    """A chunk `[K]` from P^(1/T)/Z, and the draws from P that it took."""

    tokens: Tensor
    calls: int


class BatchSample(NamedTuple):
    """Chunks `[..., K]`, and how many equal draws each rests on, `[...]`: below n the temperature was not reached."""

    tokens: Tensor
    agreement: Tensor


def sample_exact(
    sampler: Sampler, temperature: float, generator: torch.Generator, max_calls: int, block: int = 1
) -> ExactSample:
    """One chunk from P^(1/T)/Z exactly, for 0 < T <= 1.

    A round draws n times; if all agree on x, which has probability P(x)^n, a Bernoulli factory accepts with
    P(x)^a: its i-th draw accepts when it equals x and rejects with probability a/i when it does not. A round that
    fails is followed by another. `expected_calls` is the mean number of draws.

    Args:
        sampler: draws from P for one context.
        temperature: T.
        generator: all randomness, the sampler's included.
        max_calls: most draws used.
        block: draws asked of the sampler at once; those left over are discarded and not counted.

    Raises:
        CallLimitError: `max_calls` draws did not suffice.
        UserError: T is outside (0, 1].
    """
    whole, fraction = inverse_parts(temperature)
    calls = 0
    draws = _draws(sampler, generator, temperature, max_calls, block)

    def draw() -> Tensor:
        nonlocal calls
        calls += 1
        return next(draws)

    while True:
        chunk, *others = [draw() for _ in range(whole)]
        if all(torch.equal(chunk, other) for other in others) and _power_coin(draw, chunk, fraction, generator):
            return ExactSample(chunk, calls)


def expected_calls(probabilities: Tensor, temperature: float) -> float:
    """Mean draws of `sample_exact` for a known P: (n + sum P^(n+a-1)) / sum P^(n+a), or n / sum P^n where a = 0.

    A call is one draw from P. A round takes n, and, once they agree on x, the factory takes P(x)^(a-1) on average; it
    succeeds with probability sum P^(n+a). As T nears 1 from below this tends to 1 + the size of the support.
    """
    whole, fraction = inverse_parts(temperature)
    p = probabilities[probabilities > 0].double()
    factory = (p ** (whole + fraction - 1)).sum().item() if fraction else 0.0
    return (whole + factory) / (p ** (whole + fraction)).sum().item()


def estimate_calls(samples: Tensor, temperature: float, log_weights: Tensor | None = None) -> float:
    """`expected_calls` estimated from draws `[N, K]` of one context; infinite if no chunk was drawn n times.

    P(x)^n is estimated without bias by the fraction of the n-tuples of draws that agree on x, the fractional power by
    the fraction of draws that are x; rare chunks that the draws missed make it an underestimate for fractional 1/T.
    With `log_weights` `[N]` the draws represent the P under which they have these weights.
    """
    whole, fraction = inverse_parts(temperature)
    log_weights = torch.zeros(len(samples)) if log_weights is None else log_weights
    _, agreeing, among_all = agreeing_tuples(samples, log_weights, whole)
    agree, frequency = agreeing[:, whole] / among_all[whole], agreeing[:, 1] / among_all[1]
    seen = frequency > 0
    factory = (agree * frequency ** (fraction - 1))[seen].sum().item() if fraction else 0.0
    accepted = (agree * frequency**fraction)[seen].sum().item()
    return (whole + factory) / accepted if accepted else math.inf


def agreement_probability(samples: Tensor, log_weights: Tensor, whole: int) -> float:
    """The probability sum P(x)^n that n draws from P agree, without bias from draws `[N, K]` with weights `[N]`."""
    _, agreeing, among_all = agreeing_tuples(samples, log_weights, whole)
    return (agreeing[:, whole].sum() / among_all[whole]).item()


def draws_until_agreement(samples: Tensor, whole: int, generator: torch.Generator, shuffles: int = 200) -> Tensor:
    """How many draws it takes until some chunk has been drawn n times, `[shuffles]` float64; infinite where never.

    `samples` `[N, K]` are read in random orders, so that `(result <= M).mean()` is an unbiased estimate, for any
    M <= N, of the probability that M draws contain n that agree.
    """
    chunk = samples.unique(dim=0, return_inverse=True)[1]
    needed = torch.full((shuffles,), math.inf, dtype=torch.float64)
    for shuffle in range(shuffles):
        seen: Counter[int] = Counter()
        for number, drawn in enumerate(chunk[torch.randperm(len(chunk), generator=generator)].tolist(), start=1):
            seen[drawn] += 1
            if seen[drawn] == whole:
                needed[shuffle] = number
                break
    return needed


def agreeing_tuples(samples: Tensor, log_weights: Tensor, whole: int) -> tuple[Tensor, Tensor, Tensor]:
    """How much weight the sets of m different draws have that agree on a chunk, for m up to n.

    A set weighs the product of its draws' weights: the sums are elementary symmetric polynomials of the weights, which
    are taken relative to their sum.

    Args:
        samples: draws `[N, K]`.
        log_weights: of the draws, `[N]`; equal ones make all sums counts, but for their scale.
        whole: n.

    Returns:
        The different chunks `[U, K]`; for each the weight of its sets of 0 to n draws, `[U, n + 1]` float64; and that
        of all sets of 0 to n draws, `[n + 1]`.
    """
    chunks, chunk_of = samples.unique(dim=0, return_inverse=True)
    sums = [[1.0] + [0.0] * whole for _ in range(len(chunks) + 1)]
    for chunk, weight in zip(chunk_of.tolist(), log_weights.double().softmax(0).tolist(), strict=True):
        for of in (sums[chunk], sums[-1]):
            for m in range(whole, 0, -1):
                of[m] += weight * of[m - 1]
    table = torch.tensor(sums, dtype=torch.float64)
    return chunks, table[:-1], table[-1]


def sample_weighted(
    samples: Tensor, log_weights: Tensor, temperature: float, generator: torch.Generator
) -> BatchSample:
    """As `sample_batch`, from weighted draws of one context `[N, K]`: the weight of a chunk is that of its sets of n.

    Draws with log weight -inf are in no set. At T = 1 the result is one of the draws, chosen by weight.

    Raises:
        UserError: T is not 1/n.
    """
    whole = whole_inverse(temperature)
    chunks, agreeing, _ = agreeing_tuples(samples, log_weights, whole)
    agreement = int((agreeing > 0).any(0).nonzero().max())  # where no chunk has n draws, n falls
    chosen = agreeing[:, agreement].multinomial(1, generator=generator)
    return BatchSample(chunks[chosen].squeeze(0), torch.tensor(agreement))


def sample_batch(samples: Tensor, temperature: float, generator: torch.Generator) -> BatchSample:
    """One chunk per context from N draws of each, about P^n/Z for T = 1/n.

    Args:
        samples: draws from P, `[..., N, K]`; leading dimensions are contexts.
        temperature: T = 1/n for a whole n.
        generator: on the device of `samples`; one uniform number per context.

    Raises:
        UserError: T is not 1/n.
    """
    weights, agreement = chunk_weights(samples, whole_inverse(temperature))
    below = weights.cumsum(-1)
    uniform = torch.rand(agreement.shape, dtype=torch.float64, device=samples.device, generator=generator)
    # In (0, total]: the first draw whose cumulative weight reaches it has a weight above zero.
    level = (1 - uniform) * below[..., -1]
    chosen = torch.searchsorted(below, level.unsqueeze(-1)).unsqueeze(-1)
    return BatchSample(samples.take_along_dim(chosen, dim=-2).squeeze(-2), agreement)


def chunk_weights(samples: Tensor, whole: int) -> tuple[Tensor, Tensor]:
    """Weights `[..., N]` (sum 1) that choose one of the draws `[..., N, K]` at T = 1/n, and the agreement m `[...]`.

    A chunk seen c times accounts for C(c, m) of the m-tuples of draws that agree, m = n; its c draws divide that weight
    equally. Where no chunk was seen n times, m is the largest count instead.
    """
    counts = occurrences(samples)
    agreement = counts.amax(-1).clamp(max=whole)
    log_weight = _log_binomial(counts.double(), agreement.double().unsqueeze(-1)) - counts.log()
    return log_weight.softmax(-1), agreement


def occurrences(samples: Tensor) -> Tensor:
    """How often each of the N chunks `[..., N, K]` occurs among them, `[..., N]` int64.

    Stable sorts by each token, the last first, bring equal chunks together; O(K N log N), no N x N table.
    """
    order = samples[..., -1].argsort(dim=-1, stable=True)
    for token in range(samples.shape[-1] - 2, -1, -1):
        column = samples[..., token].gather(-1, order)
        order = order.gather(-1, column.argsort(dim=-1, stable=True))
    ordered = samples.take_along_dim(order.unsqueeze(-1), dim=-2)
    starts = (ordered[..., 1:, :] != ordered[..., :-1, :]).any(-1)
    group = torch.nn.functional.pad(starts.long().cumsum(-1), (1, 0))
    sizes = torch.zeros_like(group).scatter_add_(-1, group, torch.ones_like(group))
    return torch.empty_like(group).scatter_(-1, order, sizes.gather(-1, group))


def _log_binomial(counts: Tensor, chosen: Tensor | int) -> Tensor:
    """log C(counts, chosen), elementwise; -inf where counts < chosen."""
    chosen = torch.as_tensor(chosen, dtype=counts.dtype, device=counts.device)
    left = (counts - chosen).clamp(min=0)
    value = torch.lgamma(counts + 1) - torch.lgamma(chosen + 1) - torch.lgamma(left + 1)
    return value.masked_fill(counts < chosen, -math.inf)


def _power_coin(draw: Callable[[], Tensor], chunk: Tensor, power: float, generator: torch.Generator) -> bool:
    """True with probability P(chunk)^power, 0 <= power < 1, from draws alone.

    P(true) = p sum_i (1-p)^i prod_{j <= i} (1 - power/j) = p p^(power-1), the binomial series.
    """
    if not power:
        return True
    for trial in count(1):
        if torch.equal(draw(), chunk):
            return True
        if torch.rand((), dtype=torch.float64, device=generator.device, generator=generator).item() < power / trial:
            return False


def _draws(
    sampler: Sampler, generator: torch.Generator, temperature: float, max_calls: int, block: int
) -> Iterator[Tensor]:
    """Single draws `[K]`, asked for `block` at a time, at most `max_calls`."""
    for start in range(0, max_calls, block):
        yield from sampler(min(block, max_calls - start), generator)
    raise CallLimitError(
        f"Exact sampling at temperature={temperature} accepted none of {max_calls} draws: raise max_calls, or "
        "choose the batch method."
    )


def token_weights(logits: Tensor, temperature: float, top_k: int = 0, top_p: float = 1.0) -> Tensor:
    """Weights proportional to P^(1/T), truncated, float64 `[..., V]`, from logits `[..., V]`.

    First the temperature, then the `top_k` most probable tokens (0: all), then of those the fewest whose probabilities
    together reach `top_p`. Of equally probable tokens the one with the lower id counts as the more probable.
    """
    weights = ((logits - logits.amax(-1, keepdim=True)).double() / temperature).exp()
    if not top_k and top_p == 1.0:
        return weights
    ordered, tokens = weights.sort(dim=-1, descending=True, stable=True)
    if top_k:
        ordered[..., top_k:] = 0
    before = ordered.cumsum(-1) - ordered
    kept = before < top_p * ordered.sum(-1, keepdim=True)
    return torch.zeros_like(weights).scatter(-1, tokens, ordered * kept)


def draw_tokens(weights: Tensor, uniform: Tensor) -> Tensor:
    """One token `[...]` for each distribution with weights `[..., V]`, by inversion of uniform draws `[...]`."""
    passed = weights.cumsum(-1)
    sought = uniform.double().unsqueeze(-1) * passed[..., -1:]
    return torch.searchsorted(passed, sought, right=True).squeeze(-1)
