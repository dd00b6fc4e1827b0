"""Roll-outs from many positions at once, against models that read every continuation from the beginning."""

import pytest
import torch
from torch import Tensor

from calm_core.autoencoder.model import Autoencoder
from calm_core.config.model_config import AutoencoderConfig, BackboneConfig, HeadConfig, ModelShape
from calm_core.config.training_config import ParallelConfig
from calm_core.distributed.topology import Topology
from calm_core.evaluation.brier import (
    autoregressive_brier_terms,
    autoregressive_within_variance,
    brier_terms,
    within_variance,
)
from calm_core.evaluation.held_out import ScoredPositions
from calm_core.evaluation.scores import Draws, first_draws, mean_distance, next_draws, tokens_of
from calm_core.model.attention import BranchingCache
from calm_core.model.backbone import transformer_config
from calm_core.model.calm import CalmModel
from calm_core.model.noise import SampleNoise
from calm_core.model.parameters import initialize

V, MANY, LATENT, B, S = 5, 40, 4, 2, 12

POSITIONS = torch.tensor([3, 6, 9])

NOISE = SampleNoise(0, [7, 8], torch.device("cpu"), purpose="evaluation")


def random_model(kind: str, k: int) -> CalmModel:
    latent, vocabulary = (0, V) if kind == "softmax" else (LATENT, MANY)
    backbone = BackboneConfig(layers=2, hidden=16, ffn=32, heads=4, kv_groups=2)
    shape = ModelShape(backbone, HeadConfig(kind=kind, noise=4), vocabulary, k, latent)
    model = CalmModel(transformer_config(backbone, ParallelConfig()), shape).eval().requires_grad_(False)
    initialize([model], 0.5, seed=0)
    for parameter in model.head.parameters():
        torch.nn.init.normal_(parameter, std=0.3, generator=torch.Generator().manual_seed(1))
    return model


def random_autoencoder(k: int) -> Autoencoder:
    torch.manual_seed(0)
    return Autoencoder(AutoencoderConfig(hidden=16, latent=LATENT, init_std=0.5), MANY, k).eval().requires_grad_(False)


def windows(k: int) -> Tensor:
    return torch.randint(V, (B, S, k), generator=torch.Generator().manual_seed(2))


