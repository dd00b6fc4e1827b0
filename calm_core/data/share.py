"""One machine's share of work that several do, without one that coordinates: `--shard i/n`."""

import argparse
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from calm_core.data.builder import StoreBuilder
from calm_core.errors import UserError

T = TypeVar("T")


@dataclass(frozen=True)
class Share:
    """Share `index` of `count`, counted from 0: every `count`-th part of the work from number `index` on."""

    index: int = 0
    count: int = 1

    def of(self, parts: Sequence[T]) -> Sequence[T]:
        """The parts that are this share's."""
        return parts[self.index :: self.count]

    @classmethod
    def parse(cls, text: str) -> "Share":
        """The share that `i/n` writes, for argparse."""
        match = re.fullmatch(r"(\d+)/(\d+)", text)
        if not match or int(match[1]) >= int(match[2]):
            raise argparse.ArgumentTypeError(f"{text!r} is no share: write i/n with i from 0 to n - 1, such as 0/8")
        return cls(int(match[1]), int(match[2]))


WHOLE = Share()


def carry_out(
    builder: StoreBuilder, run: Callable[[Share], None], complete: Callable[[], Any], shard: Share | None, finish: bool
) -> bool:
    """Do what `--shard` and `--finish` ask for: `run` a share, or `complete` the store, or without them both.

    Returns whether the store is complete.

    Raises:
        UserError: if both are given.
    """
    if shard and finish:
        raise UserError("--shard and --finish are two steps: run every share first, then --finish alone.")
    if builder.is_complete:
        return True
    if not finish:
        run(shard or WHOLE)
    if shard:
        print(f"finished share {shard.index} of {shard.count}: {builder.folder}")
        return False
    complete()
    return True


# The options of the scripts that can share their work, as `command.run` takes them.
OPTIONS: dict[str, dict[str, Any]] = {
    "--shard": {
        "type": Share.parse,
        "metavar": "i/n",
        "help": "do share i (from 0) of n alone, as one task of an array: $SLURM_ARRAY_TASK_ID/$SLURM_ARRAY_TASK_COUNT",
    },
    "--finish": {"action": "store_true", "help": "check that all shares are done, and complete the store"},
}
