"""A training under its launcher, undisturbed and not, on a real Slurm."""

import json
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
from cluster import remains
from launching import ROOT
from trained import SMALL, STEPS, Training, same_curve

pytestmark = pytest.mark.timeout(1500)

# Replaces the Python of the ranks: the check of the nodes succeeds, and the script of every rank fails at once.
FAILING = """#!/bin/bash
[[ $2 == calm_core.cluster.steps ]] && set -- -m $2 "$3" -c "raise SystemExit(1)"
exec {python} "$@"
"""
# Uses a cluster until it is killed.
OWNER = """
import sys, time
from pathlib import Path
from cluster import Cluster
with Cluster(nodes=1) as cluster:
    cluster.submit("--wrap=exec sleep 600", folder=Path(sys.argv[1]))
    cluster.wait(cluster.processes)
    print(cluster.environment["SLURM_CONF"], flush=True)
    time.sleep(600)
"""


def test_a_run_to_its_end(uninterrupted: Training) -> None:
    job = uninterrupted.cluster.job(uninterrupted.job)
    assert (job["JobState"], job["ExitCode"], job["Restarts"]) == ("COMPLETED", "0:0", "0"), uninterrupted.log()
    assert "2 ranks = tensor 1 x pipeline 1 x data 2; global batch 8 = 2 x micro-batch 2 x 2" in uninterrupted.log()
    assert "failed" not in uninterrupted.log()
    attempt = uninterrupted.run / "slurm" / "train_calm" / "latest"
    assert attempt.resolve().name == f"{uninterrupted.job}.0"
    record = json.loads((attempt / "record.json").read_text())
    assert len(record["nodes"]) == 2
    assert record["code"]
    assert record["software"]["torch"]
    assert record["environment"]["SLURM_JOB_ID"] == uninterrupted.job
    assert f"steps: {STEPS}" in (attempt / "config.yaml").read_text()
    assert f"step {STEPS}/{STEPS}" in uninterrupted.rank_log(0)
    status = uninterrupted.tool("status.sh", uninterrupted.run).stdout
    assert f"train_calm: COMPLETED, job {uninterrupted.job}\n" in status
    assert f"step {STEPS} of {STEPS}, checkpoint {STEPS}, loss " in status
    assert "restarts 0, the last 0 without progress" in status

    # Without any of this environment in the job: it reads launchers/site.env, and srun passes on what that sets.
    command = ["submit.sh", "calm_m", "--nodes=2", *SMALL, uninterrupted.config]
    submitted = uninterrupted.tool(*command, SBATCH_EXPORT="NONE")
    assert "nodes 2, ntasks-per-node 1" in submitted.stdout, submitted.stderr
    uninterrupted.job = re.search(r"submitted as job (\d+)", submitted.stdout)[1]
    assert uninterrupted.wait_for_end()["JobState"] == "COMPLETED"
    assert "finished before" in uninterrupted.log()
    assert f"calm holds all {STEPS} steps" in uninterrupted.rank_log(0)


def test_a_node_is_lost(training: Training, uninterrupted: Training) -> None:
    training.submit()
    step = training.freeze(beyond=5)
    training.set_steps(step + 10)
    with open(training.run / "slurm" / "train_calm" / "journal.jsonl", "a") as journal:
        journal.write('{"time": 1.0, "jo')  # as a node leaves it that is lost while it writes
    lost = training.events("start")[0]["nodes"][1]
    training.cluster.cut_power(lost)
    job = training.wait_for_end()
    assert (job["JobState"], job["Restarts"]) == ("COMPLETED", "1"), training.log()
    assert lost not in training.events("start")[1]["nodes"]
    assert training.resumed_from(step)
    assert same_curve(training, uninterrupted, step + 10)


def test_configuration_errors_are_not_retried(training: Training) -> None:
    unsent = training.tool("submit.sh", "calm_m", "--nodes=3", *SMALL, training.config)
    assert (unsent.returncode, unsent.stdout) == (2, "")
    assert "sbatch --nodes=2 is the nearest" in unsent.stderr
    training.submit(arguments=("training.stepz=7",))
    other = Training(training.cluster, training.run, training.folder)
    other.submit(nodes=3)
    array = Training(training.cluster, training.run, training.folder)
    array.submit("--array=5-5")
    sentences = {
        training: "did you mean training.steps?",
        other: "sbatch --nodes=2 is the nearest",
        array: "train_calm cannot be divided over the tasks of an array",
    }
    for refused, why in sentences.items():
        job = refused.wait_for_end()
        assert (job["JobState"], job["ExitCode"], job["Restarts"]) == ("FAILED", "2:0", "0")
        assert why in refused.log()
    assert not (training.run / "slurm").exists()


@pytest.mark.usefixtures("slurm")
def test_a_cluster_is_removed_when_its_user_is_killed(tmp_path: Path) -> None:
    command = [sys.executable, "-c", OWNER, str(tmp_path)]
    with subprocess.Popen(command, cwd=Path(__file__).parent, stdout=subprocess.PIPE, text=True) as owner:
        conf = owner.stdout.readline().strip()
        owner.kill()
    assert conf
    end = time.monotonic() + 60
    while Path(conf).parent.exists() and time.monotonic() < end:
        time.sleep(0.1)
    assert remains(Path(conf).parent) == []
    assert not Path(conf).parent.exists()


