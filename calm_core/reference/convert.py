"""Models of the public reference implementation into our folders, and back.

An autoencoder becomes a frozen artefact. CALM becomes the folder of an experiment, whose parts lie where those of a
trained one do: `calm/checkpoints/step-0`, and `autoencoder/frozen` where the model came with its autoencoder.
"""

import shutil
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from calm_core import config as configuration
from calm_core.autoencoder.artefact import KIND, load_autoencoder, save_autoencoder
from calm_core.autoencoder.model import Autoencoder
from calm_core.checkpoint.folder import Checkpoint, open_checkpoint
from calm_core.checkpoint.weights import read_weights, write_weights
from calm_core.config.data_config import DataConfig
from calm_core.config.experiment import Experiment
from calm_core.config.model_config import AutoencoderConfig, ModelShape
from calm_core.config.parallel_config import ParallelConfig
from calm_core.errors import UserError
from calm_core.evaluation.autoencoder_health import find_autoencoder
from calm_core.inference.load_model import find_checkpoint, model_shape_of, paths_of
from calm_core.io import hash_file, replacing
from calm_core.manifest import MANIFEST, read_manifest
from calm_core.model.backbone import transformer_config
from calm_core.model.calm import CalmModel
from calm_core.model.parameters import named_parameters, pieces
from calm_core.model.token_loss import NAME as TOKEN_LOSS
from calm_core.reference.config_json import (
    AutoencoderSize,
    autoencoder_size,
    model_shape,
    positions,
    reference_autoencoder,
    reference_calm,
)
from calm_core.reference.names import AUTOENCODER, HEAD, HEAD_ALIAS, calm_to_ours, calm_to_theirs
from calm_core.reference.weights import CONFIG, EMBEDDED, Form, form_of, full_form, read_folder, resolve, write_folder

FORM = "reference"  # the key of a `Form` in our manifests

UNTRAINED = "none (imported weights)"  # identity of the data: no run has it, so that none can resume


def import_reference(source: Path, target: Path, tokenizer: Path | None) -> Path:
    """Make our folders below `target` from a reference folder, and return the one with the model.

    Runs inside `distributed(ParallelConfig())`, on one rank.

    Args:
        source: folder of an autoencoder or of CALM.
        target: the frozen autoencoder, or the experiment.
        tokenizer: file of the tokenizer that the model was trained with; an autoencoder is bound to it.

    Raises:
        UserError: the folder does not hold a model, whole and nothing else, or `target` is in use.
    """
    if tokenizer and not tokenizer.is_file():
        raise UserError(f"--tokenizer {tokenizer} is no file: name the one that the model was trained with.")
    config, tensors = read_folder(source)
    if any(name.startswith("transformer.") for name in tensors):
        return _import_calm(source, target, tokenizer, config, tensors)
    size = autoencoder_size(config, source / CONFIG)
    first = resolve(tensors, _autoencoder_shapes(size), source)
    _require_unused(target)
    _write_autoencoder(target, size, first, form_of(config, tensors), tokenizer)
    return target


def export_reference(source: Path, target: Path) -> None:
    """Write a reference folder from a frozen autoencoder, a checkpoint, or the newest one of a run.

    Imported weights go out in the form in which they came; others in float32, under all names that the reference has
    for them, and with the autoencoder of the run if it is there.

    Raises:
        UserError: there is no such model, the reference has none like it, or `target` is in use.
    """
    _require_unused(target)
    if folder := find_autoencoder(source):
        model, manifest = load_autoencoder(folder), read_manifest(folder, KIND)
        first = _autoencoder_to_theirs(model)
        default = full_form(reference_autoencoder(AutoencoderSize(model.config, model.vocab_size, model.k)), first)
        write_folder(target, _form(manifest["provenance"]) or default, first)
    else:
        _export_calm(open_checkpoint(find_checkpoint(source)), target)


def calm_shapes(shape: ModelShape) -> dict[str, torch.Size]:
    """The shapes of the reference's tensors of a model, by their first names."""
    with torch.device("meta"):
        model = CalmModel(transformer_config(shape.backbone, ParallelConfig()), shape)
    ours = {p.name: p.of(parameter.data) for n, parameter in named_parameters([model]) for p in pieces(n, parameter)}
    return {name: tensor.shape for name, tensor in calm_to_theirs(ours, shape).items()}


