import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from calm_core import config as configuration
from calm_core.config.experiment import Experiment
from calm_core.config.scaling_config import ScalingConfig
from calm_core.errors import UserError
from calm_core.scaling.points import Point, experiment, family_experiment, points
from calm_core.scaling.results import Row, collect, read_results, results_path, with_stored, write_results
from calm_core.scaling.study_report import fit_study

MEASURE = "brier_lm@ctx512/stride8"


def recorded(folder: Path, settings: Experiment, steps: tuple[int, ...], measure: str = MEASURE) -> None:
    """Leave what a training leaves of itself."""
    folder.mkdir(parents=True)
    configuration.save(settings, folder / "config.yaml")
    scores = {"measure": measure, "brier_1": 0.1, "brier_1_error": 0.01, "loss": 3.0, "loss_error": 0.1}
    scores["standard_errors"] = {"interval_factor": 2.5}
    lines = [json.dumps({"step": step, "kind": "eval", **scores}) for step in steps]
    (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n")


def trained(study: ScalingConfig, name: str, **how: Any) -> Point:
    """Leave what the training of a model leaves at its first three budgets."""
    [point] = (point for point in points(study) if point.name == name)
    made = experiment(study, point)
    recorded(made.paths.calm_run, made, point.budget_steps[:3], **how)
    return point


def changed(study: ScalingConfig, *overrides: str) -> ScalingConfig:
    """The study after a change of its YAML."""
    path = Path(study.run).with_suffix(".yaml")
    configuration.save(study, path)
    return configuration.load(ScalingConfig, path, overrides)


def test_a_row_for_each_budget_that_was_reached(study: ScalingConfig) -> None:
    point = trained(study, "ar-d6-s0")
    trained(study, "k4-d6-s0")
    rows = sorted(collect(study), key=lambda row: (row["model"], row["budget"]))
    assert [row["model"] for row in rows] == ["ar-d6-s0"] * 3 + ["k4-d6-s0"] * 3
    assert [row["tokens"] for row in rows[:3]] == [point.tokens(step) for step in point.budget_steps[:3]]
    assert [row["cross_entropy"] for row in rows] == [3.0] * 3 + [None] * 3
    assert {row["measure"] for row in rows} == {MEASURE}
    assert {row["interval_factor"] for row in rows} == {2.5}
    write_results(rows, results_path(study))
    assert read_results(results_path(study)) == rows


@pytest.mark.parametrize(
    ("override", "key"),
    [
        ("ladder.learning_rate=1e-3", "training.optimizer.learning_rate"),
        ("ladder.batch_tokens=65536", "training.global_batch"),
        ("base.training.schedule.warmup=7", "training.schedule.warmup"),
        ("base.training.precision=fp32", "training.precision"),
        ("base.head.samples=4", "head.samples"),
        ("base.evaluation.windows=3", "evaluation.windows"),
        ("base.data.held_out=0.5", "data.held_out"),
        ("ladder.aspect=64", "model.hidden"),
    ],
)
def test_results_of_other_settings_are_refused(study: ScalingConfig, override: str, key: str) -> None:
    trained(study, "k4-d12-s0")
    with pytest.raises(UserError, match=rf"^k4-d12-s0 was trained with {key}=.* restore it, or move .*/calm away"):
        collect(changed(study, override))


def test_what_decides_nothing_may_change(study: ScalingConfig) -> None:
    trained(study, "k4-d6-s0")
    overrides = ("base.pipeline.processes=1", "base.training.save_every=7", "base.training.wandb=disabled")
    later = changed(study, *overrides, "grid.budgets=[1e15, 2e15, 4e15, 8e15, 16e15]", "base.training.micro_batch=2")
    assert [row["step"] for row in collect(later)] == [row["step"] for row in collect(study)]


def test_what_the_baseline_does_not_read_may_change(study: ScalingConfig) -> None:
    trained(study, "ar-d6-s0")
    overrides = ("base.head.samples=4", "base.autoencoder.hidden=64", "base.data.latents=encode", "base.data.k=2")
    assert len(collect(changed(study, *overrides))) == 3


@pytest.mark.parametrize("override", ["grid.latent_per_token=16", "base.autoencoder_training.steps=7"])
def test_another_autoencoder_is_refused(study: ScalingConfig, override: str) -> None:
    trained(study, "k4-d6-s0")
    family = family_experiment(study, 4)
    recorded(family.paths.autoencoder_run, family, ())
    assert len(collect(study)) == 3
    with pytest.raises(UserError, match=r"^the autoencoder of K=4 was trained with autoencoder"):
        collect(changed(study, override))


def test_scores_of_another_context_are_refused(study: ScalingConfig) -> None:
    trained(study, "ar-d6-s0")
    trained(study, "k4-d6-s0", measure="brier_lm@ctx256/stride8")
    with pytest.raises(UserError, match=r"k4-d6-s0 (was scored )?as brier_lm@ctx256/stride8"):
        collect(study)


def test_points_of_the_file_whose_runs_are_gone_are_kept(study: ScalingConfig, rows: list[Row]) -> None:
    Path(study.run).mkdir()
    rows = [row | {"measure": MEASURE, "interval_factor": None} for row in rows]  # a file of before has no such column
    write_results(rows, results_path(study))
    fit_study(replace(study, fit=replace(study.fit, measures=["cross_entropy"])), write=True)
    assert read_results(results_path(study)) == rows
    trained(study, "ar-d6-s0")
    merged, kept = with_stored(study, collect(study))
    assert (len(merged), kept) == (48, 45)
    assert [row["cross_entropy"] for row in merged if row["model"] == "ar-d6-s0"][:3] == [3.0] * 3


def test_points_that_the_study_does_not_plan_are_neither_lost_nor_mixed_in(
    study: ScalingConfig, rows: list[Row]
) -> None:
    Path(study.run).mkdir()
    write_results(rows, results_path(study))
    other = replace(study, grid=replace(study.grid, budgets=[1e15, 3e15]))
    with pytest.raises(UserError, match=r"results\.parquet holds .* at step .*, which this study does not plan"):
        fit_study(other, write=True)
    assert read_results(results_path(study)) == rows
