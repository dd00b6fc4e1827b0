import json
import os
import time
from pathlib import Path

import pytest

from calm_core.cluster.policy import fruitless_attempts
from calm_core.cluster.slurm import SlurmError
from calm_core.cluster.status import StageRecords, describe, endings, progress_of
from calm_core.data.builder import StoreBuilder
from calm_core.errors import UserError
from calm_core.io import write_json


def plan(run: Path) -> dict:
    return {"training": str(run / "calm"), "product": str(run / "calm" / "x"), "steps": 40}


def test_the_journal_keeps_what_each_attempt_noted(tmp_path: Path) -> None:
    records = StageRecords.of(tmp_path, "train_calm", None)
    for restart in range(2):
        attempt = records.attempt(f"7.{restart}")
        records.note("7", restart, "start", step=restart)
    assert [(event["restart"], event["step"]) for event in records.journal()] == [(0, 0), (1, 1)]
    assert os.path.samefile(records.folder / "latest", attempt)
    assert StageRecords.of(tmp_path, "build_chunks", 3).folder == tmp_path / "slurm" / "build_chunks-3"


def test_ranks_that_died_with_their_node_are_left_out(tmp_path: Path) -> None:
    attempt = StageRecords.of(tmp_path, "train_calm", None).attempt("7.0")
    write_json(attempt / "ranks" / "1.json", {"rank": 1, "code": -9})
    (attempt / "ranks" / ".0.json.partial").write_text("{")
    assert endings(attempt, world=2) == [{"rank": 1, "code": -9}]


def test_progress_of_a_training_is_its_newest_complete_checkpoint(tmp_path: Path) -> None:
    checkpoints = tmp_path / "calm" / "checkpoints"
    assert progress_of(plan(tmp_path)) == 0
    for name in ("step-5", "step-10", "step-15.partial"):
        (checkpoints / name).mkdir(parents=True)
        (checkpoints / name / "manifest.json").touch()
    (checkpoints / "step-20").mkdir()
    assert progress_of(plan(tmp_path)) == 10


def test_progress_of_a_store_is_what_its_journal_holds_of_the_share(tmp_path: Path) -> None:
    tokens = tmp_path / "tokens"
    whole = {"training": "", "product": str(tokens / "manifest.json"), "share": (0, 1)}
    builder = StoreBuilder(tokens, "tokens", {}, ["a", "b", "c"])
    builder.begin()
    (tokens / ".train-00000-00000.arrow.node1-7.partial").touch()
    (tokens / "train-00000-00000.arrow").touch()
    assert progress_of(whole) == 0
    for part in range(3):
        builder.add(part, 0, True, {})
    assert progress_of(whole) == 3
    assert [progress_of({**whole, "share": (index, 2)}) for index in range(2)] == [2, 1]
    builder.finish()
    assert progress_of(whole) == 1


def test_records_of_failures_are_no_progress(tmp_path: Path) -> None:
    samples = {"training": "", "product": str(tmp_path / "samples.json"), "share": (0, 1)}
    records = StageRecords.of(tmp_path, "sample", None)
    for restart in range(3):
        records.attempt(f"7.{restart}")
        assert fruitless_attempts(records.journal(), "7", progress_of(samples)) == restart
        records.note("7", restart, "start", step=progress_of(samples))
    write_json(tmp_path / "samples.json", [])
    assert progress_of(samples) == 1


def test_status_tells_a_person_how_it_goes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    known = {"JobState": "RUNNING", "NodeList": "node[1-2]"}
    monkeypatch.setattr("calm_core.cluster.slurm.fields", lambda kind, job: known)
    records = StageRecords.of(tmp_path, "train_calm", None)
    attempt = records.attempt("7.1")
    write_json(attempt / "record.json", plan(tmp_path))
    records.note("7", 0, "start", step=0)
    records.note("7", 0, "failure", who="rank 3 on node2", code=76, log="LOG")
    records.note("7", 0, "end", code=76, step=0)
    records.note("7", 1, "start", step=0)
    (tmp_path / "calm").mkdir()
    line = {"step": 12, "kind": "train", "loss": 3.21, "tokens_per_second": 1234.0, "time": time.time()}
    (tmp_path / "calm" / "metrics.jsonl").write_text(json.dumps(line) + "\n")
    text = "\n".join(describe(tmp_path))
    assert "train_calm: RUNNING on node[1-2], job 7" in text
    assert "step 12 of 40, checkpoint 0, loss 3.2100, 1,234 tokens/s" in text
    assert "restarts 1, the last 1 without progress" in text
    assert "last error: rank 3 on node2 ended with code 76, LOG, 0:00 h ago" in text


def test_status_without_an_answer_of_slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def silent(kind: str, job: str) -> dict:
        raise SlurmError

    monkeypatch.setattr("calm_core.cluster.slurm.fields", silent)
    records = StageRecords.of(tmp_path, "train_calm", None)
    attempt = records.attempt("7.0")
    write_json(attempt / "record.json", plan(tmp_path))
    records.note("7", 0, "start", step=0)
    records.note("7", 0, "no all-reduce", problem="timed out")
    (tmp_path / "calm").mkdir()
    line = {"step": 3, "kind": "train", "loss": None, "tokens_per_second": 1.0}
    (tmp_path / "calm" / "metrics.jsonl").write_text(json.dumps(line) + '\n{"step": 4, "ki')
    text = "\n".join(describe(tmp_path))
    assert "train_calm: Slurm does not answer, job 7" in text
    assert "step 3 of 40, checkpoint 0, loss not finite" in text
    assert "last error: no all-reduce among the nodes: timed out" in text


def test_status_of_a_folder_without_jobs_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds no records of jobs"):
        list(describe(tmp_path))
