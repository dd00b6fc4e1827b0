"""Texts while training, where every rank holds a part of the model, are those of the model that the run has saved."""

from pathlib import Path

import pytest
import torch
from launching import ROOT, launch

from calm_core import config
from calm_core.config.experiment import Experiment
from calm_core.inference.generate import continue_prompts
from calm_core.inference.load_model import load_for_inference
from calm_core.training.run_log import read_metrics

PROMPTS = ["samples.while_training=true", "samples.prompts=[tone, '']", "samples.max_tokens=12"]
SIDE_LOSS = ["training.token_loss.weight=2", "training.token_loss.rank=8"]  # sampling needs no weights of it


@pytest.mark.slow
def test_the_texts_of_a_spread_model_are_those_of_its_checkpoint(tiny: Path) -> None:
    layout = ["parallel.tensor=2", "parallel.sequence=true", "parallel.pipeline=2"]
    changes = [f"run={tiny}", *PROMPTS, *SIDE_LOSS, "training.steps=2"]
    launch(4, ROOT / "pretrain" / "train_calm.py", tiny / "config.yaml", *changes, *layout)
    experiment = config.load(Experiment, tiny / "config.yaml", changes)
    loaded = load_for_inference(tiny, torch.device("cpu"))
    expected = continue_prompts(loaded, experiment.samples, experiment.seed)
    texts = read_metrics(tiny / "calm" / "metrics.jsonl", "sample")
    assert [text["step"] for text in texts] == [2] * 4
    for name in ("temperature", "prompt", "text"):
        assert [text[name] for text in texts] == [record[name] for record in expected]
    assert len({text["text"] for text in texts}) == 4
