from dataclasses import replace

import pytest

from calm_core import config as configuration
from calm_core import flops
from calm_core.errors import UserError
from calm_core.model.config import BackboneConfig
from calm_core.scaling.config import DEFAULT_CONFIG, GridConfig, LadderConfig, ScalingConfig
from calm_core.scaling.ladder import rung
from calm_core.scaling.plan import plan_table
from calm_core.scaling.points import experiment, points


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


def test_an_experiment_is_its_point(study: ScalingConfig) -> None:
    for point in points(study):
        made = experiment(study, point)
        assert made.training.steps == point.steps
        assert made.training.positions * point.k == study.grid.context
        assert made.model == point.shape.backbone
        assert made.training.milestones == list(point.budget_steps[:-1])
        assert (made.head.kind == "softmax") == (point.family == "ar")
    assert len({experiment(study, point).run for point in points(study)}) == 12


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


def test_bad_studies_end_in_a_sentence(study: ScalingConfig) -> None:
    with pytest.raises(UserError, match=r"grid\.budgets come to 0"):
        points(replace(study, grid=replace(study.grid, budgets=[1e6])))
    with pytest.raises(UserError, match="not a multiple of K=3"):
        GridConfig(k=[3], context=512)
    with pytest.raises(UserError, match=r"base\.head\.kind=softmax"):
        points(replace(study, base=replace(study.base, head=replace(study.base.head, kind="softmax"))))
