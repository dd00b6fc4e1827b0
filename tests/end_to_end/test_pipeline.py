"""The whole workflow on two processes: uninterrupted, run again, killed and run again."""

import json
import random
import re
import sys
import time
from pathlib import Path

import pytest
from launching import ROOT, finish, run_script, running

from calm_core.training.run_log import read_metrics

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]

CONFIG = """
data: {{corpus: ["{corpus}"], held_out: 0.2}}
tokenizer: {{vocab_size: 330}}
autoencoder: {{hidden: 32, latent: 8, sampled_output: 200}}
autoencoder_training: &training
  steps: 20
  global_batch: 8
  micro_batch: 2
  positions: 16
  precision: fp32
  optimizer: {{learning_rate: 5.0e-3}}
  schedule: {{warmup: 3}}
  log_every: 1
  eval_every: 10
  save_every: 10
  wandb: disabled
model: {{layers: 2, hidden: 32, ffn: 64, heads: 2}}
head: {{noise: 8, samples: 4, target_samples: 8}}
training: {{<<: *training, steps: 24, save_every: 4}}
evaluation: {{windows: 16, samples: 8, micro_batch: 4}}
pipeline: {{processes: 2, least_rebuilt: 0}}
samples: {{prompts: [The people], max_tokens: 12, while_training: true}}
"""
STAGES = 11
BASELINE = ["pipeline.baseline=true", "samples.word_texts=2"]


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pipeline")
    draw = random.Random(0)
    subjects, verbs = ("The president", "Congress", "The people"), ("serves", "honours", "protects", "asks for")
    objects = ("the union", "peace", "a treaty", "the navy", "the public debt")
    lines = [
        json.dumps({"text": " ".join(f"{draw.choice(subjects)} {draw.choice(verbs)} {draw.choice(objects)}."
                                     for _ in range(draw.randint(30, 90)))})
        for _ in range(100)
    ]  # fmt: skip
    (folder / "corpus.jsonl").write_text("\n".join(lines))
    (folder / "config.yaml").write_text(CONFIG.format(corpus=folder / "corpus.jsonl"))
    return folder / "config.yaml"


def pipeline(config: Path, run: Path) -> list[str]:
    return [sys.executable, str(ROOT / "pretrain" / "pipeline.py"), str(config), f"run={run}"]


def script(name: str, *arguments: object) -> tuple[int, str]:
    return run_script(ROOT / "pretrain" / f"{name}.py", *arguments)


@pytest.fixture(scope="module")
def run(config: Path) -> Path:
    """The run folder of an uninterrupted pipeline."""
    folder = config.parent / "run"
    code, output = finish([*pipeline(config, folder), *BASELINE], seconds=600)
    assert code == 0, output
    assert re.search(r"score +CALM +AR +bigram +unigram\nBrier-1 ", output)
    assert "The people" in output.splitlines()[-1]
    return folder


def test_everything_is_left_behind(run):
    summary = json.loads((run / "summary.json").read_text())
    assert len(summary["calm"]["brier"]) == 4
    assert set(summary["tokens_per_second"]) == {"autoencoder", "calm", "ar"}
    assert set(summary["words"]["0.5"]) == {"calm", "ar", "bigram"}
    assert len(summary["seconds"]) == STAGES
    assert [sample["temperature"] for sample in summary["samples"]] == [1.0, 0.5]
    assert summary["machine"]["ranks"] == 2
    for picture in ("autoencoder/loss.png", "autoencoder/evaluation.png", "calm/loss.png", "calm/brier.png"):
        assert (run / picture).stat().st_size > 1000


def test_a_second_run_skips_every_stage(config, run):
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*") if path.is_file()}
    code, output = finish([*pipeline(config, run), *BASELINE], seconds=120)
    assert code == 0
    assert output.count("finished before") == STAGES
    after = {path: path.stat().st_mtime_ns for path in run.rglob("*") if path.is_file()}
    written = {path.name for path in after if after[path] != before.get(path)}
    assert written <= {"config.yaml", "summary.json", "loss.png", "brier.png", "report.html"}


