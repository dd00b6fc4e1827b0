"""The choice of a chunk, against enumeration: a head that draws one of a few known latents."""

import dataclasses
import itertools
import math
from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from scipy.stats import chi2
from torch import Tensor

from calm_core.autoencoder.model import Autoencoder
from calm_core.config.generation_config import GenerationOptions
from calm_core.config.model_config import AutoencoderConfig
from calm_core.errors import UserError
from calm_core.inference.decoding import UNDECODED, DocumentEnd, DrawnTokens
from calm_core.inference.load_model import DocumentFormat, Loaded
from calm_core.inference.request import prompt_tokens
from calm_core.inference.sampler import TRIALS, ChunkSampler, Context
from calm_core.inference.temperature import occurrences, sample_batch
from calm_core.model.noise import Noise

HIDDEN = torch.zeros(1, 1, 4)
VOCABULARY, K, EOS, PAD = 4, 3, 3, 0
END = DocumentEnd((EOS,), PAD)
SPECIAL = SimpleNamespace(bos=1, eos=2, pad=0)


class FewLatents:
    """A head that draws latent i of `latents` `[L, l]` with probability `probabilities[i]`."""

    def __init__(self, latents: Tensor, probabilities: Tensor) -> None:
        self.latents, self.edges = latents, probabilities.cumsum(0)

    def sample(self, hidden: Tensor, noise: Noise, samples: int) -> Tensor:
        return self.latents[torch.searchsorted(self.edges[:-1].contiguous(), noise.uniform("head", 1, samples))]


@pytest.fixture(scope="module")
def autoencoder() -> Autoencoder:
    torch.manual_seed(1)
    return Autoencoder(AutoencoderConfig(hidden=8, latent=4, init_std=0.4), VOCABULARY, K).eval().requires_grad_(False)


@pytest.fixture(scope="module")
def few(autoencoder: Autoencoder) -> Loaded:
    generator = torch.Generator().manual_seed(3)
    head = FewLatents(torch.randn(6, 4, generator=generator) * 2, torch.tensor([0.3, 0.25, 0.2, 0.1, 0.1, 0.05]))
    return Loaded(SimpleNamespace(head=head), autoencoder, SimpleNamespace(eos=EOS, pad=PAD), positions=8)


def posterior(few: Loaded, known: list[int], temperature: float) -> dict[tuple[int, ...], float]:
    """P(chunk | known tokens)^(1/T) / Z by enumeration."""
    latents, edges = few.model.head.latents, few.model.head.edges
    prior = edges.diff(prepend=torch.zeros(1)).double()
    logits = few.autoencoder.decode(latents).double()
    probability: Counter[tuple[int, ...]] = Counter()
    for i, weight in enumerate(prior.tolist()):
        weight *= math.exp(sum(logits[i, j].log_softmax(-1)[t].item() for j, t in enumerate(known)))
        chunk = [*known, *logits[i].argmax(-1).tolist()[len(known) :]]
        end = next((j for j in range(len(known), K) if chunk[j] == EOS), K)
        probability[tuple(chunk[: end + 1] + [PAD] * (K - end - 1))] += weight
    powers = {chunk: p ** (1 / temperature) for chunk, p in probability.items()}
    return {chunk: p / sum(powers.values()) for chunk, p in powers.items()}


@pytest.mark.parametrize("known", [[], [1], [0, 2]])
@pytest.mark.parametrize(("method", "temperature"), [("batch", 1), ("batch", 1 / 2), ("exact", 1), ("exact", 0.6)])
def test_chunks_follow_the_posterior_under_known_tokens(
    few: Loaded, known: list[int], method: str, temperature: float
) -> None:
    samples = 400 if method == "batch" else 100
    sampler = ChunkSampler(few, GenerationOptions(method=method, temperature=temperature, samples=samples))
    runs = 300
    found = Counter(tuple(sampler.next_chunks(HIDDEN, [Context(seed, [], known)], 1)[0].tokens) for seed in range(runs))
    wanted = posterior(few, known, temperature)
    assert len(wanted) > 1
    assert set(found) <= set(wanted)
    for chunk, probability in wanted.items():
        error = math.sqrt(probability * (1 - probability) / runs)
        assert found[chunk] / runs == pytest.approx(probability, abs=3.5 * error + 0.01)


