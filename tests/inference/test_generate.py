import dataclasses
from collections import Counter

import pytest
import torch
from torch import Tensor

from calm_core.config.generation_config import GenerationOptions
from calm_core.errors import UserError
from calm_core.inference.generate import Completion, expected_calls, generate
from calm_core.inference.load_model import DocumentFormat, Loaded
from calm_core.inference.temperature import CallLimitError

PROMPTS = ["the quick brown fox", "", "a naïve 😀", "the lazy dog jumps"]


def options(**changes: object) -> GenerationOptions:
    return GenerationOptions(**{"max_tokens": 17, "samples": 20, "temperature": 1 / 2, **changes})


class Watched:
    """A model that counts the positions it is run on; with `rerun`, it keeps no cache but runs all of them again."""

    def __init__(self, loaded: Loaded, rerun: bool = False) -> None:
        self.model, self.rerun, self.positions = loaded.model, rerun, 0
        self.seen: list[Tensor] = []

    def __getattr__(self, name: str) -> object:
        return getattr(self.model, name)

    def hidden(self, tokens: Tensor, cache: object) -> Tensor:
        self.positions += tokens.shape[1]
        self.seen.append(tokens)
        return self.model.hidden(torch.cat(self.seen, 1)) if self.rerun else self.model.hidden(tokens, cache)


class Ending:
    """A tokenizer with another eos."""

    def __init__(self, loaded: Loaded, eos: int) -> None:
        self.tokenizer, self.eos = loaded.tokenizer, eos

    def __getattr__(self, name: str) -> object:
        return getattr(self.tokenizer, name)


def texts(completions: list[Completion]) -> list[str]:
    return [completion.text for completion in completions]


@pytest.mark.parametrize(
    "changes", [{}, {"temperature": 1}, {"partial": "shift"}, {"method": "exact", "partial": "shift", "max_tokens": 5}]
)
def test_a_completion_does_not_depend_on_its_batch(loaded: Loaded, changes: dict) -> None:
    together = generate(loaded, PROMPTS, options(**changes))
    alone = [generate(loaded, [p], options(**changes, seed=i))[0] for i, p in enumerate(PROMPTS)]
    for one, other in zip(together, alone, strict=True):
        assert one.effective_samples == pytest.approx(other.effective_samples)
    together, alone = ([dataclasses.replace(c, effective_samples=None) for c in cs] for cs in (together, alone))
    assert len({len(loaded.tokenizer.encode(prompt)) // 3 for prompt in PROMPTS}) > 2
    assert together == alone


def test_a_short_prompt_may_end_while_a_long_one_is_being_read(loaded: Loaded) -> None:
    options = GenerationOptions(max_tokens=2)
    prompts = ["a", "the quick brown fox jumps over the lazy dog"]
    alone = [generate(loaded, [prompt], options, [seed])[0].tokens for seed, prompt in enumerate(prompts)]
    assert [completion.tokens for completion in generate(loaded, prompts, options, [0, 1])] == alone


def test_seeds(loaded: Loaded) -> None:
    first = generate(loaded, ["the", "the"], options(seed=5))
    assert first == generate(loaded, ["the", "the"], options(seed=5))
    assert first[0].text != first[1].text
    assert generate(loaded, ["the", "the"], options(), seeds=[6, 5]) == first[::-1]


def test_the_cache_changes_nothing_and_runs_each_position_once(loaded: Loaded) -> None:
    cached, rerun = Watched(loaded), Watched(loaded, rerun=True)
    found, wanted = (
        generate(dataclasses.replace(loaded, model=model), PROMPTS, options(max_tokens=30, partial="shift"))
        for model in (cached, rerun)
    )
    assert found == wanted
    one = Watched(loaded)
    [completion] = generate(dataclasses.replace(loaded, model=one), PROMPTS[:1], options(partial="shift"))
    prompt = -(-(1 + len(loaded.tokenizer.encode(PROMPTS[0]))) // 3)
    assert one.positions == prompt + completion.chunks - 1
    assert one.seen[0].shape[1] == prompt  # all at once


def test_max_tokens_is_exact_and_longer_runs_begin_alike(loaded: Loaded) -> None:
    longest = generate(loaded, PROMPTS, options(max_tokens=12))
    assert any(completion.reason == "length" for completion in longest)
    for count in range(1, 12):
        for completion, long in zip(generate(loaded, PROMPTS, options(max_tokens=count)), longest, strict=True):
            assert completion.tokens == long.tokens[:count]
            assert completion.reason == ("length" if len(long.tokens) >= count else long.reason)
            assert len(completion.tokens) == count or completion.reason == "eos"


def test_nothing_follows_eos(loaded: Loaded) -> None:
    prompts = [""] * 20
    free = generate(loaded, prompts, options(max_tokens=30, temperature=1))
    eos, _ = Counter(token for completion in free for token in completion.tokens[:-1]).most_common(1)[0]
    found = generate(dataclasses.replace(loaded, tokenizer=Ending(loaded, eos)), prompts, options(temperature=1))
    assert {completion.reason for completion in found} == {"eos", "length"}
    for completion in found:
        assert eos not in completion.tokens
        assert completion.text == loaded.tokenizer.decode(completion.tokens)
        assert (completion.reason == "eos") == (len(completion.tokens) < 17)
    places = {len(completion.tokens) % 3 for completion in found if completion.reason == "eos"}
    assert len(places) > 1  # in the middle of a chunk, too


def test_a_stop_text_ends_the_text_before_it(loaded: Loaded) -> None:
    runs = ((seed, generate(loaded, PROMPTS[:1], options(max_tokens=30), seeds=[seed])[0]) for seed in range(50))
    seed, whole = next((seed, one) for seed, one in runs if len(one.text) > 8)  # some end at once
    stop = whole.text[4:6]
    pieces: list[str] = []
    stopped = generate(
        loaded,
        PROMPTS[:1],
        options(max_tokens=30, stop=("never seen", stop)),
        seeds=[seed],
        on_text=lambda _, text: pieces.append(text),
    )[0]
    assert stopped.reason == "stop"
    assert stopped.text == whole.text[: whole.text.find(stop)] == "".join(pieces)
    assert stopped.tokens == whole.tokens[: len(stopped.tokens)]
    assert len(stopped.tokens) < len(whole.tokens)


def test_streamed_pieces_are_the_text(loaded: Loaded) -> None:
    pieces: dict[int, list[str]] = {i: [] for i in range(len(PROMPTS))}
    completions = generate(loaded, PROMPTS, options(max_tokens=40), on_text=lambda i, text: pieces[i].append(text))
    assert (
        ["".join(pieces[i]) for i in pieces]
        == texts(completions)
        == texts(generate(loaded, PROMPTS, options(max_tokens=40)))
    )
    assert max(map(len, pieces.values())) > 2


def test_chunks_obey_the_predicate(loaded: Loaded) -> None:
    lengths: list[int] = []

    def even(chunks: Tensor, history: list[int]) -> Tensor:
        lengths.append(len(history))
        return chunks[:, 0] % 2 == 0

    for completion in generate(loaded, PROMPTS, options(partial="shift"), allowed=even):
        assert all(token % 2 == 0 for token in completion.tokens[::3])
    assert set(lengths) >= {3, 6, 9}
    with pytest.raises(CallLimitError, match="max_calls"):
        generate(loaded, ["the"], options(), allowed=lambda chunks, _: torch.zeros(len(chunks), dtype=torch.bool))


def test_a_low_temperature_agrees_on_fewer_chunks(loaded: Loaded) -> None:
    def different(temperature: float) -> int:
        prompts = ["the quick"] * 40
        completions = generate(loaded, prompts, options(max_tokens=3, samples=60, temperature=temperature))
        return len({tuple(completion.tokens) for completion in completions})

    assert different(1) > different(1 / 2) > different(1 / 8)


def test_expected_calls_are_those_of_the_exact_method(loaded: Loaded) -> None:
    chosen = options(method="exact", max_tokens=3, samples=2000, partial="shift")
    [estimate] = expected_calls(loaded, ["the"], chosen)
    chosen = dataclasses.replace(chosen, samples=10)
    draws = [completion.draws for completion in generate(loaded, ["the"] * 60, chosen)]
    assert sum(draws) / len(draws) == pytest.approx(estimate, rel=0.4)


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"temperature": 1.5, "method": "batch"}, "above 1"),
        ({"temperature": 1.5, "method": "exact"}, "above 1"),
        ({"temperature": 0.4, "method": "batch"}, "exact"),
        ({"temperature": 0}, "positive"),
        ({"temperature": float("nan")}, "positive"),
        ({"top_k": -1}, "top_k"),
        ({"top_p": 0.0}, "top_p"),
        ({"top_k": 5, "method": "exact"}, "top_k=5 needs logits"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"stop": ("",)}, "stop"),
        ({"method": "both"}, "method"),
    ],
)
def test_bad_options_are_refused(changes: dict, word: str) -> None:
    with pytest.raises(UserError, match=word):
        GenerationOptions(**changes)


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"temperature": 1.5}, "above 1"),
        ({"temperature": 0.4}, "exact"),
        ({"top_k": 5}, "top_k=5 needs logits"),
        ({"top_p": 0.9}, "top_p=0.9 needs logits"),
        ({"method": "logits"}, "softmax"),
    ],
)
def test_options_that_need_logits_are_refused_without(loaded: Loaded, changes: dict, word: str) -> None:
    with pytest.raises(UserError, match=word):
        generate(loaded, ["the"], options(**changes))


