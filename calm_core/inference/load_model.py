"""A checkpoint loaded for inference: model, autoencoder and tokenizer that belong together."""

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from calm_core import config as configuration
from calm_core.autoencoder.model import Autoencoder, load_autoencoder
from calm_core.checkpoint.folder import Checkpoint, list_checkpoints, open_checkpoint
from calm_core.checkpoint.tensor_folder import load_whole_model
from calm_core.config.data_config import DataConfig, Packing
from calm_core.config.experiment import Experiment, Paths
from calm_core.config.model_config import BackboneConfig, HeadConfig, ModelShape
from calm_core.errors import UserError
from calm_core.io import MANIFEST, read_manifest, source_hash, store_hash
from calm_core.model.calm import CalmModel
from calm_core.model.single_rank import SingleRank
from calm_core.tokenizer import Tokenizer, load_tokenizer


@dataclass(frozen=True)
class DocumentFormat:
    """How documents are stored in the data that a model was trained on.

    Attributes:
        eos: whether each ends with eos (`data.eos`).
        packing: whether they follow one another in chunks, or each begins a chunk (`data.packing`).
    """

    eos: bool = True
    packing: Packing = "pack"

    def ends(self, tokenizer: Tokenizer) -> tuple[int, ...]:
        """The tokens that end a document: eos; without it the bos of the next document, or the padding before it."""
        return (tokenizer.eos,) if self.eos else (tokenizer.eos, tokenizer.bos, tokenizer.pad)


@dataclass(frozen=True)
class Loaded:
    """All that generation needs.

    Attributes:
        model: the network, for inference.
        autoencoder: frozen, in the model's precision; None where the head draws tokens itself (softmax).
        tokenizer: of the data the model was trained on.
        positions: chunks of context that the model was trained on.
        documents: how documents are stored in that data.
    """

    model: CalmModel
    autoencoder: Autoencoder | None
    tokenizer: Tokenizer
    positions: int
    documents: DocumentFormat = field(default_factory=DocumentFormat)

    @property
    def has_logits(self) -> bool:
        """Whether the head has the probabilities of tokens."""
        return self.autoencoder is None

    @property
    def shape(self) -> ModelShape:
        """The shape of the model."""
        return self.model.shape


def default_device() -> torch.device:
    """A GPU if there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def load_for_inference(path: Path, device: torch.device, dtype: torch.dtype = torch.float32) -> Loaded:
    """The model of a checkpoint with the autoencoder and the tokenizer of its run.

    This process holds the whole model, whatever layout trained it, and needs no process groups.

    Args:
        path: a checkpoint `step-N`, or the folder of a run, whose newest checkpoint is taken.
        device: where to compute.
        dtype: of weights and activations.

    Raises:
        UserError: there is no complete checkpoint, or the autoencoder or tokenizer is missing or not the checkpoint's.
    """
    checkpoint = open_checkpoint(find_checkpoint(path))
    identity = checkpoint.state["identity"]
    shape = model_shape_of(identity["model"])
    paths = paths_of(checkpoint)
    tokenizer = load_tokenizer(paths.tokenizer)
    autoencoder = None if shape.head.reads_tokens else load_autoencoder(paths.autoencoder, str(device), dtype)
    _check_fit(checkpoint, shape, paths, tokenizer, autoencoder)
    model = CalmModel(SingleRank.of(shape.backbone, dtype), shape)
    load_whole_model(checkpoint, model)
    model = model.to(device).eval().requires_grad_(False)
    return Loaded(model, autoencoder, tokenizer, identity["positions"], document_format(checkpoint))


def find_checkpoint(path: Path) -> Path:
    """The checkpoint that `path` means: itself, or the newest of the run in RUN or RUN/calm.

    Raises:
        UserError: there is none.
    """
    if (path / "tensors").is_dir():
        return path
    for run in (path, path / "calm"):
        if found := list_checkpoints(run / "checkpoints"):
            return found[-1]
    raise UserError(f"{path} holds no complete checkpoint: give a folder step-N, or of a run that saved one.")


def model_shape_of(model: dict[str, Any]) -> ModelShape:
    """The shape that a checkpoint's identity has as plain values, without what only training needs."""
    backbone, head = BackboneConfig(**model["backbone"]), HeadConfig(**model["head"])
    return ModelShape(**{**model, "backbone": backbone, "head": head, "token_loss": None})


