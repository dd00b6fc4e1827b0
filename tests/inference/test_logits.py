import dataclasses
import itertools
import math
from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from scipy.stats import chi2
from torch import Tensor

from calm_core.config.experiment import Experiment, SamplesConfig
from calm_core.config.generation_config import GenerationOptions
from calm_core.config.model_config import BackboneConfig, HeadConfig, ModelShape
from calm_core.config.parallel_config import ParallelConfig
from calm_core.distributed.topology import Topology
from calm_core.errors import UserError
from calm_core.inference.forecast import forecast
from calm_core.inference.generate import continue_prompts, generate, summary
from calm_core.inference.load_model import Loaded
from calm_core.inference.logits import draw_tokens, token_weights
from calm_core.inference.sampler import ChunkSampler, Context
from calm_core.model.backbone import transformer_config
from calm_core.model.calm import CalmModel
from calm_core.model.parameters import initialize
from calm_core.tokenizer import Tokenizer

P = torch.tensor([0.05, 0.4, 0.1, 0.25, 0.2], dtype=torch.float64)


@pytest.fixture(scope="module")
def baseline(topology: Topology, spoken: Tokenizer) -> Loaded:
    """A random autoregressive model."""
    backbone = BackboneConfig(hidden=32, ffn=64, layers=2, heads=4, init_std=0.3)
    shape = ModelShape(backbone, HeadConfig(kind="softmax"), spoken.vocab_size, k=1, latent=0)
    model = CalmModel(transformer_config(shape.backbone, ParallelConfig()), shape).eval()
    initialize([model], 0.3, seed=0)
    return Loaded(model, None, spoken, positions=60)


def by_hand(temperature: float, top_k: int, top_p: float) -> list[float]:
    """The truncated distribution, token by token from the most probable one."""
    powers = {token: p ** (1 / temperature) for token, p in enumerate(P.tolist())}
    ordered = sorted(powers, key=powers.get, reverse=True)[: top_k or None]
    total = sum(powers[token] for token in ordered)
    below = itertools.accumulate((powers[token] / total for token in ordered), initial=0.0)
    kept = [token for token, before in zip(ordered, below, strict=False) if before < top_p]
    total = sum(powers[token] for token in kept)
    return [powers[token] / total if token in kept else 0.0 for token in powers]


CASES = [(1, 0, 1.0), (0.3, 0, 1.0), (1.7, 0, 1.0), (1, 2, 1.0), (1, 0, 0.6), (1, 0, 0.66), (2.0, 4, 0.7), (0.01, 0, 1)]


@pytest.mark.parametrize(("temperature", "top_k", "top_p"), CASES)
def test_weights_are_those_of_the_truncated_distribution(temperature: float, top_k: int, top_p: float) -> None:
    weights = token_weights(P.log(), temperature, top_k, top_p)
    assert (weights / weights.sum()).tolist() == pytest.approx(by_hand(temperature, top_k, top_p))


def test_equally_probable_tokens_are_truncated_by_their_ids() -> None:
    assert token_weights(torch.zeros(4), 1, top_k=2).tolist() == [1, 1, 0, 0]
    assert token_weights(torch.zeros(4), 1, top_p=0.75).tolist() == [1, 1, 1, 0]


def test_a_token_without_weight_is_never_drawn() -> None:
    weights = torch.tensor([0.0, 1.0, 0.0, 3.0, 0.0])
    assert draw_tokens(weights.expand(3, 5), torch.tensor([0.0, 0.2499, 0.25])).tolist() == [1, 1, 3]


@pytest.mark.parametrize(("temperature", "top_k", "top_p"), CASES[:-1])
def test_samples_follow_the_truncated_distribution(temperature: float, top_k: int, top_p: float) -> None:
    head = SimpleNamespace(logits=lambda hidden: P.log().expand(1, hidden.shape[1], -1))
    loaded = Loaded(SimpleNamespace(head=head), None, SimpleNamespace(eos=99, pad=98), positions=8)
    sampler = ChunkSampler(loaded, GenerationOptions(temperature=temperature, top_k=top_k, top_p=top_p))
    runs = 4000
    chunks = sampler.next_chunks(torch.zeros(1, runs, 2), [Context(seed, []) for seed in range(runs)], 1)
    found = Counter(chunk.tokens[0] for chunk in chunks)
    wanted = {token: p for token, p in enumerate(by_hand(temperature, top_k, top_p)) if p}
    assert set(found) <= set(wanted)
    statistic = sum((found[token] - runs * p) ** 2 / (runs * p) for token, p in wanted.items())
    assert statistic < chi2.ppf(0.999, len(wanted) - 1)


