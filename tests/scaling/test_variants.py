import json
from dataclasses import replace
from pathlib import Path

import pytest

from calm_core import config
from calm_core.config.scaling_config import VARIANTS_CONFIG, VariantsConfig
from calm_core.errors import UserError
from calm_core.scaling import variants
from calm_core.workflow.stages import stages


@pytest.fixture
def shipped(tmp_path: Path) -> VariantsConfig:
    return config.load(VariantsConfig, VARIANTS_CONFIG, [f"run={tmp_path / 'run'}"])


def test_every_model_executes_the_flops_of_the_study(shipped: VariantsConfig) -> None:
    for model in variants.models(shipped):
        assert model.flops == pytest.approx(shipped.flops * model.variant.share, rel=0.01)


def test_seeds_and_models_of_the_same_settings_share_their_data(shipped: VariantsConfig) -> None:
    found = {model.name: model for model in variants.models(shipped)}
    first, again, alone, wider = (found[f"{name}"] for name in ("weight-2-0", "weight-2-1", "energy-alone-0", "k-8-0"))
    assert first.data is again.data is alone.data is found["ar-0"].data
    assert first.data.run != wider.data.run
    assert first.experiment.paths.chunks == again.experiment.paths.chunks == first.data.paths.chunks
    assert first.experiment.run != again.experiment.run
    assert (first.experiment.seed, again.experiment.seed) == (0, 1)
    assert alone.experiment.token_loss is None
    assert first.experiment.token_loss.weight == 2


def test_an_ar_model_that_comes_first_leaves_the_autoencoder_to_the_others(shipped: VariantsConfig) -> None:
    order = sorted(shipped.variants, key=lambda variant: variant.name != "ar")
    ar, *_, calm = variants.models(replace(shipped, variants=order))
    assert ar.name == "ar-0"
    assert set(variants.DATA) <= {stage.name for stage in stages(ar.data)}
    assert calm.data.paths.chunks == ar.data.paths.chunks


def test_a_setting_that_does_not_exist_is_named(shipped: VariantsConfig, tmp_path: Path) -> None:
    other = config.load(
        VariantsConfig, None, [f"run={tmp_path}", "variants=[{name: a, settings: [training.weight=3]}]"]
    )
    with pytest.raises(UserError, match=r"training\.weight"):
        variants.models(other)
    with pytest.raises(UserError, match="at least one variant"):
        config.load(VariantsConfig, None, ["variants=[]"])


def test_finished_models_become_rows_and_the_rows_a_table(shipped: VariantsConfig, monkeypatch) -> None:
    scores = {f"brier_{n}": 0.1**n for n in range(1, 5)} | {"loss": 8.0, "measure": "m"}

    def run_stages(experiment, names) -> int:
        if names == ("train_calm",):
            metrics = experiment.paths.calm_run / "metrics.jsonl"
            metrics.parent.mkdir(parents=True)
            own = scores | {"brier_1": 0.1 + 0.01 * experiment.seed, "kind": "eval", "step": 1}
            metrics.write_text(json.dumps(own) + "\n")
        return 2 if "k-8-0" in experiment.run else 0

    monkeypatch.setattr(variants, "run_stages", run_stages)
    assert variants.train(shipped) == 2
    rows = json.loads((Path(shipped.run) / "results.json").read_text())
    assert "k-8-0" not in [row["model"] for row in rows]
    row = next(row for row in rows if row["model"] == "weight-2-1")
    assert row["brier_1"] == pytest.approx(0.11)
    assert row["tokens"] == row["steps"] * 2048
    lines = variants.report(rows).splitlines()
    three = next(line for line in lines if line.startswith("weight-2 "))
    assert "11.000% ± 2.484%" in three  # 4.303 standard deviations of 1 % over the root of 3
    assert next(line for line in lines if line.startswith("random-token ")).split()[5] == "10.000%"