def paths_of(checkpoint: Checkpoint) -> Paths:
    """Where the run's artefacts are."""
    return experiment_of(checkpoint).paths


def experiment_of(checkpoint: Checkpoint) -> Experiment:
    """The run and the data of a checkpoint, found from its own place, so that a run folder can be moved."""
    config = checkpoint.state["config"]
    experiment = Experiment(run=config["run"], data=configuration.convert(config["data"], DataConfig))
    calm_run = checkpoint.path.absolute().parent.parent
    if calm_run.name == experiment.paths.calm_run.name:
        experiment = replace(experiment, run=str(calm_run.parent))
    return experiment


def document_format(checkpoint: Checkpoint) -> DocumentFormat:
    """How documents are stored in the data of a checkpoint."""
    experiment = experiment_of(checkpoint)
    return documents_of_data(experiment.data, experiment.paths, checkpoint.state["identity"]["data"])


def documents_of_data(data: DataConfig, paths: Paths, identity: Any) -> DocumentFormat:
    """How documents are stored in the data of this identity: as its stores say, or if they are gone, as `data` says."""
    eos, packing, tokens = data.eos, data.packing, identity
    if (paths.chunks / MANIFEST).exists():
        chunks = read_manifest(paths.chunks, "chunks")
        if source_hash(chunks["made_from"]) == tokens:
            packing, tokens = chunks.get("packing", packing), chunks["made_from"].get("tokens")
    if (paths.tokens / MANIFEST).exists() and store_hash(paths.tokens) == tokens:
        eos = read_manifest(paths.tokens, "tokens")["made_from"].get("data.eos", eos)
    return DocumentFormat(eos, packing)


def _check_fit(
    checkpoint: Checkpoint, shape: ModelShape, paths: Paths, tokenizer: Tokenizer, autoencoder: Autoencoder | None
) -> None:
    """Compare hashes with those of the training data, if it still exists, and shapes with the model's."""
    made_from = _made_from(checkpoint, paths)
    wanted = {made_from.get("tokenizer"), autoencoder and autoencoder.tokenizer_hash} - {None}
    if not wanted <= {tokenizer.content_hash} or tokenizer.vocab_size != shape.vocabulary:
        raise UserError(
            f"{paths.tokenizer} is not the tokenizer that {checkpoint.path} was trained with: restore that one."
        )
    if autoencoder is None:
        return
    same_shape = (autoencoder.vocab_size, autoencoder.k, autoencoder.config.latent) == (
        shape.vocabulary,
        shape.k,
        shape.latent,
    )
    if autoencoder.content_hash != made_from.get("autoencoder", autoencoder.content_hash) or not same_shape:
        raise UserError(
            f"{paths.autoencoder} is not the autoencoder that {checkpoint.path} was trained with: restore that one."
        )


def _made_from(checkpoint: Checkpoint, paths: Paths) -> dict[str, Any]:
    """What the checkpoint's store was made from; {} if that store is gone, has been replaced, or was one of several."""
    data = checkpoint.state["identity"]["data"]
    if (paths.chunks / MANIFEST).exists():
        made_from = read_manifest(paths.chunks, "chunks")["made_from"]
        if source_hash(made_from) == data:
            return made_from
    if (paths.tokens / MANIFEST).exists() and store_hash(paths.tokens) == data:
        return read_manifest(paths.tokens, "tokens")["made_from"]
    return {}
