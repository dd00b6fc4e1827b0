"""The engine: Megatron-core's schedule for forward and backward, DeepSpeed ZeRO-1 for the optimizer's step."""

import contextlib
import io
import logging
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.pipeline_parallel.schedules import get_forward_backward_func
from megatron.core.transformer.module import MegatronModule
from torch import Tensor, nn

from calm_core.config.training_config import OptimizerConfig
from calm_core.distributed.optimizer import NOT_FINITE, build_optimizer
from calm_core.distributed.topology import Topology
from calm_core.plan.memory import BUCKET


class ModelParallelUnit:
    """The `mpu` argument of `deepspeed.initialize` for a Megatron-core layout.

    It must not have `get_sequence_parallel_*`: to DeepSpeed these mean another kind of sequence parallelism.
    """

    def get_model_parallel_group(self) -> dist.ProcessGroup:
        """Ranks that together hold one copy of the model: tensor x pipeline."""
        return parallel_state.get_model_parallel_group()

    def get_model_parallel_world_size(self) -> int:
        """Size of that group."""
        return dist.get_world_size(self.get_model_parallel_group())

    def get_model_parallel_rank(self) -> int:
        """This rank's place in that group."""
        return dist.get_rank(self.get_model_parallel_group())

    def get_tensor_model_parallel_group(self) -> dist.ProcessGroup:
        """Ranks that share every layer."""
        return parallel_state.get_tensor_model_parallel_group()

    def get_tensor_model_parallel_world_size(self) -> int:
        """Size of that group."""
        return parallel_state.get_tensor_model_parallel_world_size()

    def get_tensor_model_parallel_rank(self) -> int:
        """This rank's place in that group."""
        return parallel_state.get_tensor_model_parallel_rank()

    def get_pipeline_model_parallel_group(self) -> dist.ProcessGroup:
        """Ranks that share the layers of one model."""
        return parallel_state.get_pipeline_model_parallel_group()

    def get_pipeline_model_parallel_world_size(self) -> int:
        """Size of that group."""
        return parallel_state.get_pipeline_model_parallel_world_size()

    def get_pipeline_model_parallel_rank(self) -> int:
        """This rank's place in that group."""
        return parallel_state.get_pipeline_model_parallel_rank()

    def get_data_parallel_group(self) -> dist.ProcessGroup:
        """Ranks that hold the same weights and see different samples."""
        return parallel_state.get_data_parallel_group(with_context_parallel=True)

    def get_data_parallel_world_size(self) -> int:
        """Size of that group."""
        return parallel_state.get_data_parallel_world_size(with_context_parallel=True)

    def get_data_parallel_rank(self) -> int:
        """This rank's place in that group."""
        return parallel_state.get_data_parallel_rank(with_context_parallel=True)


# The schedule's own protocol: (iterator of micro-batches, model chunk) -> (output, function of the output).
ForwardStep = Callable[[Iterator[Any], MegatronModule], tuple[Any, Callable[..., Any]]]


@dataclass(frozen=True)
class Pass:
    """The shape of one pass through the schedule: `positions` x `micro_batch` chunks in each micro-batch."""

    positions: int
    micro_batch: int


@dataclass(frozen=True)
class Update:
    """What became of one optimizer step: the global gradient norm before clipping, and the answer it was given."""

    gradient_norm: float
    answer: int

    @property
    def applied(self) -> bool:
        """Whether weights and moments have changed."""
        return self.answer > 0


