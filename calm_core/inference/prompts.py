"""Prompts: reading them, and the tokens that a generation starts from."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from calm_core.config.data_config import Packing
from calm_core.errors import UserError
from calm_core.tokenizer import Tokenizer


@dataclass(frozen=True)
class DocumentFormat:
    """How documents stand in the data that a model was trained on.

    Attributes:
        eos: whether each ends with eos (`data.eos`).
        packing: whether they follow one another in chunks, or each begins a chunk (`data.packing`).
    """

    eos: bool = True
    packing: Packing = "pack"

    def ends(self, tokenizer: Tokenizer) -> tuple[int, ...]:
        """The tokens that end a document: eos; without it the bos of the next document, or the padding before it."""
        return (tokenizer.eos,) if self.eos else (tokenizer.eos, tokenizer.bos, tokenizer.pad)


def prompt_tokens(
    text: Sequence[int],
    k: int,
    tokenizer: Tokenizer,
    documents: DocumentFormat,
    partial: Literal["weigh", "shift"] = "weigh",
) -> list[int]:
    """The tokens that a generation starts from: bos and the prompt, at least one whole chunk.

    The model predicts a chunk from those before it, so the first chunk is never sampled. Where bos and the prompt do
    not fill it, something the model knows from training comes before them:
      - packed documents begin anywhere in a chunk, after the eos of another: eos tokens, or, where documents have no
        eos, further bos, each an empty document;
      - aligned documents begin a chunk: the last chunk of another document, its end and the padding after it.

    `shift` puts such tokens before a packed prompt of any length, so that the prompt ends with a chunk and no chunk is
    sampled under known tokens.

    Raises:
        UserError: `shift` for aligned documents, which never begin inside a chunk.
    """
    document = [tokenizer.bos, *text]
    end = tokenizer.eos if documents.eos else tokenizer.bos
    if documents.packing == "align":
        if partial == "shift":
            raise UserError(
                "partial=shift would begin the prompt inside a chunk, but the documents that this model was trained on "
                "each begin a chunk (data.packing=align): choose partial=weigh."
            )
        return [end, *[tokenizer.pad] * (k - 1), *document] if len(document) < k else document
    missing = -len(document) % k if partial == "shift" else max(0, k - len(document))
    return [end] * missing + document


def read_prompts(texts: Sequence[str], file: Path | None) -> list[str]:
    """The prompts of a command line and of a file, whose whole text is one; without any, the beginning of a document.

    The text of a file is kept as it is, line ends included, as that of a corpus is.

    Raises:
        UserError: the file cannot be read, or is not UTF-8.
    """
    prompts = list(texts)
    if file is not None:
        try:
            prompts.append(file.read_bytes().decode())
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"Cannot read the prompt in {file} ({error}): give a text file in UTF-8.") from error
    return prompts or [""]


def require_text(prompts: Sequence[str]) -> None:
    """Refuse prompts that are no Unicode text: bytes of a command line that are not UTF-8 become lone surrogates.

    Raises:
        UserError: naming the prompt.
    """
    for number, prompt in enumerate(prompts, start=1):
        try:
            prompt.encode()
        except UnicodeEncodeError as error:
            raise UserError(
                f"prompt {number} is not valid UTF-8 from character {error.start + 1} on: give it in UTF-8."
            ) from error
