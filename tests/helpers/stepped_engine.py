"""A small engine on one rank, after some updates by random gradients."""

import torch
from torch import Tensor

from calm_core.config.model_config import BackboneConfig, HeadConfig, ModelShape
from calm_core.config.training_config import OptimizerConfig, ParallelConfig
from calm_core.distributed.engine import Engine
from calm_core.distributed.topology import Topology
from calm_core.model.backbone import transformer_config
from calm_core.model.calm import CalmModel
from calm_core.model.parameters import initialize


def model(seed: int = 0, dtype: torch.dtype = torch.float32, **changes: int) -> CalmModel:
    backbone = BackboneConfig(**{"layers": 2, "hidden": 16, "ffn": 24, "heads": 2, **changes})
    shape = ModelShape(backbone, HeadConfig(noise=4), vocabulary=50, k=2, latent=4)
    built = CalmModel(transformer_config(backbone, ParallelConfig(), dtype), shape)
    initialize([built], 0.1, seed)
    return built


def engine(topology: Topology, *arguments: object, **changes: object) -> Engine:
    return Engine([model(*arguments, **changes)], OptimizerConfig(), topology)


def stepped(topology: Topology, dtype: torch.dtype) -> Engine:
    """An engine after three updates by random gradients."""
    one = engine(topology, 0, dtype)
    one_more_steps(one, 3)
    return one


def one_more_steps(one: Engine, steps: int) -> None:
    generator = torch.Generator().manual_seed(steps)
    for _ in range(steps):
        for parameter in one.model_parts[0].parameters():
            factor = torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
            (parameter * factor).sum().backward()
        assert one.step(1e-2, loss=1.0).applied


def state(one: Engine) -> list[Tensor]:
    masters = [flat for group in one.optimizer.param_groups for flat in group["params"]]
    moments = [value for each in one.optimizer.state.values() for value in each.values()]
    return [x.detach().clone() for x in (*one.model_parts[0].parameters(), *masters, *moments)]
