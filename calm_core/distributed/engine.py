"""The engine: Megatron-core's schedule for forward and backward, DeepSpeed ZeRO-1 for the optimizer's step."""

import contextlib
import io
import logging
import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.transformer.module import MegatronModule
from torch import Tensor, nn

from calm_core.config.training_config import OptimizerConfig, SpikeConfig
from calm_core.distributed import schedule
from calm_core.distributed.optimizer import SkipStepOptimizer, Update, build_optimizer
from calm_core.distributed.schedule import ForwardStep, Pass
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
        """This rank's index in that group."""
        return dist.get_rank(self.get_model_parallel_group())

    def get_tensor_model_parallel_group(self) -> dist.ProcessGroup:
        """Ranks that share every layer."""
        return parallel_state.get_tensor_model_parallel_group()

    def get_tensor_model_parallel_world_size(self) -> int:
        """Size of that group."""
        return parallel_state.get_tensor_model_parallel_world_size()

    def get_tensor_model_parallel_rank(self) -> int:
        """This rank's index in that group."""
        return parallel_state.get_tensor_model_parallel_rank()

    def get_pipeline_model_parallel_group(self) -> dist.ProcessGroup:
        """Ranks that share the layers of one model."""
        return parallel_state.get_pipeline_model_parallel_group()

    def get_pipeline_model_parallel_world_size(self) -> int:
        """Size of that group."""
        return parallel_state.get_pipeline_model_parallel_world_size()

    def get_pipeline_model_parallel_rank(self) -> int:
        """This rank's index in that group."""
        return parallel_state.get_pipeline_model_parallel_rank()

    def get_data_parallel_group(self) -> dist.ProcessGroup:
        """Ranks that hold the same weights and see different samples."""
        return parallel_state.get_data_parallel_group(with_context_parallel=True)

    def get_data_parallel_world_size(self) -> int:
        """Size of that group."""
        return parallel_state.get_data_parallel_world_size(with_context_parallel=True)

    def get_data_parallel_rank(self) -> int:
        """This rank's index in that group."""
        return parallel_state.get_data_parallel_rank(with_context_parallel=True)


