import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from calm_core.autoencoder.model import (
    Autoencoder,
    FoldedEncoder,
    autoencoder_loss,
    kl_divergence,
    load_autoencoder,
    save_autoencoder,
)
from calm_core.config.model_config import AutoencoderConfig
from calm_core.errors import UserError
from calm_core.model.noise import SampleNoise
from calm_core.reference.names import AUTOENCODER, AUTOENCODER_TIED

GOLDEN = Path(__file__).parents[1] / "golden"
CPU = torch.device("cpu")


def small(k=4, vocab_size=50, seed=0, **options):
    torch.manual_seed(seed)
    return Autoencoder(AutoencoderConfig(**{"hidden": 32, "latent": 16} | options), vocab_size, k)


def random_chunks(rows, batch, k=4, vocab_size=50):
    return torch.randint(vocab_size, (rows, batch, k), generator=torch.Generator().manual_seed(3))


@pytest.fixture(scope="module")
def golden():
    return load_file(GOLDEN / "tiny.golden.safetensors")


@pytest.fixture(scope="module")
def reference():
    """The autoencoder with the golden weights."""
    config = json.loads((GOLDEN / "tiny.config.json").read_text())["autoencoder"]
    weights = load_file(GOLDEN / "tiny.weights.safetensors")
    named = {name.removeprefix("ae."): weight for name, weight in weights.items() if name.startswith("ae.")}
    assert torch.equal(named.pop(AUTOENCODER_TIED), named["encoder.embed_tokens.weight"])
    shape = AutoencoderConfig(hidden=config["hidden_size"], latent=config["latent_size"])
    assert shape.ffn_width == config["intermediate_size"]
    model = Autoencoder(shape, config["vocab_size"], config["patch_size"])
    model.load_state_dict({AUTOENCODER[name]: weight for name, weight in named.items()})
    return model.eval()


def assert_golden(name, value, expected):
    error = ((value - expected).abs().max() / expected.abs().max()).item()
    print(f"{name}: largest difference {error:.1e} of the largest value")
    assert error <= 1e-5


@torch.no_grad()
def test_golden_numbers(golden, reference):
    tokens = golden["ae/input_ids"].unflatten(1, (-1, 4))  # [2, 6, K]
    mean, log_std = reference.encode(tokens)
    assert_golden("mean", mean, golden["ae/mean"])
    assert_golden("log_std", log_std, golden["ae/log_std"])
    assert_golden("logits of the mean", reference.decode(mean).flatten(1, 2), golden["ae/logits_from_mean"])
    latents = (mean + log_std.exp() * golden["ae/eps"].view_as(mean)).flatten(0, 1)
    logits = reference.decode(latents).flatten(0, 1)
    assert_golden("logits of a posterior sample", logits, golden["ae/eval_logits"])
    assert_golden("cross-entropy", F.cross_entropy(logits, tokens.flatten()), golden["ae/eval_loss"][0])
    kl = kl_divergence(mean, log_std).clamp(min=0.5).sum(-1).mean()
    assert_golden("KL divergence", kl, golden["ae/kl_clamped_mean"][0])


class RecordedNoise:
    """The recorded posterior draws; asked for nothing else when both dropouts are 0."""

    def __init__(self, eps):
        self.eps = eps

    def normal(self, name, rows, *shape):
        return self.eps.view(rows, -1, *shape)


def test_golden_loss(golden, reference):
    model = Autoencoder(AutoencoderConfig(hidden=32, latent=8, token_dropout=0.0, latent_dropout=0.0), 96, 4)
    model.load_state_dict(reference.state_dict())
    tokens = golden["ae/input_ids"].view(12, 1, 4)
    losses = autoencoder_loss(model, tokens, RecordedNoise(golden["ae/eps"]))
    assert_golden("cross-entropy of the training loss", losses.cross_entropy, golden["ae/eval_loss"][0])
    assert_golden("KL of the training loss", losses.kl, golden["ae/kl_clamped_mean"][0])
    assert_golden("loss", losses.loss, 4 * golden["ae/eval_loss"][0] + 1e-3 * golden["ae/kl_clamped_mean"][0])


