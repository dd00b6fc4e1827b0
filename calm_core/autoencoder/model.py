"""The autoencoder: K tokens to one latent vector and back (paper, section 2), each chunk by itself; its files."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from calm_core.config.model_config import AutoencoderConfig
from calm_core.errors import UserError
from calm_core.io import MANIFEST, format_version, hash_file, read_manifest, replacing, write_manifest
from calm_core.model.noise import Noise
from calm_core.model.output_layer import mean_cross_entropy, most_probable, sampled_cross_entropy

CHUNKS_AT_ONCE = 4096  # chunks decoded at a time, to bound the memory of their hidden states

# Of the initial embedding, with matrices of 1 / sqrt(inputs). The embedding is also the output layer: the encoder must
# be able to distinguish tokens by it, and the first logits must not be large.
EMBEDDING_STD = 0.2
INITIAL_SIGMA = 0.3  # of the posterior of a mirrored autoencoder: near that of a trained one
DROPPED_TOKEN = 0  # the id that replaces a dropped token; `pad` in tokenizers trained here

KIND = "autoencoder"

WEIGHTS = "model.safetensors"


class SwigluBlock(nn.Module):
    """`x + down(silu(gate(n)) * up(n))` with n = RMSNorm(x); no biases. `[..., hidden] -> [..., hidden]`."""

    def __init__(self, hidden: int, ffn: int, eps: float) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(hidden, eps=eps)
        self.gate = nn.Linear(hidden, ffn, bias=False)
        self.up = nn.Linear(hidden, ffn, bias=False)
        self.down = nn.Linear(ffn, hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Apply the block."""
        normed = self.norm(x)
        return x + self.down(F.silu(self.gate(normed)) * self.up(normed))


