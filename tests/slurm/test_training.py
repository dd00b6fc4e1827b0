"""A training under its launcher, undisturbed and not, on a real Slurm."""

import json

import pytest
from trained import STEPS, Training, same_curve

pytestmark = pytest.mark.timeout(1500)


def test_a_run_to_its_end(uninterrupted: Training) -> None:
    job = uninterrupted.cluster.job(uninterrupted.job)
    assert (job["JobState"], job["ExitCode"], job["Restarts"]) == ("COMPLETED", "0:0", "0"), uninterrupted.log()
    assert "2 ranks = tensor 1 x pipeline 1 x data 2; global batch 8 = 2 x micro-batch 2 x 2" in uninterrupted.log()
    attempt = uninterrupted.run / "slurm" / "train_calm" / "latest"
    assert attempt.resolve().name == f"{uninterrupted.job}.0"
    record = json.loads((attempt / "record.json").read_text())
    assert len(record["nodes"]) == 2
    assert record["software"]["torch"]
    assert record["environment"]["SLURM_JOB_ID"] == uninterrupted.job
    assert f"steps: {STEPS}" in (attempt / "config.yaml").read_text()
    assert f"step {STEPS}/{STEPS}" in uninterrupted.rank_log(0)

    uninterrupted.submit()
    assert uninterrupted.wait_for_end()["JobState"] == "COMPLETED"
    assert "finished before" in uninterrupted.log()
    assert "starting" not in uninterrupted.log()


def test_a_node_is_lost(training: Training, uninterrupted: Training) -> None:
    training.submit()
    step = training.freeze(beyond=5)
    training.set_steps(step + 20)
    lost = training.events("start")[0]["nodes"][1]
    training.cluster.cut_power(lost)
    job = training.wait_for_end()
    assert (job["JobState"], job["Restarts"]) == ("COMPLETED", "1"), training.log()
    assert lost not in training.events("start")[1]["nodes"]
    assert training.went_on_from(step)
    assert same_curve(training, uninterrupted, step + 20)


def test_configuration_errors_are_not_retried(training: Training) -> None:
    training.submit(arguments=("training.stepz=7",))
    other = Training(training.cluster, training.run, training.folder)
    other.submit(nodes=3)
    for refused, why in ((training, "did you mean training.steps?"), (other, "sbatch --nodes=2 is the nearest")):
        job = refused.wait_for_end()
        assert (job["JobState"], job["ExitCode"], job["Restarts"]) == ("FAILED", "2:0", "0")
        assert why in refused.log()
    assert not (training.run / "slurm").exists()


@pytest.mark.slow
def test_time_limit_then_preemption(training: Training, uninterrupted: Training) -> None:
    training.submit("--time=30", "--signal=B:USR1@120")
    step = training.freeze(beyond=5)
    minutes = int(training.cluster.job(training.job)["RunTime"].split(":")[1]) + 2
    training.cluster.run("scontrol", "update", f"JobId={training.job}", f"TimeLimit={minutes}")
    training.wait_for("the ranks are told")
    training.thaw()
    training.wait_for("requeued: Slurm needed the nodes")
    first = training.saved
    assert step <= first <= step + 5  # it saved where it was, without a step lost
    training.cluster.run("scontrol", "update", f"JobId={training.job}", "TimeLimit=30")

    second = training.freeze(beyond=first + 5)
    training.set_steps(second + 20)
    urgent = training.cluster.submit(
        "--partition=urgent", "--nodes=4", "--exclusive", "--wrap=sleep 1", folder=training.folder
    )
    training.cluster.wait(lambda: training.cluster.ended(urgent), say=training.log)
    second = training.saved
    job = training.wait_for_end()
    assert (job["JobState"], job["Restarts"]) == ("COMPLETED", "2"), training.log()
    assert training.went_on_from(first, second)
    assert same_curve(training, uninterrupted, max(training.losses))


@pytest.mark.slow
def test_a_rank_is_killed_then_a_node_is_unfit(training: Training, uninterrupted: Training) -> None:
    training.cluster.run("scontrol", "update", "nodename=node[3-4]", "state=drain", "reason=test")
    training.submit()
    step = training.freeze(beyond=5)
    training.set_steps(step + 20)
    unfit = training.folder / "scratch" / "node2"
    unfit.rmdir()
    unfit.touch()  # a file where a folder should be: nothing can be written below it
    training.rank(1).kill()
    training.wait_for("restart 1, ")
    training.cluster.run("scontrol", "update", "nodename=node[3-4]", "state=resume")
    job = training.wait_for_end()
    assert (job["JobState"], job["Restarts"]) == ("COMPLETED", "2"), training.log()
    assert "rank 1 on node2 failed first, code -9" in training.log()
    assert "bad node node2: " in training.log()
    assert "scratch/node2 is not writable" in training.log()
    assert job["ExcNodeList"] == "node2"
    assert [event["step"] for event in training.events("start")] == [0, step, step]
    assert f"resumed from {training.run}/calm/checkpoints/step-{step}\n" in training.rank_log(2)
    assert same_curve(training, uninterrupted, step + 20)


@pytest.mark.slow
def test_cancelled_then_resumed_on_fewer_nodes_then_stopped_by_a_file(
    training: Training, uninterrupted: Training
) -> None:
    training.submit()
    training.freeze(beyond=5)
    training.cluster.run("scancel", training.job)
    assert training.wait_for_end()["JobState"] == "CANCELLED"
    training.cluster.wait(lambda: not training.cluster.processes())
    step = training.saved

    training.submit(nodes=1)
    training.cluster.wait(lambda: training.saved > step, say=training.log)
    (training.run / "calm" / "stop").touch()
    job = training.wait_for_end()
    assert (job["JobState"], job["ExitCode"], job["Restarts"]) == ("FAILED", "75:0", "0"), training.log()
    assert "stopped by a person" in training.log()
    assert f"resumed from {training.run}/calm/checkpoints/step-{step}\n" in training.rank_log(0)
    losses = training.losses
    assert max(losses) == training.saved
    for number in range(1, min(len(losses), len(uninterrupted.losses)) + 1):
        exact = number <= step
        assert losses[number] == pytest.approx(uninterrupted.losses[number], rel=0 if exact else 1e-4, abs=0)


@pytest.mark.slow
def test_restarts_without_progress_come_to_an_end(training: Training) -> None:
    training.submit(arguments=("training.save_every=0",))
    (training.folder / "site.env").open("a").write("export CALM_RESTARTS=1\n")
    killed = set()

    def kill_every_start() -> bool:
        process = training.rank(1)
        if process and process.pid not in killed:
            process.kill()
            killed.add(process.pid)
        return training.cluster.ended(training.job)

    training.cluster.wait(kill_every_start, say=training.log)
    job = training.cluster.job(training.job)
    assert (job["JobState"], job["Restarts"]) == ("FAILED", "1"), training.log()
    assert "1 restarts without progress" in training.log()
