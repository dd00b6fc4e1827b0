import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from calm_core.config.experiment import Experiment, PipelineConfig
from calm_core.config.model_config import HeadConfig
from calm_core.report.summary import format_summary, plot_experiment, write_summary

REBUILT = {"token_accuracy": 0.999, "token_accuracy_posterior": 0.99, "token_accuracy_noisy": 0.9, "sigma": 0.3}
SCORED = {"brier_lm": None, "brier_lm_reason": "Not above zero by two standard errors: Brier-4.", "collision_1": 0.02}
SCORED |= {"measure": "brier_lm@ctx512/stride8", "loss": 7.5, "loss_error": None, "loss_shuffled": 8.0}
SCORED |= {"loss_shuffled_error": 0.1, "brier_lm_error": None, "bigram_brier_lm": 0.12, "bigram_brier_lm_error": 0.01}
SCORED |= {"standard_errors": {"interval_factor": 2.5}}
for n in range(1, 5):
    SCORED |= {f"brier_{n}": 0.1**n, f"brier_{n}_error": 0.01**n}
    SCORED |= {f"unigram_brier_{n}": 0.02**n, f"bigram_brier_{n}": 0.03**n}


@pytest.fixture
def experiment(tmp_path: Path) -> Experiment:
    """A run folder with what the stages leave for the summary."""
    for name in ("autoencoder", "calm"):
        folder = tmp_path / name
        folder.mkdir()
        speeds = [{"kind": "train", "step": n, "loss": 1.0, "tokens_per_second": s} for n, s in enumerate((1, 5, 90))]
        start = {"kind": "event", "step": 0, "event": "start", "ranks": 2, "precision": "float32"}
        evaluation = {"kind": "eval", "step": 2, "loss": 1.0, "brier_1": 0.1, "unigram_brier_1": 0.02}
        (folder / "metrics.jsonl").write_text("\n".join(map(json.dumps, [start, *speeds, evaluation])))
    (tmp_path / "autoencoder" / "evaluation.json").write_text(
        json.dumps(REBUILT | {"mean_sigma": 0.2, "dead_dimensions": 1})
    )
    (tmp_path / "calm" / "evaluation.json").write_text(json.dumps(SCORED))
    (tmp_path / "stages.json").write_text(json.dumps({"train_calm": {"seconds": 12.5, "stamp": "s"}}))
    samples = [{"temperature": 0.5, "prompt": "Once ", "text": "more", "draws": 7}]
    (tmp_path / "samples.json").write_text(json.dumps(samples))
    return Experiment(run=str(tmp_path))


def test_the_summary_holds_the_numbers_of_the_artefacts(experiment):
    summary = write_summary(experiment)
    assert json.loads((Path(experiment.run) / "summary.json").read_text()) == summary
    assert summary["autoencoder"]["token_accuracy"] == 0.999
    assert summary["autoencoder"]["token_accuracy_sigma_0.3"] == 0.9
    calm = summary["calm"]
    assert [score["value"] for score in calm["brier"]] == [0.1**n for n in range(1, 5)]
    assert [score["standard_error"] for score in calm["brier"]] == [0.01**n for n in range(1, 5)]
    assert [score["half_interval"] for score in calm["brier"]] == [2.5 * 0.01**n for n in range(1, 5)]
    assert calm["brier_lm"] is None
    assert "Brier-4" in calm["brier_lm_reason"]
    assert calm["unigram_brier"] == [0.02**n for n in range(1, 5)]
    assert calm["loss"] == {"value": 7.5, "standard_error": None, "half_interval": None}
    assert summary["tokens_per_second"] == {"autoencoder": 5, "calm": 5}
    assert summary["seconds"] == {"train_calm": 12.5}
    assert summary["samples"] == [{"temperature": 0.5, "prompt": "Once ", "text": "more"}]
    assert summary["machine"]["precision"] == "float32"
    assert summary["machine"]["versions"]["torch"]


def test_the_table_shows_figures_with_their_errors_and_the_samples(experiment):
    shown = format_summary(write_summary(experiment))
    assert "99.9" in shown.replace("0.999", "99.9")
    scores = {line.split("  ")[0]: line.split() for line in shown.splitlines()[:6]}
    assert scores["score"] == ["score", "CALM", "bigram", "unigram"]
    assert scores["Brier-1"] == ["Brier-1", "10.000%", "±", "2.500%", "3.000%", "2.000%"]
    assert scores["brier_lm@ctx512/stride8"][1:] == ["none", "0.120", "±", "0.025"]
    assert shown.endswith("Once more")


def test_the_baseline_has_no_autoencoder(experiment):
    shutil.rmtree(Path(experiment.run) / "autoencoder")
    baseline = replace(experiment, head=HeadConfig(kind="softmax"))
    summary = write_summary(baseline)
    assert "autoencoder" not in summary
    assert summary["tokens_per_second"] == {"calm": 5}
    shown = format_summary(summary)
    assert shown.splitlines()[0].split() == ["score", "AR", "bigram", "unigram"]
    assert "CALM" not in shown
    plot_experiment(baseline)
    assert not (Path(experiment.run) / "autoencoder").exists()


def test_a_baseline_and_the_words_stand_beside_the_model(experiment):
    run = Path(experiment.run)
    shutil.copytree(run / "calm", run / "ar" / "calm")
    other = SCORED | {"brier_1": 0.2, "brier_lm": 3.4, "brier_lm_error": 0.5}
    (run / "ar" / "calm" / "evaluation.json").write_text(json.dumps(other))
    errors = {"standard_error": 0.01, "half_interval": 0.02, "words": 1000}
    for folder, share in ((run, 0.5), (run / "ar", 0.75)):
        model, bigram = ({"share": s, **errors} for s in (share, 0.25))
        counted = {"known_words": 9, "temperatures": [{"temperature": 0.5, "model": model, "bigram": bigram}]}
        (folder / "words.json").write_text(json.dumps(counted))
    compared = replace(experiment, pipeline=PipelineConfig(baseline=True))
    summary = write_summary(compared)
    assert summary["ar"]["brier"][0]["value"] == 0.2
    assert summary["words"]["0.5"]["ar"] == {"value": 0.75, **errors}
    scores = [line.split() for line in format_summary(summary).splitlines()[:7]]
    assert scores[0] == ["score", "CALM", "AR", "bigram", "unigram"]
    assert scores[1] == ["Brier-1", "10.000%", "±", "2.500%", "20.000%", "±", "2.500%", "3.000%", "2.000%"]
    assert " ".join(scores[6]) == "words of the corpus at T=0.5 50.0% ± 2.0% 75.0% ± 2.0% 25.0% ± 2.0%"
    plot_experiment(compared)
    assert (run / "ar" / "calm" / "brier.png").stat().st_size > 1000


def test_another_configuration_has_another_hash(experiment):
    other = Experiment(run=experiment.run, seed=1)
    assert write_summary(experiment)["config_hash"] != write_summary(other)["config_hash"]


def test_each_training_has_its_curves(experiment):
    plot_experiment(experiment)
    for name in ("autoencoder/loss.png", "calm/loss.png", "calm/brier.png"):
        assert (Path(experiment.run) / name).stat().st_size > 1000
