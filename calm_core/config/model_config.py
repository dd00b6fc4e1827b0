"""The shapes of the models: autoencoder, backbone and generative head."""

from dataclasses import dataclass
from typing import Literal

from calm_core.config.schema import check, option
from calm_core.errors import UserError


@dataclass(frozen=True)
class AutoencoderConfig:
    """Shape and regularisation of the autoencoder (paper, section 2)."""

    hidden: int = option(512, "width of the autoencoder", belongs_to="weights", at_least=1)
    latent: int = option(128, "dimensions of a latent vector, l", belongs_to="weights", at_least=1)
    ffn: int = option(0, "width of the SwiGLU layers; 0 means 2.5 times hidden", belongs_to="weights", at_least=0)
    kl_weight: float = option(1e-3, "weight of the KL divergence in the loss", belongs_to="training", at_least=0)
    kl_floor: float = option(
        0.5, "nats per dimension below which the KL divergence is not reduced", belongs_to="training", at_least=0
    )
    token_dropout: float = option(
        0.15, "fraction of tokens hidden from the encoder in training", belongs_to="training", at_least=0, below=1
    )
    latent_dropout: float = option(
        0.15,
        "fraction of latent dimensions hidden from the decoder in training",
        belongs_to="training",
        at_least=0,
        below=1,
    )
    norm_eps: float = option(1e-6, "epsilon of every norm", belongs_to="weights", at_least=0)
    init_std: float = option(
        0.02,
        "standard deviation of the initial weights; 0 means 1 / sqrt(inputs) of each matrix, which learns faster",
        belongs_to="training",
        at_least=0,
    )
    init: Literal["normal", "mirror"] = option(
        "normal",
        "mirror: the decoder starts as the encoder's transpose, each block as the identity: many tokens are rebuilt at "
        "once; normal: as in the paper",
        belongs_to="training",
    )
    sampled_output: int = option(
        0,
        "tokens whose logits training computes for a sample: its own and random others; 0 means all V, as in the paper",
        belongs_to="training",
        at_least=0,
    )

    def __post_init__(self) -> None:
        check(self, "autoencoder")

    @property
    def ffn_width(self) -> int:
        """Width of the SwiGLU layers."""
        return self.ffn or self.hidden * 5 // 2

    def outputs(self, vocab_size: int, sample: int) -> int:
        """The tokens whose logits training computes, for samples of `sample` tokens: all V, or `sampled_output`.

        Raises:
            UserError: if the tokens of a sample may be as many as the outputs, which leaves none to sample.
        """
        if not 0 < self.sampled_output < vocab_size:
            return vocab_size
        if self.sampled_output <= sample:
            raise UserError(
                f"autoencoder.sampled_output={self.sampled_output} is not above the {sample} tokens of a sample "
                "(autoencoder_training.positions x data.k): raise it, or set it to 0 for the whole vocabulary."
            )
        return self.sampled_output


