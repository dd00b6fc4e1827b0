"""Every layout computes what a single process computes: loss, norm, each gradient, weights, evaluation, resume."""

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from launching import ROOT, launch
from parity_record import TOLERANCES, TOLERANCES_BF16, Differences, compared

WALK = ROOT / "tests" / "helpers" / "parity_walk.py"
HEADS = ("energy", "softmax", "diffusion", "flow")


def of(head: str, layouts: str) -> list[str]:
    return [f"{head}/{layout}" for layout in layouts.split()]


# Each group is one process tree that walks what it names (see `parity_walk`).
GROUPS = {
    "alone": (
        1,
        [
            *(f"{head}/single" for head in (*HEADS, "energy@bf16", "energy@padded")),
            *(f"energy@{side}/single" for side in ("tokens", "random-token", "full-rank", "padded-tokens")),
            *of("energy", "single-micro1 single-selective single-full"),
        ],
    ),
    "two": (
        2,
        [
            *of(
                "energy",
                "dp tp2 tp2-sp tp2-sp-whole-head tp2<tp2-sp-whole-head tp2-sp-full pp2 pp2-virtual2 pp2-uneven",
            ),
            *of("energy", "pp2-all-in-last<tp2-sp"),
            *of("softmax", "tp2-sp pp2"),
            *of("diffusion", "tp2-sp pp2"),
            *of("flow", "tp2-sp pp2"),
            *of("energy@bf16", "dp tp2-sp pp2"),
            *of("energy@tokens", "dp tp2-sp pp2-virtual2"),
            *of("energy@random-token", "tp2-sp"),
            *of("energy@padded-tokens", "tp2-sp"),
        ],
    ),
    "eight": (8, [*of("energy", "tp2-pp2-sp tp2-pp2-virtual2-sp-full"), *of("softmax", "tp2-pp2-sp")]),
    "more alone": (
        1,
        [
            *of("softmax", "single-micro1 single-selective single-full"),
            *of("energy@padded", "single-micro1"),
        ],
    ),
    "more of two": (
        2,
        [
            *of(
                "energy",
                "tp2-sp tp2-sp-selective tp2-sp-full-compiled dp pp2-virtual2 dp<pp2-virtual2 tp2<dp tp2-sp<dp",
            ),
            *of("softmax", "dp tp2 tp2-sp tp2-sp-selective tp2-sp-full pp2-virtual2 pp2-uneven"),
            *of("softmax", "pp2-all-in-first<tp2-sp tp2<dp"),
            *of("energy@padded", "dp tp2-sp pp2"),
            *of("energy@tokens", "tp2 pp2"),
            *of("energy@full-rank", "tp2-sp"),
        ],
    ),
    "more of eight": (
        8,
        [
            *of("energy", "pp4 tp2-pp2-sp dp8<tp2-pp2-sp"),
            *of("softmax", "pp4 dp8 tp2-pp2-virtual2-sp-full<dp8"),
        ],
    ),
}
EVERY = [(group, name) for group, (_, names) in GROUPS.items() for name in names]
# A layout without a rule that it needs: the group it is walked with, and what of `Differences` shows it.
BROKEN = {
    "energy/tp2-sp!sum": ("two", "replicas"),
    "energy/tp2-sp!mark-rest": ("two", "replicas"),
    "softmax/tp2-sp!parts": ("two", "gradient"),
    "energy@bf16/tp2-sp!sum": ("two", "norm"),
    "energy/tp2-sp!mark-backbone": ("more of two", "replicas"),
    "energy/tp2!count-once": ("more of two", "norm"),
    "energy/pp2!all-stages": ("more of two", "norm"),
    "energy/dp!own-noise": ("more of two", "loss"),
}
pytestmark = pytest.mark.timeout(700)  # the first test of a group runs its process tree

for name, (group, _) in BROKEN.items():
    GROUPS[group][1].append(name)


def cases(pairs: list[tuple[str, str]]) -> list[Any]:
    """Parameters (group, name); those of the larger groups are slow."""
    return [pytest.param(*pair, marks=pytest.mark.slow if "more" in pair[0] else []) for pair in pairs]


Walked = Callable[[str], dict[str, Any]]


@pytest.fixture(scope="module")
def walked(tiny_experiment: Path, tmp_path_factory: pytest.TempPathFactory) -> Walked:
    """The records of a group by name, its process tree run when first asked for, and once only if it fails."""

    @cache
    def run(group: str) -> dict[str, Any] | AssertionError:
        try:
            return records(group)
        except AssertionError as failed:
            return failed

    def records(group: str) -> dict[str, Any]:
        ranks, names = GROUPS[group]
        out = tmp_path_factory.mktemp("walk")
        launch(ranks, WALK, tiny_experiment, out, *names, seconds=600)
        return {name: torch.load(out / f"{name}.pt") for name in names}

    def walked(group: str) -> dict[str, Any]:
        found = run(group)
        if isinstance(found, AssertionError):
            raise found
        return found

    return walked


@pytest.fixture(scope="module")
def differences(walked: Walked) -> Callable[[str, str], Differences]:
    """How far a run of a group is from the single process with the same head."""
    return lambda group, name: compared(walked(group)[name], walked("alone")[single(name)])


