from dataclasses import replace
from pathlib import Path

import pytest

from calm_core import config
from calm_core.cluster.launcher import Launcher
from calm_core.config.data_config import DataConfig
from calm_core.config.experiment import Experiment, PipelineConfig
from calm_core.config.load_config import ROOT
from calm_core.config.model_config import HeadConfig
from calm_core.config.training_config import ParallelConfig
from calm_core.errors import UserError
from calm_core.plan.dry_run import model_shape
from calm_core.plan.flops import executed_training
from calm_core.workflow.ledger import Ledger, stamp
from calm_core.workflow.stages import baseline, config_path, find_stage, run_stages, save_configs, stages


@pytest.fixture
def experiment(tmp_path: Path) -> Experiment:
    return Experiment(run=str(tmp_path / "run"))


def test_every_stage_is_a_script_that_reads_the_configuration_or_a_product_of_an_earlier_one(experiment):
    plan = stages(experiment)
    for number, stage in enumerate(plan):
        assert (ROOT / stage.script).is_file()
        products = [str(earlier.product) for earlier in plan[:number]]
        source = stage.arguments[0]
        assert source.endswith("config.yaml") or any(product.startswith(source) for product in products)
    assert len({stage.product for stage in plan}) == len({stage.name for stage in plan}) == len(plan)


def test_a_head_that_reads_tokens_has_neither_autoencoder_nor_chunks(experiment):
    plan = stages(replace(experiment, head=HeadConfig(kind="softmax")))
    names = ["train_tokenizer", "tokenize_corpus", "train_calm", "evaluate_calm", "sample"]
    assert [stage.name for stage in plan] == names


def test_what_trains_or_scores_a_model_runs_under_torchrun(experiment):
    def distributed(processes: int) -> list[str]:
        plan = stages(replace(experiment, pipeline=PipelineConfig(processes=processes)))
        return [stage.name for stage in plan if "calm_core.distributed.torchrun" in stage.command]

    assert distributed(2) == ["train_autoencoder", "train_calm", "evaluate_calm"]
    assert distributed(1) == []


def test_cores_are_divided_unless_the_user_sets_threads(experiment, monkeypatch):
    train = stages(replace(experiment, pipeline=PipelineConfig(processes=10_000)))[2]
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert train.environment == {"OMP_NUM_THREADS": "1"}
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    assert train.environment == {}


def test_a_product_that_data_names_is_given_once_it_exists(experiment, tmp_path):
    tokenizer = tmp_path / "my.model"
    named = replace(experiment, data=DataConfig(tokenizer=str(tokenizer)))
    assert not any(stage.given for stage in stages(named))
    with pytest.raises(UserError, match=r"data\.tokenizer names .*my\.model, which is not there"):
        run_stages(named)
    tokenizer.touch()
    assert [stage.name for stage in stages(named) if stage.given] == ["train_tokenizer"]


def test_a_missing_corpus_is_refused_before_anything_starts(experiment, tmp_path):
    with pytest.raises(UserError, match=r"nothing\.txt"):
        run_stages(replace(experiment, data=DataConfig(corpus=[str(tmp_path / "nothing.txt")])))


def test_the_stages_read_the_configuration_that_was_resolved(experiment, monkeypatch):
    ran = []
    monkeypatch.setattr("calm_core.workflow.stages.run_process", lambda command, *_: ran.append(command) or 2)
    assert run_stages(experiment) == 2
    assert len(ran) == 1  # it stops at the first failure, with its code
    assert config.load(Experiment, Path(ran[0][-1]), []) == config.with_absolute_paths(experiment)


def test_seconds_and_stamps_survive_the_process(tmp_path):
    path = tmp_path / "stages.json"
    Ledger(path).note("train", 12.3, "a stamp")
    ledger = Ledger(path)
    assert ledger.seconds("train") == 12.3
    assert ledger.seconds("evaluate") == 0
    assert ledger.is_finished("train", "a stamp")
    assert not ledger.is_finished("train", "another")
    assert not ledger.is_finished("evaluate", "a stamp")