def test_the_posterior_depends_on_the_known_tokens(few: Loaded) -> None:
    ends = [{chunk[1:]: p for chunk, p in posterior(few, [token], 1).items()} for token in (1, 2)]
    assert max(abs(ends[0].get(end, 0) - ends[1].get(end, 0)) for end in ends[0]) > 0.05  # the test above can tell


def test_effective_samples(few: Loaded) -> None:
    sampler = ChunkSampler(few, GenerationOptions(samples=500))
    [chunk] = sampler.next_chunks(HIDDEN, [Context(0, [], [1])], 1)
    logits = few.autoencoder.decode(few.model.head.latents).double()
    prior = few.model.head.edges.diff(prepend=torch.zeros(1)).double()
    weight = logits[:, 0].log_softmax(-1)[:, 1].exp()
    expected = 500 * (prior * weight).sum() ** 2 / (prior * weight.square()).sum()
    assert chunk.effective_samples == pytest.approx(expected.item(), rel=0.1)
    same = dataclasses.replace(few, model=SimpleNamespace(head=FewLatents(few.model.head.latents[:1], torch.ones(1))))
    [chunk] = ChunkSampler(same, GenerationOptions(samples=50)).next_chunks(HIDDEN, [Context(0, [], [1])], 1)
    assert chunk.effective_samples == pytest.approx(50)


@pytest.mark.parametrize("level", [1, 2, 3, 5])
def test_draws_that_agree_are_found_without_decoding_the_others(autoencoder: Autoencoder, level: int) -> None:
    latents = torch.randn(4, 12, 4, generator=torch.Generator().manual_seed(0)) * 2
    lazy, eager = (DrawnTokens.of(autoencoder, latents, END) for _ in range(2))
    rows = torch.tensor([True, True, False, True])
    eager.decode(torch.ones(4, 12, dtype=torch.bool))
    wanted = (occurrences(eager.tokens) >= level) & rows.unsqueeze(-1)
    found = lazy.shared_by(level, rows)
    assert torch.equal(found, wanted)
    assert torch.equal(lazy.tokens[found], eager.tokens[found])
    assert (lazy.tokens[2] == UNDECODED).all()
    assert (lazy.tokens[rows] == UNDECODED).any() == (level > 1)


def test_sets_of_draws_agree_where_their_chunks_are_equal(autoencoder: Autoencoder) -> None:
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(3, 12, 4, generator=generator) * 2
    sets = torch.rand(3, 40, 12, generator=generator).argsort(-1)[..., :2]
    lazy, eager = (DrawnTokens.of(autoencoder, latents, END) for _ in range(2))
    eager.decode(torch.ones(3, 12, dtype=torch.bool))
    chunks = eager.tokens.unsqueeze(1).expand(-1, 40, -1, -1).take_along_dim(sets.unsqueeze(-1), 2)
    agree = lazy.agree(sets)
    assert torch.equal(agree, (chunks[:, :, 0] == chunks[:, :, 1]).all(-1))
    assert 0 < agree.sum() < agree.numel()
    assert (lazy.tokens == UNDECODED).any()


@pytest.mark.parametrize(("n", "samples"), [(2, 24), (3, 40)])
def test_few_draws_first_choose_as_all_draws_would(few: Loaded, n: int, samples: int) -> None:
    """Against `sample_batch` of N draws by itself, whose bias at a small N must be kept too."""
    runs = 4000
    sampler = ChunkSampler(few, GenerationOptions(temperature=1 / n, samples=samples))
    chunks = sampler.next_chunks(HIDDEN.expand(1, runs, 4), [Context(seed, []) for seed in range(runs)], 1)
    assert {chunk.draws for chunk in chunks} == {TRIALS * n, samples}  # both ways were gone
    latents = few.model.head.latents
    probabilities = few.model.head.edges.diff(prepend=torch.zeros(1))
    generator = torch.Generator().manual_seed(0)
    whole = DrawnTokens.of(few.autoencoder, latents.unsqueeze(0), END)
    whole.decode(torch.ones(1, len(latents), dtype=torch.bool))
    drawn = probabilities.expand(10 * runs, -1).multinomial(samples, replacement=True, generator=generator)
    wanted = Counter(map(tuple, sample_batch(whole.tokens[0][drawn], 1 / n, generator).tokens.tolist()))
    found = Counter(tuple(chunk.tokens) for chunk in chunks)
    assert len(wanted) > 3
    statistic = sum((found[chunk] - count / 10) ** 2 / (1.1 * count / 10) for chunk, count in wanted.items())
    assert set(found) <= set(wanted)
    assert statistic < chi2.ppf(0.999, len(wanted) - 1)


