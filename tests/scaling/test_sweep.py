"""A whole study through the real command: prepared, killed, resumed, one member failing, fitted, drawn."""

import sys
from pathlib import Path

import pytest
from launching import ROOT, finish

from calm_core import config as configuration
from calm_core.errors import ExitCode
from calm_core.experiment import Experiment
from calm_core.scaling.results import read_results

STUDY = """
run: {folder}/study
ladder: {{depths: [1], aspect: 16, head_width: 16, reference_depth: 2, learning_rate: 1.0e-2, batch_tokens: 256}}
grid: {{k: [4], context: 32, latent_per_token: 2, budget: tokens, budgets: [1024, 2048]}}
fit: {{measures: [brier_1, cross_entropy], draws: 20}}
base:
  data: {{corpus: ["{folder}/corpus/*.txt"], held_out: 0.2}}
  tokenizer: {{vocab_size: 300}}
  autoencoder: {{hidden: 16}}
  autoencoder_training: {{steps: 20, global_batch: 8, micro_batch: 8, positions: 8, precision: fp32, wandb: disabled}}
  head: {{noise: 8, samples: 4, target_samples: 8}}
  training: {{micro_batch: 4, precision: fp32, log_every: 1, schedule: {{warmup: 2}}, wandb: disabled}}
  evaluation: {{windows: 8, samples: 4, micro_batch: 4}}
  pipeline: {{processes: 1}}
"""


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_study_from_text_to_figures(tiny: Path) -> None:
    path = tiny / "study.yaml"
    path.write_text(STUDY.format(folder=tiny))

    def study(action: str, *arguments: str, code: int = 0) -> str:
        command = [sys.executable, str(ROOT / "pretrain" / "scaling_laws.py"), action, str(path), *arguments]
        ended, output = finish(command, 300)
        assert ended == code, output
        return output

    assert "ar-d1-s0" in study("plan")
    assert "make it by `scaling_laws.py prepare`" in study("run", "task=0", code=ExitCode.USAGE)
    study("prepare")
    listed = [Path(line) for line in (tiny / "study" / "models.txt").read_text().splitlines()]
    assert len(listed) == 2
    assert all(configuration.load(Experiment, line, []).training.milestones for line in listed)

    blocked = tiny / "study" / "points" / "k4-d1-s0" / "calm"  # a folder that holds something else than a run
    blocked.mkdir(parents=True)
    (blocked / "notes.txt").write_text("mine")
    assert "failed, run again to retry: k4-d1-s0" in study("run", code=ExitCode.FAILED)
    (blocked / "notes.txt").unlink()
    again = study("run")
    assert "finished before" in again

    assert "4 of 4 points measured" in study("fit")
    rows = read_results(tiny / "study" / "results.parquet")
    assert {(row["model"], row["tokens"]) for row in rows} >= {("ar-d1-s0", 1024), ("k4-d1-s0", 2048)}
    assert all(row["cross_entropy"] is not None for row in rows if row["family"] == "ar")
    study("plot")
    assert (tiny / "study" / "figures" / "compute_brier_1.svg").exists()
    assert "CALM K=4" in (tiny / "study" / "report.html").read_text()
