"""Every launcher as it is shipped: sound shell, a configuration that is there, a layout that divides."""

import subprocess
import sys
from pathlib import Path

import pytest
from launching import ROOT

from calm_core import config
from calm_core.cluster.launcher import Launcher, describe_layout, enter_work_folder, main, nearest_nodes
from calm_core.config.experiment import Experiment
from calm_core.errors import UserError
from calm_core.workflow.stages import StageTraining, find_stage

LAUNCHERS = sorted((ROOT / "launchers").glob("*.slurm"))


def training(launcher: Launcher, *overrides: str) -> StageTraining | None:
    path = launcher.config if (ROOT / launcher.config).exists() else "configs/calm_m.yaml"  # train.slurm has no default
    return find_stage(config.load(Experiment, ROOT / path, list(overrides)), launcher.stage).training


@pytest.mark.parametrize("path", [*LAUNCHERS, *(ROOT / "launchers").glob("*.sh")], ids=lambda path: path.name)
def test_it_is_sound_shell(path: Path) -> None:
    subprocess.run(["bash", "-n", path], check=True)


@pytest.mark.parametrize("path", LAUNCHERS, ids=lambda path: path.stem)
def test_it_can_come_back(path: Path) -> None:
    options = Launcher.read(path).options
    assert options["job-name"] == path.resolve().stem
    assert options["signal"].startswith("B:USR1@")
    assert {"requeue", "open-mode"} <= set(options)
    assert "/" not in options["output"]  # a folder would have to be there before the job is


@pytest.mark.parametrize("path", LAUNCHERS, ids=lambda path: path.stem)
def test_what_it_runs_is_there(path: Path) -> None:
    job = Launcher.read(path)
    if trained := training(job):
        assert describe_layout(trained, job.nodes, job.tasks).startswith(f"{job.nodes * job.tasks} ")
        assert job.options["gpus-per-node"] == job.options["ntasks-per-node"]


def test_a_launcher_for_each_configuration_of_the_paper() -> None:
    shipped = {path.stem for path in (ROOT / "configs").glob("*.yaml")} - {"demo"}
    assert {"autoencoder", "calm_m", "calm_l", "calm_xl", "ar_s", "ar_m", "ar_l"} <= shipped & {
        path.stem for path in LAUNCHERS
    }


def test_an_impossible_size_is_refused_with_the_nearest_that_works() -> None:
    job = Launcher.read(ROOT / "launchers" / "calm_xl.slurm")
    xl = training(job)
    assert nearest_nodes(xl, 64, 8) == 64
    assert nearest_nodes(xl, 40, 8) == 32
    with pytest.raises(UserError, match=r"not a multiple of .* On nodes of 8 ranks, sbatch --nodes=64 is the nearest"):
        describe_layout(xl, 63, 8)
    with pytest.raises(UserError, match=r"does not divide the 63 ranks .* On nodes of 1 ranks, sbatch --nodes=64"):
        describe_layout(xl, 63, 1)


@pytest.mark.parametrize(("tensor", "data", "accumulated"), [(2, 256, 1), (4, 128, 2), (8, 64, 4)])
def test_the_largest_model_divides_by_other_tensor_parallelism(tensor: int, data: int, accumulated: int) -> None:
    job = Launcher.read(ROOT / "launchers" / "calm_xl.slurm")
    xl = training(job, f"parallel.tensor={tensor}")
    line = f"512 ranks = tensor {tensor} x pipeline 1 x data {data}; global batch 256 = {data} x micro-batch 1 x "
    assert describe_layout(xl, job.nodes, job.tasks) == f"{line}{accumulated} accumulated"


def test_options_of_sbatch_take_the_place_of_the_file_s() -> None:
    job = Launcher.read(ROOT / "launchers" / "calm_xl.slurm").with_options(["--nodes=32", "--exclusive"])
    assert (job.nodes, job.tasks) == (32, 8)
    assert job.resources().startswith("nodes 32, ntasks-per-node 8, gpus-per-node 8")


def test_an_unknown_launcher_is_refused() -> None:
    with pytest.raises(UserError, match=r"choose one of ar_l, .*calm_xl"):
        Launcher.read(ROOT / "launchers" / "calm_xxl.slurm")


def test_the_job_and_the_status_need_no_torch() -> None:
    code = "import sys, calm_core.cluster.job, calm_core.cluster.status; print({'torch', 'numpy'} & set(sys.modules))"
    assert subprocess.check_output([sys.executable, "-c", code], cwd=ROOT, text=True) == "set()\n"


def test_tools_read_relative_paths_as_jobs_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "work").mkdir()
    (tmp_path / "mine.yaml").touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CALM_WORK", str(tmp_path / "work"))
    words = ["mine.yaml", "run=x", "runs/x"]
    assert enter_work_folder(words) == [str(tmp_path / "mine.yaml"), "run=x", "runs/x"]
    assert Path.cwd() == tmp_path / "work"


def test_ntasks_counts_before_the_launchers_tasks_per_node() -> None:
    launcher = Launcher.read(ROOT / "launchers" / "train.slurm")
    assert launcher.with_options(["--ntasks=2"]).tasks == 2
    assert launcher.with_options(["--nodes=2", "--ntasks=4"]).tasks == 2
    with pytest.raises(UserError, match=r"--ntasks=3 does not divide over 2 nodes"):
        _ = launcher.with_options(["--nodes=2", "--ntasks=3"]).tasks
    with pytest.raises(UserError, match=r"--nodes=1-4 must be a whole number"):
        _ = launcher.with_options(["--nodes=1-4"]).nodes


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["calm_m", "-N", "2"], "-N is not understood here"),
        (["train"], "There is no configuration .*configs/train.yaml"),
        (["calm_m"], "There is no sbatch on this machine"),
    ],
)
def test_submit_ends_in_a_sentence(
    words: list[str], sentence: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match=sentence):
        main(words)
