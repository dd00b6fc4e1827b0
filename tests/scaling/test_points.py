from dataclasses import replace
from pathlib import Path

import pytest

from calm_core import config as configuration
from calm_core.checkpoint.folder import list_checkpoints, retire
from calm_core.cluster.launcher import Launcher, describe_layout
from calm_core.config.experiment import PipelineConfig
from calm_core.config.model_config import BackboneConfig, TokenLossConfig
from calm_core.config.scaling_config import DEFAULT_CONFIG, GridConfig, LadderConfig, ScalingConfig
from calm_core.config.training_config import ParallelConfig
from calm_core.errors import UserError
from calm_core.io import format_version, write_json
from calm_core.plan import flops
from calm_core.scaling.points import (
    BASELINE,
    autoencoder_flops,
    experiment,
    family_experiment,
    hours,
    plan_table,
    points,
    rung,
    shared_experiment,
)
from calm_core.scaling.sweep import LAUNCHER
from calm_core.workflow.stages import find_stage


def on_ranks(study: ScalingConfig, ranks: int, **layout: int) -> ScalingConfig:
    pipeline, parallel = PipelineConfig(processes=ranks), ParallelConfig(**layout)
    return replace(study, base=replace(study.base, pipeline=pipeline, parallel=parallel))


def warmed_up(study: ScalingConfig, warmup: int) -> ScalingConfig:
    training = study.base.training
    schedule = replace(training.schedule, warmup=warmup)
    return replace(study, base=replace(study.base, training=replace(training, schedule=schedule)))


def test_the_papers_medium_model_is_a_rung() -> None:
    of_sixteen = rung(16, LadderConfig(), BackboneConfig())
    assert (of_sixteen.backbone.hidden, of_sixteen.backbone.heads, of_sixteen.backbone.layers) == (1024, 16, 16)
    assert abs(of_sixteen.backbone.ffn - 2752) <= 32
    assert of_sixteen.learning_rate == 3e-4
    of_eight = rung(8, LadderConfig(), BackboneConfig())
    assert of_eight.learning_rate == pytest.approx(6e-4)
    assert of_eight.batch_tokens == (1 << 20) / 4


def test_every_model_of_a_budget_costs_the_same(study: ScalingConfig) -> None:
    planned = points(study)
    assert len(planned) == 4 * 3
    for point in planned:
        for step, budget in zip(point.budget_steps, study.grid.budgets, strict=True):
            assert point.training_flops(point.tokens(step)) == pytest.approx(budget, rel=0.1)


def test_a_budget_pays_for_the_side_loss(study: ScalingConfig) -> None:
    side = replace(study.base.training, token_loss=TokenLossConfig(weight=2, rank=8))
    aided = {point.name: point for point in points(replace(study, base=replace(study.base, training=side)))}
    for plain in points(study):
        with_side = aided[plain.name]
        if plain.family == BASELINE:
            assert with_side == plain
            continue
        # Of a chunk: Linear(d -> rank K), then rank x V for each of its K tokens, forward and twice backward.
        d, k, vocabulary = plain.rung.backbone.hidden, plain.k, study.vocabulary
        cost = 6 * (d * 8 * k + k * 8 * vocabulary) / k
        assert with_side.training_flops(1) - plain.training_flops(1) == pytest.approx(cost)
        assert with_side.steps < plain.steps
        assert with_side.size == plain.size


def test_an_experiment_is_its_point(study: ScalingConfig) -> None:
    for point in points(study):
        made = experiment(study, point)
        assert made.training.steps == point.steps
        assert made.training.positions * point.k == study.grid.context
        assert made.model == point.shape.backbone
        assert made.training.milestones == list(point.budget_steps[:-1])
        assert (made.head.kind == "softmax") == (point.family == "ar")
    assert len({experiment(study, point).run for point in points(study)}) == 12


def test_runs_of_a_study_are_told_apart_from_its_base_and_grouped(study: ScalingConfig) -> None:
    autoencoder = family_experiment(study, 2)
    for point in points(study):
        made = experiment(study, point)
        assert made.config_file == autoencoder.config_file == str(Path(study.run) / "base.yaml")
        assert made.training.wandb_group == autoencoder.autoencoder_training.wandb_group == "study"
        if point.family == "k2":
            assert made.autoencoder == autoencoder.autoencoder


def test_no_checkpoint_of_a_budget_is_deleted(study: ScalingConfig, tmp_path: Path) -> None:
    point = points(study)[0]
    training = experiment(study, replace(point, budget_steps=(400, 2000, 8000, 16000))).training
    saved = {*range(training.save_every, training.steps, training.save_every), *training.milestones, training.steps}
    assert len(saved) <= 8 + 4
    for step in sorted(saved):
        (tmp_path / f"step-{step}").mkdir()
        (tmp_path / f"step-{step}" / "manifest.json").touch()
        retire(tmp_path / f"step-{step}", training.keep)
    assert {"step-400", "step-2000", "step-8000", "step-16000"} <= {path.name for path in list_checkpoints(tmp_path)}


