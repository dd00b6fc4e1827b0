"""A trained model in a few lines of Python: load it, generate, score a text, encode and decode latents."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, overload

import torch
from torch import Tensor

from calm_core.config.generation_config import GenerationOptions
from calm_core.distributed.topology import local_dtype
from calm_core.errors import UserError
from calm_core.evaluation.brier import brier_terms
from calm_core.inference.generate import Completion, generate
from calm_core.inference.load_model import Loaded, default_device, load_for_inference
from calm_core.inference.request import prompt_tokens, require_text
from calm_core.model.noise import SampleNoise

SCORED_AT_ONCE = 64  # positions whose draws are decoded together


def load(
    run: str | Path, device: str | torch.device | None = None, precision: Literal["fp32", "bf16", "auto"] = "fp32"
) -> "LanguageModel":
    """A trained model, with its autoencoder and tokenizer.

    Args:
        run: the folder of a run, whose newest checkpoint is taken, or a checkpoint `step-N`.
        device: where to compute; None means a GPU if there is one.
        precision: of weights and activations; auto is bf16 where it is faster.

    Raises:
        UserError: there is no complete checkpoint, or what belongs to it is missing.
    """
    device = default_device() if device is None else torch.device(device)
    return LanguageModel(load_for_inference(Path(run).expanduser(), device, local_dtype(precision, device)))


class LanguageModel:
    """A loaded model.

    Attributes:
        loaded: its parts: network, autoencoder, tokenizer, trained context.
    """

    def __init__(self, loaded: Loaded) -> None:
        self.loaded = loaded

    def __repr__(self) -> str:
        shape = self.loaded.shape
        parameters = sum(parameter.numel() for parameter in self.loaded.model.parameters())
        return f"LanguageModel(head={shape.head.kind}, k={shape.k}, {parameters / 1e6:,.1f}M parameters)"

    @overload
    def generate(self, prompt: str = "", **options: Any) -> str: ...

    @overload
    def generate(self, prompt: Sequence[str], **options: Any) -> list[str]: ...

    def generate(self, prompt: str | Sequence[str] = "", **options: Any) -> str | list[str]:
        """The prompt and its continuation; a list of texts for a list of prompts.

        Args:
            prompt: text to continue; an empty one begins a document.
            options: fields of `GenerationOptions`, such as `max_tokens=100, temperature=0.5, seed=1`.

        Raises:
            UserError: an option is out of bounds, or cannot apply to this model.
        """
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        texts = [completion.prompt + completion.text for completion in self.complete(prompts, **options)]
        return texts[0] if isinstance(prompt, str) else texts

    def complete(self, prompts: Sequence[str], **options: Any) -> list[Completion]:
        """As `generate`, with tokens, the reason of the end, and how well the temperature was reached."""
        fields = GenerationOptions.__dataclass_fields__
        if unknown := options.keys() - fields:
            raise UserError(f"{min(unknown)} is not a generation option: choose from {', '.join(fields)}.")
        if "stop" in options:
            stop = options["stop"]
            options["stop"] = (stop,) if isinstance(stop, str) else tuple(stop)
        return generate(self.loaded, prompts, GenerationOptions(**options))

    @torch.inference_mode()
    def score(self, text: str, samples: int = 16, seed: int = 0) -> dict[str, float]:
        """How well the model predicts a text, chunk by chunk, from what precedes it.

        Args:
            text: one document. It is read in windows of the context that the model was trained on.
            samples: N, draws of the next chunk at each position, at least 2.
            seed: of the draws.

        Returns:
            `brier_1`, ... up to `brier_4` or K: the mean Brier score of the first n tokens of the chunks, strictly
            proper, at most 1, 0 for a model whose draws are never right and never agree; `collision_1`: the
            probability that two draws agree in their first token; `positions`: chunks that were scored. For an
            autoregressive model also `log_likelihood`, nats per token. Every chunk counts, in contexts from one chunk
            to the whole window: `pretrain/evaluate.py` instead scores under long contexts, with standard errors.

        Raises:
            UserError: the text has fewer than two whole chunks.
        """
        require_text([text])
        loaded, k = self.loaded, self.loaded.shape.k
        start = prompt_tokens(loaded.tokenizer.encode(text), k, loaded.tokenizer, loaded.documents)
        chunks = torch.tensor(start[: len(start) // k * k], device=self._device).view(-1, k)
        if len(chunks) < 2:
            raise UserError(
                f"the text has {len(start)} tokens, but a score needs two chunks of {k}: give a longer one."
            )
        scores, collisions, likelihoods = [], [], []
        for number, window in enumerate(chunks.split(loaded.positions)):
            hidden = loaded.model.hidden(window[None])[:-1]
            for first in range(0, len(hidden), SCORED_AT_ONCE):
                some = slice(first, first + SCORED_AT_ONCE)
                truth = window[1:][some].unsqueeze(1)  # [S, 1, K]
                noise = SampleNoise(seed, [number], self._device, f"score/{first}")
                drawn = loaded.model.head.sample(hidden[some], noise, samples)
                tokens = drawn if loaded.autoencoder is None else loaded.autoencoder.decode_tokens(drawn)
                terms = brier_terms(tokens, truth)
                scores.append(terms.score.flatten(0, 1))
                collisions.append(terms.collision[..., 0].flatten())
                if loaded.has_logits:
                    likelihoods.append(loaded.model.head.log_probabilities(hidden[some], truth.squeeze(-1)).flatten())
        mean = torch.cat(scores).mean(0).tolist()
        result = {f"brier_{n}": value for n, value in enumerate(mean, start=1)}
        result |= {"collision_1": torch.cat(collisions).mean().item(), "positions": sum(map(len, scores))}
        return result | ({"log_likelihood": torch.cat(likelihoods).mean().item()} if likelihoods else {})

    @torch.inference_mode()
    def encode(self, text: str) -> Tensor:
        """The latents `[chunks, l]` of a text: the means of the autoencoder's posteriors; pad fills the last chunk.

        Raises:
            UserError: an autoregressive model has no autoencoder.
        """
        require_text([text])
        autoencoder, tokenizer = self._autoencoder, self.loaded.tokenizer
        tokens = tokenizer.encode(text)
        tokens += [tokenizer.pad] * (-len(tokens) % autoencoder.k)
        return autoencoder.encode(torch.tensor(tokens, dtype=torch.int64, device=self._device).view(-1, autoencoder.k))[
            0
        ]

    @torch.inference_mode()
    def decode(self, latents: Tensor) -> str:
        """The text of latents `[chunks, l]`: the most probable tokens of each.

        Raises:
            UserError: an autoregressive model has no autoencoder.
        """
        if not len(latents):
            return ""
        tokens = self._autoencoder.decode_tokens(latents.to(self._device))
        return self.loaded.tokenizer.decode(tokens.flatten().tolist())

    @property
    def _device(self) -> torch.device:
        return next(self.loaded.model.parameters()).device

    @property
    def _autoencoder(self) -> Any:
        if self.loaded.autoencoder is None:
            raise UserError(
                "an autoregressive model has no latents: load a CALM run, whose chunks have an autoencoder."
            )
        return self.loaded.autoencoder