def single(name: str) -> str:
    """The single process that a run is compared with."""
    return f"{name.partition('/')[0]}/single"


def tolerances(name: str) -> Differences:
    # Float32 sums over the vocabulary in another order, enlarged by the first steps of Adam; few positions, small ones.
    if "@full-rank" in name or "@random-token" in name:
        return TOLERANCES._replace(gradient=5e-5, weight=1e-4)
    return TOLERANCES_BF16 if "@bf16" in name else TOLERANCES


@pytest.mark.parametrize("head", HEADS)
def test_the_run_is_worth_comparing(walked: Walked, head: str) -> None:
    single = walked("alone")[f"{head}/single"]
    assert all(gradient.abs().max() > 1e-5 for gradient in single["gradients"].values())
    assert len(set(single["loss"])) == len(set(single["norm"])) == 6
    assert min(single["norm"]) > 0.5  # clipped to that at every step


@pytest.mark.parametrize(("group", "name"), cases(EVERY))
def test_a_layout_is_the_single_process(
    walked: Walked, differences: Callable[[str, str], Differences], group: str, name: str
) -> None:
    found, difference = walked(group)[name], differences(group, name)
    print(name, *(f"{field} {value:.1e}" for field, value in difference._asdict().items()))
    assert all(value <= limit for value, limit in zip(difference, tolerances(name), strict=True)), difference
    assert found["agreed"]
    assert found["refused"]
    evaluation, wanted = found["evaluation"], walked("alone")[single(name)]["evaluation"]
    if "@bf16" in name:  # where rounding decides which tokens are drawn
        assert evaluation["loss"] == pytest.approx(wanted["loss"], rel=TOLERANCES_BF16.loss)
    else:
        # A standard error of few windows is a small difference of large sums: it has a share of their rounding.
        assert evaluation == pytest.approx(wanted, rel=1e-5, abs=1e-6)
    # A weight on two stages would need a rule of its own, that sums its gradients over them.
    assert found["shared between stages"] == []


@pytest.mark.parametrize(("group", "name"), cases([(group, name) for name, (group, _) in BROKEN.items()]))
def test_a_rule_that_is_dropped_is_noticed(
    differences: Callable[[str, str], Differences], group: str, name: str
) -> None:
    difference, shows = differences(group, name), BROKEN[name][1]
    print(name, *(f"{field} {value:.1e}" for field, value in difference._asdict().items()))
    assert getattr(difference, shows) > 10 * getattr(tolerances(name), shows)


def test_a_model_of_one_token_a_chunk_has_been_rolled_out(walked: Walked) -> None:
    evaluation = walked("alone")["softmax/single"]["evaluation"]
    assert evaluation["brier_1"] != evaluation["brier_4"]
    assert evaluation["brier_4_error"] > 0


def test_padding_makes_another_loss(walked: Walked) -> None:
    """What the layouts agree on is not that of the same windows without padding."""
    padded, plain = (walked("alone")[f"{kind}/single"] for kind in ("energy@padded", "energy"))
    assert all(abs(a / b - 1) > 1e-3 for a, b in zip(padded["loss"], plain["loss"], strict=False))


def test_the_weights_of_positions_are_the_mean_over_samples_of_the_mean_over_their_text() -> None:
    from calm_core.training.calm_task import position_weights

    tokens = torch.ones(6, 3, 4, dtype=torch.int64)
    tokens[2:, 1] = 0
    tokens[:, 2] = 0
    tokens[0, 0, 1:] = 0  # a partial chunk is a target as any other
    weights, losses = position_weights(tokens, 0), torch.rand(6, 3)
    assert torch.allclose((losses * weights).sum(), (losses[:, 0].mean() + losses[:2, 1].mean()) / 3)
    assert torch.allclose((losses * position_weights(tokens, None)).sum(), losses.mean())


@pytest.mark.parametrize("head", ["energy", "diffusion", "flow"])
def test_noise_is_that_of_the_sample(walked: Walked, head: str) -> None:
    (alone,) = walked("alone")[f"{head}/single"]["noise"].values()
    tensor_parallel = walked("two")[f"{head}/tp2-sp"]["noise"]
    assert len(set(alone)) == len(alone)
    assert set(tensor_parallel[0, 0]) == set(tensor_parallel[0, 1]) == set(alone)


def test_data_parallel_ranks_share_no_noise(walked: Walked) -> None:
    (alone,) = walked("alone")["energy/single"]["noise"].values()
    first, second = (set(walked("two")["energy/dp"]["noise"][rank, 0]) for rank in range(2))
    assert not first & second
    assert first | second == set(alone)
    eight = walked("eight")["energy/tp2-pp2-sp"]["noise"]
    assert eight[0, 0] == eight[0, 1]
    assert eight[1, 0] == eight[1, 1]
    assert not set(eight[0, 0]) & set(eight[1, 0])


def test_a_stage_reads_only_what_it_works_on(walked: Walked) -> None:
    everything = ["tokens", "mean", "log_std"]
    assert walked("two")["energy/dp"]["columns"] == [everything] * 2
    assert walked("two")["energy/pp2"]["columns"] == [["tokens"], everything]
