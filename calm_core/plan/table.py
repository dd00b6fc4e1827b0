"""An account as text."""

from collections.abc import Mapping
from dataclasses import replace

from calm_core.config.experiment import PlanConfig
from calm_core.config.parallel_config import ParallelConfig
from calm_core.config.training_config import TrainingConfig
from calm_core.model import token_loss
from calm_core.plan import flops
from calm_core.plan.account import Account, PipelineStage

GIB = 2**30


def render(
    account: Account,
    training: TrainingConfig,
    layout: ParallelConfig,
    plan: PlanConfig,
    groups: Mapping[str, list[list[int]]],
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
            f"time: {duration(account.days)} at {plan.mfu:.0%} of {plan.peak_tflops:g} TFLOP/s a device (plan.mfu, "
            f"plan.peak_tflops){_bubble(account)}",
            "",
            f"memory of a rank in GiB ({width}; ZeRO-1; recompute: {layout.recompute}); activations and "
            "what the update needs do not exist at the same time:",
            *_columns(_memory_rows(account, plan)),
            "",
            "messages that a rank sends in a step, in GB:",
            *_columns(_message_rows(account)),
        ]
    )


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


def duration(days: float) -> str:
    """A time in days, or in hours below one day."""
    return f"{days:.1f} days" if days >= 1 else f"{24 * days:.2g} hours"


def _bubble(account: Account) -> str:
    return f"; the pipeline is idle for {account.bubble:.0%} of it" if account.bubble else ""


def _memory_rows(account: Account, plan: PlanConfig) -> list[list[str]]:
    names = ["weights", "gradients", "optimizer", "buckets", "activations", "update", "peak"]
    rows = [["stage", "layers", "parameters", "FLOPs", *names, f"of {plan.device_memory_gib:g}"]]
    for index, stage in enumerate(account.stages):
        held = stage.states
        sizes = [held.weights, held.gradients, held.optimizer, held.buckets, stage.activations, held.step, stage.total]
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