@dataclass(frozen=True)
class HeadKind:
    """A kind of generative head.

    Attributes:
        module: holds its network, its loss and its costs (see `calm_core.model.heads.HeadModule`).
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

    layers: int = option(16, "transformer layers", belongs_to="weights", at_least=1)
    hidden: int = option(1024, "width of the residual stream, d", belongs_to="weights", at_least=1)
    ffn: int = option(2752, "width of the SwiGLU feed-forward layer", belongs_to="weights", at_least=1)
    heads: int = option(16, "attention heads", belongs_to="weights", at_least=1)
    kv_groups: int = option(
        0, "key/value heads of grouped-query attention; 0 means as many as heads", belongs_to="weights"
    )
    norm_eps: float = option(
        1e-6,
        "epsilon of every norm in the backbone, the compression and the head",
        belongs_to="weights",
        at_least=0,
    )
    rope_base: float = option(10_000.0, "base of the rotary position embedding", belongs_to="weights", above=0)
    init_std: float = option(
        0.02,
        "standard deviation of the initial weights; 0 means 1 / sqrt(inputs) of each matrix, which learns faster in "
        "small models",
        belongs_to="training",
        at_least=0,
    )

    def __post_init__(self) -> None:
        check(self, "model")
        if self.hidden % self.heads:
            raise UserError(f"model.heads={self.heads} does not divide model.hidden={self.hidden}: choose a divisor.")
        if self.hidden // self.heads % 2:
            raise UserError(
                f"model.hidden={self.hidden} over model.heads={self.heads} leaves heads of an odd width, but rotary "
                "positions rotate pairs of features: change one of them."
            )
        if self.kv_groups < 0 or self.heads % self.key_value_heads:
            raise UserError(
                f"model.kv_groups={self.kv_groups} does not divide model.heads={self.heads}: choose a divisor, or 0."
            )

    @property
    def key_value_heads(self) -> int:
        """Number of key/value heads."""
        return self.kv_groups or self.heads


@dataclass(frozen=True)
class HeadConfig:
    """The generative head on the hidden states (paper, section 3.2) and its loss.

    `kind` alone changes the head; a field that only some heads read says so, and has no effect on the others.
    """

    kind: str = option(
        "energy", f"{' | '.join(HEADS)} (softmax is the autoregressive baseline, K=1)", belongs_to="weights"
    )
    blocks: int = option(
        0,
        "residual blocks (not softmax); 0 means a quarter of the backbone's layers, at least 1",
        belongs_to="weights",
        at_least=0,
    )
    noise: int = option(
        64, "energy: dimensions of the uniform noise that becomes a draw", belongs_to="weights", at_least=1
    )
    samples: int = option(
        8,
        "not softmax: N, draws per position over which the loss averages (energy: at least 2; diffusion and flow: "
        "each with its own time, noise and target)",
        belongs_to="training",
    )
    target_samples: int = option(
        100, "energy: M, draws from the posterior per position in the loss", belongs_to="training", at_least=1
    )
    target_group: int = option(
        16,
        "energy: neighbouring positions that use one set of target draws, 1 to 16",
        belongs_to="training",
        at_least=1,
        at_most=16,
    )
    beta: float = option(1.0, "energy: exponent of the score, 0 < beta < 2", belongs_to="training")

    def __post_init__(self) -> None:
        if self.kind not in HEADS:
            raise UserError(f"head.kind={self.kind!r} is unknown: choose one of {', '.join(HEADS)}.")
        check(self, "head")
        least = HEADS[self.kind].least_samples
        if self.samples < least:
            raise UserError(f"head.samples={self.samples} is too few: head.kind={self.kind} needs at least {least}.")
        if not 0.0 < self.beta < 2.0:
            raise UserError(f"head.beta={self.beta} is outside 0 < beta < 2, where the energy score is proper.")

    @property
    def reads_tokens(self) -> bool:
        """Whether the head predicts single tokens by likelihood: it needs neither latents nor an autoencoder."""
        return HEADS[self.kind].reads_tokens

    def block_count(self, layers: int) -> int:
        """Residual blocks of a head on a backbone of `layers` layers."""
        return self.blocks or max(1, layers // 4)


@dataclass(frozen=True)
class TokenLossConfig:
    """The token side loss: a training aid beyond the paper (see `calm_core.model.token_loss`). Off by default.

    It applies to heads that predict vectors; the softmax head learns tokens in any case.
    """

    weight: float = option(
        0.0,
        "weight of the tokens' cross-entropy beside the head's loss; 0 is off, as in the paper",
        belongs_to="training",
        at_least=0,
    )
    rank: int = option(
        64,
        "features per token from which the output layer, shared by the K tokens, predicts; 0: full rank",
        belongs_to="weights",
        at_least=0,
    )
    tokens: Literal["all", "first", "random"] = option(
        "all", "tokens of a chunk that a position learns to predict", belongs_to="weights"
    )
    every: int = option(
        1, "learn at one position out of this many; divides training.positions", belongs_to="training", at_least=1
    )
    until: float = option(
        1.0, "fraction of the steps after which the head's loss is alone", belongs_to="training", above=0, at_most=1
    )

    def __post_init__(self) -> None:
        check(self, "token_loss")
        if self.tokens == "random" and not self.rank:
            raise UserError("token_loss.tokens=random needs token_loss.rank above 0: set a rank, or learn all tokens.")


@dataclass(frozen=True)
class ModelShape:
    """All that fixes the parameters of a model.

    Attributes:
        backbone: the transformer.
        head: the generative head.
        vocabulary: V, tokens of the vocabulary.
        k: K, tokens per chunk.
        latent: l, dimensions of the autoencoder's latent; 0 for the softmax head.
        token_loss: the side loss of a model in training, if it has one.
    """

    backbone: BackboneConfig
    head: HeadConfig
    vocabulary: int
    k: int
    latent: int
    token_loss: TokenLossConfig | None = None


def padded_vocabulary(vocab_size: int) -> int:
    """Rows of the embedding table for a vocabulary of `vocab_size` tokens."""
    return -(-vocab_size // VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE
