import socket
from pathlib import Path

import pytest
import torch

from calm_core.cluster.preflight import Requirements, all_reduce, problems_of_node

REQUIRED = Requirements(scratch=Path("/tmp"), scratch_gib=0, memory_gib=0, seconds=5)
GPUS = torch.cuda.device_count()


def problems(tmp_path: Path, promised: int = GPUS, **required: object) -> list[str]:
    return problems_of_node(
        promised, [tmp_path / "run"], Requirements(**{**vars(REQUIRED), "scratch": tmp_path, **required})
    )


def test_a_sound_node(tmp_path: Path) -> None:
    assert problems(tmp_path) == []
    assert list(tmp_path.rglob("*")) == [tmp_path / "run"]  # nothing is left of the probes


def test_each_fault_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert problems(tmp_path, promised=GPUS + 1) == [f"Slurm gives {GPUS + 1} GPUs, torch sees {GPUS}"]
    (memory,) = problems(tmp_path, memory_gib=1e6)
    assert memory.endswith("GiB of memory free, 1e+06 needed")
    (disk,) = problems(tmp_path, scratch_gib=1e9)
    assert f"free below {tmp_path}" in disk
    (unwritable,) = problems(tmp_path, scratch=tmp_path / "file")
    assert unwritable.startswith(f"{tmp_path / 'file'} is not writable")
    assert len(problems(tmp_path, promised=GPUS + 1, memory_gib=1e6, scratch=tmp_path / "file")) == 3


def test_gpus_of_other_jobs_on_the_node_are_no_fault(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    assert problems(tmp_path, promised=0) == []


@pytest.mark.skipif(GPUS > 0, reason="one process cannot stand for two nodes with GPUs")
def test_the_first_node_names_those_that_never_connected() -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    error, unreached = all_reduce(0, ["a", "b"], "127.0.0.1", port, seconds=0.5)
    assert error
    assert unreached == ["b"]
