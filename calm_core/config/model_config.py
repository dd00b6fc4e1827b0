"""The shapes of the models: autoencoder, backbone and generative head."""

from dataclasses import dataclass

from calm_core.config.schema import option
from calm_core.errors import UserError


@dataclass(frozen=True)
class AutoencoderConfig:
    """Shape and regularisation of the autoencoder (paper, section 2)."""

    hidden: int = option(512, "width of the autoencoder")
    latent: int = option(128, "dimensions of a latent vector, l")
    ffn: int = option(0, "width of the SwiGLU layers; 0 means 2.5 times hidden")
    kl_weight: float = option(1e-3, "weight of the KL divergence in the loss")
    kl_floor: float = option(0.5, "nats per dimension below which the KL divergence is not reduced")
    token_dropout: float = option(0.15, "share of tokens hidden from the encoder in training")
    latent_dropout: float = option(0.15, "share of latent dimensions hidden from the decoder in training")
    norm_eps: float = option(1e-6, "epsilon of every norm")
    init_std: float = option(0.02, "standard deviation of the initial weights")

    def __post_init__(self) -> None:
        for name in ("token_dropout", "latent_dropout"):
            if not 0.0 <= getattr(self, name) < 1.0:
                raise UserError(f"autoencoder.{name}={getattr(self, name)} is no share of a whole: choose from 0 to 1.")
        for name in ("hidden", "latent"):
            if getattr(self, name) < 1:
                raise UserError(f"autoencoder.{name}={getattr(self, name)} is too small: choose at least 1.")

    @property
    def ffn_width(self) -> int:
        """Width of the SwiGLU layers."""
        return self.ffn or self.hidden * 5 // 2


@dataclass(frozen=True)
class HeadKind:
    """A kind of generative head.

    Attributes:
        module: holds its network, its loss and its costs (see `calm_core.model.heads.protocol.HeadModule`).
        reads_tokens: whether it predicts single tokens by likelihood: it needs neither latents nor an autoencoder.
        least_samples: draws per position that its loss needs.
    """

    module: str
    reads_tokens: bool = False
    least_samples: int = 1


# The registry of heads, by `head.kind`: a new head is its module and a line here.
HEADS = {
    "energy": HeadKind("calm_core.model.heads.energy", least_samples=2),
    "diffusion": HeadKind("calm_core.model.heads.diffusion"),
    "flow": HeadKind("calm_core.model.heads.flow"),
    "softmax": HeadKind("calm_core.model.heads.softmax", reads_tokens=True),
}

# Vocabularies are padded to a multiple that every sensible tensor-parallel size divides, so that a checkpoint has
# one shape at any layout. Padding rows are never looked up and never sampled.
VOCABULARY_MULTIPLE = 128


@dataclass(frozen=True)
class BackboneConfig:
    """The causal transformer over chunk positions (paper, section 3): RMSNorm, SwiGLU, RoPE, no biases."""

    layers: int = option(16, "transformer layers")
    hidden: int = option(1024, "width of the residual stream, d")
    ffn: int = option(2752, "width of the SwiGLU feed-forward layer")
    heads: int = option(16, "attention heads")
    kv_groups: int = option(0, "key/value heads of grouped-query attention; 0 means as many as heads")
    norm_eps: float = option(1e-6, "epsilon of every norm in the backbone, the compression and the head")
    rope_base: float = option(10_000.0, "base of the rotary position embedding")
    init_std: float = option(0.02, "standard deviation of the initial weights")

    def __post_init__(self) -> None:
        for name in ("layers", "hidden", "ffn", "heads"):
            if getattr(self, name) < 1:
                raise UserError(f"model.{name}={getattr(self, name)} must be at least 1.")
        if self.hidden % self.heads:
            raise UserError(f"model.heads={self.heads} does not divide model.hidden={self.hidden}: choose a divisor.")
        if self.hidden // self.heads % 2:
            raise UserError(
                f"model.hidden={self.hidden} over model.heads={self.heads} leaves heads of an odd width, which rotary "
                "positions cannot turn in pairs: change one of them."
            )
        if self.kv_groups < 0 or self.heads % self.key_value_heads:
            raise UserError(f"model.kv_groups={self.kv_groups} does not divide model.heads={self.heads}.")

    @property
    def key_value_heads(self) -> int:
        """Number of key/value heads."""
        return self.kv_groups or self.heads


@dataclass(frozen=True)
class HeadConfig:
    """The generative head on the hidden states (paper, section 3.2) and its loss.

    Changing `kind` alone changes the head; a setting that only some heads read says so.
    """

    kind: str = option("energy", "energy | diffusion | flow | softmax (the autoregressive baseline, K=1)")
    blocks: int = option(0, "residual blocks (not softmax); 0 means a quarter of the backbone's layers, at least 1")
    noise: int = option(64, "energy: dimensions of the uniform noise that becomes a sample")
    samples: int = option(
        8, "not softmax: N, draws per position over which the loss averages (energy: head samples, at least 2)"
    )
    target_samples: int = option(100, "energy: M, posterior samples per position in the loss")
    target_group: int = option(16, "energy: neighbouring positions that share one set of target draws, 1 to 16")
    beta: float = option(1.0, "energy: exponent of the score, 0 < beta < 2")

    def __post_init__(self) -> None:
        if self.kind not in HEADS:
            raise UserError(f"head.kind={self.kind!r} is unknown: choose one of {', '.join(HEADS)}.")
        for name, least in (("blocks", 0), ("noise", 1), ("target_samples", 1)):
            if getattr(self, name) < least:
                raise UserError(f"head.{name}={getattr(self, name)} must be at least {least}.")
        least = HEADS[self.kind].least_samples
        if self.samples < least:
            raise UserError(f"head.samples={self.samples} is too few: head.kind={self.kind} needs at least {least}.")
        if not 0.0 < self.beta < 2.0:
            raise UserError(f"head.beta={self.beta} is outside 0 < beta < 2, where the energy score is proper.")
        if not 1 <= self.target_group <= 16:
            raise UserError(f"head.target_group={self.target_group} is outside 1 to 16.")

    @property
    def reads_tokens(self) -> bool:
        """Whether the head predicts single tokens by likelihood: it needs neither latents nor an autoencoder."""
        return HEADS[self.kind].reads_tokens

    def block_count(self, layers: int) -> int:
        """Residual blocks of a head on a backbone of `layers` layers."""
        return self.blocks or max(1, layers // 4)


@dataclass(frozen=True)
class ModelShape:
    """All that fixes the parameters of a model.

    Attributes:
        backbone: the transformer.
        head: the generative head.
        vocabulary: V, tokens of the vocabulary.
        k: K, tokens per chunk.
        latent: l, dimensions of the autoencoder's latent; 0 for the softmax head.
    """

    backbone: BackboneConfig
    head: HeadConfig
    vocabulary: int
    k: int
    latent: int


def padded_vocabulary(vocab_size: int) -> int:
    """Rows of the embedding table for a vocabulary of `vocab_size` tokens."""
    return -(-vocab_size // VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE
