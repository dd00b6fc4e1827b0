"""Models of the public reference implementation into our folders, and back.

An autoencoder becomes a frozen artefact. CALM becomes the folder of an experiment, whose files are where those of a
trained one are: `calm/checkpoints/step-0`, and `autoencoder/frozen` where the model came with its autoencoder.
"""

import shutil
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from calm_core import config as configuration
from calm_core.autoencoder.model import KIND, Autoencoder, load_autoencoder, save_autoencoder
from calm_core.checkpoint.folder import Checkpoint, open_checkpoint
from calm_core.checkpoint.tensor_folder import fill, read_weights, write_weights
from calm_core.config.data_config import DataConfig
from calm_core.config.experiment import Experiment
from calm_core.config.model_config import AutoencoderConfig, ModelShape
from calm_core.errors import UserError
from calm_core.evaluation.autoencoder_health import experiment_of_autoencoder, find_autoencoder
from calm_core.inference.load_model import Loaded, document_format, find_checkpoint, model_shape_of, paths_of
from calm_core.io import MANIFEST, hash_file, read_json, read_manifest, replacing
from calm_core.model.calm import CalmModel
from calm_core.model.parameters import named_parameters, pieces
from calm_core.model.single_rank import SingleRank
from calm_core.model.token_loss import NAME as TOKEN_LOSS
from calm_core.reference.config_json import (
    AutoencoderSize,
    autoencoder_size,
    documents_of,
    llama_config,
    model_shape,
    positions,
    reference_autoencoder,
    reference_calm,
    reference_documents,
    require_exportable,
)
from calm_core.reference.names import AUTOENCODER, HEAD, HEAD_ALIAS, calm_to_ours, calm_to_theirs, to_llama
from calm_core.reference.tokenizer_files import CONVERTED, ORIGINAL, export_tokenizer
from calm_core.reference.weight_folder import (
    CONFIG,
    EMBEDDED,
    Form,
    form_of,
    full_form,
    read_folder,
    resolve,
    write_folder,
)
from calm_core.tokenizer import load_tokenizer

FORM = "reference"  # the key of a `Form` in our manifests

AUTOENCODER_FOLDER = "autoencoder"  # inside an exported folder of CALM: that of its autoencoder

UNTRAINED = "none (imported weights)"  # identity of the data: no run has it, so that none can resume


def import_reference(source: Path, target: Path, tokenizer: Path | None) -> Path:
    """Make our folders below `target` from a reference folder, and return the one with the model.

    Args:
        source: folder of an autoencoder or of CALM.
        target: the frozen autoencoder, or the experiment.
        tokenizer: file of the tokenizer that the model was trained with; an autoencoder is bound to it.

    Raises:
        UserError: the folder does not hold a model, whole and nothing else, or `target` is in use.
    """
    if tokenizer and not tokenizer.is_file():
        raise UserError(f"--tokenizer {tokenizer} is not a file: name the one that the model was trained with.")
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

    Imported weights are written in the form in which they came; others in float32, under all names that the reference
    has for them, with the token ids and the tokenizer of the run, and with its autoencoder, inside and in a folder of
    its own. An autoregressive model becomes a plain Llama, which `transformers` loads.

    Raises:
        UserError: there is no such model, the reference has none like it, or `target` is in use.
    """
    _require_unused(target)
    if folder := find_autoencoder(source):
        model, manifest = load_autoencoder(folder), read_manifest(folder, KIND)
        first = _autoencoder_to_theirs(model)
        form = _form(manifest["provenance"])
        if form is None:
            form = full_form(_autoencoder_config(model) | _export_tokenizer_of(folder, model, target), first)
        write_folder(target, form, first)
    else:
        _export_calm(open_checkpoint(find_checkpoint(source)), target)


def load_reference(folder: Path, device: torch.device, dtype: torch.dtype = torch.float32) -> Loaded:
    """A folder of CALM that holds its autoencoder and its tokenizer, as `export_reference` writes it, for inference.

    Raises:
        UserError: the folder does not hold such a model.
    """
    config, tensors = read_folder(folder)
    shape, longest, first, size = _read_calm(folder, config, tensors)
    if size is None:
        raise UserError(f"{folder} holds no autoencoder, without which nothing is generated: export a whole run.")
    file = next((folder / name for name in (ORIGINAL, CONVERTED) if (folder / name).is_file()), None)
    if file is None:
        raise UserError(f"{folder} holds no tokenizer ({ORIGINAL} or {CONVERTED}): put the model's own there.")
    tokenizer = load_tokenizer(file)
    if tokenizer.vocab_size != shape.vocabulary:
        raise UserError(
            f"{file} has {tokenizer.vocab_size} tokens, and the model {shape.vocabulary}: put the model's own there."
        )
    if (own := folder / AUTOENCODER_FOLDER / CONFIG).is_file():  # says more than the weights do
        size = autoencoder_size(read_json(own), own)
    model = CalmModel(SingleRank.of(shape.backbone, dtype), shape)
    fill(model, calm_to_ours(first, shape).__getitem__)
    autoencoder = _autoencoder_of(size, _without_prefix(first)).to(device, dtype).requires_grad_(False).eval()
    return Loaded(model.to(device).eval().requires_grad_(False), autoencoder, tokenizer, longest, documents_of(config))


def calm_shapes(shape: ModelShape) -> dict[str, torch.Size]:
    """The shapes of the reference's tensors of a model, by their first names."""
    with torch.device("meta"):
        model = CalmModel(SingleRank.of(shape.backbone), shape)
    ours = {p.name: p.of(parameter.data) for n, parameter in named_parameters([model]) for p in pieces(n, parameter)}
    return {name: tensor.shape for name, tensor in calm_to_theirs(ours, shape).items()}