def test_a_stage_that_runs_again_is_not_finished(tmp_path):
    ledger = Ledger(tmp_path / "stages.json")
    ledger.note("train", 10, "a stamp")
    ledger.note("train", 15)
    assert ledger.seconds("train") == 15
    assert not ledger.is_finished("train", "a stamp")
    assert not ledger.is_finished("train", None)


def test_a_stamp_follows_inputs_and_content(tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"
    first.write_text("1")
    assert stamp("config", [first, second]) is None
    second.write_text("2")
    original = stamp("config", [first, second])
    assert original == stamp("config", [first, second])
    assert original != stamp("other config", [first, second])
    first.write_text("changed")
    assert original != stamp("config", [first, second])


def test_the_autoencoder_must_rebuild_the_configured_share_of_tokens(experiment):
    strict = replace(experiment, pipeline=PipelineConfig(least_rebuilt=0.5))
    assert find_stage(experiment, "evaluate_autoencoder").arguments[-2:] == ["--least-rebuilt", "0.95"]
    assert find_stage(strict, "evaluate_autoencoder").arguments[-2:] == ["--least-rebuilt", "0.5"]
    with pytest.raises(UserError, match=r"pipeline\.least_rebuilt=95"):
        PipelineConfig(least_rebuilt=95)


def test_tensor_parallelism_sets_the_single_queue_that_it_needs_before_cuda_starts(experiment, monkeypatch):
    monkeypatch.delenv("CUDA_DEVICE_MAX_CONNECTIONS", raising=False)
    tensor = replace(experiment, parallel=ParallelConfig(tensor=2), pipeline=PipelineConfig(processes=1))
    assert find_stage(tensor, "train_calm").environment == {"CUDA_DEVICE_MAX_CONNECTIONS": "1"}
    assert find_stage(tensor, "train_autoencoder").environment == {}
    monkeypatch.setenv("CUDA_DEVICE_MAX_CONNECTIONS", "8")
    assert find_stage(tensor, "train_calm").environment == {}


def test_every_stage_has_a_launcher(experiment):
    for stage in stages(experiment):
        launcher = Launcher.read(ROOT / "launchers" / f"{stage.launcher}.slurm")
        assert find_stage(experiment, launcher.stage).launcher == stage.launcher
    with pytest.raises(UserError, match="There is no stage 'x': choose one of train_tokenizer, "):
        find_stage(experiment, "x")


@pytest.fixture
def demo(tmp_path: Path) -> Experiment:
    changes = [f"run={tmp_path}", "pipeline.baseline=true", "data.vocabulary=1024"]
    return config.load(Experiment, ROOT / "configs" / "demo.yaml", changes)


def test_the_baseline_trains_with_the_same_flops_on_the_same_tokens(demo: Experiment) -> None:
    ar = baseline(demo)
    of_calm, of_ar = (
        executed_training(model_shape(each), each.training.positions) * each.training.global_batch * each.training.steps
        for each in (demo, ar)
    )
    assert of_ar == pytest.approx(of_calm, rel=1e-3)
    assert ar.training.positions == demo.training.positions * demo.data.k
    assert ar.paths.tokens == demo.paths.tokens
    assert ar.model == demo.model
    assert ar.token_loss is None


def test_its_stages_come_last_and_read_a_configuration_of_their_own(demo: Experiment) -> None:
    last = stages(demo)[-3:]
    assert [stage.name for stage in last] == ["train_ar", "evaluate_ar", "sample_ar"]
    save_configs(demo)
    read = config.load(Experiment, Path(last[0].arguments[0]), [])
    assert read == config.with_absolute_paths(baseline(demo))
    assert config_path(read) == Path(last[0].arguments[0])
    alone = config.load(Experiment, ROOT / "configs" / "demo.yaml", ["pipeline.baseline=true", "head.kind=softmax"])
    assert not any(stage.name.endswith("_ar") for stage in stages(alone))
