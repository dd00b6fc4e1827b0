"""The one way of evaluating: of a model in an engine, and of one that knows the text."""

import math
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from calm_core import config
from calm_core.autoencoder.model import Autoencoder, load_autoencoder, save_autoencoder
from calm_core.config.experiment import EvaluationConfig, Experiment
from calm_core.config.model_config import AutoencoderConfig, BackboneConfig, HeadConfig, ModelShape
from calm_core.config.training_config import ParallelConfig
from calm_core.data.chunks import build_chunks
from calm_core.data.dataset import Windows
from calm_core.data.store import ChunkStore, TokenStore
from calm_core.distributed.engine import Engine
from calm_core.distributed.topology import Topology
from calm_core.evaluation.brier import BrierAccumulator
from calm_core.evaluation.evaluate import ClusteredScores, evaluate, summarize
from calm_core.evaluation.held_out import HeldOut
from calm_core.megatron import ModelType
from calm_core.model.backbone import transformer_config
from calm_core.model.heads import HeadLoss, Target
from calm_core.model.noise import SampleNoise
from calm_core.training.launch import calm_rows, calm_task


@pytest.fixture
def experiment(tiny_experiment: Path) -> Experiment:
    return config.load(Experiment, tiny_experiment / "config.yaml", [f"run={tiny_experiment}"])


@pytest.fixture
def engine(topology: Topology, experiment: Experiment) -> Iterator[Engine]:
    task = calm_task(experiment, calm_rows(experiment), topology.device)
    engine = Engine(task.build(topology, torch.float32), experiment.training.optimizer, topology)
    yield engine
    engine.close()


@pytest.fixture
def held_out(experiment: Experiment) -> HeldOut:
    store, autoencoder = ChunkStore(experiment.paths.chunks, "held_out"), load_autoencoder(experiment.paths.autoencoder)
    settings = EvaluationConfig(windows=6, samples=4, micro_batch=2)
    return HeldOut(Windows(store, experiment.training.positions), autoencoder, None, 0, settings)


def stop_at(call: int) -> Callable[[], bool]:
    """Answers no until it is asked for the `call`-th time."""
    calls = iter(range(1, 100))
    return lambda: next(calls) == call


@pytest.mark.parametrize("call", [1, 3])
def test_an_evaluation_stops_between_micro_batches_without_a_record(
    engine: Engine, held_out: HeldOut, call: int
) -> None:
    stop = stop_at(call)
    assert evaluate(engine.model_parts, engine.topology, held_out, stop) is None
    assert not stop()  # it was asked no more
    assert all(module.training for module in engine.model_parts)


def test_an_evaluation_that_may_go_on_is_the_same(engine: Engine, held_out: HeldOut) -> None:
    asked = stop_at(4)
    what = engine.model_parts, engine.topology, held_out
    assert evaluate(*what, asked) == evaluate(*what)
    assert asked()  # three micro-batches, three questions before this one


K, WIDTH = 8, 512


def exact_autoencoder(vocabulary: int) -> Autoencoder:
    """One that rebuilds every token: a latent is the sum of the chunk's embeddings, each turned in its own way."""
    torch.manual_seed(0)
    model = Autoencoder(AutoencoderConfig(hidden=WIDTH, ffn=8, latent=WIDTH), vocabulary, K).requires_grad_(False)
    for name in ("encoder_token_block", "encoder_chunk_block", "decoder_chunk_block", "decoder_token_block"):
        torch.nn.init.zeros_(getattr(model, name).down.weight)
    turns = torch.stack([torch.linalg.qr(torch.randn(WIDTH, WIDTH)).Q for _ in range(K)])
    model.embedding.weight.copy_(torch.nn.functional.normalize(torch.randn(vocabulary, WIDTH), dim=1) * 2)
    model.encoder_join.weight.copy_(turns.transpose(0, 1).flatten(1))
    model.encoder_posterior.weight.zero_()[:WIDTH].fill_diagonal_(1)
    model.encoder_posterior.bias[WIDTH:] = -5
    torch.nn.init.eye_(model.decoder_input.weight)
    model.decoder_split.weight.copy_(turns.transpose(1, 2).flatten(0, 1))
    return model.eval()


class Knowing(torch.nn.Module):
    """A network that knows the next chunk: its head draws the latent of it, or of one that `error` makes of it.

    With `halves` every other draw is of a chunk that is wrong from its first token on.
    """

    model_type = ModelType.encoder_or_decoder
    vp_stage, first, last = None, True, True

    def __init__(
        self, autoencoder: Autoencoder, layout: ParallelConfig, error: Callable[[Tensor], Tensor], halves: bool = False
    ) -> None:
        super().__init__()
        backbone = BackboneConfig(layers=1, hidden=WIDTH, heads=4, kv_groups=4, ffn=8)
        self.config = transformer_config(backbone, layout)
        self.shape = ModelShape(backbone, HeadConfig(), autoencoder.vocab_size, K, WIDTH)
        self._autoencoder, self._error, self._halves = autoencoder, error, halves

    @property
    def head(self) -> "Knowing":
        return self

    def set_input_tensor(self, _: object) -> None:
        """There is a single stage."""

    def hidden(self, tokens: Tensor, _: object) -> Tensor:
        following = self._error(tokens.roll(-1, 1))
        return self._autoencoder.encode(following)[0].transpose(0, 1)

    def sample(self, hidden: Tensor, noise: SampleNoise, samples: int) -> Tensor:
        latents = hidden.unsqueeze(2).expand(-1, -1, samples, -1).clone()
        if self._halves:
            latents[:, :, ::2] = latents[:, :, ::2].roll(2, 0)  # two positions in each chunk
        return latents

    def loss(self, hidden: Tensor, target: Target, noise: SampleNoise) -> HeadLoss:
        return HeadLoss(torch.zeros(hidden.shape[:2]), {})