class _Calm(NamedTuple):
    """CALM as a folder of the reference holds it.

    Attributes:
        shape: of the network.
        positions: the longest sequence, in chunks.
        tensors: by their first names, in float32.
        autoencoder: the size of the autoencoder inside it, if there is one.
    """

    shape: ModelShape
    positions: int
    tensors: dict[str, Tensor]
    autoencoder: AutoencoderSize | None


def _read_calm(source: Path, config: dict[str, Any], tensors: dict[str, Tensor]) -> _Calm:
    shape = model_shape(config, _head_kind(tensors, config), source / CONFIG)
    longest = positions(config, source / CONFIG)
    wanted, size = calm_shapes(shape), None
    if any(name.startswith(EMBEDDED) for name in tensors):
        size = _embedded_size(tensors, shape, source)
        wanted |= {EMBEDDED + name: wanted_shape for name, wanted_shape in _autoencoder_shapes(size).items()}
    return _Calm(shape, longest, resolve(tensors, wanted, source), size)


def _import_calm(
    source: Path, target: Path, tokenizer: Path | None, config: dict[str, Any], tensors: dict[str, Tensor]
) -> Path:
    shape, longest, first, size = _read_calm(source, config, tensors)
    experiment = Experiment(run=str(target), data=DataConfig(k=shape.k), model=shape.backbone, head=shape.head)
    paths, reference = experiment.paths, asdict(form_of(config, tensors))
    _require_unused(paths.calm_run)
    if tokenizer and paths.tokenizer.exists() and hash_file(tokenizer) != hash_file(paths.tokenizer):
        raise UserError(f"{paths.tokenizer} is another tokenizer than {tokenizer}: choose another folder to import to.")
    if size:
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
    longest = identity["positions"]
    if shape.head.reads_tokens:
        tensors = to_llama(read_weights(checkpoint), shape)
        config = llama_config(shape, longest) | _export_tokenizer(paths.tokenizer, target)
        write_folder(target, Form(config, dict.fromkeys(tensors, "float32")), tensors)
        return
    require_exportable(shape, checkpoint.path)
    weights = {name: tensor for name, tensor in read_weights(checkpoint).items() if not name.startswith(TOKEN_LOSS)}
    first = calm_to_theirs(weights, shape)
    config = reference_calm(shape, longest) | reference_documents(document_format(checkpoint))
    wanted_hash = checkpoint.state.get(FORM, {}).get("autoencoder")
    if wanted_hash or (FORM not in checkpoint.state and (paths.autoencoder / MANIFEST).exists()):
        autoencoder = load_autoencoder(paths.autoencoder)
        if autoencoder.content_hash != (wanted_hash or autoencoder.content_hash):
            raise UserError(f"{paths.autoencoder} is not the autoencoder that came with the model: restore that one.")
        own = _autoencoder_to_theirs(autoencoder)
        first |= {EMBEDDED + name: tensor for name, tensor in own.items()}
        if FORM not in checkpoint.state:
            write_folder(target / AUTOENCODER_FOLDER, full_form(_autoencoder_config(autoencoder), own), own)
            config["ae_path"] = str((target / AUTOENCODER_FOLDER).absolute())
    form = _form(checkpoint.state) or full_form(config | _export_tokenizer(paths.tokenizer, target), first)
    write_folder(target, form, first)


def _export_tokenizer(path: Path, target: Path) -> dict[str, int]:
    """The tokenizer, if it is there, and the ids of its tokens."""
    return export_tokenizer(path, target) if path.is_file() else {}


def _export_tokenizer_of(folder: Path, model: Autoencoder, target: Path) -> dict[str, int]:
    """The same for an autoencoder, if it is in the run that trained it and the tokenizer of the run is its own."""
    with suppress(UserError):
        path = experiment_of_autoencoder(folder).paths.tokenizer
        if load_tokenizer(path).content_hash == model.tokenizer_hash:
            return _export_tokenizer(path, target)
    return {}


def _autoencoder_config(model: Autoencoder) -> dict[str, Any]:
    return reference_autoencoder(AutoencoderSize(model.config, model.vocab_size, model.k))


def _write_autoencoder(
    folder: Path,
    size: AutoencoderSize,
    first: Mapping[str, Tensor],
    form: Form,
    tokenizer: Path | None,
) -> str:
    if tokenizer is None:
        raise UserError("--tokenizer is missing: give the file of the tokenizer that the autoencoder was trained with.")
    model = _autoencoder_of(size, first)
    return save_autoencoder(model, folder, hash_file(tokenizer), {FORM: asdict(form)})


def _autoencoder_of(size: AutoencoderSize, first: Mapping[str, Tensor]) -> Autoencoder:
    with torch.device("meta"):
        model = Autoencoder(*size)
    model.load_state_dict({AUTOENCODER[name]: tensor for name, tensor in first.items()}, assign=True)
    return model


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
