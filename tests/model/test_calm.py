"""The CALM network against numbers of the public reference implementation (tests/golden/README.md), in float32."""

from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from golden_numbers import RecordedNoise, assert_close, load_reference
from torch import Tensor

from calm_core.autoencoder.model import Autoencoder
from calm_core.config.model_config import AutoencoderConfig, BackboneConfig, ModelShape
from calm_core.config.training_config import ParallelConfig
from calm_core.distributed.topology import Topology
from calm_core.evaluation.brier import brier_terms
from calm_core.model.attention import KeyValueCache
from calm_core.model.backbone import transformer_config
from calm_core.model.calm import CalmModel
from calm_core.model.heads import Target
from calm_core.model.parameters import named_parameters, pieces
from calm_core.reference.names import AUTOENCODER, AUTOENCODER_TIED, HEAD, HEAD_ALIAS, calm_to_ours, calm_to_theirs

B, S, K = 2, 5, 4


def positions_first(recorded: Tensor) -> Tensor:
    """`[draws, B * S, width]`, sequence after sequence, to `[S, B, draws, width]`."""
    return recorded.unflatten(1, (B, S)).permute(2, 1, 0, 3)


class Forward(NamedTuple):
    """A pass of the golden batch: what it computed, and the gradients of its loss by our names."""

    compressed: Tensor
    hidden: Tensor
    samples: Tensor
    loss: Tensor
    gradients: dict[str, Tensor]
    compressed_gradient: Tensor


@pytest.fixture(scope="module")
def model(topology: Topology, shape: ModelShape, reference: dict[str, Tensor]) -> CalmModel:
    model = CalmModel(transformer_config(shape.backbone, ParallelConfig()), shape)
    load_reference(model, reference)
    return model


@pytest.fixture(scope="module")
def golden_pass(model: CalmModel, golden: dict[str, Tensor]) -> Forward:
    chunks = golden["energy/input_ids"].unflatten(1, (-1, K))
    mean, log_std = (golden[f"energy/target_{n}"].unflatten(0, (B, S)).transpose(0, 1) for n in ("mean", "log_std"))
    target = Target(chunks[:, 1:].transpose(0, 1), mean, log_std)
    noise = RecordedNoise(
        {
            "energy/head": positions_first(golden["energy/noise"]) + 0.5,  # the head centres U[0, 1)
            "energy/target": positions_first(golden["energy/target_eps"]),
        }
    )
    seen: dict[str, Tensor] = {}
    model.zero_grad()
    hook = model.compression.register_forward_hook(lambda module, args, out: seen.update(compressed=out))
    hidden = model.hidden(chunks[:, :-1])
    hook.remove()
    seen["compressed"].retain_grad()
    loss = model.head.loss(hidden, target, noise).loss.mean()
    loss.backward()
    gradients = {
        piece.name: piece.of(parameter.grad)
        for name, parameter in named_parameters([model])
        for piece in pieces(name, parameter)
    }
    with torch.no_grad():
        samples = model.head.sample(hidden, noise, samples=4)
    compressed = seen["compressed"]
    return Forward(compressed.detach(), hidden.detach(), samples, loss.detach(), gradients, compressed.grad)


def test_inputs_hidden_states_samples_and_loss(golden: dict[str, Tensor], golden_pass: Forward) -> None:
    assert_close("compressed inputs", golden_pass.compressed.transpose(0, 1), golden["energy/compressed_inputs"])
    assert_close("hidden states", golden_pass.hidden.transpose(0, 1), golden["energy/hidden_states"])
    assert_close("head samples", golden_pass.samples, positions_first(golden["energy/latent_predictions"]))
    assert_close("loss", golden_pass.loss, golden["energy/loss"][0])


def test_every_recorded_gradient(golden: dict[str, Tensor], golden_pass: Forward, shape: ModelShape) -> None:
    gradients = calm_to_theirs(golden_pass.gradients, shape)
    prefix = "energy/grad/"
    recorded = {name.removeprefix(prefix): g for name, g in golden.items() if name.startswith(prefix)}
    for name, gradient in recorded.items():
        assert_close(f"gradient of {name}", gradients.pop(name.replace(HEAD_ALIAS, HEAD)), gradient)
    # The recording stops at the compressed inputs.
    assert all(name.startswith(("embed_proj.", "transformer.embed_tokens.")) for name in gradients)