class SpyNoise:
    """Passes draws on and remembers them by name."""

    def __init__(self, noise):
        self.noise, self.seen = noise, {}

    def uniform(self, name, rows, *shape):
        self.seen[name] = self.noise.uniform(name, rows, *shape)
        return self.seen[name]

    def normal(self, name, rows, *shape):
        self.seen[name] = self.noise.normal(name, rows, *shape)
        return self.seen[name]


def test_the_loss_is_what_its_draws_say():
    model = small(token_dropout=0.4, latent_dropout=0.3, kl_weight=0.2, kl_floor=0.1)
    tokens = random_chunks(6, 3)
    noise = SpyNoise(SampleNoise(seed=1, samples=[5, 6, 9], device=CPU))
    losses = autoencoder_loss(model, tokens, noise)
    seen = torch.where(noise.seen["autoencoder/token_dropout"] < 0.4, 0, tokens)
    assert 0.2 < (seen == 0).float().mean() < 0.6
    mean, log_std = model.encode(seen)
    latents = mean + log_std.exp() * noise.seen["autoencoder/posterior"]
    latents = torch.where(noise.seen["autoencoder/latent_dropout"] < 0.3, 0, latents / 0.7)
    cross_entropy = F.cross_entropy(model.decode(latents).flatten(0, -2), tokens.flatten())
    kl = kl_divergence(mean, log_std).clamp(min=0.1).sum(-1).mean()
    torch.testing.assert_close(losses.loss, 4 * cross_entropy + 0.2 * kl)
    torch.testing.assert_close(losses.cross_entropy, cross_entropy.detach())
    torch.testing.assert_close(losses.kl, kl.detach())


@pytest.mark.parametrize("sampled", [0, 30])
def test_draws_follow_the_sample_and_not_the_micro_batch(sampled):
    model, tokens = small(sampled_output=sampled), random_chunks(6, 4)
    whole = autoencoder_loss(model, tokens, SampleNoise(1, [0, 1, 2, 3], CPU)).loss
    halves = [
        autoencoder_loss(model, tokens[:, part : part + 2], SampleNoise(1, [part, part + 1], CPU)).loss
        for part in (0, 2)
    ]
    torch.testing.assert_close(sum(halves) / 2, whole)
    assert not torch.allclose(autoencoder_loss(model, tokens, SampleNoise(2, [0, 1, 2, 3], CPU)).loss, whole)


def test_the_sampled_output_layer_estimates_the_loss_of_the_whole_one():
    tokens = random_chunks(6, 200)
    noise = SampleNoise(1, range(200), CPU)
    whole, sampled, all_tokens = (
        autoencoder_loss(small(init_std=0.3, sampled_output=outputs), tokens, noise) for outputs in (0, 30, 50)
    )
    torch.testing.assert_close(sampled.cross_entropy, whole.cross_entropy, rtol=0.02, atol=0)
    assert sampled.cross_entropy < whole.cross_entropy  # the logarithm of an unbiased estimate is biased downwards
    assert all_tokens == whole


def test_an_output_layer_too_small_for_a_sample_is_refused():
    config = AutoencoderConfig(sampled_output=100)
    assert [config.outputs(vocabulary, 99) for vocabulary in (50, 100, 101)] == [50, 100, 100]
    with pytest.raises(UserError, match=r"sampled_output=100 is not above the 100 tokens of a sample .*raise it"):
        config.outputs(1000, 100)
    with pytest.raises(UserError, match=r"autoencoder\.sampled_output=-1 must be at least 0"):
        AutoencoderConfig(sampled_output=-1)


