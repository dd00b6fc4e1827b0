"""Training of CALM: chunk windows in, head loss out."""

from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from calm_core.autoencoder.model import Autoencoder
from calm_core.config import changes, decides
from calm_core.config.experiment import EvaluationConfig, SamplesConfig
from calm_core.config.model_config import ModelShape, TokenLossConfig
from calm_core.config.training_config import ParallelConfig
from calm_core.data.chunks import text_tokens
from calm_core.data.dataset import Blend, ChunkBatch, TrainingSamples, Windows, needed_columns, read_batch
from calm_core.data.store import Store
from calm_core.distributed.engine import Engine
from calm_core.distributed.topology import Topology
from calm_core.errors import UserError
from calm_core.evaluation.evaluate import evaluate
from calm_core.evaluation.held_out import HeldOut, scored_offsets
from calm_core.inference.generate import continue_prompts
from calm_core.inference.load_model import DocumentFormat, Loaded
from calm_core.megatron import MegatronModule
from calm_core.model.backbone import transformer_config
from calm_core.model.calm import CalmModel
from calm_core.model.heads import HeadLoss, Target
from calm_core.model.layers import own_positions
from calm_core.model.noise import SampleNoise
from calm_core.model.parameters import gather, initialize
from calm_core.model.single_rank import SingleRank
from calm_core.plan import flops
from calm_core.plan.layout import check_layout, describe, pipeline_split, stage_fractions
from calm_core.tokenizer import Tokenizer


