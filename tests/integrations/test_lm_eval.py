"""The adapter in the real harness, on tasks made of a local file."""

import json
import sys
from pathlib import Path
from typing import Any

import lm_eval
import pytest
import torch
from launching import ROOT, finish

import calm_core as calm
from calm_core.config.model_config import BackboneConfig, HeadConfig, ModelShape
from calm_core.errors import UserError
from calm_core.inference.load_model import Loaded
from calm_core.model.calm import CalmModel
from calm_core.model.parameters import initialize
from calm_core.model.single_rank import SingleRank
from calm_core.tokenizer import load_tokenizer

RUN = ROOT / "tests" / "fixtures" / "old_run"
DOCUMENTS = [
    {"question": "The state of the", "answer": " Union", "other": " zebra"},
    {"question": "Gentlemen of the", "answer": " Senate and House", "other": " moon"},
    {"question": "I have the", "answer": " honor", "other": " q"},
]


@pytest.fixture
def task(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What all tasks share: the file."""
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (tmp_path / "documents.jsonl").write_text("".join(json.dumps(document) + "\n" for document in DOCUMENTS))
    return {
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(tmp_path / "documents.jsonl")}},
        "test_split": "test",
        "doc_to_text": "{{question}}",
        "metadata": {"version": 1},
    }


@pytest.fixture
def baseline(monkeypatch: pytest.MonkeyPatch) -> Loaded:
    """A random autoregressive model of 20 positions, which the adapter gets for any run."""
    tokenizer = load_tokenizer(RUN / "tokenizer" / "tokenizer.model")
    backbone = BackboneConfig(hidden=16, ffn=32, layers=1, heads=2)
    network = CalmModel(
        SingleRank.of(backbone), ModelShape(backbone, HeadConfig("softmax"), tokenizer.vocab_size, 1, 0)
    )
    initialize([network], 0.5, seed=0)
    loaded = Loaded(network.eval(), None, tokenizer, positions=20)
    from calm_core.integrations import lm_eval as adapter

    monkeypatch.setattr(adapter, "load", lambda run, device, precision: calm.LanguageModel(loaded))
    return loaded


def evaluated(task: dict[str, Any], **arguments: Any) -> dict[str, Any]:
    from lm_eval.tasks import TaskManager

    import calm_core.integrations.lm_eval  # noqa: F401 - registers the model

    return lm_eval.simple_evaluate(
        model="calm",
        model_args={"run": str(RUN), **arguments},
        tasks=[task],
        task_manager=TaskManager(include_defaults=False),
        bootstrap_iters=0,
    )


GENERATED = {"task": "generated", "output_type": "generate_until", "doc_to_target": "{{answer}}"}
CHOSEN = {
    "task": "chosen",
    "output_type": "multiple_choice",
    "doc_to_choice": "{{[answer, other]}}",
    "doc_to_target": "{{answer}}",
    "target_delimiter": "",
}


def test_calm_continues_texts(task: dict[str, Any]) -> None:
    asked = {"until": ["."], "max_gen_toks": 12}
    result = evaluated(task | GENERATED | {"generation_kwargs": asked}, temperature=0.5, samples=20, batch_size=2)
    texts = [sample["resps"][0][0] for sample in result["samples"]["generated"]]
    model = calm.load(RUN)
    for number, document in enumerate(DOCUMENTS):
        [expected] = model.complete(
            [document["question"]], max_tokens=12, stop=".", temperature=0.5, samples=20, seed=number
        )
        assert texts[number] == expected.text
    assert 0 <= result["results"]["generated"]["exact_match,none"] <= 1


def test_calm_refuses_what_it_cannot_do(task: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="CALM has none"):
        evaluated(task | CHOSEN)
    with pytest.raises(UserError, match=r"greedy decoding.*temperature=0\.5"):
        evaluated(task | GENERATED | {"generation_kwargs": {"until": ["."], "max_gen_toks": 4}})
    with pytest.raises(UserError, match=r"leave no room.*max_gen_toks"):
        evaluated(task | GENERATED, temperature=0.5, max_gen_toks=100_000)
    with pytest.raises(UserError, match="batch_size=auto"):
        evaluated(task | GENERATED, batch_size="auto")


def nats(loaded: Loaded, context: list[int], continuation: list[int]) -> float:
    """The log-likelihood of tokens, one by one."""
    total = 0.0
    for number, token in enumerate(continuation):
        hidden = loaded.model.hidden(torch.tensor([*context, *continuation[:number]]).view(1, -1, 1))[-1:]
        total += loaded.model.head.log_probabilities(hidden, torch.tensor([[token]])).item()
    return total


def test_an_autoregressive_model_compares_likelihoods(task: dict[str, Any], baseline: Loaded) -> None:
    encode, bos = baseline.tokenizer.encode, baseline.tokenizer.bos
    result = evaluated(task | CHOSEN, batch_size=2)
    for sample in result["samples"]["chosen"]:
        question = encode(sample["doc"]["question"])
        for (found, _), name in zip(sample["filtered_resps"], ("answer", "other"), strict=True):
            scored = encode(sample["doc"]["question"] + sample["doc"][name])[len(question) :]
            context = [bos, *question][-(baseline.positions + 1 - len(scored)) :]
            assert found == pytest.approx(nats(baseline, context, scored), abs=1e-4)


def test_a_continuation_longer_than_the_context_is_refused(task: dict[str, Any], baseline: Loaded) -> None:
    with pytest.raises(UserError, match=r"answer has \d+ tokens.*20"):
        evaluated(task | CHOSEN | {"doc_to_choice": "{{[question + answer + question, other]}}", "doc_to_target": 0})


def test_whole_texts_are_scored_token_by_token(task: dict[str, Any], baseline: Loaded) -> None:
    rolling = {"task": "rolling", "output_type": "loglikelihood_rolling", "doc_to_text": ""}
    result = evaluated(task | rolling | {"doc_to_target": "{{question}}{{answer}}"})
    lengths = []
    for sample in result["samples"]["rolling"]:
        tokens = baseline.tokenizer.encode(sample["doc"]["question"] + sample["doc"]["answer"])
        expected = nats(baseline, [baseline.tokenizer.bos], tokens[:20])
        if rest := tokens[20:]:  # in a window that ends with the text
            expected += nats(baseline, tokens[len(rest) - 1 : 20], rest)
        assert sample["resps"][0][0] == pytest.approx(expected, abs=1e-4)
        lengths.append(len(tokens))
    assert min(lengths) < 20 < max(lengths) < 40


def test_greedy_texts_of_an_autoregressive_model(task: dict[str, Any], baseline: Loaded) -> None:
    result = evaluated(task | GENERATED | {"generation_kwargs": {"until": ["\n\n"], "max_gen_toks": 3}})
    sample = result["samples"]["generated"][0]
    known = [baseline.tokenizer.bos, *baseline.tokenizer.encode(sample["doc"]["question"])]
    for _ in range(3):
        hidden = baseline.model.hidden(torch.tensor(known).view(1, -1, 1))[-1:]
        known.append(baseline.model.head.logits(hidden)[0, 0].argmax().item())
    whole = baseline.tokenizer.decode(known)
    assert sample["doc"]["question"] + sample["resps"][0][0] == whole


@pytest.mark.slow
def test_the_command_line_knows_the_model() -> None:
    code, output = finish([sys.executable, "-m", "calm_core.integrations.lm_eval", "run", "--help"], 100)
    assert code == 0
    assert "--model_args" in output
