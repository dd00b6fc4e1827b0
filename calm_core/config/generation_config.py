"""How text is generated: length, temperature, sampling method, stop texts."""

import math
from dataclasses import dataclass, replace
from typing import Literal

from calm_core.config.schema import option
from calm_core.errors import UserError

METHODS = ("auto", "batch", "exact", "logits")


@dataclass(frozen=True)
class GenerationOptions:
    """How text is generated; the same for every prompt of a call.

    A prompt that ends inside a chunk can be handled in two ways. `weigh`, the default, leaves the prompt where it is
    and samples the chunk given its known tokens, correctly as N grows. Where few draws agree with the known tokens the
    effective sample size is small (it is reported), and the exact method needs many draws. `shift` wastes no draws, but
    moves the document on the grid of chunks: up to K - 1 more eos precede it than in training.
    """

    max_tokens: int = option(256, "tokens generated per prompt, at most; the last chunk is cut to it exactly")
    temperature: float = option(
        1.0, "T: chunks follow P^(1/T)/Z; 0 < T <= 1, and T = 1/n for the batch method; any T > 0 with logits"
    )
    method: Literal["auto", "batch", "exact", "logits"] = option(
        "auto",
        "batch: approximate, from N draws; exact: by rejection; logits: for models with a softmax head; auto: logits "
        "where the head has them, otherwise batch",
    )
    top_k: int = option(0, "logits: sample from the k most probable tokens alone; 0 means all")
    top_p: float = option(1.0, "logits: sample from the fewest most probable tokens whose probabilities reach p")
    samples: int = option(100, "batch: N, draws per chunk; exact: draws made at a time")
    max_calls: int = option(10_000, "draws for one chunk, at most, where some of them may be rejected")
    seed: int = option(0, "seed of the first prompt; the following prompts have the following seeds")
    stop: tuple[str, ...] = option((), "texts that end the generation; they are not part of it")
    partial: Literal["weigh", "shift"] = option(
        "weigh",
        "a prompt that ends inside a chunk: weigh draws of the chunk by its known tokens, or shift the prompt to the "
        "end of the chunk by tokens before bos",
    )

    def __post_init__(self) -> None:
        for name in ("max_tokens", "samples", "max_calls"):
            if getattr(self, name) < 1:
                raise UserError(f"{name}={getattr(self, name)} must be at least 1.")
        for name, choices in (("method", METHODS), ("partial", ("weigh", "shift"))):
            if getattr(self, name) not in choices:
                raise UserError(f"{name}={getattr(self, name)!r} is unknown: choose {' or '.join(choices)}.")
        if "" in self.stop:
            raise UserError("stop holds an empty text, which every text begins with: leave it out.")
        if self.top_k < 0:
            raise UserError(f"top_k={self.top_k} is not a number of tokens: 0 means all.")
        if not 0.0 < self.top_p <= 1.0:
            raise UserError(f"top_p={self.top_p} is not a probability: choose 0 < top_p <= 1.")
        if not 0.0 < self.temperature < math.inf:
            raise UserError(f"temperature={self.temperature} is not a positive number: choose T > 0.")
        if self.method == "batch":
            whole_inverse(self.temperature)
        if self.method == "exact":
            inverse_parts(self.temperature)
        if self.method in ("batch", "exact"):
            self._refuse_truncation(f"method={self.method} has none")

    def for_head(self, has_logits: bool) -> "GenerationOptions":
        """These options with the method chosen for a head with or without logits.

        Raises:
            UserError: an option cannot apply to such a head.
        """
        if has_logits:
            return replace(self, method="logits") if self.method == "auto" else self
        if self.method == "logits":
            raise UserError(
                "method=logits needs a softmax head, and the head of this model has no logits: choose batch or exact."
            )
        self._refuse_truncation("the head of this model has none")
        return replace(self, method="batch") if self.method == "auto" else self

    def _refuse_truncation(self, reason: str) -> None:
        for name, off in (("top_k", 0), ("top_p", 1.0)):
            if getattr(self, name) != off:
                raise UserError(
                    f"{name}={getattr(self, name)} needs logits, and {reason}: leave it out; a temperature below 1 "
                    "sharpens the distribution."
                )


def inverse_parts(temperature: float) -> tuple[int, float]:
    """1/T as (n, a), n whole and 0 <= a < 1; an a within rounding of a whole number counts as whole.

    Raises:
        UserError: T is outside (0, 1].
    """
    if temperature > 1:
        raise UserError(
            f"temperature={temperature} is above 1: accepting draws that agree can only sharpen a distribution, and "
            "flattening one needs chunks that its sampler hardly ever draws; choose 0 < T <= 1."
        )
    if not temperature > 0:
        raise UserError(f"temperature={temperature} is not positive: choose 0 < T <= 1.")
    inverse = 1 / temperature
    if math.isclose(inverse, round(inverse), rel_tol=1e-9):
        return round(inverse), 0.0
    whole = math.floor(inverse)
    return whole, inverse - whole


def whole_inverse(temperature: float) -> int:
    """n of T = 1/n.

    Raises:
        UserError: T is not 1/n for a whole n.
    """
    whole, fraction = inverse_parts(temperature)
    if fraction:
        raise UserError(
            f"temperature={temperature} is not 1/n for a whole n: choose 1, 1/2, 1/3, ... or the exact method."
        )
    return whole
