"""From `head.kind` to the head."""

from megatron.core.transformer.transformer_config import TransformerConfig

from calm_core.config.model_config import HeadConfig
from calm_core.model.heads.diffusion import DiffusionHead
from calm_core.model.heads.energy import EnergyHead
from calm_core.model.heads.flow import FlowHead
from calm_core.model.heads.protocol import GenerativeHead
from calm_core.model.heads.softmax import SoftmaxHead


def build_head(config: TransformerConfig, head: HeadConfig, latent: int, vocabulary: int) -> GenerativeHead:
    """The head that `head.kind` names, for latents of `latent` dimensions or a vocabulary of `vocabulary`."""
    if head.kind == "softmax":
        return SoftmaxHead(config, vocabulary)
    kinds = {"energy": EnergyHead, "diffusion": DiffusionHead, "flow": FlowHead}
    return kinds[head.kind](config, head, latent)