class Engine:
    """Runs model chunks forward and backward and steps their sharded optimizer.

    Args:
        chunks: this rank's model chunks, one unless interleaved, with their weights already in place.
        config: optimizer settings.
        topology: the layout.
    """

    def __init__(self, chunks: Sequence[MegatronModule], config: OptimizerConfig, topology: Topology) -> None:
        self.chunks = list(chunks)
        self.topology = topology
        self.dtype = next(self.chunks[0].parameters()).dtype
        module = nn.ModuleList(self.chunks)
        self._adam = build_optimizer(module.parameters(), config)
        count = sum(parameter.numel() for parameter in module.parameters())
        self._deepspeed = _initialize(module, self._adam, _deepspeed_config(config, self.dtype, count))
        self.optimizer = self._deepspeed.optimizer
        self._materialize_moments()

    def close(self) -> None:
        """Let go of the model, so that its memory and, with the process groups, their threads can be freed.

        DeepSpeed's hooks on the gradients hold the optimizer from within autograd, where Python's collector cannot see
        the cycle; a process that trains one run after another would keep them all.
        """
        self._deepspeed.destroy()

    def forward_backward(self, forward_step: ForwardStep, micro_batches: Sequence[Any], shape: Pass) -> list[Any]:
        """Accumulate the gradients of all micro-batches; the loss functions' results, on the last stage."""
        return self._schedule(forward_step, micro_batches, shape, forward_only=False)

    def evaluate(self, forward_step: ForwardStep, micro_batches: Sequence[Any], shape: Pass) -> list[Any]:
        """Forward only; what the output functions return (called with `non_loss_data=True`), on the last stage."""
        with torch.no_grad():
            return self._schedule(forward_step, micro_batches, shape, forward_only=True, collect_non_loss_data=True)

    def step(self, learning_rate: float, admit: Callable[[float], int]) -> Update:
        """One update at this learning rate, if `admit(gradient norm)` is above 0 on every rank.

        The lowest answer of all ranks holds and is what every rank gets back; it is -1 for gradients that are not
        finite, which are never applied. Either way they are gone afterwards.
        """
        for group in self._adam.param_groups:
            group["lr"] = learning_rate
        self._complete_shared_gradients()

        self._adam.answer = NOT_FINITE
        # Cached: the float32 optimizer steps one parameter group at a time, and asks each time.
        self._adam.admit = cache(lambda: _lowest(self._answer(admit), self.topology.device))
        self._deepspeed.step()
        return Update(self._norm(), self._adam.answer)

    def _schedule(self, forward_step: ForwardStep, micro_batches: Sequence[Any], shape: Pass, **how: Any) -> list[Any]:
        iterators = [iter(micro_batches) for _ in self.chunks]  # each interleaved chunk walks the same micro-batches
        return get_forward_backward_func()(
            forward_step_func=forward_step,
            data_iterator=iterators if len(self.chunks) > 1 else iterators[0],
            model=self.chunks,
            num_microbatches=len(micro_batches),
            seq_length=shape.positions,
            micro_batch_size=shape.micro_batch,
            **how,
        )

    def local_gradient(self, parameter: nn.Parameter) -> Tensor:
        """Where DeepSpeed accumulates this rank's gradient (a view): a float32 buffer for bf16 weights, else `.grad`.

        Raises:
            RuntimeError: there is none, because no loss has reached the parameter, or DeepSpeed keeps it elsewhere.
        """
        name = "grad" if self.dtype == torch.float32 else "_hp_grad"  # DeepSpeed's own, which may move
        gradient = getattr(parameter, name, None)
        if gradient is None:
            raise RuntimeError(f"a parameter of shape {tuple(parameter.shape)} has no gradient in `{name}`")
        return gradient.view_as(parameter)

    def _complete_shared_gradients(self) -> None:
        """Sum the gradients of replicated parameters over ranks that each saw a part of the sequence."""
        if not self.topology.layout.sequence:
            return
        shared = [p for c in self.chunks for p in c.parameters() if getattr(p, "sequence_parallel", False)]
        if not shared:
            return
        gradients = [self.local_gradient(parameter) for parameter in shared]
        flat = torch.cat([g.flatten() for g in gradients])
        dist.all_reduce(flat, group=parallel_state.get_tensor_model_parallel_group())
        for gradient, summed in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
            gradient.copy_(summed.view_as(gradient))

    def _answer(self, admit: Callable[[float], int]) -> int:
        norm = self._norm()
        return int(admit(norm)) if math.isfinite(norm) else NOT_FINITE

    def _norm(self) -> float:
        norm = float(self.optimizer._global_grad_norm)
        return norm if norm >= 0 else math.nan  # DeepSpeed reports a norm that is not finite as -1 or inf

    def _materialize_moments(self) -> None:
        """Create Adam's moments now, so that a checkpoint can be loaded and a first step refused before any step."""
        for group in self._adam.param_groups:
            for flat in group["params"]:
                zero = torch.zeros((), dtype=torch.float32, device=flat.device)
                moments = {name: torch.zeros_like(flat) for name in ("exp_avg", "exp_avg_sq")}
                self._adam.state[flat].update(step=zero, **moments)
        self.optimizer._lazy_init_hp_params_optimizer_state()


def _lowest(mine: int, device: torch.device) -> int:
    """The lowest of all ranks' numbers. Collective."""
    lowest = torch.tensor(float(mine), device=device)
    dist.all_reduce(lowest, op=dist.ReduceOp.MIN)
    return int(lowest.item())


def _initialize(module: nn.Module, optimizer: torch.optim.Optimizer, config: dict[str, Any]) -> Any:
    """A DeepSpeed engine around an optimizer and a layout that are ours."""
    import deepspeed
    from deepspeed.utils import logger

    logger.setLevel(logging.ERROR)
    with contextlib.redirect_stdout(io.StringIO()):  # memory reports that no setting turns off
        engine, *_ = deepspeed.initialize(
            model=module, optimizer=optimizer, config=config, mpu=ModelParallelUnit(), dist_init_required=False
        )
    return engine


def _deepspeed_config(config: OptimizerConfig, dtype: torch.dtype, parameters: int) -> dict[str, Any]:
    settings: dict[str, Any] = {
        # Megatron-core's schedule divides by the number of micro-batches: DeepSpeed must not do so again.
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "managed_gradient_accumulation": False,
        "gradient_clipping": config.clip,
        "steps_per_print": 10**9,
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {
            "stage": 1,
            "overlap_comm": False,
            "contiguous_gradients": True,
            "reduce_bucket_size": min(parameters, BUCKET),  # it is allocated whole, however few the gradients
        },
        # Otherwise bf16 gradients, accumulated in float32, would be summed over the ranks in bf16.
        "communication_data_type": "fp32",
    }
    if dtype == torch.bfloat16:
        # Without float32 accumulation micro-batches are summed in bf16; without the immediate update the float32
        # buffers stay empty, because the schedule calls the modules and not DeepSpeed's engine.
        settings["bf16"] = {"enabled": True, "immediate_grad_update": True}
        settings["data_types"] = {"grad_accum_dtype": "fp32"}
    return settings