def test_with_given_products_and_killed_in_the_middle_of_training_it_reaches_the_same_end(config, run):
    other = config.parent / "killed"
    made = {"tokenizer": "tokenizer/tokenizer.model", "tokens": "tokens", "autoencoder": "autoencoder/frozen"}
    given = [f"data.{name}={run / path}" for name, path in {**made, "chunks": "chunks"}.items()]
    command = [*pipeline(config, other), *given]
    with running(command) as process:
        end = time.monotonic() + 300
        while not (other / "calm" / "checkpoints" / "step-8").exists():
            assert time.monotonic() < end
            assert process.poll() is None, process.stdout.read()
            time.sleep(0.02)
    # `running` has killed the whole tree outright
    interrupted = read_metrics(other / "calm" / "metrics.jsonl", "train")[-1]["step"]
    assert interrupted < 24
    code, output = finish(command, seconds=400)
    assert code == 0, output
    assert "resumed from" in output
    assert output.count("is given") == 4
    losses = [[record["loss"] for record in read_metrics(r / "calm" / "metrics.jsonl", "train")] for r in (run, other)]
    assert losses[0] == losses[1]
    scores = [json.loads((r / "summary.json").read_text()) for r in (run, other)]
    assert scores[0]["calm"] == scores[1]["calm"]
    assert scores[0]["samples"] == scores[1]["samples"]
    assert scores[0]["autoencoder"] == scores[1]["autoencoder"]


def test_the_baseline_needs_no_autoencoder(config):
    run = config.parent / "baseline"
    changes = ["head.kind=softmax", "training.positions=64", "training.eval_every=24", "pipeline.processes=1"]
    code, output = finish([*pipeline(config, run), *changes], seconds=600)
    assert code == 0, output
    assert re.search(r"score +AR +bigram +unigram\nBrier-1 ", output)
    summary = json.loads((run / "summary.json").read_text())
    assert summary["head"] == "softmax"
    assert set(summary["seconds"]) == {"train_tokenizer", "tokenize_corpus", "train_calm", "evaluate_calm", "sample"}
    assert all(sample["text"] for sample in summary["samples"])
    assert not (run / "autoencoder").exists()
    assert not (run / "chunks").exists()


def test_a_wrong_configuration_of_a_stage_ends_with_its_sentence_and_code(config, run):
    command = [*pipeline(config, run.parent / "refused"), "tokenizer.vocab_size=30000"]
    code, output = finish(command, seconds=120)
    assert code == 2
    assert "tokenizer.vocab_size=30000 is more than the corpus supports" in output
    assert "Traceback" not in output


def test_an_autoencoder_that_rebuilds_too_few_tokens_is_scored_and_refused(config, run):
    result = config.parent / "poor" / "evaluation.json"
    code, shown = script("evaluate", run / "autoencoder", "--output", result, "--least-rebuilt", 1)
    assert code == 2
    assert "rebuilds" in shown
    assert "less than pipeline.least_rebuilt=1" in shown
    assert json.loads(result.read_text())["token_accuracy"] < 1


def test_the_evaluation_of_a_checkpoint_equals_that_in_training(run):
    last = read_metrics(run / "calm" / "metrics.jsonl", "eval")[-1]
    output = run.parent / "same.json"
    code, shown = script("evaluate", run, "--windows", 16, "--samples", 8, "--micro-batch", 4, "--output", output)
    assert code == 0, shown
    result = json.loads(output.read_text())
    assert result["measure"] == "brier_lm@ctx64/stride4"
    for name in ("brier_1", "collision_1", "unigram_brier_2", "loss", "loss_error", "scored_positions", "documents"):
        assert result[name] == pytest.approx(last[name], rel=1e-4), name
    assert result["bigram_brier_1"] > result["unigram_brier_1"]
    assert result["spread_posterior"] > 0


def test_a_text_is_scored_by_the_model_and_its_own_tokenizer(run):
    text = run.parent / "corpus.jsonl"
    code, shown = script("evaluate", run / "calm", "--text", text, "--windows", 8)
    assert code == 0, shown
    assert "Brier-1" in shown
    assert "8 windows" in shown


@pytest.mark.parametrize("name", ["calm", "autoencoder"])
def test_the_documents_of_a_step_are_named(run, name):
    code, shown = script("inspect_batch", run / name, "--step", 3)
    assert code == 0, shown
    lines = shown.splitlines()[1:]
    assert [int(line.split()[0]) for line in lines] == list(range(16, 24))
    assert all("corpus.jsonl:" in line for line in lines)
    assert script("inspect_batch", run / name, "--step", 1000)[0] == 2
