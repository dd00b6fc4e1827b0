"""The full evaluation of checkpoints: baselines and diagnostics of each; several at the same positions of one text."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from math import lcm
from pathlib import Path
from typing import Any, TypeVar

from calm_core.autoencoder.model import Autoencoder
from calm_core.checkpoint.folder import Checkpoint, open_checkpoint
from calm_core.config.data_config import DataConfig
from calm_core.config.experiment import EvaluationConfig
from calm_core.data.chunks import build_chunks
from calm_core.data.dataset import Rows, Windows, chunk_rows, token_rows
from calm_core.data.store import ChunkStore, Store, TokenStore
from calm_core.data.tokens import build_tokens
from calm_core.distributed.collectives import on_every_rank, on_first_rank
from calm_core.distributed.topology import Topology
from calm_core.errors import UserError
from calm_core.evaluation.held_out import HeldOut, Protocol
from calm_core.evaluation.ngram import bigram_of
from calm_core.evaluation.scores import BASELINES
from calm_core.inference.load_model import Loaded, experiment_of, find_checkpoint, load_for_inference
from calm_core.progress import Progress
from calm_core.tokenizer import Tokenizer

PAPER_CONTEXT = 8192  # tokens of a block under the paper's protocol

T = TypeVar("T")


def evaluate_checkpoint(
    loaded: Loaded,
    topology: Topology,
    train: Store | None,
    held_out: Store,
    seed: int,
    config: EvaluationConfig,
    protocol: Protocol = "default",
) -> dict[str, Any]:
    """Score a model on `config.windows` windows of a store (0: all), evenly spread over it. Collective.

    The record has the bigram baseline and the diagnostics of the head in addition to that of an evaluation in training.
    The baselines are those of the tokens in `train`, and None without. With `protocol="paper"` the record has one more,
    `paper`: Brier-n and BrierLM as the paper counts them.
    """
    from calm_core.evaluation.evaluate import evaluate  # takes seconds, and tokenizing a text does not need it

    counts, bigram = (None, None) if train is None else (train.token_counts(), bigram_of(train))
    windows = Windows(held_out, loaded.positions)
    own = HeldOut(windows, loaded.autoencoder, counts, seed, config, bigram, diagnostics=True)
    passes = [own]
    if protocol == "paper":
        passes.append(replace(own, counts=None, bigram=None, diagnostics=False, protocol="paper"))
    total = sum(map(len, own.micro_batches(topology))) * len(passes)
    with Progress("evaluating", total, "windows") as progress:
        result, *paper = [evaluate([loaded.model], topology, what, progress=progress.advance) for what in passes]
    return {**dict.fromkeys(BASELINES), **result, **({"paper": paper[0]} if paper else {})}


@dataclass(frozen=True)
class ScoredText:
    """A txt, jsonl or parquet file to score on.

    Attributes:
        file: its path.
        field: of a JSON line, or column, that holds the text; empty: that of the run's own data.
    """

    file: Path
    field: str = ""

    def data(self, run: DataConfig) -> DataConfig:
        """The settings of a run's data, for the documents of this file, which are all held out."""
        return replace(run, corpus=[str(self.file)], held_out=0.0, text_field=self.field or run.text_field)


def tokens_of_text(text: ScoredText, tokenizer: Tokenizer, data: DataConfig, folder: Path) -> TokenStore:
    """The documents of a file, tokenized into a store below `folder` as a run's `data` settings say (field, eos).

    Raises:
        UserError: if the file holds no text.
    """
    try:
        build_tokens(text.data(data), tokenizer, folder / "tokens")
    except UserError as error:  # it advises on settings that have other names here
        sentence = str(error).replace("data.text_field", "--text-field").replace("data.corpus", "--text")
        raise UserError(sentence) from error
    return TokenStore(folder / "tokens", "train")


def chunks_of_text(
    text: ScoredText, tokenizer: Tokenizer, autoencoder: Autoencoder, data: DataConfig, folder: Path
) -> ChunkStore:
    """The documents of a file, tokenized and encoded into a store below `folder`, packed as `data` says."""
    tokens_of_text(text, tokenizer, data, folder)
    build_chunks(folder / "tokens", autoencoder, folder / "chunks", packing=data.packing)
    return ChunkStore(folder / "chunks", "train")