class Autoencoder(nn.Module):
    """Encoder and decoder of chunks of K tokens; the output layer is the embedding, tied (paper, section 2).

    Initial weights come from torch's global generator: seed it for a reproducible model.
    """

    def __init__(self, config: AutoencoderConfig, vocab_size: int, k: int) -> None:
        super().__init__()
        self.config, self.vocab_size, self.k = config, vocab_size, k
        self.content_hash, self.tokenizer_hash = "", ""  # set when read from a frozen artefact
        hidden, latent = config.hidden, config.latent
        shape = hidden, config.ffn_width, config.norm_eps
        self.embedding = nn.Embedding(vocab_size, hidden)
        self.encoder_token_block = SwigluBlock(*shape)
        self.encoder_join = nn.Linear(k * hidden, hidden)
        self.encoder_chunk_block = SwigluBlock(*shape)
        self.encoder_norm = nn.RMSNorm(hidden, eps=config.norm_eps)
        self.encoder_posterior = nn.Linear(hidden, 2 * latent)
        self.decoder_input = nn.Linear(latent, hidden)
        self.decoder_chunk_block = SwigluBlock(*shape)
        self.decoder_split = nn.Linear(hidden, k * hidden)
        self.decoder_token_block = SwigluBlock(*shape)
        self.decoder_norm = nn.RMSNorm(hidden, eps=config.norm_eps)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=config.init_std or module.in_features**-0.5)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, nn.Embedding):
                nn.init.normal_(module.weight, std=config.init_std or EMBEDDING_STD)
        if config.init == "mirror":
            self._mirror()

    @torch.no_grad()
    def _mirror(self) -> None:
        """Start the decoder as the transpose of the encoder, and every block as the identity.

        A latent is then a random projection of its tokens' embeddings. Its transpose gives the sum of each
        embedding, scaled down, and noise without a preferred direction: the nearest row of the table is often right.
        """
        for block in filter(lambda module: isinstance(module, SwigluBlock), self.modules()):
            nn.init.zeros_(block.down.weight)
        mean, log_std = self.encoder_posterior.weight.chunk(2)
        self.decoder_split.weight.copy_(self.encoder_join.weight.T)
        self.decoder_input.weight.copy_(mean.T)
        nn.init.zeros_(log_std)
        nn.init.constant_(self.encoder_posterior.bias.chunk(2)[1], math.log(INITIAL_SIGMA))

    def encode(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens `[..., K]` -> posterior mean and log standard deviation, `[..., l]` each."""
        hidden = self.encoder_token_block(self.embedding(tokens))
        hidden = self.encoder_chunk_block(self.encoder_join(hidden.flatten(-2)))
        mean, log_std = self.encoder_posterior(self.encoder_norm(hidden)).chunk(2, dim=-1)
        return mean, log_std

    def decode_hidden(self, latents: Tensor) -> Tensor:
        """Latents `[..., l]` -> the input of the output layer, `[..., K, hidden]`."""
        return self.decode_positions(self.decode_chunk(latents), slice(None))

    def decode_chunk(self, latents: Tensor) -> Tensor:
        """The decoder's first half, on the whole chunk: latents `[..., l]` -> `[..., hidden]`."""
        return self.decoder_chunk_block(self.decoder_input(latents.to(self.dtype)))

    def decode_positions(self, hidden: Tensor, positions: slice) -> Tensor:
        """The decoder's second half for some of the K tokens: `[..., hidden]` -> `[..., positions, hidden]`."""
        weight, bias = (
            part.unflatten(0, (self.k, -1))[positions].flatten(0, 1)
            for part in (self.decoder_split.weight, self.decoder_split.bias)
        )
        split = F.linear(hidden, weight, bias).unflatten(-1, (-1, hidden.shape[-1]))
        return self.decoder_norm(self.decoder_token_block(split))

    def decode(self, latents: Tensor) -> Tensor:
        """Latents `[..., l]` -> logits `[..., K, V]` in the parameters' dtype."""
        return F.linear(self.decode_hidden(latents), self.embedding.weight)

    def decode_tokens(self, latents: Tensor) -> Tensor:
        """Latents `[..., l]` -> the most probable tokens, `[..., K]` int64, without holding all logits at once."""
        tokens = []
        for part in latents.flatten(0, -2).split(CHUNKS_AT_ONCE):
            tokens.append(most_probable(self.decode_hidden(part).flatten(0, -2), self.embedding.weight))
        return torch.cat(tokens).view(*latents.shape[:-1], self.k)

    @property
    def dtype(self) -> torch.dtype:
        """The parameters' dtype, in which matrix products run."""
        return self.embedding.weight.dtype


class AutoencoderLosses(NamedTuple):
    """The loss of a micro-batch and its detached terms, float32: `loss = K * cross_entropy + kl_weight * kl`."""

    loss: Tensor
    cross_entropy: Tensor  # nats per token; an estimate where the output layer is sampled
    kl: Tensor  # nats per chunk, each dimension raised to the floor


def autoencoder_loss(model: Autoencoder, tokens: Tensor, noise: Noise) -> AutoencoderLosses:
    """Training loss of chunks `tokens [rows, B, K]`: reconstruction from a posterior draw with dropout (section 2).

    `noise` draws which tokens the encoder reads as id 0, the posterior draw, and which of its dimensions the decoder
    reads as 0; the others are scaled so that their expectation stays. Where the output layer is sampled, it also draws
    the tokens that each sample's softmax runs over besides the sample's own.

    Raises:
        UserError: if a sample has too many tokens for `config.sampled_output`.
    """
    config, rows = model.config, len(tokens)
    seen = tokens
    if config.token_dropout > 0:
        dropped = noise.uniform("autoencoder/token_dropout", rows, model.k) < config.token_dropout
        seen = tokens.masked_fill(dropped, DROPPED_TOKEN)
    mean, log_std = (_at_least_float32(part) for part in model.encode(seen))
    latents = mean + log_std.exp() * noise.normal("autoencoder/posterior", rows, config.latent)
    if config.latent_dropout > 0:
        kept = noise.uniform("autoencoder/latent_dropout", rows, config.latent) >= config.latent_dropout
        latents = latents * kept / (1 - config.latent_dropout)
    hidden, table = model.decode_hidden(latents), model.embedding.weight  # [rows, B, K, hidden], [V, hidden]
    outputs = config.outputs(model.vocab_size, rows * model.k)
    if outputs == model.vocab_size:
        cross_entropy = mean_cross_entropy(hidden.flatten(0, -2), table, tokens.flatten())
    else:
        (keys,) = noise.uniform("autoencoder/output", 1, model.vocab_size)
        by_sample, goals = hidden.transpose(0, 1).flatten(1, 2), tokens.transpose(0, 1).flatten(1)
        cross_entropy = sampled_cross_entropy(by_sample, table, goals, keys, outputs)
    kl = kl_divergence(mean, log_std).clamp(min=config.kl_floor).sum(-1).mean()
    loss = model.k * cross_entropy + config.kl_weight * kl
    return AutoencoderLosses(loss, cross_entropy.detach(), kl.detach())


def kl_divergence(mean: Tensor, log_std: Tensor) -> Tensor:
    """KL divergence of N(mean, exp(log_std)^2) from N(0, 1) in nats, per dimension, elementwise."""
    return 0.5 * (mean.square() + (2 * log_std).exp() - 1) - log_std


def _at_least_float32(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


class FoldedEncoder:
    """`encode` of an autoencoder whose weights do not change, for a fraction of the FLOPs.

    Up to and including the join of a chunk's tokens, what the encoder adds for a token depends only on the token and
    its index in the chunk. So this stage is a table of K x V vectors, and a chunk's hidden state is the sum of K rows.
    The table has K x V x hidden numbers of the autoencoder's dtype and is computed once.
    """

    def __init__(self, autoencoder: Autoencoder) -> None:
        self._autoencoder = autoencoder
        self.latent = autoencoder.config.latent
        self.device = autoencoder.embedding.weight.device
        self._offsets = torch.arange(autoencoder.k, device=self.device) * autoencoder.vocab_size
        with torch.no_grad():
            states = autoencoder.encoder_token_block(autoencoder.embedding.weight)
            join = autoencoder.encoder_join.weight.chunk(autoencoder.k, dim=1)
            self._table = torch.cat([states @ weight.T for weight in join])  # [K·V, hidden]

    @torch.no_grad()
    def encode(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens `[n, K]` -> posterior mean and log standard deviation, `[n, l]` each."""
        model = self._autoencoder
        joined = F.embedding_bag(tokens + self._offsets, self._table, mode="sum") + model.encoder_join.bias
        hidden = model.encoder_norm(model.encoder_chunk_block(joined))
        mean, log_std = model.encoder_posterior(hidden).chunk(2, dim=-1)
        return mean, log_std


def save_autoencoder(model: Autoencoder, folder: Path, tokenizer_hash: str, provenance: dict[str, Any]) -> str:
    """Write the model in float32 and return the content hash of its weights.

    `provenance`, what the model was trained on and how, goes into the manifest as it is. The manifest is written last:
    a folder without one is not an autoencoder.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / MANIFEST).unlink(missing_ok=True)
    weights = {name: weight.detach().float().cpu().contiguous() for name, weight in model.state_dict().items()}
    with replacing(folder / WEIGHTS) as temporary:
        save_file(weights, temporary)
    content_hash = hash_file(folder / WEIGHTS)
    manifest = {
        "format_version": format_version(KIND),
        "kind": KIND,
        "k": model.k,
        "vocab_size": model.vocab_size,
        "config": dataclasses.asdict(model.config),
        "tokenizer_hash": tokenizer_hash,
        "content_hash": content_hash,
        "provenance": provenance,
    }
    write_manifest(folder, manifest)
    return content_hash


def load_autoencoder(folder: Path, device: str = "cpu", dtype: torch.dtype = torch.float32) -> Autoencoder:
    """The frozen autoencoder in `folder`, for inference, with its `content_hash` and `tokenizer_hash` set.

    Raises:
        UserError: if the folder has no finished autoencoder, or other weights than the manifest names.
    """
    manifest = read_manifest(folder, KIND)
    path = folder / WEIGHTS
    if not path.is_file():
        raise UserError(f"{path} is missing: train the autoencoder again, or restore the file.")
    if hash_file(path) != manifest["content_hash"]:
        raise UserError(f"{path} is not the file that {folder / MANIFEST} names (content hash differs): restore it.")
    with torch.device("meta"), _SkippedInitialisation():
        model = Autoencoder(AutoencoderConfig(**manifest["config"]), manifest["vocab_size"], manifest["k"])
    model.load_state_dict(load_file(path), assign=True)
    model.content_hash, model.tokenizer_hash = manifest["content_hash"], manifest["tokenizer_hash"]
    return model.to(device, dtype).requires_grad_(False).eval()


class _SkippedInitialisation(TorchFunctionMode):
    """Skip the initialization of weights that are about to be loaded: on "meta", torch imports its compiler for it."""

    def __torch_function__(self, function: Callable, _: Any, args: Sequence = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if getattr(function, "__module__", "") == "torch.nn.init":
            return kwargs["tensor"] if "tensor" in kwargs else args[0]
        return function(*args, **kwargs)
