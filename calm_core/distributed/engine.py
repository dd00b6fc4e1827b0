"""The engine: Megatron-core's schedule for forward and backward, DeepSpeed ZeRO-1 for the optimizer's step."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from calm_core.config.training_config import OptimizerConfig, SpikeConfig
from calm_core.distributed import schedule
from calm_core.distributed.optimizer import Update, build_optimizer, is_split
from calm_core.distributed.schedule import ForwardStep, Pass
from calm_core.distributed.topology import Topology
from calm_core.distributed.zero import shard
from calm_core.megatron import MegatronModule, parallel_state


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
