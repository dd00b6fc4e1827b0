"""Training of the autoencoder: token windows in, reconstruction loss out. Data-parallel only."""

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from calm_core.autoencoder.model import Autoencoder, autoencoder_loss, save_autoencoder
from calm_core.checkpoint.load import full_weights
from calm_core.config import changes, decides
from calm_core.config.model_config import AutoencoderConfig
from calm_core.config.training_config import ParallelConfig
from calm_core.data.dataset import Blend, TrainingSamples, read_batch
from calm_core.data.store import TokenStore
from calm_core.distributed.collectives import on_first_rank
from calm_core.distributed.engine import Engine
from calm_core.distributed.topology import Topology
from calm_core.errors import UserError
from calm_core.evaluation.autoencoder_health import evaluate_autoencoder
from calm_core.io import MANIFEST
from calm_core.megatron import MegatronModule, ModelType, TransformerConfig
from calm_core.model.noise import SampleNoise, stream_seed
from calm_core.plan import flops
from calm_core.plan.flops import AutoencoderShape

EVALUATED_CHUNKS = 4096


@dataclass(frozen=True)
class TokenBatch:
    """A micro-batch of windows: global sample indices `[B]`, and tokens `[S, B, K]`."""

    samples: np.ndarray
    tokens: Tensor


class AutoencoderModule(MegatronModule):
    """The autoencoder as one stage of Megatron-core's schedule."""

    model_type = ModelType.encoder_or_decoder

    def __init__(self, config: AutoencoderConfig, vocab_size: int, k: int) -> None:
        super().__init__(TransformerConfig(num_layers=1, hidden_size=config.hidden, num_attention_heads=1))
        self.autoencoder = Autoencoder(config, vocab_size, k)

    def set_input_tensor(self, input_tensor: list[Tensor | None]) -> None:
        """Called by the schedule; there is no previous stage."""


class AutoencoderTask:
    """The autoencoder on the windows of token stores (see `training.task.Task`).

    After the last step it is frozen: written to the folder `artefact`, in float32, with the hashes of its tokenizer and
    training data.
    """

    name = "autoencoder"
    section = "autoencoder_training"
    shape_type = AutoencoderConfig
    stages: ClassVar[list[dict[str, Any]]] = []  # it has no pipeline

    def __init__(
        self,
        config: AutoencoderConfig,
        k: int,
        positions: int,
        seed: int,
        train: Blend,
        held_out: TokenStore,
        artefact: Path,
    ) -> None:
        self.config, self.k, self.positions, self.seed = config, k, positions, seed
        self.vocab_size = train.first.vocab_size
        self.samples = TrainingSamples(train, positions * k, seed)
        self.tokens_per_sample = positions * k
        shape = {**asdict(config), "vocab_size": self.vocab_size, "k": k}
        del shape["init"], shape["sampled_output"]  # a run may resume with others; older checkpoints do not have them
        sizes = AutoencoderShape(self.vocab_size, k, config.hidden, config.ffn_width, config.latent)
        outputs = config.outputs(self.vocab_size, self.tokens_per_sample)
        self.flops_per_sample = float(positions * flops.autoencoder_training(sizes, outputs))
        self.identity = {"model": shape, "data": train.identity, "positions": positions, "seed": seed}
        self.summary = f"K={k}, latent of {config.latent}, hidden {config.hidden}"
        self._cross_entropy = "cross_entropy" if outputs == self.vocab_size else "sampled_cross_entropy"
        self._held_out, self._artefact, self._train = held_out, artefact, train
        self._device = torch.device("cpu")

    def check(self, layout: ParallelConfig, world: int) -> None:
        """Every rank holds the whole model: nothing to refuse."""

    def build(self, topology: Topology, dtype: torch.dtype) -> list[MegatronModule]:
        """The whole model on every rank; the initial weights depend on the seed alone."""
        self._device = topology.device
        torch.manual_seed(stream_seed(self.seed, "initial/autoencoder", 0))
        return [AutoencoderModule(self.config, self.vocab_size, self.k).to(self._device, dtype)]

    def shared_with(self, model: dict[str, Any]) -> tuple[str, ...]:
        """All weights of an autoencoder of this shape."""
        for key, theirs, ours in changes(AutoencoderConfig, model, self.identity["model"]):
            if decides(AutoencoderConfig, key, "weights"):
                raise UserError(
                    f"training.init_from: {key} is {theirs} in that checkpoint and {ours} here; set it to {theirs}."
                )
        return ("",)

    def begin(self, done: float) -> None:
        """Nothing changes in the course of a run."""

    def load(self, samples: np.ndarray) -> TokenBatch:
        """The chunks of the windows of these samples."""
        tokens = read_batch(self.samples, samples, samples).tokens[:, :-1]
        chunks = tokens.reshape(len(samples), self.positions, self.k)
        return TokenBatch(samples, chunks.transpose(0, 1))

    def require(self, samples: int) -> None:
        """Refuse a run that consumes more samples than the stores have."""
        self.samples.require(samples)

    def documents(self, samples: np.ndarray) -> list[str]:
        """The names of the documents that these samples are from."""
        return self.samples.documents(samples)

    def forward_step(self, micro_batches: Iterator[TokenBatch], model: AutoencoderModule) -> tuple[Any, Any]:
        """Forward of one micro-batch; the loss is the mean over its chunks."""
        batch = next(micro_batches)
        noise = SampleNoise(self.seed, batch.samples, self._device)
        losses = autoencoder_loss(model.autoencoder, batch.tokens.to(self._device), noise)
        cross_entropy = {self._cross_entropy: losses.cross_entropy}
        metrics = {"loss": losses.loss.detach().clone(), **cross_entropy, "kl": losses.kl}
        return losses.loss, lambda loss: (loss, metrics)

    def texts(self, engine: Engine) -> list[dict[str, Any]]:
        """None: an autoencoder continues no prompts."""
        return []

    def evaluate(self, engine: Engine, stop: Callable[[], bool] = lambda: False) -> dict[str, Any]:
        """Reconstruction of held-out documents; computed on every rank, since it takes little time."""
        model = engine.model_parts[0].autoencoder
        return evaluate_autoencoder(model, self._held_out, EVALUATED_CHUNKS, self.seed)

    def is_finished(self) -> bool:
        """Whether the frozen autoencoder has been written."""
        return (self._artefact / MANIFEST).exists()

    def finish(self, engine: Engine) -> None:
        """Freeze the autoencoder: write its float32 master weights as an artefact."""
        model = Autoencoder(self.config, self.vocab_size, self.k)
        weights = {name.removeprefix("autoencoder."): w for name, w in full_weights(engine).items()}
        model.load_state_dict(weights)
        tokenizer, made_from = self._train.first.tokenizer_hash, {"tokens": self._train.identity}
        on_first_rank(lambda: save_autoencoder(model.eval(), self._artefact, tokenizer, made_from))
