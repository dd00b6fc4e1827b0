from pathlib import Path

import pytest
import torch
from launching import ROOT
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer

import calm_core as calm
import calm_core.integrations.huggingface as integration
from calm_core.errors import UserError
from calm_core.reference.convert import export_reference

RUN = ROOT / "tests" / "fixtures" / "old_run"


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("exported") / "model"
    export_reference(RUN, folder)
    return folder


@pytest.fixture(scope="module")
def model(exported: Path) -> integration.CalmForCausalLM:
    return AutoModelForCausalLM.from_pretrained(exported)


@pytest.fixture(scope="module")
def ours() -> calm.LanguageModel:
    return calm.load(RUN)


def test_an_exported_folder_generates_what_the_run_does(exported: Path, model, ours: calm.LanguageModel) -> None:
    assert isinstance(model, integration.CalmForCausalLM)
    config = AutoConfig.from_pretrained(exported)
    assert (config.patch_size, config.bos_token_id, config.document_eos) == (4, 1, True)
    tokenizer = AutoTokenizer.from_pretrained(exported)
    prompts = ["The state of the Union", "And"]
    given = tokenizer(prompts, return_tensors="pt", padding=True, padding_side="left", return_token_type_ids=False)
    rows = model.generate(**given, max_new_tokens=10, temperature=0.5, samples=20, seed=7)
    expected = ours.complete(prompts, max_tokens=10, temperature=0.5, samples=20, seed=7)
    assert torch.equal(rows[:, : given.input_ids.shape[1]], given.input_ids)
    for row, completion in zip(rows.tolist(), expected, strict=True):
        assert row[given.input_ids.shape[1] :][: len(completion.tokens)] == completion.tokens
    torch.manual_seed(3)
    first = model.generate(max_new_tokens=6)
    torch.manual_seed(3)
    assert torch.equal(model.generate(max_new_tokens=6), first)
    assert first[0, 0] == tokenizer.bos_token_id


def test_a_row_that_ends_has_eos_and_then_pad(model, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = integration.generate

    def ended(loaded, prompts, options):
        first, second = whole(loaded, prompts, options)
        first.__dict__.update(tokens=[50, 51], reason="eos")
        return [first, second]

    monkeypatch.setattr(integration, "generate", ended)
    rows = model.generate(torch.tensor([[1, 40], [1, 41]]), max_new_tokens=4, seed=0)
    assert rows[0].tolist() == [1, 40, 50, 51, 2, 0]
    assert rows.shape == (2, 6)


def test_hidden_states_are_those_of_the_network(exported: Path, ours: calm.LanguageModel) -> None:
    model = AutoModel.from_pretrained(exported, dtype="float32", device_map="cpu")
    tokens = torch.randint(4, 300, (2, 12), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = ours.loaded.model.hidden(tokens.view(2, 3, 4)).transpose(0, 1)
        assert torch.equal(model(tokens).last_hidden_state, expected)
    assert AutoModel.from_pretrained(exported, dtype=torch.bfloat16).dtype == torch.bfloat16
    with pytest.raises(UserError, match="whole chunks of 4"):
        model(tokens[:, :3])


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"do_sample": False}, "do_sample=False"),
        ({"num_beams": 4}, "num_beams"),
        ({"top_k": 5}, "top_k=5 needs logits"),
    ],
)
def test_what_cannot_be_done_is_a_sentence(model, options: dict, words: str) -> None:
    with pytest.raises(UserError, match=words):
        model.generate(torch.tensor([[1]]), **options)


def test_an_incomplete_folder_is_refused(exported: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="load_in_8bit"):
        integration.CalmForCausalLM.from_pretrained(exported, load_in_8bit=True)
    with pytest.raises(UserError, match="not a local folder"):
        integration.CalmForCausalLM.from_pretrained("someone/calm")
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes((exported / name).read_bytes())
    with pytest.raises(UserError, match="holds no tokenizer"):
        AutoModelForCausalLM.from_pretrained(tmp_path)
