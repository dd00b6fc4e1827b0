"""The text of tokens as they are generated; an unfinished character or beginning of a stop text is held back."""

from collections.abc import Sequence

from calm_core.tokenizer import Tokenizer

UNFINISHED = "\ufffd"  # what the bytes of a character decode to while the last one is missing


class TextStream:
    """The text of a growing list of tokens, which ends with the first token that completes a stop text.

    Attributes:
        tokens: all tokens so far, up to the one that completes a stop text.
        text: their text so far, up to the stop text.
        stopped: whether a stop text is complete.
    """

    def __init__(self, tokenizer: Tokenizer, before: Sequence[int], stop: Sequence[str]) -> None:
        """`before`: the last tokens before these; the first word's space may depend on them."""
        self._tokenizer, self._before, self._stop = tokenizer, list(before), stop
        self._skipped = len(tokenizer.decode(self._before))
        self._shown = 0
        self.tokens: list[int] = []
        self.text, self.stopped = "", False

    def add(self, tokens: Sequence[int]) -> None:
        """Append tokens; those after a stop text are dropped."""
        start = len(self.tokens)
        self.tokens += tokens
        self.text = self._decode(len(self.tokens))
        if self._stop_at(self.text) >= 0:
            self.stopped = True
            end = next(n for n in range(start, len(self.tokens) + 1) if self._stop_at(self._decode(n)) >= 0)
            self.tokens = self.tokens[:end]
            self.text = self._decode(end)
            self.text = self.text[: self._stop_at(self.text)]

    def take(self, last: bool = False) -> str:
        """The text that can no longer change and was not taken before; with `last`, all the rest."""
        certain = self.text if last or self.stopped else self._certain()
        new, self._shown = certain[self._shown :], max(self._shown, len(certain))
        return new

    def _decode(self, count: int) -> str:
        return self._tokenizer.decode(self._before + self.tokens[:count])[self._skipped :]

    def _stop_at(self, text: str) -> int:
        """Where the first stop text in `text` begins, -1 if there is none."""
        return min((at for at in map(text.find, self._stop) if at >= 0), default=-1)

    def _certain(self) -> str:
        """The text without unfinished characters at its end, and without an end that a stop text may begin with."""
        text = self.text.rstrip(UNFINISHED)
        held = max((n for stop in self._stop for n in range(1, len(stop)) if text.endswith(stop[:n])), default=0)
        return text[: len(text) - held]
