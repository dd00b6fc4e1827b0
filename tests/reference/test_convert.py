"""Exchange with the public reference implementation: what is read is written back, what is wrong is named."""

import json
import re
import runpy
import shutil
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from golden_numbers import GOLDEN, assert_close
from launching import ROOT
from reference_folders import CONFIGS, calm, part, write
from safetensors.torch import load_file
from torch import Tensor

from calm_core import config as configuration
from calm_core.autoencoder.model import Autoencoder, load_autoencoder
from calm_core.checkpoint.folder import open_checkpoint
from calm_core.checkpoint.tensor_folder import write_weights
from calm_core.config.experiment import Experiment
from calm_core.config.model_config import AutoencoderConfig, BackboneConfig, HeadConfig, ModelShape
from calm_core.config.training_config import ParallelConfig
from calm_core.distributed.topology import distributed
from calm_core.errors import ExitCode, UserError
from calm_core.reference.config_json import model_shape, reference_calm
from calm_core.reference.names import AUTOENCODER, AUTOENCODER_TIED, HEAD, HEAD_ALIAS
from calm_core.reference.weight_folder import EMBEDDED, TIED_TO
from calm_core.training.launch import run_calm

FIRST_AND_ALIAS = {"first": (HEAD, TIED_TO), "alias": (HEAD_ALIAS, AUTOENCODER_TIED)}
CPU = torch.device("cpu")


@pytest.fixture
def alone() -> Iterator[None]:
    with distributed(ParallelConfig()):
        yield


@pytest.fixture
def tokenizer(tmp_path: Path) -> Path:
    (tmp_path / "some.model").write_bytes(b"a tokenizer")
    return tmp_path / "some.model"


def without(tensors: dict[str, Tensor], form: str) -> dict[str, Tensor]:
    """The tensors of a folder that knows one of two names only."""
    if form == "both":
        return tensors
    other = FIRST_AND_ALIAS["alias" if form == "first" else "first"]
    return {name: w for name, w in tensors.items() if not name.removeprefix(EMBEDDED).startswith(other)}


def assert_written_back(source: Path, folder: Path, tensors: dict[str, Tensor], config: dict) -> None:
    from calm_core.reference.convert import export_reference

    export_reference(source, folder)
    back = load_file(folder / "model.safetensors")
    assert back.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert back[name].dtype == tensor.dtype
        assert torch.equal(back[name].view(torch.uint8), tensor.contiguous().view(torch.uint8)), name
    assert json.loads((folder / "config.json").read_text()) == config


