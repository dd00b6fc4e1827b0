"""Evaluation in training, through the engine of a run."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from calm_core import config
from calm_core.autoencoder.artefact import load_autoencoder
from calm_core.config.experiment import EvaluationConfig, Experiment
from calm_core.data.dataset import Windows
from calm_core.data.store import ChunkStore
from calm_core.distributed.engine import Engine
from calm_core.distributed.topology import Topology
from calm_core.evaluation.in_training import evaluate
from calm_core.evaluation.scores import HeldOut
from calm_core.training.launch import calm_rows, calm_task


@pytest.fixture
def experiment(tiny_experiment: Path) -> Experiment:
    return config.load(Experiment, tiny_experiment / "config.yaml", [f"run={tiny_experiment}"])


@pytest.fixture
def engine(topology: Topology, experiment: Experiment) -> Iterator[Engine]:
    task = calm_task(experiment, calm_rows(experiment), topology.device)
    engine = Engine(task.build(topology, torch.float32), experiment.training.optimizer, topology)
    yield engine
    engine.close()


@pytest.fixture
def held_out(experiment: Experiment) -> HeldOut:
    store, autoencoder = ChunkStore(experiment.paths.chunks, "held_out"), load_autoencoder(experiment.paths.autoencoder)
    settings = EvaluationConfig(windows=6, samples=4, micro_batch=2)
    return HeldOut(Windows(store, experiment.training.positions), autoencoder, None, 0, settings)


def stop_at(call: int) -> Callable[[], bool]:
    """Answers no until it is asked for the `call`-th time."""
    calls = iter(range(1, 100))
    return lambda: next(calls) == call


@pytest.mark.parametrize("call", [1, 3])
def test_an_evaluation_stops_between_micro_batches_without_a_record(
    engine: Engine, held_out: HeldOut, call: int
) -> None:
    stop = stop_at(call)
    assert evaluate(engine, held_out, stop) is None
    assert not stop()  # it was asked no more
    assert all(module.training for module in engine.model_parts)


def test_an_evaluation_that_may_go_on_is_the_same(engine: Engine, held_out: HeldOut) -> None:
    asked = stop_at(4)
    assert evaluate(engine, held_out, asked) == evaluate(engine, held_out)
    assert asked()  # three micro-batches, three questions before this one
