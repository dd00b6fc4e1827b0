"""Studies as they run: what fails and what continues; and one through the real command, killed and resumed."""

import runpy
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from launching import ROOT, forked, running

from calm_core import config as configuration
from calm_core.checkpoint.folder import list_checkpoints
from calm_core.config.experiment import Experiment, PipelineConfig
from calm_core.config.scaling_config import ScalingConfig
from calm_core.errors import ExitCode, UserError
from calm_core.scaling import sweep
from calm_core.scaling.points import experiment, family_experiment, points, shared_experiment
from calm_core.scaling.results import read_results
from calm_core.training.run_log import read_metrics
from calm_core.workflow import stages

STUDY = """
run: {folder}/study
ladder: {{depths: [1], aspect: 16, head_width: 16, reference_depth: 2, learning_rate: 1.0e-2, batch_tokens: 256}}
grid: {{k: [4], context: 32, latent_per_token: 2, budget: tokens, budgets: [1024, 25600]}}
fit: {{measures: [brier_1, cross_entropy], draws: 20}}
base:
  data: {{corpus: ["{folder}/corpus/*.txt"], held_out: 0.2}}
  tokenizer: {{vocab_size: 300}}
  autoencoder: {{hidden: 16}}
  autoencoder_training: {{steps: 20, global_batch: 8, micro_batch: 8, positions: 8, precision: fp32, wandb: disabled}}
  head: {{noise: 8, samples: 4, target_samples: 8}}
  training: {{micro_batch: 4, precision: fp32, save_every: 1, schedule: {{warmup: 2}}, wandb: disabled}}
  evaluation: {{windows: 8, samples: 4, micro_batch: 4}}
  pipeline: {{processes: 1, least_rebuilt: 0}}
"""


def pretend(monkeypatch: pytest.MonkeyPatch, codes: Mapping[str, int]) -> list[str]:
    """Let the parts of a study, named by their folders, end with these codes or well; those that run, in order."""
    ran: list[str] = []

    def run_stages(part: Experiment, names: tuple[str, ...]) -> int:
        ran.append(Path(part.run).name)
        return codes.get(ran[-1], ExitCode.OK)

    monkeypatch.setattr(sweep, "run_stages", run_stages)
    return ran


def names(study: ScalingConfig, *families: str) -> list[str]:
    return [point.name for point in points(study) if point.family in families]


def made(folder: Path) -> None:
    """Let this part be there."""
    folder.mkdir(parents=True)
    (folder / "manifest.json").touch()


