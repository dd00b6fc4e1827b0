"""The engine: Megatron-core's schedule for forward and backward, DeepSpeed ZeRO-1 for the optimizer's step.

ZeRO-1: buckets of gradients are reduced into shards during the backward pass, and each rank updates its shards.
"""

import logging
import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from deepspeed import comm
from deepspeed.runtime import bf16_optimizer
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from deepspeed.runtime.precision_config import DeepSpeedBF16Config
from deepspeed.utils import logger
from torch import Tensor, nn

from calm_core.config.training_config import OptimizerConfig, SpikeConfig
from calm_core.distributed import schedule
from calm_core.distributed.collectives import reduce_scatter
from calm_core.distributed.optimizer import SkipStepOptimizer, Update, build_optimizer, is_split, is_summed
from calm_core.distributed.schedule import ForwardStep, Pass
from calm_core.distributed.topology import Topology
from calm_core.megatron import MegatronModule, parallel_state, without_the_unused

with without_the_unused():  # DeepSpeed's optimizer imports it, and it compiles functions when imported
    import deepspeed.runtime.zero.muon.muon_optimizer  # noqa: F401

# It prints memory reports while it starts, and collects garbage before each: no setting turns that off.
bf16_optimizer.see_memory_usage = lambda *_, **__: None


class Engine:
    """Runs model parts forward and backward and steps their sharded optimizer.

    Args:
        model_parts: this rank's parts of the model, one unless the pipeline is interleaved, with their weights.
        config: optimizer settings.
        topology: the layout.
        spikes: which updates to skip; by default those that are not finite.

    Attributes:
        optimizer: holds the float32 master weights that ZeRO-1 assigns to this rank, one flat tensor for each bucket of
            parameters, and their state.
        zero: divides them among the data-parallel ranks.
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
        bucket = topology.layout.reduce_bucket
        self.optimizer = build_optimizer(module.parameters(), config, spikes or SpikeConfig(), bucket)
        self.zero = shard(self.optimizer, module, config.clip)

    def parameter_count(self) -> int:
        """The parameters of the whole model, on all tensor- and pipeline-parallel ranks. Collective."""
        first = parallel_state.get_tensor_model_parallel_rank() == 0
        own = sum(
            parameter.numel()
            for part in self.model_parts
            for parameter in part.parameters()
            if first or is_split(parameter)
        )
        total = torch.tensor(own, device=self.topology.device)
        dist.all_reduce(total, group=parallel_state.get_model_parallel_group())
        return int(total.item())

    def close(self) -> None:
        """Release the model, so that its memory and the threads of its process groups can be freed.

        The gradients' hooks refer to the optimizer from within autograd, where Python's garbage collector cannot see
        the cycle; without this call a process that trains several runs would keep the models of all.
        """
        self.zero.destroy()

    def forward_backward(self, forward_step: ForwardStep, micro_batches: Sequence[Any], shape: Pass) -> list[Any]:
        """Accumulate the gradients of all micro-batches; the loss functions' results, on the last stage. Collective."""
        self.zero.expect(len(micro_batches))
        return schedule.forward_backward(self.model_parts, forward_step, micro_batches, shape)

    def step(self, learning_rate: float, loss: float) -> Update:
        """One update, unless the spike detector of any rank rejects this loss or the gradient norm.

        Either way the gradients are zero afterwards. Collective.
        """
        self.zero.reduce()
        self.optimizer.begin_update(loss, learning_rate)
        self.zero.step()  # clips, steps `self.optimizer`, gathers the weights
        return self.optimizer.end_update()


class NormRanks:
    """The `mpu` argument of DeepSpeed's optimizer: it names the ranks over which the gradient norm is summed."""

    def get_model_parallel_group(self) -> dist.ProcessGroup:
        """All ranks: each has a shard of its own, of tensor, pipeline and data parallelism."""
        return dist.group.WORLD


