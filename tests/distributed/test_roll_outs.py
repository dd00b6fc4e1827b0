"""A model of one token a chunk is rolled out alike in every layout, through pipeline stages too."""

from pathlib import Path

import pytest
from launching import ROOT, launch

from calm_core.training.run_log import read_metrics

LAYOUTS = {
    "single": [],
    "tp2-sp": ["parallel.tensor=2", "parallel.sequence=true"],
    "pp2-virtual2": ["parallel.pipeline=2", "parallel.virtual=2"],
}


@pytest.mark.slow  # three starts
def test_roll_outs_do_not_depend_on_the_layout(tiny_experiment: Path, tmp_path: Path) -> None:
    shared = [
        f"data.tokens={tiny_experiment / 'tokens'}",
        f"data.tokenizer={tiny_experiment / 'tokenizer/tokenizer.model'}",
    ]
    found = {}
    for name, changes in LAYOUTS.items():
        changes = [*changes, *shared, f"run={tmp_path / name}", "head.kind=softmax", "training.steps=1"]
        script, ranks = ROOT / "pretrain" / "train_calm.py", 1 if name == "single" else 2
        launch(ranks, script, tiny_experiment / "config.yaml", *changes)
        (found[name],) = read_metrics(tmp_path / name / "calm" / "metrics.jsonl", "eval")
    single = found.pop("single")
    assert single["rollout_chunks"] == 4
    assert single["brier_4_error"] > 0
    for name, evaluation in found.items():
        assert evaluation.keys() == single.keys()
        for score, value in single.items():
            assert evaluation[score] == (pytest.approx(value, rel=1e-4) if isinstance(value, float) else value), (
                name,
                score,
            )
