"""Many jobs: a sweep, and the whole workflow, on a real Slurm."""

import json
import re
import subprocess
from pathlib import Path

import pytest
from cluster import Cluster
from launching import ROOT
from trained import SMALL, Training

from calm_core.training.run_log import read_metrics

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500)]


def test_a_sweep_with_one_failing_member(training: Training, tmp_path: Path) -> None:
    cluster = training.cluster
    training.set_steps(8)
    other = Training.of_copy(cluster, training.run, tmp_path / "other")
    other.set_steps(8)
    lines = [
        f"{training.config} training.keep=1",
        f"{training.config} training.kep=1",
        "# a comment",
        f"{other.config} seed=1",
    ]
    (tmp_path / "list").write_text("\n".join(lines))  # an editor may leave out the newline at the end
    count = subprocess.check_output(["grep", "-c", "", "list"], cwd=tmp_path, text=True).strip()  # as the README says
    assert int(count) == len(lines)

    def states(tasks: range) -> tuple[str, list[str]]:
        array = f"--array={tasks[0]}-{tasks[-1]}"
        job = cluster.submit(*SMALL, array, ROOT / "launchers" / "sweep.slurm", "list", folder=tmp_path)
        cluster.wait(lambda: cluster.ended(job))
        return job, [cluster.state(f"{job}_{task}") for task in tasks]

    job, ended = states(range(1, len(lines) + 2))  # one more than there are lines
    assert ended == ["COMPLETED", "FAILED", "COMPLETED", "COMPLETED", "COMPLETED"]
    assert "did you mean training.keep" in (tmp_path / f"sweep-{job}_2.out").read_text()
    for run in (training.run, other.run):
        assert [r["step"] for r in read_metrics(run / "calm" / "metrics.jsonl", "train")] == list(range(1, 9))

    job, ended = states(range(4, 5))
    assert ended == ["COMPLETED"]
    assert "finished before" in (tmp_path / f"sweep-{job}_4.out").read_text()


def test_the_workflow_as_jobs_that_wait_for_each_other(cluster: Cluster, tiny_experiment: Path, tmp_path: Path) -> None:
    run, config = tmp_path / "run", tmp_path / "mine.yaml"
    text = (tiny_experiment / "config.yaml").read_text() + f"run: {run}\ntokenizer: {{vocab_size: 300}}\n"
    config.write_text(
        text + "pipeline: {shares: 2, nodes: 2, least_rebuilt: 0}\n"
        "samples: {prompts: [a], temperatures: [1.0], max_tokens: 8}\n"
    )
    made = {"tokenizer": "tokenizer/tokenizer.model", "tokens": "tokens", "autoencoder": "autoencoder/frozen"}
    given = [f"data.{name}={tiny_experiment / path}" for name, path in made.items()]
    small = " ".join([*SMALL, "--nodes=1", "--mem=1G", "--no-requeue"])

    def pipeline(*arguments: str) -> str:
        result = subprocess.run(
            [ROOT / "launchers" / "pipeline.sh", config, *arguments],
            env=cluster.environment | {"EXTRA_SBATCH_ARGS": small},
            cwd=tmp_path,
            capture_output=True,
            text=True,
            check=False,
        )
        assert result.returncode == 0, result.stderr
        return result.stdout

    planned = pipeline("--dry-run")
    names = [line.split(":")[0] for line in planned.splitlines() if ": sbatch" in line]
    assert names == [
        "train_tokenizer",
        *("tokenize_corpus", "tokenize_corpus-finish"),
        *("train_autoencoder", "evaluate_autoencoder"),
        *("build_chunks", "build_chunks-finish"),
        *("train_calm", "evaluate_calm", "sample"),
    ]
    assert "2 ranks = tensor 1 x pipeline 1 x data 2" in planned
    assert "array 0-1" in planned
    assert not run.exists()
    assert not cluster.busy()

    names = names[names.index("evaluate_autoencoder") :]
    submitted = pipeline(*given)
    jobs = dict(re.findall(r"^(\S+): job (\d+)", submitted, re.MULTILINE))
    assert list(jobs) == names
    assert pipeline(*given).count("in the queue already") >= len(names) - 1  # nothing twice
    cluster.wait(lambda: not cluster.busy(), seconds=1200)
    assert {name: cluster.state(job) for name, job in jobs.items()} == dict.fromkeys(names, "COMPLETED"), "\n".join(
        path.read_text() for path in sorted((run / "slurm").glob("*.out"))
    )
    assert json.loads((run / "calm" / "evaluation.json").read_text())
    assert json.loads((run / "samples.json").read_text())
    for task in (0, 1):
        assert (
            f"finished task {task} of 2"
            in (run / "slurm" / f"build_chunks-{task}" / "latest" / "rank-0000.log").read_text()
        )
    assert json.loads((run / "autoencoder" / "evaluation.json").read_text())
    assert "nothing to do: every stage is finished" in pipeline(*given)
