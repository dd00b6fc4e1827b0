"""How well the hidden states of a CALM predict the next chunk, and how much of that the head's draws reach.

A linear classifier is trained on the frozen hidden states of training windows, one for each token of the next chunk,
and scored exactly at held-out positions by Brier-n; the head's draws from the same hidden states are scored there too.
Brier-1 compares features and head: the difference is what the head does not express. For n > 1 the classifier treats
the tokens of a chunk as independent; the head draws them jointly.
"""

import argparse
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from calm_core.checkpoint.folder import open_checkpoint
from calm_core.data.dataset import Windows
from calm_core.data.store import ChunkStore
from calm_core.evaluation.brier import BrierTerms, brier_terms, clustered_mean
from calm_core.evaluation.tables import table
from calm_core.inference.load_model import Loaded, find_checkpoint, load_for_inference, paths_of
from calm_core.model.noise import SampleNoise

DRAWS, STEPS, BATCH, WINDOWS_AT_ONCE = 16, 2000, 512, 16


def batches(store: ChunkStore, positions: int, count: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Chunks `[B, S + 1, K]` of `count` windows spread over a store, and the document of each row `[B, S + 1]`."""
    windows = Windows(store, positions)
    chosen = np.linspace(0, len(windows) - 1, min(count, len(windows))).astype(np.int64)
    for part in np.array_split(chosen, -(-len(chosen) // WINDOWS_AT_ONCE)):
        rows = [store.read(first, positions + 1, ("tokens",))["tokens"] for _, first in windows.locate(part)]
        yield torch.from_numpy(np.stack(rows).astype(np.int64)), torch.from_numpy(windows.document_ids(part))


def hidden_states(loaded: Loaded, chunks: Tensor) -> Tensor:
    """The hidden states `[S / 2, B, d]` of the later half of the windows, which predict the chunks after them."""
    return loaded.model.hidden(chunks[:, :-1])[chunks.shape[1] // 2 :]


def targets(chunks: Tensor) -> Tensor:
    """The chunks `[S / 2, B, K]` after those positions."""
    return chunks[:, 1:][:, chunks.shape[1] // 2 :].transpose(0, 1)


def trained_probe(hidden: Tensor, chunks: Tensor, vocabulary: int) -> torch.nn.Linear:
    """A classifier of each of the K tokens `[P, K]` from hidden states `[P, d]`."""
    torch.manual_seed(0)
    k = chunks.shape[-1]
    probe = torch.nn.Linear(hidden.shape[-1], k * vocabulary)
    optimizer = torch.optim.Adam(probe.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
    for _ in range(STEPS):
        rows = torch.randint(len(hidden), (BATCH,))
        loss = cross_entropy(probe(hidden[rows]).view(BATCH * k, vocabulary), chunks[rows].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return probe


def probe_terms(probe: torch.nn.Linear, hidden: Tensor, chunks: Tensor) -> BrierTerms:
    """Exact terms `[P, K]` of the classifier, its tokens taken as independent."""
    likely = probe(hidden).unflatten(-1, (chunks.shape[-1], -1)).softmax(-1)
    hit = likely.gather(-1, chunks.unsqueeze(-1)).squeeze(-1).cumprod(-1)
    return BrierTerms(hit, likely.square().sum(-1).cumprod(-1))


def draw_terms(loaded: Loaded, hidden: Tensor, chunks: Tensor, batch: int) -> BrierTerms:
    """Terms `[S, B, K]` of the head's draws from hidden states `[S, B, d]`."""
    noise = SampleNoise(0, np.arange(batch * hidden.shape[1], (batch + 1) * hidden.shape[1]), hidden.device, "probe")
    return brier_terms(loaded.autoencoder.decode_tokens(loaded.model.head.sample(hidden, noise, DRAWS)), chunks)


@torch.no_grad()
def scores(loaded: Loaded, train: ChunkStore, held_out: ChunkStore, windows: int) -> dict[str, Tensor]:
    """Means and standard errors `[2, K]` of Brier-1 to Brier-K, of the classifier and of the draws."""
    seen = list(batches(train, loaded.positions, windows))
    hidden = torch.cat([hidden_states(loaded, chunks).flatten(0, 1) for chunks, _ in seen])
    with torch.enable_grad():
        probe = trained_probe(
            hidden, torch.cat([targets(chunks).flatten(0, 1) for chunks, _ in seen]), loaded.shape.vocabulary
        )
    found: dict[str, list[Tensor]] = {"linear probe": [], "draws of the head": []}
    documents = []
    for batch, (chunks, of) in enumerate(batches(held_out, loaded.positions, windows // 4)):
        states, truth = hidden_states(loaded, chunks), targets(chunks)
        found["linear probe"].append(probe_terms(probe, states, truth).score.flatten(0, 1))
        found["draws of the head"].append(draw_terms(loaded, states, truth, batch).score.flatten(0, 1))
        documents.append(of[:, 1:][:, chunks.shape[1] // 2 :].T.flatten())
    results = {name: clustered_mean(torch.cat(parts), torch.cat(documents)) for name, parts in found.items()}
    return {name: torch.stack([result.mean, result.standard_error]) for name, result in results.items()}


def main() -> None:
    """Load, train the classifier, print both rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="run folder or checkpoint of a CALM")
    parser.add_argument("--windows", type=int, default=512, help="of the training split, and a quarter held out")
    arguments = parser.parse_args()
    checkpoint = find_checkpoint(arguments.run)
    loaded, chunks = load_for_inference(checkpoint, torch.device("cpu")), paths_of(open_checkpoint(checkpoint)).chunks
    found = scores(loaded, ChunkStore(chunks, "train"), ChunkStore(chunks, "held_out"), arguments.windows)
    head = ["from the same hidden states", *(f"Brier-{n}" for n in range(1, loaded.shape.k + 1))]
    rows = [[name, *(f"{m:.3%} ± {e:.3%}" for m, e in values.T.tolist())] for name, values in found.items()]
    print("\n".join(table(head, rows)))


if __name__ == "__main__":
    main()
