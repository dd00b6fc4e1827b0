"""What can be said about a temperature before sampling at it, from draws of the first chunk of each prompt."""

from collections.abc import Sequence

import torch

from calm_core.config.generation_config import GenerationOptions, whole_inverse
from calm_core.inference.load_model import Loaded
from calm_core.inference.request import hidden_states, new_requests
from calm_core.inference.sampler import PILOT, ChunkSampler, Sharpness

ENOUGH = 0.95  # of the first chunks reach the temperature with the number of draws that is recommended


@torch.inference_mode()
def expected_calls(loaded: Loaded, prompts: Sequence[str], options: GenerationOptions) -> list[float]:
    """The mean number of draws that the exact method takes for the first chunk of each prompt, estimated.

    From `options.samples` draws; infinite where too few of them agree to tell.
    """
    sampler, k = ChunkSampler(loaded, options), loaded.shape.k
    estimates = []
    for request in new_requests(loaded, prompts, options):
        position, hidden = next(hidden_states(loaded, [request]))
        estimates.append(sampler.expected_calls(hidden, request.context(position, k), position))
    return estimates


@torch.inference_mode()
def sharpness(loaded: Loaded, prompts: Sequence[str], options: GenerationOptions) -> list[Sharpness]:
    """How far the batch method can follow T = 1/n at the first chunk of each prompt."""
    sampler, k = ChunkSampler(loaded, options), loaded.shape.k
    found = []
    for request in new_requests(loaded, prompts, options):
        position, hidden = next(hidden_states(loaded, [request]))
        found.append(sampler.sharpness(hidden, request.context(position, k), position))
    return found


def forecast(loaded: Loaded, prompts: Sequence[str], options: GenerationOptions) -> str | None:
    """One line about the temperature; None where it is always reached, with logits or at T = 1.

    For the exact method it is the number of draws. For the batch method it is how often N draws suffice, and the
    largest N that pays: with so many draws n of them agree for 95 % of the first chunks.
    """
    options = options.for_head(loaded.has_logits)
    if options.method == "exact":
        calls = ", ".join(f"{calls:.0f}" for calls in expected_calls(loaded, prompts, options))
        return f"exact temperature: about {calls} draws for the first chunk, at most {options.max_calls}"
    if options.method == "logits" or options.temperature == 1:
        return None
    n, found = whole_inverse(options.temperature), sharpness(loaded, prompts, options)
    agreement, reached = (sum(getattr(one, name) for one in found) / len(found) for name in ("agreement", "reached"))
    needed = torch.cat([one.needed for one in found]).sort().values
    enough = needed[int(ENOUGH * (len(needed) - 1))].item()
    advice = (
        f"--samples {enough:.0f} suffices for {ENOUGH:.0%} of them"
        if enough <= PILOT * options.samples
        else f"{PILOT} times as many do not suffice for {ENOUGH:.0%} of them"
    )
    return (
        f"temperature 1/{n}: {n} draws agree with probability {agreement:.2g}; {options.samples} draws contain "
        f"{n} that agree for about {reached:.0%} of first chunks, {advice}"
    )