def _import_calm(
    source: Path, target: Path, tokenizer: Path | None, config: dict[str, Any], tensors: dict[str, Tensor]
) -> Path:
    shape = model_shape(config, _head_kind(tensors, config), source / CONFIG)
    longest = positions(config, source / CONFIG)
    wanted = calm_shapes(shape)
    embedded = any(name.startswith(EMBEDDED) for name in tensors)
    if embedded:
        size = _embedded_size(tensors, shape, source)
        wanted |= {EMBEDDED + name: wanted_shape for name, wanted_shape in _autoencoder_shapes(size).items()}
    first = resolve(tensors, wanted, source)
    experiment = Experiment(run=str(target), data=DataConfig(k=shape.k), model=shape.backbone, head=shape.head)
    paths, reference = experiment.paths, asdict(form_of(config, tensors))
    _require_unused(paths.calm_run)
    if tokenizer and paths.tokenizer.exists() and hash_file(tokenizer) != hash_file(paths.tokenizer):
        raise UserError(f"{paths.tokenizer} is another tokenizer than {tokenizer}: choose another folder to import to.")
    if embedded:
        _require_unused(paths.autoencoder)
        own = _without_prefix(tensors)
        form = form_of(reference_autoencoder(size), own)
        reference["autoencoder"] = _write_autoencoder(paths.autoencoder, size, _without_prefix(first), form, tokenizer)
    if tokenizer:
        paths.tokenizer.parent.mkdir(parents=True, exist_ok=True)
        with replacing(paths.tokenizer) as temporary:
            shutil.copyfile(tokenizer, temporary)
    state = {
        "config": configuration.to_dict(configuration.with_absolute_paths(experiment)),
        "identity": {"data": UNTRAINED, "model": asdict(shape), "positions": longest},
        FORM: reference,
    }
    checkpoint = paths.calm_run / "checkpoints" / "step-0"
    write_weights(checkpoint, calm_to_ours(first, shape), state)
    return checkpoint


def _export_calm(checkpoint: Checkpoint, target: Path) -> None:
    identity, paths = checkpoint.state["identity"], paths_of(checkpoint)
    shape = model_shape_of(identity["model"])
    if shape.head.reads_tokens:
        raise UserError(f"{checkpoint.path} has a softmax head: the reference has no such network.")
    weights = {name: tensor for name, tensor in read_weights(checkpoint).items() if not name.startswith(TOKEN_LOSS)}
    first = calm_to_theirs(weights, shape)
    wanted_hash = checkpoint.state.get(FORM, {}).get("autoencoder")
    if wanted_hash or (FORM not in checkpoint.state and (paths.autoencoder / MANIFEST).exists()):
        autoencoder = load_autoencoder(paths.autoencoder)
        if autoencoder.content_hash != (wanted_hash or autoencoder.content_hash):
            raise UserError(f"{paths.autoencoder} is not the autoencoder that came with the model: restore that one.")
        first |= {EMBEDDED + name: tensor for name, tensor in _autoencoder_to_theirs(autoencoder).items()}
    default = full_form(reference_calm(shape, identity["positions"]), first)
    write_folder(target, _form(checkpoint.state) or default, first)


def _write_autoencoder(
    folder: Path,
    size: AutoencoderSize,
    first: Mapping[str, Tensor],
    form: Form,
    tokenizer: Path | None,
) -> str:
    if tokenizer is None:
        raise UserError("--tokenizer is missing: give the file of the tokenizer that the autoencoder was trained with.")
    with torch.device("meta"):
        model = Autoencoder(*size)
    model.load_state_dict({AUTOENCODER[name]: tensor for name, tensor in first.items()}, assign=True)
    return save_autoencoder(model, folder, hash_file(tokenizer), {FORM: asdict(form)})


def _autoencoder_shapes(size: AutoencoderSize) -> dict[str, torch.Size]:
    with torch.device("meta"):
        model = Autoencoder(*size)
    return {name: tensor.shape for name, tensor in _autoencoder_to_theirs(model).items()}


def _autoencoder_to_theirs(model: Autoencoder) -> dict[str, Tensor]:
    ours = model.state_dict()
    return {name: ours[own] for name, own in AUTOENCODER.items()}


def _head_kind(tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> str:
    """The energy head has no `net`; the diffusion head says a noise and a variance for each latent dimension."""
    out = tensors.get(f"{HEAD}net.final_layer.linear.bias", tensors.get(f"{HEAD_ALIAS}net.final_layer.linear.bias"))
    if out is None:
        return "energy"
    return "flow" if out.numel() == config.get("latent_size") else "diffusion"


def _embedded_size(tensors: Mapping[str, Tensor], shape: ModelShape, source: Path) -> AutoencoderSize:
    """The size of the autoencoder inside CALM, whose configuration does not say its widths: a matrix does."""
    gate = f"{EMBEDDED}encoder.encoder_layers.0.mlp.gate_proj.weight"
    if gate not in tensors or tensors[gate].dim() != 2:
        raise UserError(f"{source} holds an autoencoder without the matrix {gate}: get the whole model.")
    ffn, hidden = tensors[gate].shape
    return AutoencoderSize(AutoencoderConfig(hidden=hidden, ffn=ffn, latent=shape.latent), shape.vocabulary, shape.k)


def _without_prefix(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(EMBEDDED): tensor for name, tensor in tensors.items() if name.startswith(EMBEDDED)}


def _form(manifest: Mapping[str, Any]) -> Form | None:
    found = manifest.get(FORM)
    return Form(found["config"], found["dtypes"]) if found else None


def _require_unused(folder: Path) -> None:
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder} is in use: give another folder, or remove it.")
