"""The first 20 losses of the demo's configuration; `python tests/helpers/golden_losses.py` records them again.

The configuration is `configs/demo.yaml` in float32; its corpus, tokenizer and untrained autoencoder are made from
seeds, so that the numbers depend only on this project's code and its pinned packages. Record them again only
when a change is meant to change what is trained, and say so.
"""

import random
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
import yaml

from calm_core import config
from calm_core.autoencoder.model import Autoencoder, load_autoencoder, save_autoencoder
from calm_core.config.command import DEFAULT_CONFIG
from calm_core.config.experiment import Experiment
from calm_core.data.chunks import build_chunks
from calm_core.data.tokens import build_tokens
from calm_core.io import read_json, write_json
from calm_core.tokenizer import load_tokenizer
from calm_core.tokenizer.sentencepiece import train_tokenizer
from calm_core.training.launch import run_calm
from calm_core.training.run_log import read_metrics

RECORDED = Path(__file__).parents[1] / "golden" / "demo_losses.json"
NAMES = ("loss", "gradient_norm")
STEPS = 20


def experiment(folder: Path) -> Path:
    """The configuration file of an experiment in `folder` whose chunks are there."""
    draw = random.Random(0)
    words = ["".join(draw.choices("etaoinshrdlu", k=draw.randint(1, 7))) for _ in range(400)]
    documents = [" ".join(draw.choices(words, k=draw.randint(300, 900))) for _ in range(150)]
    (folder / "corpus").mkdir(parents=True)
    for number, document in enumerate(documents):
        (folder / "corpus" / f"{number}.txt").write_text(document)
    settings = yaml.safe_load(DEFAULT_CONFIG.read_text())
    settings["run"] = str(folder)
    settings["data"] |= {"corpus": [f"{folder}/corpus/*.txt"], "held_out": 0.2}
    settings["training"] |= {"steps": STEPS, "precision": "fp32", "log_every": 1, "eval_every": 0, "save_every": 0}
    settings["training"]["wandb"] = "disabled"
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(settings))
    made = config.load(Experiment, path, [])
    train_tokenizer(documents, made.tokenizer, made.paths.tokenizer, {})
    tokenizer = load_tokenizer(made.paths.tokenizer)
    build_tokens(made.data, tokenizer, made.paths.tokens)
    torch.manual_seed(0)
    autoencoder = Autoencoder(made.autoencoder, tokenizer.vocab_size, made.data.k)
    save_autoencoder(autoencoder, made.paths.autoencoder, tokenizer.content_hash, {})
    build_chunks(made.paths.tokens, load_autoencoder(made.paths.autoencoder), made.paths.chunks)
    return path


def losses(run: Path) -> dict[str, list[float]]:
    """Loss and gradient norm of each step of a training run."""
    records = read_metrics(run / "calm" / "metrics.jsonl", "train")
    return {name: [record[name] for record in records] for name in NAMES}


def recorded() -> dict[str, Sequence[float]]:
    """The numbers on record."""
    return read_json(RECORDED)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as scratch:
        path = experiment(Path(scratch) / "demo")
        run_calm(config.load(Experiment, path, []))
        write_json(RECORDED, losses(path.parent))
