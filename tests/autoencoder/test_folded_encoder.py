import pytest
import torch

from calm_core.autoencoder.folded_encoder import FoldedEncoder
from calm_core.autoencoder.model import Autoencoder
from calm_core.config.model_config import AutoencoderConfig


@pytest.mark.parametrize("k", [1, 4])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_folded_encoder_equals_the_direct_one(k, dtype, tolerance):
    torch.manual_seed(0)
    model = Autoencoder(AutoencoderConfig(hidden=32, latent=8), vocab_size=50, k=k).to(dtype)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)  # so that every weight and bias counts
    tokens = torch.randint(50, (200, k))
    for folded, direct in zip(FoldedEncoder(model).encode(tokens), model.encode(tokens), strict=True):
        assert folded.shape == (200, 8)
        torch.testing.assert_close(folded, direct, rtol=tolerance, atol=tolerance)


def test_same_token_counts_differently_in_each_place():
    torch.manual_seed(0)
    model = Autoencoder(AutoencoderConfig(hidden=32, latent=8), vocab_size=50, k=2)
    there, back = FoldedEncoder(model).encode(torch.tensor([[1, 2], [2, 1]]))[0]
    assert not torch.equal(there, back)
