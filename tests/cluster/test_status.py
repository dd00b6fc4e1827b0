import json
import os
import time
from pathlib import Path

import pytest

from calm_core.cluster.slurm import SlurmError
from calm_core.cluster.status import (
    StageRecords,
    attempts_without_progress,
    describe,
    endings,
    first_failure,
    progress_of,
)
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


def start(step: int, job: str = "7") -> dict:
    return {"job": job, "event": "start", "step": step}


def end(asked: bool, job: str = "7") -> dict:
    return {"job": job, "event": "asked" if asked else "end"}


@pytest.mark.parametrize(
    ("journal", "count"),
    [
        ([], 0),
        ([start(5)], 1),
        ([start(5), start(5), end(False), start(5)], 3),  # the first was lost with its node
        ([start(0), end(False), start(5), end(False)], 1),  # progress between them
        ([start(5), end(False), start(5), end(True), start(5)], 1),  # ended because Slurm asked
        ([start(5), end(True)], 0),
        ([start(5, "6"), end(False, "6"), start(5)], 1),  # submitted again by a person
        ([start(4), end(False)], 0),  # the attempt has made progress itself
    ],
)
def test_attempts_without_progress(journal: list[dict], count: int) -> None:
    assert attempts_without_progress(journal, "7", step=5) == count


def test_the_first_failure_is_the_cause() -> None:
    records = [
        {"rank": 0, "code": 1, "time": 3.0},
        {"rank": 1, "code": -9, "time": 2.0},
        {"rank": 2, "code": 75, "time": 1.0},
        {"rank": 3, "code": 0, "time": 0.0},
    ]
    assert first_failure(records)["rank"] == 1
    assert first_failure(records[2:]) is None


@pytest.mark.parametrize("cut", ['{"time": 1, "jo', "7", "\x00\x00", "\xff{"])
def test_a_journal_cut_short_by_a_lost_node_is_read_and_continued(tmp_path: Path, cut: str) -> None:
    records = StageRecords.of(tmp_path, "train_calm", None)
    records.attempt("7.0")
    records.note("7", 0, "start", step=3)
    with open(records.folder / "journal.jsonl", "a", encoding="latin-1") as journal:
        journal.write(cut)
    records.note("7", 1, "start", step=3)
    assert [event["restart"] for event in records.journal()] == [0, 1]
    assert attempts_without_progress(records.journal(), "7", step=3) == 2
    assert next(describe(tmp_path)).startswith("train_calm: ")


def test_a_journal_without_a_whole_line_is_as_none(tmp_path: Path) -> None:
    records = StageRecords.of(tmp_path, "train_calm", None)
    records.attempt("7.0")
    (records.folder / "journal.jsonl").write_text('{"time": 1')
    with pytest.raises(UserError, match="holds no records of jobs"):
        list(describe(tmp_path))
    records.note("7", 1, "start", step=0)
    assert len(records.journal()) == 1


def test_ranks_lost_with_their_node_have_no_ending(tmp_path: Path) -> None:
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
        assert attempts_without_progress(records.journal(), "7", progress_of(samples)) == restart
        records.note("7", restart, "start", step=progress_of(samples))
    write_json(tmp_path / "samples.json", [])
    assert progress_of(samples) == 1


def test_status_of_a_running_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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


def test_status_when_slurm_does_not_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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