@pytest.mark.parametrize("packing", ["pack", "align"])
def test_without_eos_the_next_document_ends_the_text(loaded: Loaded, packing: str) -> None:
    """The bos of the next document, and with aligned documents the padding before it; no eos goes into the model."""
    loaded = dataclasses.replace(loaded, documents=DocumentFormat(eos=False, packing=packing))
    seen = Watched(loaded)
    free = generate(dataclasses.replace(loaded, model=seen), [""] * 30, options(max_tokens=30, temperature=1))
    assert all(loaded.tokenizer.eos not in tokens for tokens in torch.cat(seen.seen, 1)[:, 0].tolist())
    common, _ = Counter(token for one in free for token in one.tokens[:-1]).most_common(1)[0]
    for name in ("bos", "pad") if packing == "align" else ("bos",):
        tokenizer = Ending(loaded, loaded.tokenizer.eos)
        setattr(tokenizer, name, common)
        found = generate(dataclasses.replace(loaded, tokenizer=tokenizer), [""] * 30, options(temperature=1))
        assert {completion.reason for completion in found} == {"eos", "length"}
        assert all(common not in completion.tokens for completion in found)


def test_a_prompt_that_is_no_text_is_refused(loaded: Loaded) -> None:
    with pytest.raises(UserError, match="prompt 2 is not valid UTF-8"):
        generate(loaded, ["the", b"na\xefve".decode("utf-8", "surrogateescape")], options())


def test_a_context_beyond_the_trained_one_is_refused(loaded: Loaded) -> None:
    assert generate(loaded, [""], options(max_tokens=40 * 3, seed=3))
    with pytest.raises(UserError, match="trained on 40"):
        generate(loaded, [""], options(max_tokens=40 * 3 + 1))