def test_temperature_one_draws_as_the_head_itself_does(baseline: Loaded) -> None:
    prompts = ["the quick", "", "a lazy"]
    ours, heads = (
        generate(baseline, prompts, GenerationOptions(max_tokens=20, method=method)) for method in ("auto", "batch")
    )
    assert ours == heads
    assert any(len(completion.tokens) == 20 for completion in ours)


def test_every_temperature_is_reached_without_rejection(baseline: Loaded) -> None:
    options = GenerationOptions(max_tokens=20, temperature=0.7, top_p=0.9)
    assert forecast(baseline, ["the"], options) is None
    [completion] = generate(baseline, ["the"], options)
    assert (completion.draws, completion.agreed) == (completion.chunks, 1.0)
    assert "approximate" not in summary(completion, options.for_head(baseline.has_logits))
    cold = dataclasses.replace(options, temperature=1e-3)
    assert generate(baseline, ["the"], cold, seeds=[1])[0].tokens == generate(baseline, ["the"], cold)[0].tokens
    hot = [generate(baseline, ["the"], dataclasses.replace(options, temperature=3), seeds=[s])[0] for s in range(3)]
    assert len({tuple(completion.tokens) for completion in hot}) == 3


def test_the_predicate_holds_for_tokens(baseline: Loaded) -> None:
    def even(chunks: Tensor, history: list[int]) -> Tensor:
        return chunks[:, 0] % 2 == 0

    [completion] = generate(baseline, ["the"], GenerationOptions(max_tokens=20), allowed=even)
    assert completion.tokens
    assert all(token % 2 == 0 for token in completion.tokens)
    with pytest.raises(UserError, match="allows no token"):
        generate(baseline, ["the"], GenerationOptions(max_tokens=5), allowed=lambda chunks, _: chunks[:, 0] < 0)


def test_the_other_methods_agree_with_the_logits(baseline: Loaded) -> None:
    """Rejection knows no probabilities: at T = 1/2 it must give the distribution that the logits give."""
    runs, counts = 1500, {}
    for method in ("logits", "exact"):
        options = GenerationOptions(max_tokens=1, temperature=1 / 2, method=method)
        completions = generate(baseline, ["the quick"] * runs, options)
        counts[method] = Counter(tuple(completion.tokens) for completion in completions)
    tokens = [token for token, count in (counts["logits"] + counts["exact"]).items() if count > 10]
    ours, theirs = ([counts[method][token] for token in tokens] for method in counts)
    statistic = sum((a - b) ** 2 / (a + b) for a, b in zip(ours, theirs, strict=True))
    assert len(tokens) > 2
    assert not math.isnan(statistic)
    assert statistic < chi2.ppf(0.999, len(tokens))


def test_prompts_of_a_configuration_are_continued_with_its_truncation(baseline: Loaded) -> None:
    config = SamplesConfig(prompts=["the"], temperatures=[3.0], max_tokens=20, top_k=1)
    [greedy] = continue_prompts(baseline, config, seed=0)
    assert greedy["tokens"] == continue_prompts(baseline, config, seed=1)[0]["tokens"]
    free = dataclasses.replace(config, top_k=0)
    assert continue_prompts(baseline, free, seed=0)[0]["tokens"] != greedy["tokens"]


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"temperatures": [1.5]}, "samples: temperature=1.5 is above 1"),
        ({"temperatures": [0.4]}, "not 1/n"),
        ({"top_k": 5}, "samples: top_k=5 needs logits"),
        ({"top_p": 0.5}, "samples: top_p=0.5 needs logits"),
    ],
)
def test_a_configuration_is_refused_where_its_head_has_no_logits(changes: dict, word: str) -> None:
    with pytest.raises(UserError, match=word):
        Experiment(samples=SamplesConfig(**changes))
    assert Experiment(samples=SamplesConfig(**changes), head=HeadConfig("softmax"))


@pytest.mark.parametrize("changes", [{"temperatures": [0.0]}, {"top_k": -1}, {"top_p": 0.0}, {"top_p": 1.5}])
def test_samples_outside_their_bounds_are_refused(changes: dict) -> None:
    with pytest.raises(UserError, match=f"samples.{next(iter(changes))}"):
        SamplesConfig(**changes)