def test_pad_follows_eos_in_a_chunk(autoencoder: Autoencoder) -> None:
    drawn = DrawnTokens.of(autoencoder, torch.randn(1, 200, 4) * 3, END)
    drawn.decode(torch.ones(1, 200, dtype=torch.bool))
    ended = (drawn.tokens == EOS).cumsum(-1).roll(1, -1)
    ended[..., 0] = 0
    assert ended.any()
    assert (drawn.tokens[ended > 0] == PAD).all()


@pytest.mark.parametrize(("length", "partial"), [*itertools.product(range(12), ("weigh", "shift"))])
def test_a_prompt_fills_the_first_chunk_and_shift_fills_all(length: int, partial: str) -> None:
    text = list(range(10, 10 + length))
    tokens = prompt_tokens(text, 4, SPECIAL, DocumentFormat(), partial)
    filler = len(tokens) - length - 1
    assert tokens == [2] * filler + [1, *text]
    assert len(tokens) >= 4
    assert filler < 4
    assert len(tokens) % 4 == 0 if partial == "shift" else filler == max(0, 3 - length)


def test_a_short_prompt_follows_what_its_model_has_seen_before_a_document() -> None:
    def start(length: int, **format: object) -> list[int]:
        return prompt_tokens(range(10, 10 + length), 4, SPECIAL, DocumentFormat(**format))

    assert start(0, eos=False) == [1, 1, 1, 1]  # documents without eos: no eos anywhere
    assert start(2, eos=False) == [1, 1, 10, 11]
    assert start(0, packing="align") == [2, 0, 0, 0, 1]  # a document begins a chunk, after the padding of another
    assert start(2, packing="align", eos=False) == [1, 0, 0, 0, 1, 10, 11]
    assert start(3, packing="align") == [1, 10, 11, 12]
    assert start(6, packing="align", eos=False) == [1, 10, 11, 12, 13, 14, 15]
    with pytest.raises(UserError, match="each begin a chunk"):
        prompt_tokens([10], 4, SPECIAL, DocumentFormat(packing="align"), "shift")


@pytest.mark.parametrize(("n", "samples", "known"), [(2, 4, []), (3, 4, []), (2, 4, [1])])
def test_how_often_a_temperature_is_reached_is_known_before(
    few: Loaded, n: int, samples: int, known: list[int]
) -> None:
    sampler = ChunkSampler(few, GenerationOptions(temperature=1 / n, samples=samples))
    estimates = [sampler.sharpness(HIDDEN, Context(seed, [], known), 1) for seed in range(200)]
    expected = sum(estimate.reached for estimate in estimates) / len(estimates)
    chunks = [sampler.next_chunks(HIDDEN, [Context(seed, [], known)], 1)[0] for seed in range(1000, 2000)]
    reached = sum(chunk.reached for chunk in chunks) / len(chunks)
    assert 0.2 < reached < 0.95
    assert expected == pytest.approx(reached, abs=0.06)
    if not known:
        agreement = sum(estimate.agreement for estimate in estimates) / len(estimates)
        exact = posterior(few, [], 1)
        assert agreement == pytest.approx(sum(p**n for p in exact.values()), rel=0.15)


def test_the_recommended_number_of_draws_suffices(few: Loaded) -> None:
    sampler = ChunkSampler(few, GenerationOptions(temperature=1 / 3, samples=30))
    needed = torch.cat([sampler.sharpness(HIDDEN, Context(seed, []), 1).needed for seed in range(20)])
    enough = int(needed.quantile(0.95))
    assert enough < 30
    sampler = ChunkSampler(few, GenerationOptions(temperature=1 / 3, samples=enough))
    chunks = sampler.next_chunks(HIDDEN.expand(1, 500, 4), [Context(seed, []) for seed in range(500)], 1)
    assert sum(chunk.reached for chunk in chunks) / 500 == pytest.approx(0.95, abs=0.04)
