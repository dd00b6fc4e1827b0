"""The step-time model against steps on this machine's CPU, in several layouts of ranks.

Start it by `python -m calm_core.distributed.torchrun --standalone --nproc-per-node 2 benchmarks/step_time.py`. Rates
of the machine are fitted on the first layout alone: operators are timed one by one, which gives the rate of matrix
products and that of all others; the rest of the step is the host's cost for each. A message of known
size gives the link. Times are those of processors, so a busy machine disturbs them little; a rank that waits for a
pipeline's other stages takes none. Prints each layout's measured and predicted milliseconds and their ratio.

With `--published` it compares predictions with the rates of GPUs that torchtitan publishes (docs/performance.md of
pytorch/torchtitan), by the default rates of `plan.*` except for memory and network. Its runs shard weights too, overlap
messages, and recompute some activations, which this plan counts otherwise.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

from calm_core.config.experiment import PlanConfig
from calm_core.config.model_config import BackboneConfig, HeadConfig, ModelShape
from calm_core.config.training_config import OptimizerConfig, ParallelConfig
from calm_core.distributed.topology import Topology, distributed
from calm_core.model.costs import Load
from calm_core.model.noise import SampleNoise
from calm_core.plan.layout import pipeline_split
from calm_core.plan.step_time import Machine, StepTime, step_time

POSITIONS, SEQUENCES = 128, 16
SHAPE = ModelShape(
    BackboneConfig(layers=4, hidden=256, ffn=688, heads=4),
    HeadConfig(blocks=1, samples=8, target_samples=100),
    vocabulary=4096,
    k=4,
    latent=128,
)
# The layout that the rates are fitted on, then those that are predicted; each with its micro-batch.
LAYOUTS = {
    "data": (ParallelConfig(), 4),
    "data, micro-batch 1": (ParallelConfig(), 1),
    "data, recomputed": (ParallelConfig(recompute="full"), 4),
    "tensor": (ParallelConfig(tensor=2), 4),
    "tensor, sequence": (ParallelConfig(tensor=2, sequence=True), 4),
    "pipeline": (ParallelConfig(pipeline=2), 4),
}
PRODUCTS = ("aten.mm.", "aten.addmm.", "aten.bmm.", "aten.baddbmm", "aten._scaled_dot_product")


LLAMA_8B = ModelShape(
    BackboneConfig(layers=32, hidden=4096, ffn=14336, heads=32, kv_groups=8), HeadConfig("softmax"), 128_256, 1, 0
)
EAGER, COMPILED = ParallelConfig(compile="never"), ParallelConfig()
# Ranks, micro-batch, layout, machine, and the published tokens/s of a GPU; sequences of 8,192 tokens.
PUBLISHED = {
    "Llama 3.1 8B, 8 H100 at 500 W": (8, 2, EAGER, PlanConfig(memory_gbs=1900), 5762),
    "the same, compiled": (8, 2, COMPILED, PlanConfig(memory_gbs=1900), 6667),
    "Llama 3 8B, 64 A100": (64, 1, COMPILED, PlanConfig(peak_tflops=312, memory_gbs=1600, network_gbs=20), 2973),
}


def compare_published() -> None:
    """Print tokens/s of a GPU: published, predicted, and their ratio."""
    for name, (ranks, micro_batch, layout, plan, published) in PUBLISHED.items():
        load, split = Load(8192, micro_batch, layout), [LLAMA_8B.backbone.layers]
        step = step_time(LLAMA_8B, load, Machine.of(plan), split, 1, ranks)
        rate = load.rows / step.total
        print(f"{name:<32} published {published:>6,}, predicted {rate:>6,.0f}, ratio {rate / published:.2f}")


class TimedOperators(TorchDispatchMode):
    """Attributes: processor seconds of `products`, `messages` and `others`, and the `count` of operators that ran."""

    def __init__(self) -> None:
        super().__init__()
        self.products = self.messages = self.others = 0.0
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        start = time.thread_time()
        out = func(*args, **(kwargs or {}))
        seconds = time.thread_time() - start
        if str(func).startswith(PRODUCTS):
            self.products += seconds
        elif str(func).startswith("c10d."):
            self.messages += seconds
        elif not func.is_view:
            self.others += seconds
        self.count += not func.is_view
        return out


def step_of(topology: Topology, micro_batch: int) -> Callable[[], None]:
    """One training step."""
    from calm_core.distributed.engine import Engine, Pass
    from calm_core.model.backbone import transformer_config
    from calm_core.model.calm import CalmModel
    from calm_core.model.heads import Target
    from calm_core.model.parameters import initialize

    layout = topology.layout
    split = pipeline_split(SHAPE, POSITIONS, layout)
    config = transformer_config(SHAPE.backbone, layout, torch.float32, split)
    parts = [CalmModel(config, SHAPE, first=first, last=last, vp_stage=i) for first, last, i in topology.model_parts]
    initialize(parts, 0.02, seed=0)
    engine = Engine(parts, OptimizerConfig(), topology)
    tokens = torch.randint(SHAPE.vocabulary, (micro_batch, POSITIONS + 1, SHAPE.k))
    latents = [torch.randn(micro_batch, POSITIONS + 1, SHAPE.latent), torch.full((1, 1, 1), -1.2)]
    latents[1] = latents[1].expand_as(latents[0])

    def forward_step(batches: Any, model: CalmModel) -> tuple[Any, Any]:
        samples = next(batches)
        target = Target(*(x[:, 1:].transpose(0, 1).contiguous() for x in (tokens, *latents)))
        output = model(tokens[:, :-1], target, SampleNoise(0, samples, topology.device))
        return output, lambda output: (output.loss.mean(), {})

    batches = [list(range(micro_batch))] * (SEQUENCES // topology.data_size // micro_batch)

    def step() -> None:
        engine.forward_backward(forward_step, batches, Pass(POSITIONS, micro_batch))
        engine.step(1e-3, loss=1.0)

    return step


def seconds_of(action: Callable[[], None], runs: int, clock: Callable[[], float] = time.process_time) -> float:
    """Median processor seconds of an action, of the rank that takes most; of all its threads by default."""
    measured = []
    action()
    for _ in range(runs):
        start = clock()
        action()
        measured.append(clock() - start)
    slowest = torch.tensor(statistics.median(measured))
    dist.all_reduce(slowest, dist.ReduceOp.MAX)
    return float(slowest)


def fitted(topology: Topology, layout: ParallelConfig, micro_batch: int, runs: int) -> Machine:
    """The rates of this machine, from one layout and a message of 16 MiB."""
    step = step_of(topology, micro_batch)
    step()
    operators = TimedOperators()
    with operators:
        step()
    whole = seconds_of(step, runs, time.thread_time)  # gloo sends in threads of its own
    # At these rates the plan's seconds are FLOPs and bytes.
    counts = predicted(
        Machine(1.0, 1.0, 0.0, 0.0, 1.0, 1.0, 2, asynchronous=False), layout, micro_batch, topology.world
    )
    message = torch.ones(1 << 22)
    sent = seconds_of(lambda: dist.all_reduce(message), runs)
    host = max(0.0, whole - operators.products - operators.others - operators.messages) / operators.count
    return Machine(
        matrices=counts.matrices / operators.products,
        memory=(counts.memory + counts.update) / operators.others,
        launch=host,
        message=1e-4,
        node=message.nbytes * 2 * (topology.world - 1) / topology.world / sent,
        network=1.0,
        node_ranks=topology.world,
        asynchronous=False,
    )


def predicted(machine: Machine, layout: ParallelConfig, micro_batch: int, world: int) -> StepTime:
    """The plan's step; without waiting, which takes no processor time."""
    data = world // (layout.tensor * layout.pipeline)
    load = Load(POSITIONS, micro_batch, layout, 4, "cpu")
    split = pipeline_split(SHAPE, POSITIONS, layout)
    return step_time(SHAPE, load, machine, split, SEQUENCES // data // micro_batch, data)


def main() -> None:
    """Fit, measure, predict and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--published", action="store_true", help="compare with published rates instead; one process")
    arguments = parser.parse_args()
    if arguments.published:
        return compare_published()
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    machine = None
    for name, (layout, micro_batch) in LAYOUTS.items():
        with distributed(layout) as topology:
            if machine is None:
                machine = fitted(topology, layout, micro_batch, arguments.runs)
                topology.say(
                    f"fitted on {name!r}: {machine.matrices / 1e9:.1f} GFLOP/s, {machine.memory / 1e9:.2f} GB/s, "
                    f"{machine.launch * 1e6:.1f} us a kernel, {machine.node / 1e9:.2f} GB/s sent"
                )
            measured = seconds_of(step_of(topology, micro_batch), arguments.runs)
            plan = predicted(machine, layout, micro_batch, topology.world)
            found = plan.total - plan.bubble
            topology.say(
                f"{name:<20} measured {1e3 * measured:7.1f} ms, predicted {1e3 * found:7.1f} ms, "
                f"ratio {found / measured:.2f}"
            )


if __name__ == "__main__":
    main()
