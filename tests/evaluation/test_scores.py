"""Roll-outs from many places at once, against models that read every continuation from the beginning."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from calm_core.autoencoder.model import Autoencoder
from calm_core.config.model_config import AutoencoderConfig, BackboneConfig, HeadConfig, ModelShape
from calm_core.config.parallel_config import ParallelConfig
from calm_core.distributed.topology import Topology
from calm_core.errors import UserError
from calm_core.evaluation.brier import (
    BrierAccumulator,
    autoregressive_brier_terms,
    autoregressive_within_variance,
    brier_terms,
    within_variance,
)
from calm_core.evaluation.scores import (
    STRIDE,
    ClusteredScores,
    Draws,
    branching_cache,
    chunks_to_draw,
    measure,
    scored_positions,
    summarize,
)
from calm_core.model.backbone import transformer_config
from calm_core.model.calm import CalmModel
from calm_core.model.noise import SampleNoise
from calm_core.model.parameters import initialize

BRIER = tuple(f"brier_{n}" for n in range(1, 5))


def part(values: torch.Tensor, documents: list[int], names: tuple[str, ...] = BRIER) -> ClusteredScores:
    accumulator = BrierAccumulator(values.shape[1])
    accumulator.add(values, torch.tensor(documents))
    return names, accumulator.state()


def test_parts_merge_to_the_whole():
    values = torch.rand(12, 4, dtype=torch.float64)
    documents = [0, 0, 1, 1, 1, 2, 2, 3, 3, 3, 3, 0]
    whole = summarize([part(values, documents)])
    split = summarize([part(values[:5], documents[:5]), part(values[5:], documents[5:])])
    assert whole.keys() == split.keys()
    assert all(whole[name] == pytest.approx(split[name]) for name in whole if whole[name] is not None)
    assert whole["brier_1"] == pytest.approx(values[:, 0].mean().item())
    assert whole["scored_positions"] == 12
    assert whole["documents"] == 4


def test_brier_lm_is_of_the_brier_scores_alone_wherever_they_stand():
    values = torch.tensor([[9.0, 0.4, 0.3, 0.2, 0.1], [8.0, 0.41, 0.31, 0.21, 0.11]], dtype=torch.float64)
    result = summarize([part(values, [0, 1], ("loss", *BRIER))])
    assert result["brier_lm"] == pytest.approx(100 * math.prod([0.405, 0.305, 0.205, 0.105]) ** 0.25)
    assert result["brier_lm_reason"] is None
    assert result["loss"] == 8.5


def test_a_single_document_has_no_error_and_no_brier_lm():
    result = summarize([part(torch.full((3, 4), 0.5), [7, 7, 7])])
    assert result["brier_1_error"] is None
    assert result["brier_lm"] is None
    assert "two documents" in result["brier_lm_reason"]


@given(positions=st.integers(48, 300), k=st.sampled_from([1, 2, 3, 4, 8, 16]))
def test_scored_chunks_are_aligned_and_have_half_the_context_before_them(positions, k):
    targets = (scored_positions(positions, k) + 1).tolist()
    assert targets == [
        t for t in range(1, positions) if t * k % STRIDE == 0 and t >= positions / 2 and t * k + 4 <= positions * k
    ]
    assert all(t + chunks_to_draw(k) <= positions for t in targets)


@pytest.mark.parametrize("places", [0, 1, 5, 100])
def test_models_of_every_k_score_the_same_token_offsets(places):
    offsets = [((scored_positions(256 // k, k, places) + 1) * k).tolist() for k in (1, 2, 4, 8)]
    assert all(own == offsets[0] for own in offsets)
    assert len(offsets[0]) == min(places or 16, 16)


def test_fewer_places_are_spread_over_all_of_them():
    every = scored_positions(512, 1).tolist()
    assert scored_positions(512, 1, 3).tolist() == [every[0], every[15], every[-1]]


def test_the_name_tells_stride_context_and_padding():
    assert measure(512, 4) == measure(512, 1) == measure(512, 2, "pack") == "brier_lm@ctx512/stride8"
    assert measure(512, 3) == "brier_lm@ctx512/stride24"
    assert measure(512, 4, "align") == "brier_lm@ctx512/stride8/align4"


def test_a_window_without_a_place_is_refused():
    with pytest.raises(UserError, match=r"2 positions of 4 tokens has no place .* raise training\.positions"):
        scored_positions(2, 4)
    assert scored_positions(3, 4).tolist() == [1]


V, MANY, LATENT, B, S = 5, 40, 4, 2, 12

PLACES = torch.tensor([3, 6, 9])

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


def drawn(model: CalmModel, autoencoder: Autoencoder | None, tokens: Tensor, samples: int) -> Draws:
    cache = branching_cache(model.shape.k)
    draws = Draws(model, autoencoder, NOISE, model.hidden(tokens, cache)[PLACES], samples)
    if cache is not None:
        cache.branch(PLACES.repeat_interleave(samples))
    for _ in range(1, chunks_to_draw(model.shape.k)):
        draws.advance(model.hidden(draws.said, cache))
    return draws


@pytest.mark.parametrize(("kind", "k", "chunks"), [("energy", 1, 4), ("flow", 2, 2), ("energy", 3, 2), ("flow", 4, 1)])
def test_a_roll_out_goes_on_as_if_its_chunks_were_the_text(topology: Topology, kind: str, k: int, chunks: int) -> None:
    model, autoencoder, tokens, n = random_model(kind, k), random_autoencoder(k), windows(k), 6
    found = drawn(model, autoencoder, tokens, n).tokens
    assert found.shape == (len(PLACES), B, n, k * chunks)
    assert len(found.flatten(0, 2).unique(dim=0)) > 5
    for step in range(1, chunks):
        said = found[..., : step * k].unflatten(-1, (step, k))  # [P, B, N, step, K]
        noise = SampleNoise(0, [7, 8], torch.device("cpu"), f"evaluation/step-{step}")
        states = torch.stack(
            [
                model.hidden(torch.cat([tokens[:, : place + 1], said[p, :, i]], 1))[-1]
                for p, place in enumerate(PLACES.tolist())
                for i in range(n)
            ]
        )
        expected = autoencoder.decode(model.head.sample(states, noise, 1).squeeze(2)).argmax(-1)  # [P N, B, K]
        next_chunk = found[..., step * k : (step + 1) * k].transpose(1, 2).flatten(0, 1)
        assert torch.equal(next_chunk, expected), f"{kind}, K={k}, step {step}"


def probabilities(model: CalmModel, tokens: Tensor, place: int) -> tuple[Tensor, Tensor]:
    """Every four tokens `[V^4, 4]` and their log-probabilities `[V^4, 4]` after the first window's place."""
    every = torch.cartesian_prod(*[torch.arange(V)] * 4)
    texts = torch.cat([tokens[:1, : place + 1, 0].expand(len(every), -1), every], 1)
    hidden = model.hidden(texts.unsqueeze(-1))[place : place + 4]
    return every, model.head.log_probabilities(hidden, every.T).T


