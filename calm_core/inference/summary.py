"""What to say of a completion besides its text."""

from calm_core.inference.generate import Completion
from calm_core.inference.options import GenerationOptions


def summary(completion: Completion, options: GenerationOptions) -> str:
    """One line: length and end, and how far the sampling can be trusted."""
    parts = [
        f"{len(completion.tokens)} tokens, ended by {completion.reason}",
        f"seed {completion.seed}",
        f"{completion.draws / completion.chunks:.0f} draws per chunk",
    ]
    if completion.effective_samples is not None:
        parts.append(f"effective sample size {completion.effective_samples:.1f} of {options.samples} at the prompt")
    if options.method == "batch" and options.temperature < 1:
        parts.append(f"temperature approximate, from {options.samples} draws")
    if completion.agreed < 1:
        parts.append(f"{completion.agreed:.0%} of the chunks as sharp as temperature {options.temperature:.3g} asks")
    return "; ".join(parts)
