"""The plan's activations of the autoencoder against the tensors that autograd saves; its products."""

import pytest
import torch
from torch import Tensor

from calm_core.autoencoder.model import Autoencoder, autoencoder_loss
from calm_core.config.model_config import AutoencoderConfig
from calm_core.config.training_config import ParallelConfig
from calm_core.model import output_layer
from calm_core.model.costs import FLOAT32, Load
from calm_core.model.noise import SampleNoise
from calm_core.plan import flops
from calm_core.plan.autoencoder_account import activations, autoencoder_shape, kernels

S, B, K, V = 32, 2, 4, 512


@pytest.mark.parametrize("sampled", [0, 256])
@pytest.mark.parametrize("hidden", [64, 128])
def test_the_activations_kept_are_the_tensors_that_autograd_saves(hidden: int, sampled: int) -> None:
    config = AutoencoderConfig(hidden=hidden, latent=16, sampled_output=sampled)
    model, tokens = Autoencoder(config, V, K), torch.randint(V, (S, B, K))
    known, saved = {parameter.untyped_storage()._cdata for parameter in (*model.parameters(), tokens)}, {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in known:
            saved[storage._cdata] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        autoencoder_loss(model, tokens, SampleNoise(0, range(B), torch.device("cpu")))
    measured = sum(storage.nbytes() for storage in saved.values()) + tokens.nbytes
    outputs = sampled or V
    load, inputs = Load(S, B, ParallelConfig(), 4, "cpu"), S * K if sampled else S * B * K
    block = output_layer.activations(load, inputs, hidden, outputs).forward
    another = FLOAT32 * (B * outputs + V if sampled else V) * hidden  # gradient, made by backward
    predicted = activations(autoencoder_shape(config, V, K), load, outputs)
    predicted -= block + another
    print(f"hidden {hidden}, sampled {sampled}: predicted {predicted}, measured {measured}")
    assert predicted == pytest.approx(measured, rel=0.015)


@pytest.mark.parametrize("outputs", [256, V])
def test_the_products_have_all_flops_of_the_autoencoder(outputs: int) -> None:
    shape = autoencoder_shape(AutoencoderConfig(hidden=64, latent=16), V, K)
    found = kernels(shape, Load(S, B, ParallelConfig()), outputs)
    products = (*found.products_forward, *found.products_backward)
    assert sum(each.flops for each in products) == S * B * flops.autoencoder_training(shape, outputs)
