"""Every layout computes what a single process computes: loss, norm, each gradient, weights, evaluation, resume."""

import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from launching import finish, launch

WALK = Path(__file__).parent / "parity_walk.py"

# Each group is one process tree that walks its layouts (see `parity_walk`); `B<A` resumes in B from a checkpoint of A.
GROUPS = {
    "alone": (1, ["single", "single-micro1", "single-selective", "single-full"]),
    "two": (2, ["dp", "tp2", "tp2-sp", "tp2-sp-full", "pp2", "pp2-virtual2", "pp2-uneven", "pp2-all-in-last<tp2-sp"]),
    "eight": (8, ["tp2-pp2-sp", "tp2-pp2-virtual2-sp-full"]),
    "two more": (2, ["tp2-sp", "tp2-sp-selective", "dp", "pp2-virtual2", "dp<pp2-virtual2", "tp2<dp", "tp2-sp<dp"]),
    "eight more": (8, ["pp4", "dp8", "tp2-pp2-sp", "dp8<tp2-pp2-sp", "tp2-pp2-virtual2-sp-full<dp8"]),
}
EVERY = [
    pytest.param(group, name, marks=pytest.mark.slow if "more" in group else [])
    for group, (_, names) in GROUPS.items()
    for name in names
]

# Relative for loss and norm; gradients relative to the tensor's largest value; weights absolute, at steps of 1e-3.
LOSS, NORM, GRADIENT, WEIGHT = 5e-7, 3e-6, 1e-5, 2e-5

Walked = Callable[[str], dict[str, Any]]


@pytest.fixture(scope="module")
def walked(tiny_experiment: Path, tmp_path_factory: pytest.TempPathFactory) -> Walked:
    """The records of a group by layout, its process tree run when first asked for."""

    @cache
    def records(group: str) -> dict[str, Any]:
        ranks, names = GROUPS[group]
        out = tmp_path_factory.mktemp("walk")
        if ranks == 1:
            code, output = finish([sys.executable, str(WALK), str(tiny_experiment), str(out), *names], seconds=250)
            assert code == 0, output
        else:
            launch(ranks, WALK, tiny_experiment, out, *names, seconds=280)
        return {name: torch.load(out / f"{name}.pt") for name in names}

    return records


def test_the_run_is_worth_comparing(walked: Walked) -> None:
    single = walked("alone")["single"]
    assert all(gradient.abs().max() > 1e-4 for gradient in single["gradients"].values())
    assert len(set(single["loss"])) == len(set(single["norm"])) == 10
    assert min(single["norm"]) > 1  # clipped to 0.5 at every step


@pytest.mark.parametrize(("group", "name"), EVERY)
def test_a_layout_is_the_single_process(walked: Walked, group: str, name: str) -> None:
    found, wanted = walked(group)[name], walked("alone")["single"]
    steps = len(found["loss"])  # a resumed run has the last ones only
    loss, norm = (
        max(abs(a / b - 1) for a, b in zip(found[key], wanted[key][-steps:], strict=True)) for key in ("loss", "norm")
    )
    assert found["gradients"].keys() == found["weights"].keys() == wanted["gradients"].keys()
    gradient = max(
        ((found["gradients"][key] - g).abs().max() / g.abs().max()).item() for key, g in wanted["gradients"].items()
    )
    weight = max((found["weights"][key] - w).abs().max().item() for key, w in wanted["weights"].items())
    print(f"{name}: loss {loss:.1e}, norm {norm:.1e}, gradients {gradient:.1e}, weights {weight:.1e}")
    assert loss <= LOSS
    assert norm <= NORM
    assert gradient <= GRADIENT
    assert weight <= WEIGHT
    assert found["replica_spread"] == {"gradients": 0.0, "weights": 0.0}
    assert found["evaluation"] == pytest.approx(wanted["evaluation"], rel=1e-5)
    assert found["refused"]


def test_a_stage_reads_only_what_it_works_on(walked: Walked) -> None:
    everything = ["tokens", "mean", "log_std"]
    assert walked("two")["dp"]["columns"] == [everything] * 2
    assert walked("two")["pp2"]["columns"] == [["tokens"], everything]


def test_head_noise_is_that_of_the_sample(walked: Walked) -> None:
    data_parallel, tensor_parallel = (walked("two")[name]["noise"] for name in ("dp", "tp2"))
    assert not set(data_parallel[0, 0]) & set(data_parallel[1, 0])
    assert tensor_parallel[0, 0] == tensor_parallel[0, 1]
    assert len(set(tensor_parallel[0, 0])) > 10
