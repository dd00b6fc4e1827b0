"""Two steps of the tiny model on windows with chunks of nothing but padding, in several layouts.

`padding_walk.py FOLDER OUT NAME...`: FOLDER is a tiny experiment; OUT/NAME.json takes loss and gradient norm of each
step in the layout NAME.
"""

import json
import os
import sys
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist

from calm_core import config
from calm_core.experiment import Experiment
from calm_core.parallel.config import ParallelConfig
from calm_core.parallel.topology import Topology, distributed
from calm_core.training.launch import calm_rows, calm_task

# Layout and samples per micro-batch, of 8 samples a step.
LAYOUTS = {
    "single": (ParallelConfig(), 8),
    "single-micro1": (ParallelConfig(), 1),
    "dp": (ParallelConfig(), 2),
    "tp2-sp": (ParallelConfig(tensor=2, sequence=True), 4),
    "pp2": (ParallelConfig(pipeline=2), 2),
}


def walk(folder: Path, out: Path, names: list[str]) -> None:
    """Run each layout in turn."""
    if "RANK" in os.environ:  # one world for all: its store remembers the addresses of the first
        dist.init_process_group("gloo")
    for name in names:
        layout, micro_batch = LAYOUTS[name]
        with distributed(layout) as topology:
            record = train(folder, micro_batch, topology)
            if topology.rank == 0:
                (out / f"{name}.json").write_text(json.dumps(record))


def train(folder: Path, micro_batch: int, topology: Topology) -> list[tuple[float, float]]:
    """Loss and gradient norm of two steps."""
    from calm_core.model.parameters import initialize
    from calm_core.parallel.engine import Engine, Pass
    from calm_core.parallel.reduce import average_metrics
    from calm_core.training.chunk_batch import ChunkBatch
    from calm_core.training.loader import step_samples

    experiment = config.load(Experiment, folder / "config.yaml", [f"run={folder}"])
    training, rows = experiment.training, calm_rows(experiment)
    store = rows[0].first
    store.manifest["packing"] = "align"
    task = calm_task(replace(experiment, parallel=topology.layout), rows, topology.device)

    def padded(batch: ChunkBatch) -> ChunkBatch:
        """Later samples have more padding, and one has nothing else."""
        if batch.tokens is not None:
            for row, sample in enumerate(batch.samples):
                batch.tokens[row, 33 - int(sample) * 33 // 15 :] = store.padding
        return batch

    chunks = task.build(topology, torch.float32)
    for chunk in chunks:
        for parameter in chunk.parameters():
            parameter.starts_at_zero = False  # else only the last layer has a gradient at first
    initialize(chunks, std=0.15, seed=0)
    engine, record = Engine(chunks, training.optimizer, topology), []
    for step in range(2):
        count = 8 // (micro_batch * topology.data_size)
        plan = step_samples(step * 8, count, micro_batch, topology.data_rank, topology.data_size)
        batches = [padded(task.load(samples)) for samples in plan]
        results = engine.forward_backward(task.forward_step, batches, Pass(training.positions, micro_batch))
        loss = average_metrics(results, topology)["loss"]
        record.append((loss, engine.step(1e-3, admit=lambda norm: True).gradient_norm))
    engine.close()
    return record


if __name__ == "__main__":
    walk(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:])
