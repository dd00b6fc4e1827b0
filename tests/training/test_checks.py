"""What training refuses before its first step a dry run refuses too, with the same sentence, and writes nothing."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest
from damage import flip

from calm_core import config
from calm_core.config.experiment import Experiment
from calm_core.errors import ExitCode, UserError
from calm_core.plan.dry_run import plan_autoencoder, plan_calm
from calm_core.training.launch import check_autoencoder, check_calm, run_autoencoder, run_calm


def thesis(run: Path) -> None:
    (run / "calm").mkdir()
    (run / "calm" / "thesis.tex").write_text("...")


def changed_autoencoder(run: Path) -> None:
    flip(run / "autoencoder" / "frozen" / "model.safetensors")


def changed_chunks(run: Path) -> None:
    flip(next(run.glob("chunks/train-*[0-9].arrow")))


def changed_manifest(run: Path) -> None:
    path = run / "chunks" / "manifest.json"
    path.write_text(path.read_text().replace('"held_out"', '"another"'))


REFUSED = {  # settings, with RUN for the folder of a finished run; what is done to the data; words of the sentence
    "another K": (["data.k=2"], None, "data.k=2"),
    "another packing": (["data.packing=align"], None, "data.packing=align"),
    "another vocabulary": (["data.vocabulary=999"], None, "data.vocabulary=999"),
    "no window": (["training.positions=99999"], None, "fewer than one window of 99999 positions"),
    "no scored position": (["training.positions=1"], None, "has no position to score"),
    "too few samples": (
        ["data.blend=[{chunks: HERE/chunks, epochs: 1}]", "training.steps=9999"],
        None,
        r"data\.blend give [\d,]+ samples",
    ),
    "a blend without chunks": (["data.blend=[{tokens: HERE/tokens}]"], None, "names no store of chunks"),
    "an early time-out": (["training.hang_minutes=30"], None, "is not below parallel.timeout_minutes=20"),
    "a side loss that does not divide": (
        ["training.token_loss.weight=1", "training.token_loss.every=5"],
        None,
        "training.token_loss.every=5 does not divide",
    ),
    "a folder of something else": ([], thesis, "holds something other than a run"),
    "a changed autoencoder": ([], changed_autoencoder, "content hash differs"),
    "a changed shard": ([], changed_chunks, "has changed since it was written"),
    "a changed manifest": ([], changed_manifest, r"manifest\.json has changed since it was written"),
    "another run": (["run=RUN", "seed=1", "training.steps=8"], None, "seed was 0 and is now 1"),
    "a run in use": (["run=RUN", "training.resume=never", "training.steps=8"], None, "already holds a run"),
    "nothing to start from": (["training.init_from=RUN"], None, "is not a complete checkpoint"),
    "nothing to resume from": (["training.resume_from=RUN"], None, "is not a complete checkpoint"),
    "another backbone": (
        ["training.init_from=RUN/calm/checkpoints/step-6", "model.layers=2"],
        None,
        "init_from: backbone.layers is 4",
    ),
    "another seed to resume": (
        ["training.resume_from=RUN/calm/checkpoints/step-6", "seed=3"],
        None,
        "seed was 0 and is now 3",
    ),
}


def refusal(action: Callable[[], object]) -> str:
    with pytest.raises(UserError) as refused:
        action()
    return str(refused.value)


def files(*folders: Path) -> list[Path]:
    return sorted(path for folder in folders for path in folder.rglob("*"))


@pytest.mark.parametrize("case", REFUSED)
def test_a_dry_run_refuses_what_training_refuses(
    case: str, tiny: Path, whole: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings, damage, words = REFUSED[case]
    if damage:
        damage(tiny)
    changes = [f"run={tiny}", *(s.replace("HERE", str(tiny)).replace("RUN", str(whole)) for s in settings)]
    experiment = config.load(Experiment, tiny / "config.yaml", changes)
    before = files(tiny, whole)
    sentence = refusal(lambda: plan_calm(experiment, (), check_calm))
    assert capsys.readouterr().out == ""
    assert files(tiny, whole) == before
    assert sentence == refusal(lambda: run_calm(experiment))
    assert re.search(words, sentence), sentence


@pytest.mark.parametrize("change", ["autoencoder_training.positions=99999", "data.vocabulary=999"])
def test_so_it_does_for_the_autoencoder(change: str, tiny: Path) -> None:
    changes = [f"run={tiny}/other", f"data.tokens={tiny}/tokens", change]
    experiment = config.load(Experiment, tiny / "config.yaml", changes)
    sentence = refusal(lambda: plan_autoencoder(experiment, (), check_autoencoder))
    assert sentence == refusal(lambda: run_autoencoder(experiment))


def test_too_few_held_out_windows_for_all_ranks(tiny: Path) -> None:
    changes = [f"run={tiny}", "evaluation.micro_batch=4", "evaluation.windows=0", "training.global_batch=4096"]
    experiment = config.load(Experiment, tiny / "config.yaml", changes)
    assert check_calm(experiment, 1) == []
    with pytest.raises(UserError, match=r"held-out split has \d+ windows, fewer than the 2048 data-parallel ranks"):
        check_calm(experiment, 2048)


def test_a_run_that_can_start_or_has_ended_is_planned(
    tiny: Path, whole: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for run in (tiny, whole):
        experiment = config.load(Experiment, tiny / "config.yaml", [f"run={run}"])
        assert plan_calm(experiment, (), check_calm) == ExitCode.OK
        assert "checked as when the training starts" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (["parallel.tensor=3"], "parallel.tensor=3 does not divide the 2 key/value heads"),
        (["training.token_loss.weight=1", "training.token_loss.every=5"], "token_loss.every=5 does not divide"),
        (["training.positions=1"], "has no position to score"),
    ],
)
def test_what_no_data_could_mend_is_refused_without_data(
    changes: list[str], words: str, tmp_path: Path, tiny: Path
) -> None:
    """A plan on a laptop is for a run that can start elsewhere."""
    experiment = config.load(Experiment, tiny / "config.yaml", [f"run={tmp_path / 'none'}", *changes])
    assert words in refusal(lambda: plan_calm(experiment, (), check_calm))


def test_what_is_not_there_yet_is_named(tmp_path: Path, tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "none"
    changes = [f"run={run}", "samples.while_training=true"]
    experiment = config.load(Experiment, tiny / "config.yaml", changes)
    paths = experiment.paths
    assert check_calm(experiment, 1) == [paths.autoencoder, paths.chunks, paths.tokenizer]
    assert check_autoencoder(experiment, 1) == [paths.tokens]
    assert plan_calm(experiment, (), check_calm) == ExitCode.OK
    assert f"not there yet, so not checked: {paths.autoencoder}, {paths.chunks}, " in capsys.readouterr().out
    assert not run.exists()