class CalmTask:
    """The CALM network on the windows of chunk stores (see `training.task.Task`).

    A head that reads tokens is trained on the windows of token stores, as chunks of one token, without an autoencoder.
    """

    name = "calm"
    section = "training"
    shape_type = ModelShape

    def __init__(
        self,
        shape: ModelShape,
        layout: ParallelConfig,
        positions: int,
        seed: int,
        train: Blend,
        held_out: Store,
        autoencoder: Autoencoder | None,
        token_counts: np.ndarray,
        evaluation: EvaluationConfig,
        samples: SamplesConfig,
        documents: DocumentFormat,
        tokenizer: Tokenizer | None = None,
    ) -> None:
        check_layout(shape, positions, layout)
        scored_offsets(positions, shape.k)  # refuses windows that are too short to be scored
        self.shape, self.layout, self.seed = shape, layout, seed
        self.split = pipeline_split(shape, positions, layout)
        self.samples = TrainingSamples(train, positions, seed)
        self.tokens_per_sample = positions * shape.k
        self.summary = f"K={shape.k}, {shape.head.kind} head, {shape.backbone.layers} layers of {shape.backbone.hidden}"
        self.stages = [
            {"stage": stage, "layers": sum(self.split[stage :: layout.pipeline]), "share of FLOPs": share}
            for stage, share in enumerate(stage_fractions(shape, positions, layout, self.split))
        ]
        self.flops_per_sample = flops.executed_training(shape, positions)
        self.identity = {
            "model": asdict(shape),
            "data": train.identity,
            "positions": positions,
            "seed": seed,
        }
        self._held_out = HeldOut(
            Windows(held_out, positions),
            autoencoder,
            token_counts,
            seed,
            evaluation,
        )
        self._prompts, self._tokenizer, self._documents = samples, tokenizer, documents
        self._learns_tokens = True
        self._device = torch.device("cpu")
        self._columns = train.first.read_columns

    def check(self, layout: ParallelConfig, world: int) -> None:
        """Refuse too few held-out windows for these ranks; `CalmTask` itself has refused a layout that does not fit."""
        self._held_out.count(layout, world)

    def build(self, topology: Topology, dtype: torch.dtype) -> list[MegatronModule]:
        """This rank's parts of the network; the initial weights depend on the seed alone."""
        self._device = topology.device
        store = self.samples.store
        needed = needed_columns(store, first=topology.first, last=topology.last)
        self._columns = [name for name in store.read_columns if name in needed]
        if self.layout.pipeline > 1:
            topology.say(describe(self.shape, self.samples.positions, self.layout, self.split))
        compiled = self.layout.compiles(self._device.type)
        config = transformer_config(self.shape.backbone, self.layout, dtype, self.split, compiled)
        model_parts = [
            CalmModel(config, self.shape, first=first, last=last, vp_stage=index).to(self._device)
            for first, last, index in topology.model_parts
        ]
        initialize(model_parts, self.shape.backbone.init_std, self.seed)
        return model_parts

    def shared_with(self, model: dict[str, Any]) -> tuple[str, ...]:
        """The prefixes of the names of the weights that a network of this shape shares with this one.

        All of them, those of the backbone where only the rest differs, or all but the side loss's where only that one
        differs.
        """
        found = changes(ModelShape, model, self.identity["model"])
        changed = [change for change in found if decides(ModelShape, change[0], "weights")]
        network = [c for c in changed if not c[0].startswith("token_loss")]
        side = [c for c in changed if c not in network and decides(TokenLossConfig, c[0].rpartition(".")[2], "weights")]
        for key, theirs, ours in network:
            if key.startswith("backbone."):
                raise UserError(
                    f"training.init_from: {key} is {theirs} in that checkpoint and {ours} here; set it to {theirs}."
                )
        if network:
            return ("backbone.",)
        return ("compression.", "backbone.", "head.") if side else ("",)

    def load(self, samples: np.ndarray) -> ChunkBatch:
        """What this rank's pipeline stage needs of the windows of these samples."""
        return read_batch(self.samples, samples, samples, self._columns)

    def require(self, samples: int) -> None:
        """Refuse a run that consumes more samples than the stores have."""
        self.samples.require(samples)

    def documents(self, samples: np.ndarray) -> list[str]:
        """The names of the documents that these samples are from."""
        return self.samples.documents(samples)

    def begin(self, done: float) -> None:
        """The token loss is off after its share of the run."""
        side = self.shape.token_loss
        self._learns_tokens = side is not None and done < side.until

    def forward_step(self, micro_batches: Iterator[ChunkBatch], model: CalmModel) -> tuple[Any, Any]:
        """Forward of one micro-batch; the loss is the mean over its samples of the mean over the positions of each.

        A target that is all padding has weight 0. Every sample has the same weight, however much padding it has, so the
        loss of a step depends on its samples alone and not on how they are divided into ranks and micro-batches.
        """
        batch = next(micro_batches)
        noise = SampleNoise(self.seed, batch.samples, self._device)
        inputs = batch.inputs(self._device) if model.first else None
        target = self._target(batch) if model.last else None
        output = model(inputs, target, noise, self._learns_tokens)
        weights = own_positions(target.weights, model.config) if model.last else None
        return output, partial(_mean_loss, weights=weights)

    def _target(self, batch: ChunkBatch) -> Target:
        """What the batch predicts, encoded here where its store holds tokens alone."""
        target = batch.target(self._device)
        weights = position_weights(target.tokens, self.samples.store.padding)
        if target.mean is not None or not self.shape.latent:
            return replace(target, weights=weights)
        mean, log_std = self.samples.store.encode(target.tokens)
        return Target(target.tokens, mean.float(), log_std.float(), weights)

    def texts(self, engine: Engine) -> list[dict[str, Any]]:
        """The continuations of the configured prompts, if there is a tokenizer.

        Rank 0 makes them with a network of its own, which holds the whole model for as long as that takes.
        """
        if self._tokenizer is None:
            return []
        whole = self._whole_network(engine.dtype) if engine.topology.rank == 0 else None
        gather(engine.model_parts, whole)
        if whole is None:
            return []
        loaded = Loaded(whole, self._held_out.autoencoder, self._tokenizer, self.samples.positions, self._documents)
        records = continue_prompts(loaded, self._prompts, self.seed)
        return [{name: record[name] for name in ("temperature", "prompt", "text")} for record in records]

    def _whole_network(self, dtype: torch.dtype) -> CalmModel:
        """A network of this shape for inference, its weights not yet set, without what only training needs."""
        shape = replace(self.shape, token_loss=None)
        return CalmModel(SingleRank.of(shape.backbone, dtype), shape).to(self._device).eval().requires_grad_(False)

    def evaluate(self, engine: Engine, stop: Callable[[], bool] = lambda: False) -> dict[str, Any] | None:
        """Brier scores and loss on held-out documents."""
        return evaluate(engine.model_parts, engine.topology, self._held_out, stop)

    def is_finished(self) -> bool:
        """Nothing remains to be done after the last step."""
        return True

    def finish(self, engine: Engine) -> None:
        """Nothing remains to be done after the last step."""


def position_weights(tokens: Tensor, pad: int | None) -> Tensor:
    """The weight of each position in the mean loss of a micro-batch, `[S, B]`, from its targets `[S, B, K]`."""
    text = text_tokens(tokens, pad)[..., 0].float()
    return text / text.sum(0).clamp(min=1) / tokens.shape[1]


def _mean_loss(output: HeadLoss, weights: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """The weighted sum over these positions `[S', B]`; sequence-parallel ranks hold parts of one sum."""
    loss = (output.loss * weights).sum()
    terms = {name: (term * weights).sum() for name, term in output.terms.items()}
    minimised = loss if output.side is None else loss + (output.side * weights).sum()
    return minimised, {"loss": loss.detach().clone(), **terms}
