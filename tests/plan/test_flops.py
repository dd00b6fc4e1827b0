import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import silu
from torch.utils.flop_counter import FlopCounterMode

from calm_core.autoencoder.model import Autoencoder, autoencoder_loss
from calm_core.config.model_config import AutoencoderConfig, BackboneConfig, HeadConfig
from calm_core.model.noise import SampleNoise
from calm_core.plan import flops
from calm_core.plan.flops import AutoencoderShape, ModelShape

VOCABULARY = 128_257
AUTOENCODER = AutoencoderShape(VOCABULARY, k=4, hidden=512, ffn=1280, latent=128)


def model(hidden: int, ffn: int, layers: int, kind: str, k: int) -> ModelShape:
    backbone = BackboneConfig(hidden=hidden, ffn=ffn, layers=layers, heads=16)
    return ModelShape(backbone, HeadConfig(kind=kind), VOCABULARY, k, latent=128)


AR_S = model(768, 2048, 12, "softmax", 1)
AR_M = model(1024, 2752, 16, "softmax", 1)
AR_L = model(1536, 4096, 16, "softmax", 1)
CALM_M = model(1024, 2752, 16, "energy", 4)
CALM_L = model(1536, 4096, 16, "energy", 4)
CALM_XL = model(2560, 6880, 16, "energy", 4)  # inferred: the paper gives its size alone

TINY = ModelShape(
    BackboneConfig(hidden=32, ffn=64, layers=2, heads=4),
    HeadConfig(noise=8, samples=4, target_samples=10, blocks=2),
    vocabulary=96,
    k=4,
    latent=8,
)


@pytest.mark.parametrize(
    ("shape", "millions"),
    [(AR_S, 281), (AR_M, 465), (AR_L, 849), (CALM_M, 371), (CALM_L, 735), (CALM_XL, 1820)],
)
def test_parameters_match_the_papers_table(shape: ModelShape, millions: float) -> None:
    assert sum(flops.parameters(shape).values()) == pytest.approx(millions * 1e6, rel=0.01)


def test_autoencoder_has_75_million_parameters() -> None:
    assert flops.autoencoder_parameters(AUTOENCODER) == pytest.approx(75e6, rel=0.015)


@pytest.mark.parametrize(
    ("shape", "expected"), [(AR_S, 6.6e20), (AR_M, 11.9e20), (AR_L, 22.5e20), (CALM_M, 3.7e20), (CALM_L, 7.7e20)]
)
def test_training_flops_match_the_papers_table(shape: ModelShape, expected: float) -> None:
    assert flops.paper_training(shape) == pytest.approx(expected, rel=0.05)


@pytest.mark.parametrize(
    ("shape", "expected"),
    [(AR_S, 4.4e8), (AR_M, 7.9e8), (AR_L, 15.0e8), (CALM_M, 2.9e8), (CALM_L, 4.6e8), (CALM_XL, 9.4e8)],
)
def test_inference_flops_match_the_papers_table(shape: ModelShape, expected: float) -> None:
    autoencoder = None if shape.head.kind == "softmax" else AUTOENCODER
    assert flops.paper_inference(shape, autoencoder) == pytest.approx(expected, rel=0.05)


class Norm(nn.LayerNorm):
    """RMSNorm's one vector of weights."""

    def __init__(self, width: int) -> None:
        super().__init__(width, bias=False)