class Engine:
    """Runs model parts forward and backward and steps their sharded optimizer.

    Args:
        model_parts: this rank's parts of the model, one unless the pipeline is interleaved, with their weights.
        config: optimizer settings.
        topology: the layout.
        spikes: which updates to skip; by default those that are not finite.

    Attributes:
        optimizer: holds the float32 master weights that ZeRO-1 assigns to this rank, one flat tensor per parameter
            group, and their state.
    """

    def __init__(
        self,
        model_parts: Sequence[MegatronModule],
        config: OptimizerConfig,
        topology: Topology,
        spikes: SpikeConfig | None = None,
    ) -> None:
        self.model_parts = list(model_parts)
        self.topology = topology
        self.dtype = next(self.model_parts[0].parameters()).dtype
        module = nn.ModuleList(self.model_parts)
        self.optimizer: SkipStepOptimizer = build_optimizer(module.parameters(), config, spikes or SpikeConfig())
        count = sum(parameter.numel() for parameter in module.parameters())
        self._deepspeed = _initialize(module, self.optimizer, _deepspeed_config(config, self.dtype, count))
        self.optimizer.global_norm = self._global_norm
        self.optimizer.create_state()

    def parameter_count(self) -> int:
        """The parameters of the whole model, on all tensor- and pipeline-parallel ranks. Collective."""
        first = parallel_state.get_tensor_model_parallel_rank() == 0
        own = sum(
            parameter.numel()
            for part in self.model_parts
            for parameter in part.parameters()
            if first or getattr(parameter, "tensor_model_parallel", False)
        )
        total = torch.tensor(own, device=self.topology.device)
        dist.all_reduce(total, group=parallel_state.get_model_parallel_group())
        return int(total.item())

    def close(self) -> None:
        """Release the model, so that its memory and the threads of its process groups can be freed.

        DeepSpeed's gradient hooks refer to the optimizer from within autograd, where Python's garbage collector cannot
        see the cycle; without this call a process that trains several runs would keep the models of all.
        """
        self._deepspeed.destroy()

    def forward_backward(self, forward_step: ForwardStep, micro_batches: Sequence[Any], shape: Pass) -> list[Any]:
        """Accumulate the gradients of all micro-batches; the loss functions' results, on the last stage."""
        return schedule.forward_backward(self.model_parts, forward_step, micro_batches, shape)

    def step(self, learning_rate: float, loss: float) -> Update:
        """One update, unless the spike detector of any rank rejects this loss or the gradient norm.

        Either way the gradients are zero afterwards. Collective.
        """
        self._sum_shared_gradients()
        self.optimizer.begin_update(loss, learning_rate)
        self._deepspeed.step()  # reduces, clips, steps `self.optimizer`, gathers the weights
        return self.optimizer.end_update()

    def local_gradient(self, parameter: nn.Parameter) -> Tensor:
        """This rank's accumulated gradient (a view): a float32 buffer of DeepSpeed for bf16 weights, else `.grad`.

        Raises:
            RuntimeError: the parameter has none, because no loss depends on it or DeepSpeed keeps it elsewhere.
        """
        name = "grad" if self.dtype == torch.float32 else "_hp_grad"  # private to DeepSpeed: may change
        gradient = getattr(parameter, name, None)
        if gradient is None:
            raise RuntimeError(f"a parameter of shape {tuple(parameter.shape)} has no gradient in `{name}`")
        return gradient.view_as(parameter)

    def _sum_shared_gradients(self) -> None:
        """Sum the gradients of replicated parameters over the ranks that each saw a part of the sequence."""
        if not self.topology.layout.sequence:
            return
        shared = [p for part in self.model_parts for p in part.parameters() if getattr(p, "sequence_parallel", False)]
        if not shared:
            return
        gradients = [self.local_gradient(parameter) for parameter in shared]
        flat = torch.cat([g.flatten() for g in gradients])
        dist.all_reduce(flat, group=parallel_state.get_tensor_model_parallel_group())
        for gradient, summed in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
            gradient.copy_(summed.view_as(gradient))

    def _global_norm(self) -> float:
        norm = float(self._deepspeed.optimizer._global_grad_norm)
        return norm if norm >= 0 else math.nan  # DeepSpeed reports a norm that is not finite as -1 or inf


def _initialize(module: nn.Module, optimizer: torch.optim.Optimizer, config: dict[str, Any]) -> Any:
    """A DeepSpeed engine around our optimizer and layout."""
    import deepspeed
    from deepspeed.utils import logger

    logger.setLevel(logging.ERROR)
    with contextlib.redirect_stdout(io.StringIO()):  # prints memory reports that no setting turns off
        engine, *_ = deepspeed.initialize(
            model=module, optimizer=optimizer, config=config, mpu=ModelParallelUnit(), dist_init_required=False
        )
    return engine


def _deepspeed_config(config: OptimizerConfig, dtype: torch.dtype, parameters: int) -> dict[str, Any]:
    settings: dict[str, Any] = {
        # Megatron-core's schedule divides by the number of micro-batches; DeepSpeed must not do so again.
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
            "reduce_bucket_size": min(parameters, BUCKET),  # allocated whole, even for few gradients
        },
        # Otherwise bf16 gradients, accumulated in float32, would be summed over the ranks in bf16.
        "communication_data_type": "fp32",
    }
    if dtype == torch.bfloat16:
        # Without float32 accumulation micro-batches would be summed in bf16; without the immediate update the float32
        # buffers would stay empty, because the schedule calls the modules and not DeepSpeed's engine.
        settings["bf16"] = {"enabled": True, "immediate_grad_update": True}
        settings["data_types"] = {"grad_accum_dtype": "fp32"}
    return settings