def drawn(
    model: CalmModel, autoencoder: Autoencoder | None, tokens: Tensor, samples: int, known: int = 0, chunks: int = 0
) -> Draws:
    """Draws that predict the tokens from the `known`-th of the chunk on that follows each of `POSITIONS`."""
    k, cache = model.shape.k, BranchingCache()
    scored = ScoredPositions((POSITIONS + 1) * k + known, torch.ones(3, dtype=torch.bool), k)
    text = tokens[:, POSITIONS + 1].transpose(0, 1)
    draws = first_draws(model, autoencoder, NOISE, model.hidden(tokens, cache)[POSITIONS], scored, text, samples)
    cache.branch(POSITIONS.repeat_interleave(samples))
    for _ in range(1, chunks or -(-(known + 4) // k)):
        states = model.hidden(draws.last_chunks(model), cache)
        draws = next_draws(model, autoencoder, NOISE, states, draws)
    return draws


@pytest.mark.parametrize(("kind", "k", "chunks"), [("energy", 1, 4), ("flow", 2, 2), ("energy", 3, 2), ("flow", 4, 1)])
def test_a_roll_out_continues_as_if_its_chunks_were_the_text(
    topology: Topology, kind: str, k: int, chunks: int
) -> None:
    model, autoencoder, tokens, n = random_model(kind, k), random_autoencoder(k), windows(k), 6
    found = drawn(model, autoencoder, tokens, n).tokens
    assert found.shape == (len(POSITIONS), B, n, k * chunks)
    assert len(found.flatten(0, 2).unique(dim=0)) > 5
    for step in range(1, chunks):
        said = found[..., : step * k].unflatten(-1, (step, k))  # [P, B, N, step, K]
        noise = SampleNoise(0, [7, 8], torch.device("cpu"), f"evaluation/step-{step}")
        states = torch.stack(
            [
                model.hidden(torch.cat([tokens[:, : position + 1], said[p, :, i]], 1))[-1]
                for p, position in enumerate(POSITIONS.tolist())
                for i in range(n)
            ]
        )
        expected = autoencoder.decode(model.head.sample(states, noise, 1).squeeze(2)).argmax(-1)  # [P N, B, K]
        next_chunk = found[..., step * k : (step + 1) * k].transpose(1, 2).flatten(0, 1)
        assert torch.equal(next_chunk, expected), f"{kind}, K={k}, step {step}"


def probabilities(model: CalmModel, tokens: Tensor, position: int) -> tuple[Tensor, Tensor]:
    """Every four tokens `[V^4, 4]` and their log-probabilities `[V^4, 4]` after a position of the first window."""
    every = torch.cartesian_prod(*[torch.arange(V)] * 4)
    texts = torch.cat([tokens[:1, : position + 1, 0].expand(len(every), -1), every], 1)
    hidden = model.hidden(texts.unsqueeze(-1))[position : position + 4]
    return every, model.head.log_probabilities(hidden, every.T).T


@pytest.mark.parametrize("form", ["likelihood", "samples"])
def test_both_forms_are_unbiased_for_an_autoregressive_model(topology: Topology, form: str) -> None:
    """Against Brier-n of the model's own distribution, every one of its V^4 continuations enumerated."""
    model, tokens, n = random_model("softmax", 1), windows(1), 600
    draws = drawn(model, None, tokens, n)
    for p, position in enumerate(POSITIONS.tolist()):
        every, logprob = probabilities(model, tokens, position)
        whole = logprob.double().sum(-1).exp()
        assert whole.sum().item() == pytest.approx(1, abs=1e-5)
        truth = every[300]
        exact = []
        for length in range(1, 5):
            starts = every[:, :length].unique(dim=0, return_inverse=True)[1]
            joint = torch.zeros(V**length, dtype=torch.float64).index_add_(0, starts, whole)
            exact.append(2 * joint[starts[300]] - joint.square().sum())
        samples, said = draws.tokens[p, 0], draws.log_probabilities[p, 0]
        if form == "likelihood":
            estimate = autoregressive_brier_terms(logprob[300], said)
            error = autoregressive_within_variance(said).sqrt()
            assert torch.allclose(estimate.hit, logprob[300].double().cumsum(-1).exp())
        else:
            estimate, error = brier_terms(samples, truth), within_variance(samples, truth).sqrt()
        assert ((estimate.score - torch.stack(exact)).abs() < 4 * error).all()
        assert (error < (0.05 if form == "samples" else 0.015)).all()


def test_the_likelihood_of_a_roll_out_is_that_of_its_tokens(topology: Topology) -> None:
    model, tokens = random_model("softmax", 1), windows(1)
    draws = drawn(model, None, tokens, 3)
    every, logprob = probabilities(model, tokens, int(POSITIONS[1]))
    for said, found in zip(draws.tokens[1, 0], draws.log_probabilities[1, 0], strict=True):
        torch.testing.assert_close(found, logprob[(every == said).all(-1)][0])


def test_likelihoods_are_far_less_noisy_than_samples(topology: Topology) -> None:
    model, tokens = random_model("softmax", 1), windows(1)
    draws = drawn(model, None, tokens, 16)
    truth = draws.tokens[:, :, 0]
    from_samples = within_variance(draws.tokens[:, :, 1:], truth).mean((0, 1))
    from_likelihoods = autoregressive_within_variance(draws.log_probabilities).mean((0, 1))
    assert (from_likelihoods < from_samples / 4).all()


@pytest.mark.parametrize(("k", "known", "chunks"), [(8, 4, 1), (3, 1, 2), (3, 2, 2), (6, 4, 2)])
def test_known_tokens_are_kept_and_weigh_the_draws_by_the_decoder(
    topology: Topology, k: int, known: int, chunks: int
) -> None:
    model, autoencoder, tokens = random_model("energy", k), random_autoencoder(k), windows(k)
    free, found = drawn(model, autoencoder, tokens, 6), drawn(model, autoencoder, tokens, 6, known)
    assert free.log_weights is None
    assert found.tokens.shape[-1] == k * chunks
    assert torch.equal(found.latents, free.latents)
    text = tokens[:, POSITIONS + 1].transpose(0, 1).unsqueeze(2)
    assert (found.tokens[..., :known] == text[..., :known]).all()
    assert torch.equal(found.tokens[..., known:k], free.tokens[..., known:k])
    assert torch.equal(found.predicted, found.tokens[..., known : known + 4])
    likely = autoencoder.decode(found.latents).double().log_softmax(-1)  # [P, B, N, K, V]
    wanted = likely[..., :known, :].gather(-1, text[..., :known, None].expand(-1, -1, 6, -1, -1)).sum((-1, -2))
    torch.testing.assert_close(found.log_weights, wanted, rtol=1e-5, atol=1e-5)


def test_a_roll_out_from_inside_a_chunk_reads_the_known_tokens(topology: Topology) -> None:
    model, autoencoder, tokens, known = random_model("energy", 3), random_autoencoder(3), windows(3), 2
    found = drawn(model, autoencoder, tokens, 4, known)
    read = torch.cat([tokens[:, :7], found.tokens[1, :, 2, None, :3]], 1)  # after the second position, draw 2
    states = model.hidden(read)[-1:]
    noise = SampleNoise(0, [7, 8], torch.device("cpu"), "evaluation/step-1")
    many = model.head.sample(states.expand(12, -1, -1), noise, 1)  # the noise of a branch is that of its row
    assert torch.equal(autoencoder.decode_tokens(many[6, :, 0]), found.tokens[1, :, 2, 3:])


def test_branches_can_be_dropped_and_begun_again(topology: Topology) -> None:
    model, tokens, cache = random_model("flow", 2), windows(2), BranchingCache()
    model.hidden(tokens, cache)
    new = torch.randint(V, (B, 3, 2), generator=torch.Generator().manual_seed(3))
    cache.branch(POSITIONS)
    first = model.hidden(new, cache)
    cache.branch(POSITIONS - 2)
    assert not torch.allclose(model.hidden(new, cache), first)
    cache.branch(POSITIONS)
    torch.testing.assert_close(model.hidden(new, cache), first)


@pytest.mark.parametrize("count", [2, 25, 26, 100])
def test_the_spread_of_nearly_equal_draws_is_exact(count: int) -> None:
    """A head that has collapsed: draws 1e-5 apart, far from the origin."""
    generator = torch.Generator().manual_seed(0)
    centre, noise = (torch.randn(n, 2, c, 64, generator=generator) for n, c in ((3, 1), (3, count)))
    points = centre + 1e-5 * noise
    wanted = (points.double().unsqueeze(2) - points.double().unsqueeze(3)).norm(dim=-1).sum((-1, -2))
    found = mean_distance(points)
    assert wanted.max() < 1e-3 * count**2
    torch.testing.assert_close(found.double(), wanted / (count * (count - 1)), rtol=1e-5, atol=0)
    assert torch.equal(mean_distance(points[:, :, :1].expand(-1, -1, count, -1)), torch.zeros(3, 2))


def test_a_numbered_score_counts_where_so_many_tokens_are_text() -> None:
    assert [tokens_of(name) for name in ("brier_4", "unigram_brier_2", "collision_1", "loss", "loss_shuffled")] == [
        4,
        2,
        1,
        1,
        1,
    ]
