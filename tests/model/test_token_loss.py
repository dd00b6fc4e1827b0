"""The token side loss against plain cross-entropy, its costs against what is allocated, and who does not have it."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from calm_core.config.model_config import BackboneConfig, HeadConfig, ModelShape, TokenLossConfig
from calm_core.config.training_config import ParallelConfig
from calm_core.distributed.topology import Topology
from calm_core.errors import UserError
from calm_core.model import token_loss
from calm_core.model.backbone import transformer_config
from calm_core.model.calm import CalmModel
from calm_core.model.heads import Target
from calm_core.model.noise import SampleNoise
from calm_core.model.parameters import initialize
from calm_core.model.token_loss import TokenLoss
from calm_core.plan import flops
from calm_core.plan.layout import check_layout
from calm_core.plan.memory import padded

S, B, K, V, D = 8, 3, 4, 50, 16
NOISE = SampleNoise(0, [5, 6, 7], torch.device("cpu"))
BACKBONE = BackboneConfig(layers=1, hidden=D, ffn=24, heads=2)


def shape(**side: object) -> ModelShape:
    head = HeadConfig(noise=4, samples=2, target_samples=2)
    return ModelShape(BACKBONE, head, V, K, 6, TokenLossConfig(weight=2.0, **side))


def side_loss(**side: object) -> TokenLoss:
    module = TokenLoss(transformer_config(BACKBONE, ParallelConfig()), shape(**side))
    torch.manual_seed(0)
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return module


def plain(module: TokenLoss, hidden: Tensor, target: Target) -> Tensor:
    """Nats of each token that has features, at every position, `[S, B, tokens]`."""
    rank = module.side.rank
    features = module.features(hidden)
    if rank:
        logits = torch.stack([f @ module.out[0].weight[:V].T for f in features.split(rank, -1)], 2)
    else:
        logits = torch.stack([features @ matrix.weight[:V].T for matrix in module.out], 2)
    wanted = target.tokens[..., : logits.shape[2]]
    return F.cross_entropy(logits.flatten(0, 2), wanted.flatten(), reduction="none").view(wanted.shape)


@pytest.fixture
def inputs() -> tuple[Tensor, Target]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(S, B, D, generator=generator), Target(torch.randint(V, (S, B, K), generator=generator))


@pytest.mark.parametrize("side", [{"rank": 5}, {"rank": 0}, {"rank": 5, "tokens": "first"}])
def test_it_is_the_mean_cross_entropy_of_the_tokens(topology: Topology, inputs: tuple[Tensor, Target], side) -> None:
    module = side_loss(**side)
    assert torch.allclose(module(*inputs, NOISE), plain(module, *inputs).mean(-1), atol=1e-5)


@pytest.mark.parametrize("side", [{"rank": 5}, {"rank": 0}, {"rank": 5, "tokens": "random", "every": 2}])
def test_positions_have_their_weights_in_the_gradient(topology: Topology, inputs: tuple[Tensor, Target], side) -> None:
    """As by finite differences, in the direction of the gradient itself."""
    module, hidden, target = side_loss(**side).double(), inputs[0].double(), inputs[1]
    target = replace(target, weights=torch.linspace(0, 2, S * B, dtype=torch.float64).view(S, B))

    def loss() -> Tensor:
        return 3.0 * (module(hidden, target, NOISE) * target.weights).sum()

    hidden.requires_grad_()
    gradient = torch.autograd.grad(loss(), (hidden, *module.parameters()))
    places = [hidden, *module.parameters()]
    steep = sum((part.square().sum() for part in gradient), torch.zeros(()))
    rise = []
    for step in (1e-5, -2e-5):
        with torch.no_grad():
            for place, part in zip(places, gradient, strict=True):
                place += step * part / steep.sqrt()
            rise.append(loss())
    assert ((rise[0] - rise[1]) / 2e-5).item() == pytest.approx(steep.sqrt().item(), rel=1e-6)


def test_a_random_token_is_one_of_the_chunk_and_all_come_up(topology: Topology, inputs: tuple[Tensor, Target]) -> None:
    module = side_loss(rank=5, tokens="random")
    distance = (module(*inputs, NOISE).unsqueeze(-1) - plain(module, *inputs)).abs()
    assert distance.min(-1).values.max() < 1e-5
    assert set(distance.argmin(-1).flatten().tolist()) == set(range(K))


def test_positions_left_out_are_compensated(topology: Topology, inputs: tuple[Tensor, Target]) -> None:
    """Over many samples the mean is that of all positions."""
    module = side_loss(rank=5, every=4)
    every = plain(module, *inputs).mean(-1)
    found = [module(*inputs, SampleNoise(0, [i, i + 1, i + 2], torch.device("cpu"))) for i in range(0, 1200, 3)]
    assert all(((loss == 0) | ((loss - 4 * every).abs() < 1e-4)).all() for loss in found)
    assert all(((loss != 0).sum(0) == S // 4).all() for loss in found)
    assert torch.allclose(torch.stack(found).mean(0), every, rtol=0.4)
    assert torch.stack(found).mean().item() == pytest.approx(every.mean().item(), rel=0.05)


def test_the_plan_counts_its_parameters(topology: Topology) -> None:
    for side in ({"rank": 5}, {"rank": 0}, {"rank": 5, "tokens": "first"}, {"rank": 5, "tokens": "random", "every": 2}):
        allocated = sum(parameter.numel() for parameter in side_loss(**side).parameters())
        assert token_loss.weights(padded(shape(**side))).parameters == allocated
    model = CalmModel(transformer_config(BACKBONE, ParallelConfig()), shape(rank=5))
    counted = sum(unit.parameters for unit in flops.unit_weights(padded(shape(rank=5))))
    assert counted == sum(parameter.numel() for parameter in model.parameters())


def test_its_training_flops() -> None:
    """Forward and twice that backward: features of 4 tokens, then the logits of the tokens that are learned."""
    base = flops.executed_training(replace(shape(), token_loss=None), S)
    assert flops.executed_training(shape(rank=5), S) - base == 6 * S * (D * 4 * 5 + 4 * 5 * V)
    assert flops.executed_training(shape(rank=5, tokens="random", every=2), S) - base == 6 * S // 2 * (D * 20 + 5 * V)
    assert flops.executed_training(shape(rank=0), S) - base == 6 * S * 4 * D * V
    assert flops.paper_training(shape(rank=5), 1, S) == flops.paper_training(replace(shape(), token_loss=None), 1, S)


def test_the_loss_of_the_head_stays_what_it_is(topology: Topology, inputs: tuple[Tensor, Target]) -> None:
    """The side loss is a term of its own, and leaves zero gradients in the steps without it."""
    models = []
    for of in (shape(rank=5), replace(shape(), token_loss=None)):
        models.append(CalmModel(transformer_config(BACKBONE, ParallelConfig()), of))
        initialize([models[-1]], 0.2, seed=0)
    tokens, (_, target) = torch.randint(V, (B, S, K)), inputs
    target = Target(target.tokens, torch.randn(S, B, 6), torch.zeros(S, B, 6))
    with_side, without = (model(tokens, target, NOISE) for model in models)
    assert torch.equal(with_side.loss, without.loss)
    assert without.side is None
    assert torch.equal(with_side.side, 2.0 * with_side.terms["token_loss"])
    idle = models[0](tokens, target, NOISE, side=False)
    assert "token_loss" not in idle.terms
    (idle.loss + idle.side).sum().backward()
    assert all(not parameter.grad.any() for parameter in models[0].token_loss.parameters())


def test_settings_that_cannot_work_are_refused() -> None:
    with pytest.raises(UserError, match=r"token_loss.tokens=random needs token_loss.rank"):
        TokenLossConfig(weight=1.0, tokens="random", rank=0)
    with pytest.raises(UserError, match=r"token_loss.every=3 does not divide the 8 positions"):
        check_layout(shape(every=3), 8, ParallelConfig())
    with pytest.raises(UserError, match=r"token_loss.every=8 does not divide the 4 positions"):
        check_layout(shape(every=8), 8, ParallelConfig(tensor=2, sequence=True))
