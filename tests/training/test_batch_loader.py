import threading
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from calm_core.data.dataset import ChunkBatch
from calm_core.data.order import SampleOrder
from calm_core.training.batch_loader import DeviceCopies, Loader, step_samples


@given(st.integers(0, 10**12), st.integers(1, 5), st.integers(1, 5), st.integers(1, 6))
def test_the_ranks_share_exactly_the_samples_of_the_step(consumed: int, count: int, micro: int, ranks: int) -> None:
    shares = [step_samples(consumed, count, micro, rank, ranks) for rank in range(ranks)]
    assert all(len(share) == count and all(len(part) == micro for part in share) for share in shares)
    taken = np.concatenate([part for share in shares for part in share])
    assert sorted(taken) == list(range(consumed, consumed + count * micro * ranks))


@given(st.integers(5, 60), st.lists(st.tuples(st.integers(1, 8), st.integers(1, 3), st.integers(1, 3)), max_size=12))
def test_runs_on_any_numbers_of_ranks_see_each_window_once_an_epoch(
    windows: int, layouts: list[tuple[int, int, int]]
) -> None:
    """A step for each layout of (ranks, micro-batch, micro-batches): resumed on other ranks after every step."""
    order, seen = SampleOrder(windows, seed=3), []
    for ranks, micro, count in layouts:
        shares = [step_samples(len(seen), count, micro, rank, ranks) for rank in range(ranks)]
        taken = np.sort(np.concatenate([part for share in shares for part in share]))
        seen += order.window(taken).tolist()
    for first in range(0, len(seen), windows):
        epoch = seen[first : first + windows]
        assert len(set(epoch)) == len(epoch)


CPU = torch.device("cpu")


def plan(consumed: int) -> list[np.ndarray]:
    return [np.arange(consumed, consumed + 2), np.arange(consumed + 2, consumed + 4)]


def test_steps_come_in_order_and_no_more_than_asked_for() -> None:
    loaded = []

    def load(samples: np.ndarray) -> list[int]:
        loaded.append(threading.current_thread() is threading.main_thread())
        return samples.tolist()

    with Loader(load, plan, consumed=8, global_batch=4, steps=3, device=CPU) as loader:
        assert [loader.next()[0] for _ in range(3)] == [[[8, 9], [10, 11]], [[12, 13], [14, 15]], [[16, 17], [18, 19]]]
    assert loaded == [False] * 6


def test_nothing_is_loaded_for_a_finished_run() -> None:
    with Loader(lambda samples: 1 / 0, plan, consumed=8, global_batch=4, steps=0, device=CPU):
        pass


def test_a_failure_reaches_the_step_that_needs_the_batch() -> None:
    def load(samples: np.ndarray) -> int:
        if samples[0] >= 4:
            raise OSError("a shard has gone")
        return 0

    with Loader(load, plan, consumed=0, global_batch=4, steps=3, device=CPU) as loader:
        assert loader.next()[0] == [0, 0]
        with pytest.raises(OSError, match="a shard has gone"):
            loader.next()


def chunk_batch(samples: np.ndarray) -> ChunkBatch:
    return ChunkBatch(samples, torch.from_numpy(samples).view(-1, 1, 1).expand(-1, 3, 4))


def test_on_a_gpu_the_thread_copies_on_a_stream_of_its_own_and_the_step_waits_for_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Without a GPU: which calls are made, on which stream and in which thread."""
    calls: list[tuple[str, str]] = []
    current = threading.local()

    class Stream:
        def __init__(self, device: torch.device) -> None:
            self.name = f"own stream of {device}"

        def wait_stream(self, other: "Stream") -> None:
            calls.append((f"{self.name} waits for {other.name}", threading.current_thread().name))

    @contextmanager
    def stream(chosen: Stream):
        current.stream = chosen
        yield
        del current.stream

    def copy(copies: DeviceCopies, tensor: torch.Tensor) -> torch.Tensor:
        calls.append((f"copy on {current.stream.name}", threading.current_thread().name))
        return tensor.clone()

    default = Stream.__new__(Stream)
    default.name = "the step's stream"
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "stream", stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: default)
    monkeypatch.setattr(DeviceCopies, "_copy", copy)
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda tensor, on: calls.append((f"kept for {on.name}", "")))
    with Loader(chunk_batch, plan, consumed=0, global_batch=4, steps=1, device=torch.device("cuda:0")) as loader:
        batches, _ = loader.next()
    assert [batch.tokens[:, 0, 0].tolist() for batch in batches] == [[0, 1], [2, 3]]
    assert calls == [
        *[("copy on own stream of cuda:0", "loader_0")] * 2,
        ("the step's stream waits for own stream of cuda:0", "MainThread"),
        *[("kept for the step's stream", "")] * 2,
    ]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_batch_arrives_on_the_gpu() -> None:
    device = torch.device("cuda:0")
    with Loader(chunk_batch, plan, consumed=0, global_batch=4, steps=2, device=device) as loader:
        for first in (0, 4):
            batches, _ = loader.next()
            assert all(batch.tokens.device == device for batch in batches)
            assert [batch.tokens[:, 0, 0].tolist() for batch in batches] == [[first, first + 1], [first + 2, first + 3]]