def test_the_ranks_of_the_array_share_every_batch(study: ScalingConfig) -> None:
    job = Launcher.read(LAUNCHER)
    for layout in ({}, {"tensor": 2}, {"pipeline": 2, "virtual": 2}):
        for point in points(on_ranks(study, job.nodes * job.tasks, **layout)):
            made = experiment(on_ranks(study, job.tasks, **layout), point)
            assert describe_layout(find_stage(made, "train_calm").training, job.nodes, job.tasks).startswith("8 ranks")


def test_size_leaves_out_what_the_vocabulary_makes(study: ScalingConfig) -> None:
    wider = replace(study, base=replace(study.base, data=replace(study.base.data, vocabulary=64_000)))
    for small, large in zip(*(sorted(points(c), key=lambda p: p.name) for c in (study, wider)), strict=True):
        assert small.name == large.name
        assert small.size == large.size
        assert sum(flops.parameters(small.shape).values()) < sum(flops.parameters(large.shape).values())


def test_the_shipped_study_is_planned() -> None:
    config = configuration.load(ScalingConfig, DEFAULT_CONFIG, [])
    text = plan_table(config)
    assert "k4-d5-s0" in text
    assert "autoencoder of K=2, trained once" in text
    one, two = (points(on_ranks(config, ranks)) for ranks in (1, 2))
    assert [point.global_batch for point in one] == [point.global_batch for point in two]


def test_the_hours_hold_the_autoencoders(study: ScalingConfig) -> None:
    shared = sum(autoencoder_flops(study, k) for k in study.grid.k) / study.hardware.flops_per_hour
    models = sum(hours(study, point) for point in points(study))
    assert f"{models:.3g}" != f"{models + shared:.3g}"
    assert f", {models + shared:.3g} hours on 8 devices" in plan_table(study)


def test_a_budget_within_the_warm_up_is_reported(study: ScalingConfig) -> None:
    first = sorted(point.budget_steps[0] for point in points(study))
    assert "warning" not in plan_table(warmed_up(study, (first[0] - 1) // 2))
    *_, line = plan_table(warmed_up(study, -(-first[0] // 2))).splitlines()
    assert line.startswith("warning: the first budget comes within twice the warm-up")
    assert line.count("-s0") == sum(step <= 2 * -(-first[0] // 2) for step in first)


def test_a_second_epoch_is_reported(study: ScalingConfig) -> None:
    study = warmed_up(study, 0)
    most, *_ = sorted(points(study), key=lambda point: -point.tokens(point.steps))
    tokens = most.tokens(most.steps)
    for there, told in ((tokens, False), (tokens // 2, True)):
        header = {"kind": "tokens", "format_version": format_version("tokens")}
        store = shared_experiment(study).paths.tokens
        store.mkdir(parents=True, exist_ok=True)
        write_json(store / "manifest.json", header | {"splits": {"train": {"tokens": there}}})
        assert (f"{most.name} (2)" in plan_table(study)) == told
        assert ("warning: more than one epoch" in plan_table(study)) == told


def test_bad_studies_end_in_a_sentence(study: ScalingConfig) -> None:
    with pytest.raises(UserError, match=r"grid\.budgets come to 0"):
        points(replace(study, grid=replace(study.grid, budgets=[1e6])))
    with pytest.raises(UserError, match="not a multiple of K=4"):
        GridConfig(k=[4], context=510)
    with pytest.raises(UserError, match="holds 16, which does not divide 8"):
        GridConfig(k=[16], context=512)
    with pytest.raises(UserError, match=r"base\.data\.packing=align"):
        points(replace(study, base=replace(study.base, data=replace(study.base.data, packing="align"))))
    with pytest.raises(UserError, match=r"base\.pipeline\.processes=2, the ranks .* base\.parallel\.tensor=4"):
        points(on_ranks(study, 2, tensor=4))
    with pytest.raises(UserError, match=r"ar at depth 4 cannot be trained .* the 4 key/value heads"):
        points(on_ranks(study, 8, tensor=8))
    with pytest.raises(UserError, match=r"ar at depth 4 cannot be trained .* model\.layers=4"):
        points(on_ranks(study, 8, pipeline=8))
    with pytest.raises(UserError, match=r"base\.head\.kind=softmax"):
        points(replace(study, base=replace(study.base, head=replace(study.base.head, kind="softmax"))))
