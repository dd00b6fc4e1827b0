"""What a request for text can ask for."""

from dataclasses import dataclass
from typing import Literal

from calm_core.config import option
from calm_core.errors import UserError
from calm_core.temperature import inverse_parts, whole_inverse


@dataclass(frozen=True)
class GenerationOptions:
    """How text is generated; the same for every prompt of a call.

    There are two ways for a prompt that ends inside a chunk, since neither serves always. `weigh`, the default, keeps
    the prompt where it is and follows the model's own distribution given the known tokens, as N grows; where few draws
    agree with them, little is left of N (the effective sample size says how much), and the exact method, which then
    refuses most draws, becomes dear. `shift` wastes no draw, but moves the document on the grid of chunks and begins it
    by up to K - 1 eos more than the one that precedes a document in training.
    """

    max_tokens: int = option(256, "most tokens generated per prompt, exactly: the last chunk is cut")
    temperature: float = option(1.0, "T: chunks follow P^(1/T)/Z; 0 < T <= 1, and 1/n for the batch method")
    method: Literal["batch", "exact"] = option("batch", "batch: approximate, from N draws; exact: by rejection")
    samples: int = option(100, "N, draws per chunk; the exact method draws that many at a time")
    max_calls: int = option(10_000, "most draws for one chunk, where some of them may be refused")
    seed: int = option(0, "seed of the first prompt; the next prompts have the next seeds")
    stop: tuple[str, ...] = option((), "texts that end the generation; they are not part of it")
    partial: Literal["weigh", "shift"] = option(
        "weigh",
        "a prompt that ends inside a chunk: weigh draws of the chunk by its known tokens, or shift the prompt to the "
        "chunk's end by eos tokens before bos",
    )

    def __post_init__(self) -> None:
        for name in ("max_tokens", "samples", "max_calls"):
            if getattr(self, name) < 1:
                raise UserError(f"{name}={getattr(self, name)} must be at least 1.")
        for name, choices in (("method", ("batch", "exact")), ("partial", ("weigh", "shift"))):
            if getattr(self, name) not in choices:
                raise UserError(f"{name}={getattr(self, name)!r} is unknown: choose {' or '.join(choices)}.")
        if "" in self.stop:
            raise UserError("stop holds an empty text, which every text begins with: leave it out.")
        (whole_inverse if self.method == "batch" else inverse_parts)(self.temperature)