def test_a_k_that_fails_stops_no_other(
    study: ScalingConfig, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ran = pretend(monkeypatch, {"k2": ExitCode.USAGE})
    assert sweep.run(study) == ExitCode.FAILED
    assert ran == ["shared", "k2", "k4", *names(study, "ar", "k4")]
    said = capsys.readouterr().err.splitlines()
    assert said == [
        "failed, run again to retry: k2 (exit code 2)",
        f"not trained, as their autoencoder or chunks failed: {', '.join(names(study, 'k2'))}",
    ]


def test_the_list_for_an_array_leaves_out_what_is_not_prepared(
    study: ScalingConfig, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pretend(monkeypatch, {"k2": ExitCode.FAILED})
    assert sweep.prepare(study) == ExitCode.FAILED
    lines = (Path(study.run) / "models.txt").read_text().splitlines()
    for line, point in zip(lines, points(study), strict=True):
        path, _, comment = line.partition("#")
        assert bool(path) == (point.family != "k2")
        assert point.name in path + comment
        if path:
            assert configuration.load(Experiment, Path(path), []) == experiment(study, point)
    base = replace(study.base, run=str(Path(study.base.run).absolute()))
    assert configuration.load(Experiment, Path(study.run) / "base.yaml", []) == base
    assert "for an array of jobs: sbatch --array=1-12%4" in capsys.readouterr().out


@pytest.mark.parametrize("asked", ["k2", "ar-d6-s0"])
def test_a_request_to_stop_ends_the_study(
    study: ScalingConfig, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], asked: str
) -> None:
    ran = pretend(monkeypatch, {asked: ExitCode.STOPPED})
    assert sweep.run(study) == ExitCode.STOPPED
    assert ran[-1] == asked
    assert "failed" not in capsys.readouterr().err


def test_without_tokens_nothing_continues(study: ScalingConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    ran = pretend(monkeypatch, {"shared": ExitCode.USAGE})
    assert sweep.run(study) == sweep.prepare(study) == ExitCode.USAGE
    assert ran == ["shared", "shared"]


def test_a_model_that_fails_stops_no_other(
    study: ScalingConfig, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ran = pretend(monkeypatch, {"k2-d4-s0": ExitCode.FAILED, "ar-d8-s0": ExitCode.WATCHDOG})
    assert sweep.run(study) == ExitCode.FAILED
    assert ran[3:] == [point.name for point in points(study)]
    said = capsys.readouterr().err
    assert "k2-d4-s0 (exit code 1)" in said
    assert "ar-d8-s0 (exit code 76)" in said


def test_one_model_wants_its_own_inputs_alone(study: ScalingConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    ran = pretend(monkeypatch, {})
    numbers = {point.name: number for number, point in enumerate(points(study))}
    baseline, calm = replace(study, task=numbers["ar-d4-s0"]), replace(study, task=numbers["k4-d4-s0"])
    with pytest.raises(UserError, match=r"shared/tokens is not there yet: make it by `scaling_laws\.py prepare`"):
        sweep.run(baseline)
    made(shared_experiment(study).paths.tokens)
    assert sweep.run(baseline) == ExitCode.OK
    with pytest.raises(UserError, match="k4/autoencoder/frozen is not there yet"):
        sweep.run(calm)
    made(family_experiment(study, 4).paths.autoencoder)
    with pytest.raises(UserError, match="k4/chunks is not there yet"):
        sweep.run(calm)
    encoding = replace(study.base, data=replace(study.base.data, latents="encode"))
    assert sweep.run(replace(calm, base=encoding)) == ExitCode.OK
    made(family_experiment(study, 4).paths.chunks)
    assert sweep.run(calm) == ExitCode.OK
    assert ran == ["ar-d4-s0", "k4-d4-s0", "k4-d4-s0"]


@pytest.mark.parametrize(
    ("ranks", "options"),
    [(8, ""), (16, "--nodes=2 "), (2, "--ntasks-per-node=2 --gpus-per-node=2 ")],
)
def test_the_array_has_the_ranks_of_the_study(study: ScalingConfig, ranks: int, options: str) -> None:
    study = replace(study, base=replace(study.base, pipeline=PipelineConfig(processes=ranks)))
    listed = f"{study.run}/models.txt"
    assert sweep.array_command(study) == f"sbatch --array=1-12%4 {options}launchers/sweep.slurm {listed}"


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_study_from_text_to_figures(
    tiny: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The action that is killed is a process of its own; the others run in this one, and their stages forked."""

    def run_forked(command: Sequence[str], environment: Mapping[str, str], on_progress: Callable[[float], None]) -> int:
        assert command[0] == sys.executable
        code, output = forked(0, command[1:], 300, **environment)
        print(output, flush=True)
        on_progress(0.0)
        return code

    monkeypatch.setattr(stages, "run_process", run_forked)
    path = tiny / "study.yaml"
    path.write_text(STUDY.format(folder=tiny))
    script = ROOT / "pretrain" / "scaling_laws.py"
    main = runpy.run_path(str(script))["main"]

    def study(action: str, *arguments: str, code: int = 0) -> str:
        capfd.readouterr()
        ended = main([action, str(path), *arguments])
        output = "".join(capfd.readouterr())
        assert ended == code, output
        return output

    assert "ar-d1-s0" in study("plan")
    assert "make it by `scaling_laws.py prepare`" in study("run", "task=0", code=ExitCode.USAGE)

    blocked = tiny / "study" / "k4" / "autoencoder"  # a folder that holds something other than a run
    blocked.mkdir(parents=True)
    (blocked / "notes.txt").write_text("mine")
    baseline = tiny / "study" / "points" / "ar-d1-s0" / "calm"
    with running([sys.executable, str(script), "run", str(path)]) as process:  # killed with all its children
        while len(list_checkpoints(baseline / "checkpoints")) < 2:
            assert process.poll() is None
            time.sleep(0.01)
    saved = int(list_checkpoints(baseline / "checkpoints")[-1].name.removeprefix("step-"))
    assert saved < 200  # of its steps

    again = study("run", code=ExitCode.FAILED)
    assert f"resumed from {baseline}/checkpoints/step-{saved}\n" in again
    assert "failed, run again to retry: k4 (exit code 2)" in again
    assert "not trained, as their autoencoder or chunks failed: k4-d1-s0" in again
    starts = [event["step"] for event in read_metrics(baseline / "metrics.jsonl", "event") if event["event"] == "start"]
    assert starts == [0, saved]
    assert {"step-8", "step-200"} <= {checkpoint.name for checkpoint in list_checkpoints(baseline / "checkpoints")}

    (blocked / "notes.txt").unlink()
    _, of_baseline = study("run").split("ar-d1-s0: ")
    assert "train_calm: finished before" in of_baseline.split("k4-d1-s0: ")[0]

    assert "4 of 4 points measured" in study("fit")
    rows = read_results(tiny / "study" / "results.parquet")
    assert {(row["model"], row["tokens"]) for row in rows} == {
        (model, tokens) for model in ("ar-d1-s0", "k4-d1-s0") for tokens in (1024, 25600)
    }
    assert all(row["cross_entropy"] is not None for row in rows if row["family"] == "ar")
    study("plot")
    assert (tiny / "study" / "figures" / "compute_brier_1.svg").exists()
    assert "CALM K=4" in (tiny / "study" / "report.html").read_text()
