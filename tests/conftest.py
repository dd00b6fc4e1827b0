import gc
import random
import shutil
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import pytest
import torch

from calm_core import config
from calm_core.autoencoder.model import Autoencoder, load_autoencoder, save_autoencoder
from calm_core.config.data_config import TokenizerConfig
from calm_core.config.experiment import Experiment
from calm_core.config.model_config import AutoencoderConfig
from calm_core.config.training_config import ParallelConfig
from calm_core.data.chunks import build_chunks
from calm_core.data.tokens import build_tokens
from calm_core.distributed.topology import Topology, distributed
from calm_core.tokenizer import load_tokenizer
from calm_core.tokenizer.sentencepiece import train_tokenizer

TINY = """
data: {{corpus: ["{folder}/corpus.txt"], held_out: 0.2, k: 4}}
autoencoder: {{hidden: 16, latent: 8}}
autoencoder_training: &training
  steps: 6
  global_batch: 8
  micro_batch: 2
  positions: 32
  precision: fp32
  optimizer: {{learning_rate: 1.0e-2}}
  schedule: {{warmup: 2}}
  log_every: 1
  eval_every: 0
  save_every: 0
  wandb: disabled
model: {{layers: 4, hidden: 32, ffn: 48, heads: 4, kv_groups: 2}}
head: {{noise: 8, samples: 4, target_samples: 8, blocks: 2}}
training: *training
evaluation: {{windows: 16, samples: 4, micro_batch: 2}}
"""

hypothesis.settings.register_profile("calm", deadline=None)  # the tests assert no times
hypothesis.settings.load_profile("calm")

torch.set_num_threads(1)  # as ranks have; the matrices of the tests are small


# Files and folders that take minutes, in the order in which they start. The second waits for Slurm more than it works,
# while the demo, which is one test, computes on two threads; the third is queued behind the demo.
LONGEST = (
    "end_to_end/test_demo.py",
    "slurm/test_training.py",
    "end_to_end/test_own_text.py",
    "slurm",
    "distributed/test_parity.py",
    "end_to_end",
    "scaling",
    "distributed",
    "training",
    "plan/test_memory.py",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The files that take longest run first, so that at the end no process has one left while the others are idle."""

    def place(item: pytest.Item) -> int:
        path = item.path.relative_to(Path(__file__).parent).as_posix()
        return next((place for place, name in enumerate(LONGEST) if path.startswith(name)), len(LONGEST))

    items.sort(key=place)


def pytest_collection_finish() -> None:
    """Each end of a run collects garbage, for a second if it goes through all the modules of a test session."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="module")
def topology() -> Iterator[Topology]:
    """A world of one rank, for as long as the tests of a file run."""
    with distributed(ParallelConfig()) as topology:
        yield topology


@pytest.fixture(scope="session")
def tiny_experiment(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with all that training starts from: config.yaml, tokens, a frozen autoencoder, chunks."""
    folder = tmp_path_factory.mktemp("tiny")
    draw = random.Random(0)
    words = ["".join(draw.choices("etaoinshrdlu", k=draw.randint(1, 7))) for _ in range(200)]
    documents = [" ".join(draw.choices(words, k=draw.randint(150, 400))) for _ in range(60)]
    corpus = folder / "corpus"
    corpus.mkdir()
    for number, document in enumerate(documents):
        (corpus / f"{number}.txt").write_text(document)
    (folder / "config.yaml").write_text(TINY.format(folder=folder).replace("corpus.txt", "corpus/*.txt"))
    experiment = config.load(Experiment, folder / "config.yaml", [f"run={folder}"])
    paths = experiment.paths
    train_tokenizer(documents, TokenizerConfig(vocab_size=300), paths.tokenizer, {})
    tokenizer = load_tokenizer(paths.tokenizer)
    build_tokens(experiment.data, tokenizer, paths.tokens)
    torch.manual_seed(0)
    autoencoder = Autoencoder(AutoencoderConfig(hidden=16, latent=8, init_std=0.2), tokenizer.vocab_size, k=4)
    save_autoencoder(autoencoder, paths.autoencoder, tokenizer.content_hash, {})
    build_chunks(paths.tokens, load_autoencoder(paths.autoencoder), paths.chunks)
    return folder


@pytest.fixture
def tiny(tiny_experiment: Path, tmp_path: Path) -> Path:
    """A copy of `tiny_experiment`, to train in and to break."""
    return Path(shutil.copytree(tiny_experiment, tmp_path / "tiny"))