@pytest.mark.slow
def test_time_limit_then_preemption_then_cancelled_then_on_fewer_nodes_until_a_stop_file(
    training: Training, uninterrupted: Training
) -> None:
    training.lose_every_other_answer()
    training.submit("--time=30", "--signal=B:USR1@120")
    training.freeze(beyond=5)
    minutes = int(training.cluster.job(training.job)["RunTime"].split(":")[1]) + 2
    training.cluster.run("scontrol", "update", f"JobId={training.job}", f"TimeLimit={minutes}")
    training.wait_for("the ranks are signalled")
    training.thaw()
    training.wait_for("requeued: Slurm needed the nodes")
    first = training.saved
    assert first == max(training.losses)  # it saved where it was, without a step lost
    training.cluster.run("scontrol", "update", f"JobId={training.job}", "TimeLimit=30")

    training.freeze(beyond=first + 5)
    urgent = training.cluster.submit(
        "--partition=urgent", "--nodes=4", "--exclusive", "--wrap=sleep 1", folder=training.folder
    )
    training.cluster.wait(lambda: training.cluster.ended(urgent), say=training.log)
    second = training.saved

    training.freeze(beyond=second + 5)
    training.cluster.run("scancel", training.job)
    job = training.wait_for_end()
    assert (job["JobState"], job["Restarts"]) == ("CANCELLED", "2"), training.log()
    assert training.resumed_from(first, second)
    training.cluster.wait(lambda: not training.cluster.processes())
    third = training.saved
    assert third <= STEPS

    training.submit(nodes=1)
    training.cluster.wait(lambda: training.saved > third, say=training.log)
    (training.run / "calm" / "stop").touch()
    job = training.wait_for_end()
    assert (job["JobState"], job["ExitCode"], job["Restarts"]) == ("FAILED", "75:0", "0"), training.log()
    assert "stopped by a person" in training.log()
    assert f"resumed from {training.run}/calm/checkpoints/step-{third}\n" in training.rank_log(0)
    losses, expected = training.losses, uninterrupted.losses
    assert max(losses) == training.saved
    for step in losses.keys() & expected.keys():  # to the last bit where the layout is the same
        assert losses[step] == pytest.approx(expected[step], rel=0 if step <= third else 1e-4, abs=0)


@pytest.mark.slow
def test_a_rank_is_killed_then_all_nodes_are_unfit(training: Training, uninterrupted: Training) -> None:
    training.cluster.run("scontrol", "update", "nodename=node[3-4]", "state=drain", "reason=test")
    training.submit()
    step = training.freeze(beyond=5)
    training.set_steps(step + 10)
    for node in ("node1", "node2"):
        scratch = training.folder / "scratch" / node
        scratch.rmdir()
        scratch.touch()  # a file where a folder should be: nothing can be written below it
    training.rank(1).kill()
    training.wait_for("restart 1, ")
    training.cluster.run("scontrol", "update", "nodename=node[3-4]", "state=resume")
    job = training.wait_for_end()
    assert (job["JobState"], job["Restarts"]) == ("COMPLETED", "2"), training.log()
    assert "rank 1 on node2 failed first, code -9" in training.log()
    for node in ("node1", "node2"):
        assert re.search(rf"bad node {node}: .*scratch/{node} is not writable", training.log())
    assert job["ExcNodeList"] == "node1,node2"
    assert [event["step"] for event in training.events("start")] == [0, step, step]
    assert f"resumed from {training.run}/calm/checkpoints/step-{step}\n" in training.rank_log(2)
    assert same_curve(training, uninterrupted, step + 10)


@pytest.mark.slow
def test_restarts_without_progress_come_to_an_end(training: Training) -> None:
    cluster, folder = training.cluster, training.folder
    (folder / "python").write_text(FAILING.format(python=sys.executable))
    (folder / "python").chmod(0o755)
    with open(folder / "site.env", "a") as site:
        site.write(f"export CALM_RESTARTS=1 CALM_PYTHON={folder}/python\n")

    def log_of_a_job_that_fails_twice() -> str:
        launcher = [ROOT / "launchers" / "evaluate.slurm", "--stage", "sample", training.config]
        job = cluster.submit("--nodes=1", "--mem=1G", *SMALL, *launcher, folder=folder)
        log = folder / f"evaluate-{job}.out"
        cluster.wait(lambda: cluster.ended(job), say=log.read_text)
        assert (cluster.state(job), cluster.job(job)["Restarts"]) == ("FAILED", "1"), log.read_text()
        return log.read_text()

    log = log_of_a_job_that_fails_twice()
    assert log.count("rank 0 on node1 failed first, code 1") == 2
    assert "1 restarts without progress" in log
    (folder / "python").write_text("#!/bin/bash\nexit 1\n")
    assert log_of_a_job_that_fails_twice().count("no node has answered") == 2
