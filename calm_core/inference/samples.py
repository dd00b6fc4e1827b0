"""The prompts of a configuration continued by a model, at each temperature."""

from dataclasses import asdict
from typing import Any

from calm_core.inference.config import SamplesConfig
from calm_core.inference.generate import generate
from calm_core.inference.load import Loaded
from calm_core.inference.options import GenerationOptions


def continue_prompts(loaded: Loaded, config: SamplesConfig, seed: int) -> list[dict[str, Any]]:
    """One record a temperature and prompt: both, the text, and what else a `Completion` tells.

    The same seed gives the same noise, so that the texts of two checkpoints differ by their weights alone.
    """
    records = []
    for temperature in config.temperatures:
        options = GenerationOptions(max_tokens=config.max_tokens, temperature=temperature, seed=seed)
        for completion in generate(loaded, config.prompts, options):
            records.append({"temperature": temperature, **asdict(completion)})
    return records
