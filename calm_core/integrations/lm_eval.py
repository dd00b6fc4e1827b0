"""Our models in EleutherAI's lm-evaluation-harness, as its model "calm".

    python -m calm_core.integrations.lm_eval run --model calm --model_args run=runs/demo,temperature=0.5 --tasks TASK

is the harness's own command line with this model added; in Python, import this module and pass `model="calm"`.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import Collator, normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from torch.nn.utils.rnn import pad_sequence

from calm_core.api import load
from calm_core.config.generation_config import GenerationOptions
from calm_core.errors import UserError
from calm_core.inference.generate import generate

Scored = tuple[tuple[str, str], list[int], list[int]]  # texts, tokens of the context, tokens of the continuation


@register_model("calm")
class CalmLM(TemplateLM):
    """A run of ours: texts of any model, likelihoods of autoregressive ones."""

    def __init__(
        self,
        run: str,
        temperature: float | None = None,
        samples: int = 100,
        seed: int = 0,
        batch_size: int | str = 8,
        max_gen_toks: int = 256,
        device: str | None = None,
        precision: str = "fp32",
        max_batch_size: int | None = None,
    ) -> None:
        """Load the newest checkpoint of `run`, or a checkpoint.

        Args:
            run: as `calm_core.load` takes it.
            temperature: of the texts, whatever tasks ask for; CALM needs it where they ask for greedy decoding.
            samples: N, draws per chunk, for CALM.
            seed: of the first text's noise; the following ones have the following seeds.
            batch_size: texts or windows at once.
            max_gen_toks: tokens of a text where its task says nothing.
            device: None means a GPU if there is one.
            precision: fp32, bf16 or auto.
            max_batch_size: passed by the harness, for automatic batch sizes; there are none here.

        Raises:
            UserError: there is no such model, or the batch size is "auto".
        """
        super().__init__()
        if not str(batch_size).isdigit():
            raise UserError(f"batch_size={batch_size} is not a number: choose one, such as 8.")
        self._loaded = load(run, device, precision).loaded
        self._temperature, self._samples, self._seed = temperature, samples, seed
        self._batch, self._longest = int(batch_size), max_gen_toks
        self._tokenizer = self._loaded.tokenizer

    @property
    def eot_token_id(self) -> int:
        """The end of a document."""
        return self._tokenizer.eos

    @property
    def prefix_token_id(self) -> int:
        """The beginning of a document, which precedes every text."""
        return self._tokenizer.bos

    @property
    def tokenizer_name(self) -> str:
        """What makes cached requests those of this tokenizer."""
        return self._tokenizer.content_hash

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """The tokens of a text, without control tokens."""
        return self._tokenizer.encode(string)

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Continuations up to the stop texts of each task.

        A context that does not fit in with the tokens to be generated loses its beginning.

        Raises:
            UserError: a task asks for what the model cannot do.
        """
        numbered = [(*request.args, number) for number, request in enumerate(requests)]
        order = Collator(numbered, lambda one: -len(one[0]), group_by="gen_kwargs", group_fn=lambda one: one[1])
        texts = []
        for batch in order.get_batched(n=self._batch):
            options = self._options(batch[0][1])
            contexts = [self._cut(context, options.max_tokens) for context, *_ in batch]
            seeds = [self._seed + number for *_, number in batch]
            texts += [done.text for done in generate(self._loaded, contexts, options, seeds)]
        return order.get_original(texts)

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Nats of whole texts; each token is scored once, in a window of the context of training.

        Raises:
            UserError: the model has no likelihoods.
        """
        self._require_likelihoods()
        found = []
        for request in requests:
            tokens = self.tok_encode(request.args[0])
            windows = get_rolling_token_windows(tokens, self.prefix_token_id, self._loaded.positions, context_len=1)
            scored = [(("", ""), *make_disjoint_window(window)) for window in windows]
            found.append(sum(nats for nats, _ in self._loglikelihood_tokens(scored)))
        return found

    @torch.inference_mode()
    def _loglikelihood_tokens(self, requests: Sequence[Scored], **_: Any) -> list[tuple[float, bool]]:
        """For each request the nats of the continuation, and whether each of its tokens is the most probable one."""
        self._require_likelihoods()
        order = Collator([(c, t) for _, c, t in requests], lambda pair: -len(pair[0]) - len(pair[1]))
        found = []
        for batch in order.get_batched(n=self._batch):
            found += self._scores(batch)
        return order.get_original(found)

    def _scores(self, pairs: Sequence[tuple[list[int], list[int]]]) -> Iterator[tuple[float, bool]]:
        model, bos = self._loaded.model, self.prefix_token_id
        device = next(model.parameters()).device
        rows = [[bos, *(context[1:] if context[:1] == [bos] else context), *scored] for context, scored in pairs]
        # The last token is only predicted. What is longer than the context of training loses its beginning.
        if (longest := max(len(scored) for _, scored in pairs)) > self._loaded.positions:
            raise UserError(
                f"an answer has {longest} tokens, and the model was trained on {self._loaded.positions}: leave out the "
                "task, or train with a longer context."
            )
        rows = [torch.tensor(row[-self._loaded.positions - 1 :], device=device) for row in rows]
        inputs = pad_sequence([row[:-1] for row in rows], batch_first=True, padding_value=self._tokenizer.pad)
        logits = model.head.logits(model.hidden(inputs.unsqueeze(-1))).transpose(0, 1)  # [B, T, V]
        for row, own, (_, scored) in zip(rows, logits, pairs, strict=True):
            truth, predicted = row[-len(scored) :], own[len(row) - 1 - len(scored) : len(row) - 1].log_softmax(-1)
            nats = predicted.gather(1, truth.unsqueeze(1)).sum().item()
            yield nats, bool((predicted.argmax(-1) == truth).all())

    def _options(self, asked: dict[str, Any]) -> GenerationOptions:
        wanted = normalize_gen_kwargs(asked, self._longest)
        temperature = wanted.get("temperature", 0.0) if self._temperature is None else self._temperature
        options = {"max_tokens": wanted["max_gen_toks"], "stop": tuple(filter(None, wanted["until"]))}
        options |= {name: wanted[name] for name in ("top_k", "top_p") if name in wanted}
        if temperature > 0:
            options |= {"temperature": temperature, "samples": self._samples}
        elif self._loaded.has_logits:
            options |= {"top_k": 1}
        else:
            raise UserError(
                "the task asks for greedy decoding, but CALM does not know the most probable chunk: give the "
                "temperature to sample at, such as temperature=0.5, among the model's arguments."
            )
        return GenerationOptions(**options).for_head(self._loaded.has_logits)

    def _cut(self, context: str, new_tokens: int) -> list[int]:
        """The last tokens of a context that leave room for the new ones, and for bos."""
        k = self._loaded.shape.k
        room = (self._loaded.positions + 1) * k - new_tokens - 1
        if room < k:
            raise UserError(
                f"{new_tokens} new tokens leave no room for a context in the {self._loaded.positions} chunks that the "
                "model was trained on: lower max_gen_toks, an argument of the model and of tasks."
            )
        return self.tok_encode(context)[-room:]

    def _require_likelihoods(self) -> None:
        if not self._loaded.has_logits:
            raise UserError(
                "the task compares likelihoods, and CALM has none: choose tasks that generate text, or score by "
                "pretrain/evaluate.py."
            )


if __name__ == "__main__":
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()