class Zero(BF16_Optimizer):
    """DeepSpeed's sharded optimizer, for bf16 and for float32 weights, with a reduction of its own.

    DeepSpeed holds the weights of a bucket (a parameter group) in one flat tensor and their gradients, accumulated in
    float32, in another. Each data-parallel rank has one shard of both, with its master weights and their state: it
    steps the shard, and gathers the weights of the bucket. DeepSpeed would sum all gradients on all ranks after the
    backward pass; here the last micro-batch's backward pass reduce-scatters each bucket as soon as it is complete.

    Attributes:
        bf16_groups: the parameters of each bucket. Their `main_grad` is a view of the bucket's gradients.
    """

    def __init__(self, optimizer: SkipStepOptimizer, names: dict[nn.Parameter, str], clip: float) -> None:
        super().__init__(
            optimizer,
            names,
            DeepSpeedBF16Config(enabled=True),
            mpu=NormRanks(),
            clip_grad=clip,
            dp_process_group=parallel_state.get_data_parallel_group(with_context_parallel=True),
            grad_acc_dtype=torch.float32,
        )
        for bucket, parameters in enumerate(self.bf16_groups):
            for parameter, gradient in zip(parameters, self.fp32_groups_gradients[bucket], strict=True):
                parameter.main_grad = gradient.view_as(parameter)
                hook = partial(self._accumulate, bucket=bucket)
                self._grad_acc_hooks.append(parameter.register_post_accumulate_grad_hook(hook))
        # The buckets that must first be summed over the tensor-parallel ranks are last.
        self._unsummed = sum(not is_summed(parameters[0]) for parameters in self.bf16_groups)
        self._missing = [math.inf] * len(self.bf16_groups)
        self._reductions: list[Callable[[], None]] = []

    @property
    def global_norm(self) -> float:
        """The norm of the whole model's gradient in the last step, not a number if it was not finite."""
        norm = float(self._global_grad_norm)
        return norm if norm >= 0 else math.nan  # DeepSpeed reports a norm that is not finite as -1 or inf

    def expect(self, micro_batches: int) -> None:
        """Treat the next `micro_batches` as one update, whose gradients are reduced during the last one."""
        self._missing = [micro_batches * len(parameters) for parameters in self.bf16_groups]

    def reduce(self) -> None:
        """Complete the reduction: each rank's shards hold the mean over the data-parallel ranks. Collective."""
        for bucket in range(len(self._reductions), len(self.bf16_groups)):
            if bucket >= self._unsummed:
                self._sum_over_positions(bucket)
            self._begin_reduction(bucket)
        for wait, shard in zip(self._reductions, self.fp32_groups_gradient_flat_partition, strict=True):
            wait()
            shard.div_(dist.get_world_size(self.dp_process_group))
        self._reductions.clear()
        self._missing = [math.inf] * len(self.bf16_groups)

    def get_grads_for_norm(self, for_clipping: bool = False) -> list[Tensor] | tuple[list[Tensor], dict]:
        """The gradients of this rank's shards: those that DeepSpeed's step clips, or those whose norm it adds up.

        Gradients that all tensor-parallel ranks hold whole count in the norm of the first of them.
        """
        shards = self.fp32_groups_gradient_flat_partition
        if for_clipping:
            return shards
        first = parallel_state.get_tensor_model_parallel_rank() == 0
        counted = (first or is_split(parameters[0]) for parameters in self.bf16_groups)
        return [shard if counts else shard[:0] for shard, counts in zip(shards, counted, strict=True)], {}

    @torch.no_grad()
    def _accumulate(self, parameter: nn.Parameter, bucket: int) -> None:
        """Add a micro-batch's gradient, without a copy in float32; begin the reductions that it completes."""
        if bucket < len(self._reductions):
            raise RuntimeError(f"a gradient of shape {tuple(parameter.shape)} has come after its bucket was reduced")
        parameter.main_grad.add_(parameter.grad)
        parameter.grad = None
        self._missing[bucket] -= 1
        # In the order of the buckets, which must be that of all ranks.
        while (following := len(self._reductions)) < self._unsummed and not self._missing[following]:
            self._begin_reduction(following)

    def _begin_reduction(self, bucket: int) -> None:
        self._reductions.append(reduce_scatter(self.fp32_groups_gradients_flat[bucket], self.dp_process_group))

    def _sum_over_positions(self, bucket: int) -> None:
        """Sum the gradients of replicated parameters over the ranks that each saw a part of the sequence."""
        group = parallel_state.get_tensor_model_parallel_group()
        dist.all_reduce(self.fp32_groups_gradients_flat[bucket], group=group)


def shard(optimizer: SkipStepOptimizer, module: nn.Module, clip: float) -> Zero:
    """Divide the module's float32 master weights, and the optimizer's state of them, among the data-parallel ranks."""
    logger.setLevel(logging.ERROR)
    comm.init_distributed(dist_init_required=False)
    zero = Zero(optimizer, {parameter: name for name, parameter in module.named_parameters()}, clip)
    optimizer.global_norm = lambda: zero.global_norm
    optimizer.create_state()
    return zero