@pytest.mark.parametrize("form", ["likelihood", "samples"])
def test_both_forms_are_unbiased_for_an_autoregressive_model(topology: Topology, form: str) -> None:
    """Against Brier-n of the model's own distribution, every one of its V^4 continuations enumerated."""
    model, tokens, n = random_model("softmax", 1), windows(1), 600
    draws = drawn(model, None, tokens, n)
    for p, place in enumerate(PLACES.tolist()):
        every, logprob = probabilities(model, tokens, place)
        whole = logprob.double().sum(-1).exp()
        assert whole.sum().item() == pytest.approx(1, abs=1e-5)
        truth = every[300]
        exact = []
        for length in range(1, 5):
            starts = every[:, :length].unique(dim=0, return_inverse=True)[1]
            joint = torch.zeros(V**length, dtype=torch.float64).index_add_(0, starts, whole)
            exact.append(2 * joint[starts[300]] - joint.square().sum())
        samples, said = draws.tokens[p, 0], draws.log_probability[p, 0]
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
    every, logprob = probabilities(model, tokens, int(PLACES[1]))
    for said, found in zip(draws.tokens[1, 0], draws.log_probability[1, 0], strict=True):
        torch.testing.assert_close(found, logprob[(every == said).all(-1)][0])


def test_likelihoods_are_far_less_noisy_than_samples(topology: Topology) -> None:
    model, tokens = random_model("softmax", 1), windows(1)
    draws = drawn(model, None, tokens, 16)
    truth = draws.tokens[:, :, 0]
    from_samples = within_variance(draws.tokens[:, :, 1:], truth).mean((0, 1))
    from_likelihoods = autoregressive_within_variance(draws.log_probability).mean((0, 1))
    assert (from_likelihoods < from_samples / 4).all()
