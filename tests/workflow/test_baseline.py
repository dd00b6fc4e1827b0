from pathlib import Path

import pytest

from calm_core import config
from calm_core.config.experiment import Experiment
from calm_core.config.load_config import ROOT
from calm_core.plan.dry_run import model_shape
from calm_core.plan.flops import executed_training
from calm_core.workflow.baseline import baseline
from calm_core.workflow.stages import config_path, save_configs, stages


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
