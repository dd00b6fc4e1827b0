"""How long training waits for a checkpoint of the demo's model, written in the background and while it waits.

One run with saves of both kinds alternately and training steps in between: `background` counts the copy to the host
and the completion at a later step's boundary; `waiting` copies, writes, syncs and completes before the next step. For
comparison, a training step of the same model, without a save and while one is being written. Medians.

usage: [torchrun --nproc-per-node N] python benchmarks/checkpoint.py [--saves 5]
"""

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from calm_core import config
from calm_core.config.command import DEFAULT_CONFIG
from calm_core.config.experiment import Experiment
from calm_core.config.model_config import ModelShape
from calm_core.config.training_config import ParallelConfig
from calm_core.distributed.collectives import on_first_rank
from calm_core.distributed.topology import Topology, distributed


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--saves", type=int, default=5, help="saves of each kind (default: %(default)s)")
    saves = parser.parse_args().saves
    with distributed(ParallelConfig()) as topology, TemporaryDirectory() as folder:
        measure(Path(on_first_rank(lambda: folder)), saves, topology)


def measure(folder: Path, saves: int, topology: Topology) -> None:
    """Time steps and saves of both kinds, in turn."""
    from calm_core.checkpoint.save import SavePolicy, Saver

    engine, train = demo(topology)
    steps, during, background, waiting = [], [], [], []
    train()
    with Saver(folder, engine, SavePolicy(keep=1)) as saver:
        for number in range(saves):
            steps += [seconds(train), seconds(train)]
            stalls = [seconds(partial(saver.save, 2 * number, {"updates": 0}))]
            done = False
            while not done:
                during.append(seconds(train))
                start = time.perf_counter()
                done = saver.poll() is not None
                stalls.append(time.perf_counter() - start)
            background.append(sum(stalls))
            waiting.append(seconds(partial(save_now, saver, 2 * number + 1)))
    parameters = sum(p.numel() for part in engine.model_parts for p in part.parameters())
    rows = {
        "step": steps,
        "step while one is written": during,
        "stall, background": background,
        "stall, waiting": waiting,
    }
    topology.say(f"{parameters / 1e6:.1f}M parameters, {12 * parameters / 1e6:.0f} MB, {topology.world} ranks")
    for name, values in rows.items():
        share = statistics.median(values) / statistics.median(steps)
        topology.say(f"{name:<28}{1e3 * statistics.median(values):8.1f} ms{share:8.2f} steps")


def save_now(saver: "Saver", step: int) -> None:  # noqa: F821 - imported late
    """A save that training waits for."""
    saver.save(step, {"updates": 0})
    saver.wait()


def demo(topology: Topology) -> tuple["Engine", Callable[[], None]]:  # noqa: F821 - imported late
    """The engine of the demo's model in float32, and one training step of it on random chunks."""
    from calm_core.distributed.engine import Engine, Pass
    from calm_core.model.backbone import transformer_config
    from calm_core.model.calm import CalmModel
    from calm_core.model.heads import Target
    from calm_core.model.noise import SampleNoise
    from calm_core.model.parameters import initialize

    demo = config.load(Experiment, DEFAULT_CONFIG, [])
    shape = ModelShape(demo.model, demo.head, demo.tokenizer.vocab_size, demo.data.k, demo.autoencoder.latent)
    model = CalmModel(transformer_config(shape.backbone, ParallelConfig(), torch.float32), shape)
    initialize([model], 0.02, seed=0)
    engine = Engine([model.to(topology.device)], demo.training.optimizer, topology)
    training, count = demo.training, demo.training.micro_batches(topology.data_size)
    generator = torch.Generator().manual_seed(0)
    drawn = (training.micro_batch, training.positions + 1)
    tokens = torch.randint(shape.vocabulary, (*drawn, shape.k), generator=generator).to(topology.device)
    mean = torch.randn(*drawn, shape.latent, generator=generator).to(topology.device)

    def forward_step(samples, model):
        next(samples)
        target = Target(*(x[:, 1:].transpose(0, 1) for x in (tokens, mean, torch.full_like(mean, -1.2))))
        noise = SampleNoise(0, range(training.micro_batch), topology.device)
        loss = model(tokens[:, :-1], target, noise).loss.mean()
        return loss, lambda loss: (loss, {})

    def train() -> None:
        engine.forward_backward(forward_step, range(count), Pass(training.positions, training.micro_batch))
        engine.step(1e-3, loss=1.0)

    return engine, train


def seconds(action: Callable[[], object]) -> float:
    """Wall time of one call."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    start = time.perf_counter()
    action()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
