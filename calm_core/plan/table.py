"""An account as text."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

from calm_core.config.experiment import PlanConfig
from calm_core.config.training_config import ParallelConfig, TrainingConfig
from calm_core.model import token_loss
from calm_core.plan import flops
from calm_core.plan.account import Account, DataCost, PipelineStage, RunCost
from calm_core.plan.search import Candidate
from calm_core.plan.step_time import StepTime

GIB = 2**30

SHOWN = 5  # of the layouts that fit

PARTS = {
    "matrices": "matrix products",
    "memory": "other kernels",
    "host": "host",
    "tensor": "tensor-parallel messages",
    "bubble": "pipeline idle",
    "borders": "pipeline messages",
    "gradients": "gradient sum",
    "weights": "weights gathered",
    "update": "update",
}


def render(
    account: Account,
    training: TrainingConfig,
    layout: ParallelConfig,
    plan: PlanConfig,
    groups: Mapping[str, list[list[int]]],
    cost: RunCost,
    candidates: Sequence[Candidate],
) -> str:
    """The whole account as lines of text."""
    parameters = sum(flops.parameters(account.shape).values())
    executed, paper = account.executed_flops, account.paper_flops
    tokens, all_tokens = account.tokens_per_step, account.tokens_per_step * training.steps
    width = "float32, kernels of a CPU" if training.precision == "fp32" else "bf16, kernels of a GPU"
    return "\n".join(
        [
            f"model: {parameters / 1e6:.1f}M parameters without the autoencoder, vocabulary {account.shape.vocabulary}",
            f"ranks: {account.world} = tensor {layout.tensor} x pipeline {layout.pipeline} x data {account.data_size}; "
            f"each rank is in one of {', '.join(f'{len(groups[kind])} {kind}' for kind in groups)} groups (checked)",
            f"batch: {training.global_batch} samples a step = {account.data_size} data-parallel ranks x "
            f"{training.micro_batch} a micro-batch x {account.micro_batches} accumulated",
            f"work: {tokens:,} tokens a step, {training.steps:,} steps, {all_tokens / 1e9:.4g}B tokens",
            f"FLOPs executed: {executed:.3g} a token, {executed * tokens:.3g} a step, "
            f"{executed * all_tokens:.3g} the run",
            f"FLOPs by the paper's accounting: {paper:.3g} a token, {paper * tokens:.3g} a step, "
            f"{paper * all_tokens:.3g} the run",
            *_side_loss(account, training),
            "",
            *time_lines(account.step, account.seconds, account.mfu, tokens, plan),
            *cost_lines(cost, account.world, plan),
            "",
            f"memory of a rank in GiB ({width}; ZeRO-1; recompute: {layout.recompute}); activations and "
            "what the update needs do not exist at the same time:",
            *_columns(_memory_rows(account, plan)),
            "",
            "messages that a rank sends in a step, in GB:",
            *_columns(_message_rows(account)),
            *_layouts(candidates, layout, training),
        ]
    )


def time_lines(step: StepTime, seconds: float, mfu: float, tokens: int, plan: PlanConfig) -> list[str]:
    """Where the time of a step goes; `seconds` and `mfu` are assumed if the plan does so."""
    parts = {name: getattr(step, field) for field, name in PARTS.items() if getattr(step, field) >= 5e-4 * step.total}
    how = "assumed by plan.mfu" if plan.mfu else "predicted from the rates of plan.*; no GPU has measured them"
    return [
        f"time of a step: {1e3 * seconds:.0f} ms, {tokens / seconds:,.0f} tokens/s, MFU {mfu:.1%} of "
        f"{plan.peak_tflops:g} TFLOP/s a device ({how})",
        *_columns(
            [
                ["", *parts],
                ["ms", *(f"{1e3 * part:.1f}" for part in parts.values())],
                ["", *(f"{part / step.total:.0%}" for part in parts.values())],
            ]
        ),
    ]


def cost_lines(cost: RunCost, world: int, plan: PlanConfig) -> list[str]:
    """What the run costs, and its checkpoints."""
    parts = {name: getattr(cost, name) for name in ("training", "evaluation", "checkpoints", "start")}
    money = f", {number(cost.money)} at {plan.price:g} an hour (plan.price)" if plan.price else ""
    listed = " + ".join(f"{name} {duration(seconds)}" for name, seconds in parts.items() if seconds)
    return [
        f"time of the run: {duration(cost.total)} = {listed}",
        f"cost: {number(cost.device_hours)} device-hours on {world} devices{money}; a checkpoint is "
        f"{size(cost.checkpoint_bytes)}, written in {duration(cost.checkpoint_bytes / plan.storage_gbs / 1e9)}",
    ]


def data_line(data: DataCost) -> str:
    """The stores of the corpus, and the time to make them."""
    stores = f"tokens {size(data.token_bytes)} ({duration(data.tokenizing)} of one core)"
    if data.chunk_bytes:
        stores += f", chunks with latents {size(data.chunk_bytes)} (at least {duration(data.encoding)} to make)"
    return f"disk: {data.tokens / 1e9:.4g}B tokens of text: {stores}"


def _layouts(candidates: Sequence[Candidate], layout: ParallelConfig, training: TrainingConfig) -> list[str]:
    """The fastest layouts that fit; the configured one is marked."""
    if len(candidates) < 2:
        return []
    rows = [["", "tensor", "pipeline", "sequence", "head", "recompute", "micro-batch", "GiB", "ms a step", "MFU"]]
    for each in candidates[:SHOWN]:
        own, found = each.layout, each.account
        same = (own.tensor, own.pipeline, each.micro_batch) == (layout.tensor, layout.pipeline, training.micro_batch)
        rows.append(
            [
                "this" if same and (own.sequence, own.head) == (layout.sequence, layout.head) else "",
                str(own.tensor),
                str(own.pipeline),
                str(own.sequence).lower(),
                own.head,
                own.recompute,
                str(each.micro_batch),
                f"{found.peak_memory / GIB:.3g}",
                f"{1e3 * found.step.total:.0f}",
                f"{found.step.total and found.mfu * found.seconds / found.step.total:.1%}",
            ]
        )
    return ["", "the fastest layouts that fit, each with its best micro-batch:", *_columns(rows)]


def _side_loss(account: Account, training: TrainingConfig) -> list[str]:
    """What the token side loss is and costs, where there is one."""
    shape = account.shape
    if shape.token_loss is None:
        return []
    whole = flops.executed_training(shape, training.positions)
    without = flops.executed_training(replace(shape, token_loss=None), training.positions)
    size = token_loss.weights(shape).parameters
    return [
        f"token side loss: {token_loss.describe(shape)}; {size / 1e6:.1f}M parameters for training alone, "
        f"{whole / without - 1:+.1%} FLOPs executed"
    ]


def number(count: float) -> str:
    """A number with three digits, or whole from 100 on."""
    return f"{count:,.0f}" if count >= 100 else f"{count:.3g}"


def size(count: float) -> str:
    """A number of bytes in the unit that suits it."""
    unit, name = (1e12, "TB") if count >= 1e12 else (1e9, "GB")
    return f"{count / unit:.3g} {name}"


def duration(seconds: float) -> str:
    """A time in the unit that suits it."""
    for unit, size in (("days", 86_400), ("hours", 3600), ("minutes", 60)):
        if seconds >= size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds:.2g} s"


def _memory_rows(account: Account, plan: PlanConfig) -> list[list[str]]:
    names = ["weights", "gradients", "optimizer", "activations", "reduction", "peak"]
    rows = [["stage", "layers", "parameters", "FLOPs", *names, f"of {plan.device_memory_gib:g}"]]
    for index, stage in enumerate(account.stages):
        held = stage.states
        sizes = [held.weights, held.gradients, held.optimizer, stage.activations, held.step, stage.total]
        room = stage.total / GIB / plan.device_memory_gib
        rows.append(
            [
                str(index),
                str(stage.layers),
                f"{stage.parameters / 1e6:.1f}M",
                f"{stage.fraction:.1%}",
                *(f"{size / GIB:.3g}" for size in sizes),
                f"{room:.0%}" + (" TOO MUCH" if room > 1 else ""),
            ]
        )
    return rows


def _message_rows(account: Account) -> list[list[str]]:
    rows = [["stage", "tensor: backbone", "tensor: head", "data: gradients", "data: weights", "pipeline"]]
    for index, stage in enumerate(account.stages):
        rows.append([str(index), *(f"{size / 1e9:.3g}" for size in _sent(stage))])
    return rows


def _sent(stage: PipelineStage) -> list[int]:
    return [stage.backbone_sent, stage.head_sent, stage.gradients_sent, stage.weights_sent, stage.borders_sent]


def _columns(rows: list[list[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