def test_kl_divergence_is_that_of_torch():
    mean, log_std = torch.randn(2, 20, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    posterior, prior = torch.distributions.Normal(mean, log_std.exp()), torch.distributions.Normal(0.0, 1.0)
    torch.testing.assert_close(kl_divergence(mean, log_std), torch.distributions.kl_divergence(posterior, prior))


@pytest.mark.parametrize("k", [1, 2, 4, 8])
def test_it_learns_its_chunks(k):
    model = small(k, token_dropout=0.0)
    tokens = random_chunks(8, 2, k)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0)
    for step in range(max(600 // k, 150)):  # with fewer tokens a chunk it learns more slowly
        loss = autoencoder_loss(model, tokens, SampleNoise(0, [2 * step, 2 * step + 1], CPU)).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    rebuilt = model.decode_tokens(model.encode(tokens)[0])
    assert (rebuilt == tokens).float().mean() > 0.9


def test_a_mirrored_autoencoder_rebuilds_many_tokens_before_it_is_trained():
    tokens = random_chunks(8, 16, vocab_size=500)
    rebuilt = {}
    for init in ("normal", "mirror"):
        model = small(vocab_size=500, hidden=256, latent=128, init_std=0, init=init)
        mean, log_std = model.encode(tokens)
        rebuilt[init] = (model.decode_tokens(mean) == tokens).float().mean()
    assert rebuilt["normal"] < 0.02
    assert rebuilt["mirror"] > 0.8
    torch.testing.assert_close(log_std.exp(), torch.full_like(mean, 0.3))


def test_a_chunk_is_encoded_by_itself_and_in_order():
    model, tokens = small(), random_chunks(2, 3)
    mean, _ = model.encode(tokens)
    torch.testing.assert_close(model.encode(tokens[1, 2])[0], mean[1, 2])
    assert not torch.allclose(model.encode(tokens.flip(-1))[0], mean)


@pytest.mark.parametrize("sampled", [0, 30])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_the_loss_is_at_least_float32(dtype, sampled):
    model = small(sampled_output=sampled).to(dtype)
    losses = autoencoder_loss(model, random_chunks(4, 2), SampleNoise(0, [0, 1], CPU))
    losses.loss.backward()
    assert losses.loss.dtype == torch.promote_types(dtype, torch.float32)
    assert all(parameter.grad.dtype == dtype and parameter.grad.isfinite().all() for parameter in model.parameters())


def test_a_share_above_one_is_refused():
    with pytest.raises(UserError, match=r"autoencoder\.token_dropout=1\.5"):
        AutoencoderConfig(token_dropout=1.5)


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


@pytest.fixture
def model():
    torch.manual_seed(0)
    return Autoencoder(AutoencoderConfig(hidden=16, latent=4), vocab_size=20, k=3)


def test_what_is_saved_is_read_back_frozen(tmp_path, model):
    content_hash = save_autoencoder(model, tmp_path / "frozen", "tokens-hash", {"step": 7})
    frozen = load_autoencoder(tmp_path / "frozen")
    assert (frozen.content_hash, frozen.tokenizer_hash) == (content_hash, "tokens-hash")
    assert (frozen.k, frozen.vocab_size, frozen.config) == (3, 20, model.config)
    assert not frozen.training
    assert not any(parameter.requires_grad for parameter in frozen.parameters())
    tokens = torch.randint(20, (5, 3))
    assert torch.equal(frozen.encode(tokens)[0], model.encode(tokens)[0])
    assert json.loads((tmp_path / "frozen" / "manifest.json").read_text())["provenance"] == {"step": 7}


def test_the_hash_is_that_of_the_weights(tmp_path, model):
    first = save_autoencoder(model, tmp_path / "first", "a", {})
    assert save_autoencoder(model, tmp_path / "again", "b", {"x": 1}) == first
    with torch.no_grad():
        model.embedding.weight[0, 0] += 1
    assert save_autoencoder(model, tmp_path / "other", "a", {}) != first


def test_changed_weights_are_refused_by_name(tmp_path, model):
    save_autoencoder(model, tmp_path, "a", {})
    path = tmp_path / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"model\.safetensors.*hash"):
        load_autoencoder(tmp_path)


def test_missing_parts_are_named(tmp_path, model):
    with pytest.raises(UserError, match=r"manifest\.json"):
        load_autoencoder(tmp_path)
    save_autoencoder(model, tmp_path, "a", {})
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"model\.safetensors is missing"):
        load_autoencoder(tmp_path)