@pytest.fixture(scope="module")
def eight(tiny_experiment: Path, tmp_path_factory: pytest.TempPathFactory) -> HeldOut:
    """Windows of chunks of eight tokens, with an autoencoder that rebuilds them."""
    folder = tmp_path_factory.mktemp("eight")
    autoencoder = exact_autoencoder(TokenStore(tiny_experiment / "tokens", "train").vocab_size)
    tokenizer_hash = TokenStore(tiny_experiment / "tokens", "train").tokenizer_hash
    save_autoencoder(autoencoder, folder / "frozen", tokenizer_hash, {})
    frozen = load_autoencoder(folder / "frozen")
    build_chunks(tiny_experiment / "tokens", frozen, folder / "chunks")
    settings = EvaluationConfig(windows=4, places=0, samples=8, micro_batch=2)
    return HeldOut(Windows(ChunkStore(folder / "chunks", "held_out"), 16), frozen, None, 0, settings)


def wrong_from(first: int) -> Callable[[Tensor], Tensor]:
    """Other tokens from this one of each chunk on."""
    return lambda chunks: torch.cat([chunks[..., :first], 300 - chunks[..., first:] - 1], -1)


def test_a_model_wrong_in_the_second_half_of_its_chunks_alone_scores_lower(topology: Topology, eight: HeldOut) -> None:
    right, wrong = (
        evaluate([Knowing(eight.autoencoder, topology.layout, wrong_from(first))], topology, eight) for first in (8, 4)
    )
    assert right["known_tokens"] == [0, 4]
    assert right["brier_lm"] == pytest.approx(100)
    # Half the scored positions are in the second half of a chunk, where it is sure of what is wrong.
    assert all(wrong[f"brier_{n}"] == pytest.approx(0, abs=0.05) for n in range(1, 5))
    assert wrong["brier_lm"] is None


def test_known_tokens_decide_between_draws_in_the_second_half(topology: Topology, eight: HeldOut) -> None:
    """Two chunks are equally likely. The first token is open between them; the fifth follows from the first four."""
    found = evaluate([Knowing(eight.autoencoder, topology.layout, wrong_from(8), halves=True)], topology, eight)
    # Of 8 draws 4 are right: at the start of a chunk 2 * 4/8 - 24/56, from its middle 2 - 1.
    assert found["brier_4"] == pytest.approx((1 - 24 / 56 + 1) / 2, abs=0.03)
    assert 4 < found["effective_draws"] < 7  # 8 and 4


BRIER = tuple(f"brier_{n}" for n in range(1, 5))


def part(values: torch.Tensor, documents: list[int], names: tuple[str, ...] = BRIER) -> ClusteredScores:
    accumulator = BrierAccumulator(values.shape[1])
    accumulator.add(values, torch.tensor(documents))
    return names, accumulator.state()


def test_parts_merge_to_the_whole():
    values = torch.rand(12, 4, dtype=torch.float64)
    documents = [0, 0, 1, 1, 1, 2, 2, 3, 3, 3, 3, 0]
    whole = summarize([part(values, documents)])
    split = summarize([part(values[:5], documents[:5]), part(values[5:], documents[5:])])
    assert whole.keys() == split.keys()
    assert all(whole[name] == pytest.approx(split[name]) for name in whole if whole[name] is not None)
    assert whole["brier_1"] == pytest.approx(values[:, 0].mean().item())
    assert whole["scored_positions"] == 12
    assert whole["documents"] == 4


def test_brier_lm_is_of_the_brier_scores_alone_wherever_they_stand():
    values = torch.tensor([[9.0, 0.4, 0.3, 0.2, 0.1], [8.0, 0.41, 0.31, 0.21, 0.11]], dtype=torch.float64)
    result = summarize([part(values, [0, 1], ("loss", *BRIER))])
    assert result["brier_lm"] == pytest.approx(100 * math.prod([0.405, 0.305, 0.205, 0.105]) ** 0.25)
    assert result["brier_lm_reason"] is None
    assert result["loss"] == 8.5


def test_a_single_document_has_no_error_and_no_brier_lm():
    result = summarize([part(torch.full((3, 4), 0.5), [7, 7, 7])])
    assert result["brier_1_error"] is None
    assert result["brier_lm"] is None
    assert "two documents" in result["brier_lm_reason"]


def test_a_single_document_has_errors_by_blocks_of_its_positions():
    values = torch.rand(40, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 0.1 + 0.4
    blocks = torch.arange(40) // 4
    accumulator = BrierAccumulator(4)
    accumulator.add(values, torch.full((40,), 7), blocks=blocks)
    result = summarize([(BRIER, accumulator.state())])
    means = values.unflatten(0, (10, 4)).mean(1)
    assert result["brier_1_error"] == pytest.approx((means[:, 0].std() / 10**0.5).item())
    assert result["brier_lm"] is not None
    assert result["documents"] == 1
    assert result["standard_errors"] == {"clusters": 10, "of": "blocks", "interval_factor": pytest.approx(2.2622, 1e-4)}
    two = summarize([(BRIER, accumulator.state()), part(values, [8] * 40)])
    assert two["standard_errors"]["of"] == "documents"
    assert (two["documents"], two["standard_errors"]["clusters"]) == (2, 2)