def test_gradients_of_the_input_compression(
    golden: dict[str, Tensor], golden_pass: Forward, reference: dict[str, Tensor], shape: ModelShape
) -> None:
    names = [f"embed_proj.{index}.{part}" for index in (0, 2, 3) for part in ("weight", "bias")]
    names.insert(0, "transformer.embed_tokens.weight")
    parameters = [reference[name].clone().requires_grad_() for name in names]
    embedding, w0, b0, w2, b2, w3, b3 = parameters
    chunks = golden["energy/input_ids"].unflatten(1, (-1, K))[:, :-1]
    expanded = F.silu(F.linear(F.embedding(chunks, embedding).flatten(2), w0, b0))
    compressed = F.layer_norm(F.linear(expanded, w2, b2), (32,), w3, b3, eps=1e-6)
    compressed.backward(golden_pass.compressed_gradient.transpose(0, 1))
    gradients = calm_to_theirs(golden_pass.gradients, shape)
    for name, parameter in zip(names, parameters, strict=True):
        assert_close(f"gradient of {name}", gradients[name], parameter.grad)


def test_brier_scores(
    golden: dict[str, Tensor], golden_pass: Forward, weights: dict[str, Tensor], model: CalmModel
) -> None:
    """The reference scores the first two samples of each position."""
    named = {name.removeprefix("ae."): w for name, w in weights.items() if name.startswith("ae.")}
    autoencoder = Autoencoder(AutoencoderConfig(hidden=32, latent=8), 96, K)
    autoencoder.load_state_dict({AUTOENCODER[n]: w for n, w in named.items() if n != AUTOENCODER_TIED})
    noise = RecordedNoise({"energy/head": positions_first(golden["energy/eval_noise"]) + 0.5})
    with torch.no_grad():
        tokens = autoencoder.decode_tokens(model.head.sample(golden_pass.hidden, noise, samples=4)[:, :, :2])
    truth = golden["energy/input_ids"].unflatten(1, (-1, K))[:, 1:].transpose(0, 1)
    score = brier_terms(tokens, truth).score.flatten(0, 1).mean(0)
    torch.testing.assert_close(score.float(), golden["energy/eval_brier"])


@pytest.mark.parametrize("kv_groups", [1, 2, 4])
def test_names_and_cuts_go_both_ways(shape: ModelShape, kv_groups: int) -> None:
    backbone = BackboneConfig(layers=2, hidden=32, ffn=64, heads=4, kv_groups=kv_groups)
    shape = ModelShape(backbone, shape.head, shape.vocabulary, shape.k, shape.latent)
    model = CalmModel(transformer_config(backbone, ParallelConfig()), shape)
    ours = {
        piece.name: torch.randn(piece.of(parameter).shape)
        for name, parameter in named_parameters([model])
        for piece in pieces(name, parameter)
    }
    ours["compression.embedding.weight"][shape.vocabulary :] = 0
    theirs = calm_to_theirs(ours, shape)
    assert theirs["transformer.layers.0.self_attn.k_proj.weight"].shape == (8 * kv_groups, 32)
    assert all(torch.equal(tensor, ours.pop(name)) for name, tensor in calm_to_ours(theirs, shape).items())
    assert not ours


def test_grouped_queries_attend_to_their_own_group(topology: Topology, shape: ModelShape) -> None:
    """Heads that share a key and a value, written out as heads of their own, are the same attention."""
    grouped, whole = (BackboneConfig(layers=1, hidden=32, ffn=64, heads=4, kv_groups=groups) for groups in (2, 4))
    torch.manual_seed(0)
    models = []
    for backbone in (grouped, whole):
        one = ModelShape(backbone, shape.head, shape.vocabulary, shape.k, shape.latent)
        models.append((one, CalmModel(transformer_config(backbone, ParallelConfig()), one)))
    (shape_grouped, model_grouped), (shape_whole, model_whole) = models
    ours = {}
    for name, parameter in named_parameters([model_grouped]):
        torch.nn.init.normal_(parameter, std=0.1)
        ours |= {piece.name: piece.of(parameter.data) for piece in pieces(name, parameter)}
    theirs = calm_to_theirs(ours, shape_grouped)
    for kind in "kv":
        name = f"transformer.layers.0.self_attn.{kind}_proj.weight"
        theirs[name] = theirs[name].unflatten(0, (2, 8)).repeat_interleave(2, dim=0).flatten(0, 1)
    ours = calm_to_ours(theirs, shape_whole)
    for name, parameter in named_parameters([model_whole]):
        for piece in pieces(name, parameter):
            piece.of(parameter.data).copy_(ours[piece.name])
    tokens = torch.randint(shape.vocabulary, (2, 7, K))
    with torch.no_grad():
        torch.testing.assert_close(model_grouped.hidden(tokens), model_whole.hidden(tokens))


@pytest.mark.parametrize("pieces_of", [(6, 1, 1, 62), (1, 69)])
@torch.no_grad()
def test_cached_hidden_states_are_the_uncached(model: CalmModel, pieces_of: tuple[int, ...]) -> None:
    tokens = torch.randint(96, (3, sum(pieces_of), K), generator=torch.Generator().manual_seed(0))
    cache = KeyValueCache()
    cached = torch.cat([model.hidden(part, cache) for part in tokens.split(pieces_of, dim=1)])
    assert cache.length == sum(pieces_of)
    torch.testing.assert_close(cached, model.hidden(tokens))
