"""Blends: the stores that a run trains on, and the share of its samples that each of them gives."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from calm_core.config import option
from calm_core.data.apportion import LEAST_SHARE
from calm_core.data.store import Store
from calm_core.errors import UserError


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
class Blend:
    """The training documents of one or several stores, all of one tokenizer, K and autoencoder.

    Held-out documents, the baselines and the shapes are those of the first store.
    """

    stores: Sequence[Store]
    shares: Sequence[StoreShare]

    @classmethod
    def of(cls, store: Store) -> "Blend":
        """A store by itself."""
        return cls([store], [StoreShare()])

    def __post_init__(self) -> None:
        for store in self.stores[1:]:
            for name, value in store.kinship.items():
                if value != self.first.kinship[name]:
                    raise UserError(
                        f"{store.folder} and {self.first.folder} differ in the {name} ({value} and "
                        f"{self.first.kinship[name]}): data.blend takes stores of one kind, make one of them again."
                    )

    @property
    def first(self) -> Store:
        """The store that says what the others must be like."""
        return self.stores[0]

    @property
    def identity(self) -> Any:
        """What a resumed run must share: the data of a single store; for several, theirs and the shares."""
        if len(self.stores) == 1 and self.shares[0].limit(1, 1) is None:
            return self.first.identity
        return [
            {"data": store.identity, "weight": share.weight, "budget": share.budget, "epochs": share.epochs}
            for store, share in zip(self.stores, self.shares, strict=True)
        ]