def random_reference(shape: ModelShape, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    from calm_core.reference.convert import calm_shapes

    generator = torch.Generator().manual_seed(0)
    return {n: torch.randn(size, generator=generator).to(dtype) * 0.1 for n, size in calm_shapes(shape).items()}


@pytest.mark.parametrize("pickled", [False, True])
@pytest.mark.parametrize("form", ["both", "first", "alias"])
def test_autoencoder_there_and_back(tmp_path: Path, tokenizer: Path, form: str, pickled: bool) -> None:
    from calm_core.reference.convert import import_reference

    config, tensors = CONFIGS["autoencoder"] | {"architectures": ["Autoencoder"]}, without(part("ae."), form)
    assert len(tensors) == 28 - (form != "both")
    frozen = import_reference(write(tmp_path / "in", config, tensors, pickled), tmp_path / "frozen", tokenizer)
    model, golden = load_autoencoder(frozen), load_file(GOLDEN / "tiny.golden.safetensors")
    with torch.no_grad():
        mean, log_std = model.encode(golden["ae/input_ids"].unflatten(1, (-1, 4)))
    assert_close("mean", mean, golden["ae/mean"])
    assert_close("log_std", log_std, golden["ae/log_std"])
    assert (model.config.kl_floor, model.config.latent_dropout) == (0.5, 0.15)
    assert_written_back(frozen, tmp_path / "out", tensors, config)


@pytest.mark.parametrize("form", ["both", "first", "alias"])
@pytest.mark.parametrize("embedded", [False, True])
@pytest.mark.parametrize("kind", ["energy", "diffusion", "flow"])
def test_calm_there_and_back(tmp_path: Path, tokenizer: Path, kind: str, embedded: bool, form: str) -> None:
    from calm_core.reference.convert import import_reference

    tensors = without(calm(kind, embedded), form) if kind == "energy" else calm(kind, embedded)
    config = CONFIGS["calm"] | {"torch_dtype": "float32"}
    checkpoint = import_reference(write(tmp_path / "in", config, tensors), tmp_path / "run", tokenizer)
    assert checkpoint == tmp_path / "run" / "calm" / "checkpoints" / "step-0"
    assert open_checkpoint(checkpoint).state["identity"]["model"]["head"]["kind"] == kind
    assert (tmp_path / "run" / "autoencoder").exists() == embedded
    assert_written_back(tmp_path / "run", tmp_path / "out", tensors, config)


@pytest.mark.parametrize(
    ("k", "groups", "dtype"), [(1, 4, torch.float32), (2, 1, torch.bfloat16), (3, 2, torch.float32)]
)
@pytest.mark.parametrize("kind", ["energy", "flow"])
def test_grouped_queries_any_k_and_half_precision(
    tmp_path: Path, tokenizer: Path, kind: str, k: int, groups: int, dtype: torch.dtype
) -> None:
    from calm_core.reference.convert import import_reference

    config = CONFIGS["calm"] | {"patch_size": k, "num_key_value_heads": groups}
    shape = model_shape(config, kind, tmp_path)
    autoencoder = Autoencoder(AutoencoderConfig(hidden=16, latent=shape.latent), shape.vocabulary, k).state_dict()
    embedded = {EMBEDDED + theirs: autoencoder[ours].to(dtype) for theirs, ours in AUTOENCODER.items()}
    tensors = random_reference(shape, dtype) | embedded
    assert tensors["transformer.layers.0.self_attn.k_proj.weight"].shape == (8 * groups, 32)
    assert tensors["embed_proj.0.weight"].shape == (64, 32 * k)
    import_reference(write(tmp_path / "in", config, tensors), tmp_path / "run", tokenizer)
    assert load_autoencoder(tmp_path / "run" / "autoencoder" / "frozen").k == k
    assert_written_back(tmp_path / "run", tmp_path / "out", tensors, config)


@pytest.mark.parametrize("pickled", [False, True])
def test_shards_are_read_as_one_file(tmp_path: Path, tokenizer: Path, pickled: bool) -> None:
    from calm_core.reference.convert import import_reference

    tensors = calm("energy", embedded=True)
    source = write(tmp_path / "in", CONFIGS["calm"], tensors, pickled, shards=3)
    import_reference(source, tmp_path / "run", tokenizer)
    assert_written_back(tmp_path / "run", tmp_path / "out", tensors, CONFIGS["calm"])


def test_imported_weights_give_the_recorded_hidden_states(alone: None, tmp_path: Path) -> None:
    from calm_core.checkpoint.load import load_weights
    from calm_core.inference.load_model import model_shape_of
    from calm_core.model.backbone import transformer_config
    from calm_core.model.calm import CalmModel
    from calm_core.reference.convert import import_reference

    source = write(tmp_path / "in", CONFIGS["calm"], calm("energy"))
    checkpoint = open_checkpoint(import_reference(source, tmp_path / "run", None))
    shape = model_shape_of(checkpoint.state["identity"]["model"])
    model = CalmModel(transformer_config(shape.backbone, ParallelConfig()), shape)
    load_weights(checkpoint, [model])
    golden = load_file(GOLDEN / "tiny.golden.safetensors")
    with torch.no_grad():
        hidden = model.hidden(golden["energy/input_ids"].unflatten(1, (-1, 4))[:, :-1])
    assert_close("hidden states", hidden.transpose(0, 1), golden["energy/hidden_states"])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: t.pop("transformer.norm.weight"), ["missing: transformer.norm.weight)"]),
        (lambda t: t.update({"extra.a": torch.ones(1), "extra.b": torch.ones(1)}), ["surplus: extra.a, extra.b"]),
        (
            lambda t: t.update({"embed_proj.2.bias": torch.ones(7)}),
            ["misshapen: embed_proj.2.bias (7,) instead of (32,)"],
        ),
        (lambda t: t[f"{HEAD_ALIAS}noise_embd.bias"].add_(1), ["unequal", "noise_embd.bias and its other name"]),
        (lambda t: t[EMBEDDED + AUTOENCODER_TIED].add_(1), ["unequal", "and its other name"]),
        (lambda t: t.update({"embed_proj.2.bias": torch.ones(32).double()}), ["embed_proj.2.bias of type"]),
        (
            lambda t: (t.pop("embed_proj.2.bias"), t.pop("transformer.norm.weight"), t.update(a=torch.ones(1))),
            ["missing: embed_proj.2.bias, transformer.norm.weight; surplus: a)"],
        ),
        (lambda t: t.pop(EMBEDDED + "encoder.norm.weight"), ["missing: ae_model.encoder.norm.weight"]),
    ],
)
def test_wrong_tensors_are_named(tmp_path: Path, tokenizer: Path, change: object, words: list[str]) -> None:
    from calm_core.reference.convert import import_reference

    tensors = {name: tensor.clone() for name, tensor in calm("energy", embedded=True).items()}
    change(tensors)
    with pytest.raises(UserError) as error:
        import_reference(write(tmp_path / "in", CONFIGS["calm"], tensors), tmp_path / "run", tokenizer)
    assert all(word in str(error.value) for word in words), error.value
    assert not (tmp_path / "run").exists()


def test_wrong_folders_are_refused(tmp_path: Path, tokenizer: Path) -> None:
    from calm_core.reference.convert import export_reference, import_reference

    tensors = calm("energy", embedded=True)
    source = write(tmp_path / "in", CONFIGS["calm"], tensors)
    with pytest.raises(UserError, match="--tokenizer"):
        import_reference(source, tmp_path / "run", None)
    with pytest.raises(UserError, match="nowhere"):
        import_reference(source, tmp_path / "run", tmp_path / "nowhere")
    import_reference(source, tmp_path / "run", tokenizer)
    with pytest.raises(UserError, match="in use"):
        import_reference(source, tmp_path / "run", tokenizer)
    with pytest.raises(UserError, match="in use"):
        export_reference(tmp_path / "run", source)
    (source / "config.json").write_text(json.dumps({**CONFIGS["calm"], "hidden_size": "32"}))
    with pytest.raises(UserError, match="hidden_size"):
        import_reference(source, tmp_path / "other", tokenizer)
    (source / "config.json").write_text(json.dumps(CONFIGS["calm"]))
    (source / "model.safetensors").unlink()
    with pytest.raises(UserError, match="neither"):
        import_reference(source, tmp_path / "other", tokenizer)


def write_random(folder: Path, shape: ModelShape, **config: object) -> Path:
    """A checkpoint of random weights."""
    from calm_core.model.calm import CalmModel
    from calm_core.model.parameters import named_parameters, pieces
    from calm_core.model.single_rank import SingleRank

    model = CalmModel(SingleRank.of(shape.backbone), shape)
    generator = torch.Generator().manual_seed(0)
    weights = {p.name: p.of(parameter) for n, parameter in named_parameters([model]) for p in pieces(n, parameter)}
    weights = {name: torch.randn(weight.shape, generator=generator) * 0.2 for name, weight in weights.items()}
    state = {
        "config": configuration.to_dict(Experiment(run=str(folder))),
        "identity": {"data": "none", "model": asdict(shape), "positions": 32},
    }
    write_weights(folder / "calm" / "checkpoints" / "step-0", weights, state)
    return folder


AR_SHAPE = ModelShape(
    BackboneConfig(layers=2, hidden=32, ffn=48, heads=4, kv_groups=2, rope_base=500.0, norm_eps=1e-5),
    HeadConfig(kind="softmax"),
    vocabulary=300,
    k=1,
    latent=0,
)


def test_an_autoregressive_model_is_a_plain_llama(tiny: Path, tmp_path: Path) -> None:
    from calm_core.inference.load_model import load_for_inference
    from calm_core.reference.convert import export_reference

    run = write_random(tmp_path / "run", AR_SHAPE)
    shutil.copytree(tiny / "tokenizer", run / "tokenizer")
    export_reference(run, tmp_path / "llama")
    config = json.loads((tmp_path / "llama" / "config.json").read_text())
    assert (config["model_type"], config["bos_token_id"], config["eos_token_id"]) == ("llama", 1, 2)
    assert (tmp_path / "llama" / "tokenizer.model").read_bytes() == (run / "tokenizer/tokenizer.model").read_bytes()
    transformers = pytest.importorskip("transformers")
    llama, report = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "llama", output_loading_info=True)
    assert not any(report.values())
    tokens = torch.randint(0, 300, (2, 24), generator=torch.Generator().manual_seed(1))
    model = load_for_inference(run, CPU).model
    with torch.no_grad():
        ours = model.head.logits(model.hidden(tokens.unsqueeze(-1)))[..., :300].transpose(0, 1)
        theirs = llama(tokens).logits
    assert ours.std() > 0.1
    torch.testing.assert_close(theirs, ours, rtol=0, atol=1e-5)


def test_an_export_says_all_that_loading_it_needs(tiny: Path, tmp_path: Path) -> None:
    from calm_core.reference.convert import export_reference, import_reference

    experiment = configuration.load(Experiment, tiny / "config.yaml", [f"run={tiny}"])
    write_random(tiny, ModelShape(experiment.model, experiment.head, 300, 4, 8))
    export_reference(tiny, tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    ids = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    assert {name: config[name] for name in ids} == ids
    assert config["model_type"] == "calm"
    assert config["ae_path"] == str(tmp_path / "out" / "autoencoder")
    assert (tmp_path / "out" / "tokenizer.model").exists()
    own = json.loads((tmp_path / "out" / "autoencoder" / "config.json").read_text())
    assert (own["model_type"], own["rms_norm_eps"]) == ("autoencoder", 1e-6)
    again = import_reference(tmp_path / "out" / "autoencoder", tmp_path / "ae", experiment.paths.tokenizer)
    assert load_autoencoder(again).content_hash == load_autoencoder(experiment.paths.autoencoder).content_hash
    import_reference(tmp_path / "out", tmp_path / "run", experiment.paths.tokenizer)
    export_reference(experiment.paths.autoencoder, tmp_path / "alone")
    assert json.loads((tmp_path / "alone" / "config.json").read_text()) == own
    configuration.save(experiment, tiny / "autoencoder" / "config.yaml")  # now it is in the run that trained it
    export_reference(experiment.paths.autoencoder, tmp_path / "in_its_run")
    assert json.loads((tmp_path / "in_its_run" / "config.json").read_text()) == own | ids
    assert (tmp_path / "in_its_run" / "tokenizer.model").exists()


def test_a_model_with_another_epsilon_is_not_exported(tmp_path: Path) -> None:
    from calm_core.reference.convert import export_reference

    backbone = BackboneConfig(layers=1, hidden=32, ffn=48, heads=4, norm_eps=1e-5)
    shape = ModelShape(backbone, HeadConfig(noise=8, target_samples=4), vocabulary=64, k=2, latent=4)
    write_random(tmp_path / "run", shape)
    with pytest.raises(UserError, match=r"model\.norm_eps=1e-05.*cannot be exported"):
        export_reference(tmp_path / "run", tmp_path / "out")


def imported(tiny: Path, folder: Path) -> Path:
    """The checkpoint of random weights of the tiny experiment's shape, imported into a copy of its artefacts."""
    from calm_core.reference.convert import import_reference

    experiment = configuration.load(Experiment, tiny / "config.yaml", [f"run={tiny}"])
    shape = ModelShape(experiment.model, experiment.head, 300, 4, 8)
    source = write(folder / "in", reference_calm(shape, 32), random_reference(shape))
    shutil.copytree(tiny / "autoencoder" / "frozen", folder / "run" / "autoencoder" / "frozen")
    return import_reference(source, folder / "run", experiment.paths.tokenizer)


def test_an_imported_model_generates(tiny: Path, tmp_path: Path) -> None:
    from calm_core.config.generation_config import GenerationOptions
    from calm_core.inference.generate import generate
    from calm_core.inference.load_model import load_for_inference

    imported(tiny, tmp_path)
    loaded = load_for_inference(tmp_path / "run", CPU)
    assert loaded.positions == 32
    [completion] = generate(loaded, ["tone"], GenerationOptions(max_tokens=8))
    assert completion.tokens


def test_an_imported_model_is_scored_on_a_text_without_training_data(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from calm_core.evaluation.scores import BASELINES

    imported(tiny, tmp_path)
    text, output = tmp_path / "text.jsonl", tmp_path / "out.json"
    documents = [path.read_text() for path in sorted(tiny.glob("corpus/1*.txt"))]
    text.write_text("".join(json.dumps({"text": document}) + "\n" for document in documents))
    evaluate = runpy.run_path(str(ROOT / "pretrain" / "evaluate.py"))["main"]
    evaluate([str(tmp_path / "run"), "--text", str(text), "--samples", "4", "--output", str(output)])
    found, shown = json.loads(output.read_text()), capsys.readouterr().out
    assert found["documents"] > 5
    assert -1 <= found["brier_1"] <= 1
    assert found["loss"] > 0
    assert {found[name] for name in BASELINES} == {None}
    assert str(tmp_path / "run" / "chunks") in found["baselines_reason"]
    assert re.search(r"^Brier-4 .*%.* -  +-$", shown, re.MULTILINE)
    assert f"no baselines: {found['baselines_reason']}" in shown
    with pytest.raises(UserError, match="holds no finished store of chunks"):
        evaluate([str(tmp_path / "run")])


def test_training_starts_from_imported_weights_and_does_not_resume_them(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = imported(tiny, tmp_path)

    def train(*overrides: str) -> ExitCode:
        changes = [f"run={tiny}", "training.steps=1", "evaluation.windows=2", *overrides]
        return run_calm(configuration.load(Experiment, tiny / "config.yaml", changes))

    assert train(f"training.init_from={checkpoint}") == ExitCode.OK
    assert "starting from all weights" in capsys.readouterr().out
    from calm_core.reference.convert import export_reference

    export_reference(tiny, tmp_path / "trained")
    trained, before = (load_file(tmp_path / f / "model.safetensors") for f in ("trained", "in"))
    assert {HEAD_ALIAS + name.removeprefix(HEAD) for name in before if name.startswith(HEAD)} <= trained.keys()
    assert EMBEDDED + AUTOENCODER_TIED in trained
    for name, tensor in before.items():  # one step of Adam at most
        torch.testing.assert_close(trained[name], tensor, rtol=0, atol=0.02)

    checkpoints = tiny / "calm" / "checkpoints"
    shutil.rmtree(checkpoints)
    shutil.copytree(checkpoint, checkpoints / "step-0")
    with pytest.raises(UserError, match=r"none \(imported weights\).*training.init_from"):
        train()