def compare(
    paths: Sequence[Path],
    text: ScoredText | None,
    context: int,
    seed: int,
    config: EvaluationConfig,
    topology: Topology,
    scratch: Path,
    protocol: Protocol = "default",
) -> list[dict[str, Any]]:
    """The evaluation of each checkpoint under one context. Collective.

    Args:
        paths: checkpoints `step-N` or run folders; CALM of any K and head, AR.
        text: what to score on; None means the held-out documents of each run, which must then be the same ones. With it
            a checkpoint can be scored whose training data is gone, or never was there: it then has no baselines.
        context: tokens of a window; 0 means the most that all of them were trained on, and the paper's under its
            protocol.
        seed: of the draws.
        config: how much is scored.
        topology: where to compute.
        scratch: folder for the stores that the text becomes.
        protocol: `paper` adds its scores to each record.

    Raises:
        UserError: naming the checkpoint that cannot be compared, and why.
    """
    context = common_context([_newest(path, open_checkpoint) for path in paths], context, protocol)
    results: list[dict[str, Any]] = []
    scored_on: dict[str, str] = {}  # what must agree: name -> hash of the first checkpoint
    for number, path in enumerate(paths):
        checkpoint, loaded = _newest(path, lambda found: _load(found, topology))
        loaded = replace(loaded, positions=context // loaded.shape.k)
        train, held_out, reason = _stores(checkpoint, loaded, text, scratch / str(number))
        for name, found in _must_agree(loaded, held_out).items():
            if scored_on.setdefault(name, found) != found:
                raise UserError(
                    f"{checkpoint.path} has another {name} than {results[0]['checkpoint']}: their scores cannot "
                    "be compared; "
                    + ("give one text to both by --text." if name == "held-out text" else "evaluate it by itself.")
                )
        about = {"checkpoint": str(checkpoint.path), "k": loaded.shape.k, "head": loaded.shape.head.kind}
        about |= {"step": checkpoint.step, "context": context, "baselines_reason": reason}
        if text is not None:
            about["text"] = _text_settings(checkpoint, loaded, text)
        results.append(about | evaluate_checkpoint(loaded, topology, train, held_out, seed, config, protocol))
    return results


def common_context(checkpoints: Sequence[Checkpoint], context: int, protocol: Protocol = "default") -> int:
    """The tokens of context to score all checkpoints under: `context`, or with 0 the most that suits all of them.

    Raises:
        UserError: it is more than one was trained on, or not whole chunks of each.
    """
    ks = [checkpoint.state["identity"]["model"]["k"] for checkpoint in checkpoints]
    trained = [checkpoint.state["identity"]["positions"] * k for checkpoint, k in zip(checkpoints, ks, strict=True)]
    given = f"--context {context}"
    if not context and protocol == "paper":
        context, given = PAPER_CONTEXT, f"--protocol paper, which scores blocks of {PAPER_CONTEXT:,} tokens,"
    if not context:
        return min(trained) // lcm(*ks) * lcm(*ks) if len(ks) > 1 else trained[0]
    for checkpoint, k, most in zip(checkpoints, ks, trained, strict=True):
        if context > most:
            advice = f"; --context {most} scores shorter blocks under a name that says so" if "paper" in given else ""
            raise UserError(f"{given} is more than the {most} tokens that {checkpoint.path} was trained on{advice}.")
        if context % k:
            raise UserError(f"{given} is not a multiple of {k}, the tokens of a chunk of {checkpoint.path}.")
    return context


def _load(path: Path, topology: Topology) -> tuple[Checkpoint, Loaded]:
    return open_checkpoint(path), load_for_inference(path, topology.device)


def _newest(path: Path, action: Callable[[Path], T]) -> T:
    """`action` on the checkpoint that `path` means, or on a newer one if training removes it in the meantime.

    Collective: training may save one at any time, and all ranks must score the same.

    Raises:
        UserError: there is no complete checkpoint, or the newest one cannot be used.
    """
    while True:
        found = on_first_rank(lambda: find_checkpoint(path))
        made: list[T] = []
        try:
            on_every_rank(lambda found=found, made=made: made.append(action(found)))
            return made[0]
        except (UserError, RuntimeError):
            if on_first_rank(lambda: find_checkpoint(path)) == found:
                raise


def _stores(
    checkpoint: Checkpoint, loaded: Loaded, text: ScoredText | None, scratch: Path
) -> tuple[Store | None, Store, str | None]:
    """What the checkpoint was trained on, for the baselines; what it is scored on; why the first is None, if it is."""
    if text is None:
        rows = _rows(checkpoint, loaded.autoencoder)
        return rows.train.first, rows.held_out, None
    try:
        train, reason = _rows(checkpoint, loaded.autoencoder).train.first, None
    except UserError as missing:
        train, reason = None, f"the training documents are not available: {missing}"
    data = data_settings(checkpoint, loaded)
    if loaded.autoencoder is None:
        return train, tokens_of_text(text, loaded.tokenizer, data, scratch), reason
    return train, chunks_of_text(text, loaded.tokenizer, loaded.autoencoder, data, scratch), reason


def _rows(checkpoint: Checkpoint, autoencoder: Autoencoder | None) -> Rows:
    """The documents of the run that saved a checkpoint."""
    experiment = experiment_of(checkpoint)
    if autoencoder is None:
        return token_rows(experiment.data, experiment.paths)
    return chunk_rows(experiment.data, experiment.paths, autoencoder)


def data_settings(checkpoint: Checkpoint, loaded: Loaded) -> DataConfig:
    """The settings of the data that a model was trained on, for other documents to be made into the same form."""
    return replace(experiment_of(checkpoint).data, eos=loaded.documents.eos, packing=loaded.documents.packing)


def _text_settings(checkpoint: Checkpoint, loaded: Loaded, text: ScoredText) -> dict[str, Any]:
    """How a text was made into tokens and chunks: as the run's data was, which imported weights do not say."""
    data, imported = text.data(data_settings(checkpoint, loaded)), "reference" in checkpoint.state
    return {"field": data.text_field, "eos": data.eos, "packing": data.packing, "assumed": imported}


def _must_agree(loaded: Loaded, held_out: Store) -> dict[str, Any]:
    """What must be the same where scores are to be compared, by name."""
    tokens = held_out.content_hash if isinstance(held_out, TokenStore) else held_out.manifest["made_from"]["tokens"]
    return {
        "tokenizer": loaded.tokenizer.content_hash,
        "held-out text": tokens,
        "packing of documents": (held_out.packing, held_out.k if held_out.packing == "align" else None),
    }
