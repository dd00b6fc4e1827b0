import json
import runpy
import shutil
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from live_bytes import LiveBytes, storages

from calm_core import config
from calm_core.autoencoder.model import Autoencoder, kl_divergence, load_autoencoder
from calm_core.config.experiment import Experiment
from calm_core.config.model_config import AutoencoderConfig
from calm_core.data.store import TokenStore
from calm_core.errors import UserError
from calm_core.evaluation.autoencoder_health import (
    autoencoder_metrics,
    examine_autoencoder,
    experiment_of_autoencoder,
    find_autoencoder,
    spread_chunks,
)

SCRIPT = Path(__file__).parents[2] / "pretrain" / "evaluate.py"


@pytest.fixture
def run(tiny: Path) -> Path:
    """The run folder of a (random) autoencoder, moved from where its configuration says it is."""
    config.save(config.load(Experiment, tiny / "config.yaml", ["run=elsewhere"]), tiny / "autoencoder" / "config.yaml")
    return tiny / "autoencoder"


def test_examination_agrees_with_itself(run):
    model, store = load_autoencoder(run / "frozen"), TokenStore(run.parent / "tokens", "held_out")
    found = examine_autoencoder(model, store, 500, seed=0)
    sigmas, accuracies = zip(*found["noise_curve"], strict=True)
    assert (sigmas[0], sigmas[-1]) == (0.0, 1.0)
    assert accuracies[0] == pytest.approx(found["token_accuracy"])
    assert sum(found["dimension_sigma"]) / 8 == pytest.approx(found["mean_sigma"])
    assert len(found["position_accuracy"]) == 4
    assert found["chunks"] == 500


def test_chunks_are_spread_over_the_split(run):
    model, store = load_autoencoder(run / "frozen"), TokenStore(run.parent / "tokens", "held_out")
    whole = spread_chunks(model, store, len(store))
    some = spread_chunks(model, store, 3)
    assert len(whole) == len(store) // 4
    assert some.tolist() == [whole[i].tolist() for i in (0, (len(whole) - 1) // 2, -1)]


def test_an_autoencoder_is_found_in_its_run_and_nowhere_else(run):
    assert find_autoencoder(run) == find_autoencoder(run / "frozen") == run / "frozen"
    assert find_autoencoder(run.parent) is None
    assert experiment_of_autoencoder(run / "frozen").paths.tokens == run.parent / "tokens"
    lonely = shutil.copytree(run / "frozen", run.parent.parent / "lonely" / "frozen")
    with pytest.raises(UserError, match="is not in the run"):
        experiment_of_autoencoder(lonely)


@pytest.mark.parametrize("source", ["held_out", "text", "tokens"])
def test_the_script_leaves_numbers_and_a_picture(run, source, capsys):
    text = run.parent / "corpus" / "0.txt"
    arguments = {"held_out": [], "text": ["--text", str(text)], "tokens": ["--tokens", str(run.parent / "tokens")]}
    output = run / "health.json"
    runpy.run_path(str(SCRIPT))["main"]([str(run), "--chunks", "200", "--output", str(output), *arguments[source]])
    result = json.loads(output.read_text())
    shown = capsys.readouterr().out
    assert f"{result['token_accuracy']:.3%}" in shown
    assert f"of {len(result['kl'])}" in shown
    assert output.with_suffix(".png").stat().st_size > 1000


class Code(Autoencoder):
    """Writes each token in a dimension of its own, which the decoder rounds; the last dimension is unused."""

    def __init__(self):
        super().__init__(AutoencoderConfig(hidden=2, latent=3), vocab_size=10, k=2)
        token = torch.arange(10.0)
        self.embedding.weight.data = torch.stack([2 * token, -token.square()], dim=-1)

    def encode(self, tokens):
        mean = torch.cat([tokens.float(), torch.zeros_like(tokens[..., :1]).float()], dim=-1)
        return mean, torch.tensor([-5.0, 0.0, -1.0]).expand(mean.shape)

    def decode_hidden(self, latents):
        """The logit of token v is x² - (x - v)² at the latent's x."""
        return torch.stack([latents[..., :2], torch.ones_like(latents[..., :2])], dim=-1)


def test_each_number_is_what_it_says():
    tokens = torch.randint(1, 9, (4000, 2), generator=torch.Generator().manual_seed(0))
    metrics = autoencoder_metrics(Code(), tokens, torch.Generator().manual_seed(1), sigma=0.5, batch=900)
    within = torch.distributions.Normal(0.0, 1.0).cdf(torch.tensor([0.5, 1.0])) * 2 - 1  # |normal| < 0.5, < 1
    assert metrics.token_accuracy == 1.0
    assert metrics.position_accuracy == [1.0, 1.0]
    assert (
        abs(metrics.token_accuracy_posterior - (1 + within[0]) / 2) < 0.02
    )  # sigma 1 on one position, tiny on the other
    assert abs(metrics.token_accuracy_noisy - within[1]) < 0.02
    assert abs(metrics.mean_sigma - torch.tensor([-5.0, 0.0, -1.0]).exp().mean()) < 1e-6
    assert metrics.dead_dimensions == 1
    expected = kl_divergence(torch.tensor(0.0), torch.tensor(-1.0))
    torch.testing.assert_close(torch.tensor(metrics.kl[2]), expected)


def test_the_cross_entropy_is_that_of_the_whole_vocabulary():
    torch.manual_seed(0)
    model = Autoencoder(AutoencoderConfig(hidden=8, latent=4, init_std=0.5, sampled_output=20), vocab_size=50, k=2)
    tokens = torch.randint(50, (30, 2), generator=torch.Generator().manual_seed(0))
    metrics = autoencoder_metrics(model, tokens, torch.Generator().manual_seed(1), batch=100)
    mean, log_std = model.encode(tokens)
    drawn = mean + log_std.exp() * torch.randn(2, 30, 4, generator=torch.Generator().manual_seed(1))[0]
    expected = F.cross_entropy(model.decode(drawn).flatten(0, 1), tokens.flatten()).item()
    assert metrics.cross_entropy == pytest.approx(expected, rel=1e-5)


def test_errors_are_counted_at_their_position():
    class Wrong(Code):
        def decode_hidden(self, latents):
            return super().decode_hidden(latents) * torch.tensor([1.0, -1.0]).unsqueeze(-1)

    tokens = torch.randint(2, 8, (100, 2), generator=torch.Generator().manual_seed(0))
    metrics = autoencoder_metrics(Wrong(), tokens, torch.Generator().manual_seed(1))
    assert metrics.position_accuracy == [1.0, 0.0]
    assert metrics.token_accuracy == 0.5


def test_tokens_are_those_of_all_logits_which_are_never_held_at_once():
    torch.manual_seed(0)
    model = Autoencoder(AutoencoderConfig(hidden=8, latent=4, init_std=0.5), vocab_size=40_000, k=2)
    latents, older = torch.randn(3, 200, 4), storages()
    with torch.no_grad():
        expected = model.decode(latents).argmax(-1)
        with LiveBytes(older) as live:
            found = model.decode_tokens(latents)
    assert torch.equal(found, expected)
    assert expected.unique().numel() > 100
    assert live.peak < 3 * 200 * 2 * 40_000 * 4 / 5  # a fifth of what float32 logits take
