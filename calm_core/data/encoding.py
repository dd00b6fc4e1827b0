"""From chunks to latents as they are stored: the posterior's mean and log standard deviation in float16."""

from collections.abc import Callable

import numpy as np
import torch

from calm_core.errors import UserError
from calm_core.folded_encoder import FoldedEncoder

ENCODED_AT_ONCE = 1 << 12  # chunks: few enough for their activations to stay in cache
FLOAT16_MAX = float(np.finfo(np.float16).max)


def encoded(
    encoder: FoldedEncoder, chunks: np.ndarray, advance: Callable[[int], object] = lambda count: None
) -> tuple[np.ndarray, np.ndarray]:
    """The posteriors of the chunks `[n, K]`: mean and log_std, `[n, l]` float16. `advance` hears of what is done.

    Raises:
        UserError: if a number is beyond the range of float16.
    """
    mean, log_std = (np.empty((len(chunks), encoder.latent), np.float16) for _ in range(2))
    for begin in range(0, len(chunks), ENCODED_AT_ONCE):
        piece = slice(begin, begin + ENCODED_AT_ONCE)
        tokens = torch.from_numpy(chunks[piece].astype(np.int64)).to(encoder.device)
        for name, values, out in zip(("mean", "log_std"), encoder.encode(tokens), (mean, log_std), strict=True):
            largest = values.abs().max().item()
            if not largest <= FLOAT16_MAX:  # not-a-number included
                raise UserError(
                    f"A latent's {name} is {largest:g}, beyond float16's {FLOAT16_MAX:g}: train the autoencoder again."
                )
            out[piece] = values.cpu().numpy()
        advance(len(tokens))
    return mean, log_std
