"""From one text file to scores and text, by the three commands of the README, and an AR model beside it."""

import json
import random
import re
import shlex
import sys
from pathlib import Path

import pytest
from launching import ROOT, finish, run_script

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]

CONFIG = """
tokenizer: {vocab_size: 330}
autoencoder: {hidden: 32, latent: 8}
autoencoder_training: &training
  steps: 4
  global_batch: 8
  micro_batch: 2
  positions: 16
  precision: fp32
  schedule: {warmup: 1}
  log_every: 1
  eval_every: 0
  save_every: 0
  wandb: disabled
model: {layers: 2, hidden: 32, ffn: 64, heads: 2}
head: {noise: 8, samples: 4, target_samples: 8}
training: {<<: *training, eval_every: 2, positions: 96}
evaluation: {windows: 16, samples: 4, micro_batch: 2}
pipeline: {processes: 1, least_rebuilt: 0.0}
samples: {prompts: [The people], max_tokens: 8}
"""


def script(name: str, *arguments: object) -> str:
    code, output = run_script(ROOT / name, *arguments)
    assert code == 0, output
    return output


def pipeline(name: str, *arguments: str) -> str:
    """The workflow, whose stages print into a pipe only if it is a process of its own."""
    code, output = finish([sys.executable, str(ROOT / name), *arguments], seconds=600)
    assert code == 0, output
    return output


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("own")
    draw = random.Random(0)
    words = ["".join(draw.choices("etaoinshrdlu", k=draw.randint(1, 7))) for _ in range(300)]
    (folder / "my.txt").write_text(" ".join(draw.choices(words, k=4000)))
    (folder / "config.yaml").write_text(CONFIG)
    return folder


@pytest.fixture(scope="module")
def outputs(folder: Path) -> list[str]:
    """What the commands of the README print, run with a small model."""
    block = re.search(r"##+ Your own text\n+```\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)[1]
    own = {"configs/demo.yaml": folder / "config.yaml", "my.txt": folder / "my.txt", "runs/mine": folder / "mine"}
    for name, path in own.items():
        block = block.replace(name, str(path))
    commands = [shlex.split(line.removeprefix("python ")) for line in block.splitlines()]
    assert [Path(command[0]).stem for command in commands] == ["pipeline", "evaluate", "generate"]
    return [pipeline(*commands[0]), *(script(*command) for command in commands[1:])]


@pytest.fixture(scope="module")
def run(outputs: list[str], folder: Path) -> Path:
    return folder / "mine"


def test_one_text_file_is_enough(outputs: list[str], run: Path) -> None:
    assert "held out: the last " in outputs[0]
    assert "Brier-1" in outputs[1]
    assert "Once upon a time" in outputs[2]
    split = json.loads((run / "tokens" / "manifest.json").read_text())["split"]
    assert split["by"] == "position"
    scores = json.loads((run / "calm" / "evaluation.json").read_text())
    assert scores["brier_1"] is not None
    assert scores["unigram_brier_1"] is not None


def test_an_autoregressive_model_scores_the_same_tokens(run: Path, folder: Path) -> None:
    ar = ["head.kind=softmax", "training.positions=384", f"data.tokens={run / 'tokens'}", f"run={folder / 'ar'}"]
    ar.append(f"data.tokenizer={run / 'tokenizer' / 'tokenizer.model'}")
    script("pretrain/train_calm.py", folder / "config.yaml", *ar)
    script("pretrain/evaluate.py", folder / "ar", "--output", folder / "ar.json")
    calm, other = (json.loads(path.read_text()) for path in (run / "calm" / "evaluation.json", folder / "ar.json"))
    assert calm["measure"] == other["measure"]
    assert calm["windows"] == other["windows"] >= 2
    for n in range(1, 5):
        assert calm[f"unigram_brier_{n}"] == pytest.approx(other[f"unigram_brier_{n}"], abs=1e-6)