class Layer(nn.Module):
    def __init__(self, d: int, ffn: int, key_value: int) -> None:
        super().__init__()
        self.norms = nn.ModuleList([Norm(d), Norm(d)])
        self.q, self.o = nn.Linear(d, d, bias=False), nn.Linear(d, d, bias=False)
        self.k, self.v = nn.Linear(d, key_value, bias=False), nn.Linear(d, key_value, bias=False)
        self.gate, self.up = nn.Linear(d, ffn, bias=False), nn.Linear(d, ffn, bias=False)
        self.down = nn.Linear(ffn, d, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norms[0](x)
        query = self.q(y)
        shared = 1, query.shape[-1] // self.k.out_features  # query heads that share a key head
        keys, values = self.k(y).tile(shared), self.v(y).tile(shared)
        x = x + self.o((query @ keys.mT).softmax(-1) @ values)
        y = self.norms[1](x)
        return x + self.down(silu(self.gate(y)) * self.up(y))


class HeadBlock(nn.Module):
    def __init__(self, d: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(d)
        self.from_sample, self.from_condition = nn.Linear(d, d), nn.Linear(d, d, bias=False)
        self.mix, self.gate_up, self.down = nn.Linear(d, d), nn.Linear(d, 2 * d), nn.Linear(d, d)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        inner = self.mix(silu(self.from_sample(self.norm(x)) + self.from_condition(condition)))
        gate, up = self.gate_up(silu(inner)).chunk(2, -1)
        return x + self.down(silu(gate) * up)


class PlainModel(nn.Module):
    """The network of `TINY`'s kind in plain torch, attention with one head and no mask."""

    def __init__(self, shape: ModelShape) -> None:
        super().__init__()
        self.shape = shape
        d, head = shape.backbone.hidden, shape.head
        key_value = d * shape.backbone.key_value_heads // shape.backbone.heads
        self.embedding = nn.Embedding(shape.vocabulary, d)
        self.compression = nn.Sequential(nn.Linear(shape.k * d, 2 * d), nn.SiLU(), nn.Linear(2 * d, d), nn.LayerNorm(d))
        self.layers = nn.Sequential(*(Layer(d, shape.backbone.ffn, key_value) for _ in range(shape.backbone.layers)))
        self.final_norm = Norm(d)
        self.noise_in, self.noise_norm = nn.Linear(head.noise, d), nn.LayerNorm(d)
        self.hidden_in, self.hidden_norm = nn.Linear(d, d), nn.LayerNorm(d)
        self.blocks = nn.ModuleList(HeadBlock(d) for _ in range(head.block_count(shape.backbone.layers)))
        self.out = nn.Sequential(nn.LayerNorm(d), nn.Linear(d, d), nn.SiLU(), nn.Linear(d, shape.latent))

    def loss(self, tokens: Tensor) -> Tensor:
        """Tokens `[S, K]`; the loss has the products of the energy loss, not its value."""
        head, positions = self.shape.head, tokens.shape[0]
        hidden = self.final_norm(self.layers(self.compression(self.embedding(tokens).flatten(1))))
        condition = self.hidden_norm(self.hidden_in(hidden)).unsqueeze(1)
        x = self.noise_norm(self.noise_in(torch.rand(positions, head.samples, head.noise)))
        for block in self.blocks:
            x = block(x, condition)
        draws = torch.randn(positions, head.target_samples, self.shape.latent)
        spread = torch.ones(positions, 1, self.shape.latent) @ draws.square().mT
        return (self.out(x) @ draws.mT).sum() + spread.sum()


@pytest.mark.parametrize(("kv_groups", "k"), [(0, 4), (2, 4), (0, 1)])
def test_parameters_and_executed_flops_equal_those_of_a_plain_model(kv_groups: int, k: int) -> None:
    backbone = BackboneConfig(hidden=32, ffn=64, layers=2, heads=4, kv_groups=kv_groups)
    shape = ModelShape(backbone, TINY.head, TINY.vocabulary, k, TINY.latent)
    plain, positions = PlainModel(shape), 6
    assert sum(flops.parameters(shape).values()) == sum(p.numel() for p in plain.parameters())
    with FlopCounterMode(display=False) as counter:
        plain.loss(torch.randint(shape.vocabulary, (positions, shape.k))).backward()
    masked_half = backbone.layers * 3 * 2 * backbone.hidden * positions * (positions - 1)
    assert counter.get_total_flops() == flops.executed_training(shape, positions) + masked_half


def test_stages_add_up_to_the_model_in_the_order_of_the_pipeline() -> None:
    stages = flops.unit_costs(CALM_M, positions=2048)
    assert [stage.name for stage in stages] == ["embedding", *(f"layer {i}" for i in range(16)), "head"]
    assert sum(stage.parameters for stage in stages) == sum(flops.parameters(CALM_M).values())
    assert sum(stage.training for stage in stages) == flops.executed_training(CALM_M, 2048)
    assert all(2 * stage.forward < stage.training <= 3 * stage.forward for stage in stages)


def test_the_energy_head_weighs_as_much_as_the_layers_and_its_conditioning_is_counted_once() -> None:
    *body, head = flops.unit_costs(CALM_M, positions=2048)
    assert 0.7 < head.training / sum(stage.training for stage in body) < 1
    more = ModelShape(CALM_M.backbone, HeadConfig(samples=16), VOCABULARY, k=4, latent=128)
    per_sample = (flops.unit_costs(more, 1)[-1].forward - flops.unit_costs(CALM_M, 1)[-1].forward) / 8
    d = 1024
    assert per_sample == 2 * (64 * d + 4 * 5 * d * d + d * d + d * 128) + 2 * 100 * 128


@pytest.mark.parametrize(("kind", "outputs", "evaluations"), [("diffusion", 16, 100), ("flow", 8, 20)])
def test_iterative_heads(kind: str, outputs: int, evaluations: int) -> None:
    d, latent = 32, 8
    shape = ModelShape(TINY.backbone, HeadConfig(kind=kind, blocks=2), vocabulary=96, k=4, latent=latent)
    linears = [(d, d), (latent, d), (256, d), (d, d), *2 * [(d, 3 * d), (d, d), (d, d)], (d, 2 * d), (d, outputs)]
    expected = sum(i * o + o for i, o in linears) + 2 * 2 * d  # two affine norms
    assert flops.parameters(shape)["head"] == expected
    body = flops.paper_inference(shape) * shape.k - flops.head(shape).forward * evaluations
    assert body == flops.paper_inference(TINY) * shape.k - flops.head(TINY).forward


def test_utilisation() -> None:
    assert math.isclose(flops.utilisation(flops=5e12, seconds=2, peak=1e13), 0.25)


def test_the_autoencoders_training_is_what_torch_counts() -> None:
    shape = AutoencoderShape(vocabulary=300, k=4, hidden=16, ffn=40, latent=8)
    model = Autoencoder(AutoencoderConfig(hidden=16, latent=8), 300, 4)
    with FlopCounterMode(display=False) as counter:
        mean, log_std = model.encode(torch.randint(300, (5, 4)))
        (model.decode(mean).sum() + log_std.sum()).backward()
    assert 5 * flops.autoencoder_training(shape) == counter.get_total_flops()


def test_a_sampled_output_layer_computes_fewer_logits() -> None:
    shape = AutoencoderShape(vocabulary=300, k=4, hidden=16, ffn=40, latent=8)
    model = Autoencoder(AutoencoderConfig(hidden=16, latent=8, sampled_output=128), 300, 4)
    with FlopCounterMode(display=False) as counter:
        noise = SampleNoise(0, range(3), torch.device("cpu"))
        autoencoder_loss(model, torch.randint(300, (5, 3, 4)), noise).loss.backward()
    assert 5 * 3 * flops.autoencoder_training(shape, outputs=128) == counter.get_total_flops()
