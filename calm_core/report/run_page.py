"""The page of a training run, or of several side by side: everything on it is read from the run folders."""

import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np

from calm_core import config as configuration
from calm_core.config.experiment import Experiment
from calm_core.errors import UserError
from calm_core.evaluation.brier import half_interval
from calm_core.io import read_json, read_json_lines
from calm_core.plan import flops
from calm_core.plan.dry_run import model_shape
from calm_core.report.figure import GREY, STEPS, Axis, Figure, Trace, brier_axis, curve, curve_with_band
from calm_core.report.incidents import ENVELOPE, incidents, shown_time
from calm_core.report.page import Paragraph, Section, Table, number, write_page
from calm_core.training.run_log import FIGURES
from calm_core.training.stopping import stacks
from calm_core.workflow.stages import BASELINE

Record = dict[str, Any]

BASELINES = {"unigram_": ("unigram", GREY), "bigram_": ("bigram", 5)}

TERMS = {
    "loss": "the objective of training: the energy score, which has no unit and no fixed zero, for an energy head; "
    "cross-entropy in nats a token for AR; the two do not compare",
    "held-out loss": "the same loss on documents that the model was not trained on, with half of its 95 % interval",
    "Brier-1": "how well the model's draws predict the next token: 100 % is perfect, unigram is by token frequencies",
    "unigram Brier-1": "the score of token frequencies alone",
    "bigram Brier-1": "the score of token frequencies given the token before",
    "BrierLM": "100 times the geometric mean of Brier-1 to Brier-4; none unless their 95 % intervals all lie above 0",
    "model FLOPs utilisation": "FLOPs that the model needs over those that the device could have executed",
    "mfu": "model FLOPs utilisation: FLOPs that the model needs over those that the device could have executed",
    "gradient norm": "norm of the gradient before clipping",
    "time spent waiting for data": "fraction of the time of a step",
    "collision rate": "how often two draws of the model agree on the next token",
    "tokens reconstructed": "tokens that the autoencoder decodes as they were",
}

TRAININGS = ("calm", "autoencoder")


@dataclass(frozen=True)
class Training:
    """The settings and records of one training run; of a finished model also its full evaluation and its texts."""

    name: str
    folder: Path
    settings: dict[str, Any]
    train: list[Record]
    evaluations: list[Record]
    events: list[Record]
    samples: list[Record]
    full_evaluation: Record
    final_samples: list[Record]


def read_training(folder: Path, name: str) -> Training:
    """Read what a training run has recorded so far.

    Raises:
        UserError: if there is no run.
    """
    if not (folder / "metrics.jsonl").exists():
        raise UserError(f"{folder} holds no training run (metrics.jsonl is missing): give a folder such as runs/demo.")
    records = read_json_lines(folder / "metrics.jsonl")
    kinds = ([r for r in records if r["kind"] == kind] for kind in ("train", "eval", "event", "sample"))
    settings = dict(configuration.flatten(configuration.read_yaml(folder / "config.yaml")))
    left = {"scores": folder / "evaluation.json", "texts": folder.parent / "samples.json"}
    found = {what: read_json(path) for what, path in left.items() if folder.name == "calm" and path.exists()}
    return Training(name, folder, settings, *kinds, found.get("scores", {}), found.get("texts", []))


def trainings(runs: Sequence[Path]) -> list[Training]:
    """The training runs below the folders of experiments, or those that the folders are, each once.

    Their names are the ends of their paths, of two parts or as many more as make them unique.

    Raises:
        UserError: if a folder holds none.
    """
    folders = list(dict.fromkeys(folder for run in runs for folder in _folders(Path(os.path.abspath(run)))))
    depth = 2
    while len({folder.parts[-depth:] for folder in folders}) < len(folders):
        depth += 1
    return [read_training(folder, "/".join(folder.parts[-depth:])) for folder in folders]


def _folders(run: Path) -> list[Path]:
    return [run / part for part in TRAININGS if (run / part / "metrics.jsonl").exists()] or [run]


def write_run_page(run: Path, page: Path | None = None) -> Path:
    """Write the page of all training runs of an experiment, RUN/report.html by default; its path."""
    page = page or run / "report.html"
    sections = [section for one in trainings([run]) for section in _sections([one], one.name, page.parent)]
    write_page(page, Path(os.path.abspath(run)).name, sections)
    return page


def write_comparison(runs: Sequence[Path], page: Path) -> None:
    """Write a page that shows several runs in the same figures, trainings of one kind together."""
    found = trainings(runs)
    sections = []
    for kind in dict.fromkeys(training.folder.name for training in found):
        together = [training for training in found if training.folder.name == kind]
        sections += _sections(together, kind, page.parent)
    write_page(page, ", ".join(training.name for training in found), sections)


def _sections(runs: Sequence[Training], title: str, page_folder: Path) -> list[Section]:
    """All that there is to show of some runs, on a page in the folder `page_folder`."""
    prefix = title.replace("/", "-")
    parts: list[tuple[str, Callable[[], list[Any]]]] = [
        ("", lambda: [_summary(runs), *_losses(runs, prefix)]),
        (": scores on held-out documents", lambda: _scores(runs, prefix)),
        (
            ": speed and health",
            lambda: _curves(runs, prefix, {name: Axis(f.label, percent=f.percent) for name, f in FIGURES.items()}),
        ),
        (": samples", lambda: _samples(runs)),
        (": layout", lambda: _layout(runs)),
        (": restarts and faults", lambda: _faults(runs, page_folder)),
        (": profiles", lambda: _profiles(runs, page_folder)),
        (": configuration", lambda: _configuration(runs)),
    ]
    folded = (": samples", ": layout", ": profiles", ": configuration")
    return [Section(f"{title}{heading}", make(), heading in folded) for heading, make in parts]


def _summary(runs: Sequence[Training]) -> Table:
    """A column for each run: what it is, how far it has come, and its last scores next to the baselines.

    A single model is shown next to the autoregressive one that its experiment has trained, if there is one.
    """
    shown = [*runs, *(_baseline(runs[0]) if len(runs) == 1 else [])]
    facts = [_facts(run) for run in shown]
    rows = [[name, *(of_run[name] for of_run in facts)] for name in facts[0]]
    return Table(["", *(run.name for run in shown)], [row for row in rows if any(row[1:])], about=TERMS)


def _baseline(run: Training) -> list[Training]:
    """The autoregressive model of the same training FLOPs that the workflow has trained too, if there is one."""
    folder = run.folder.parent / BASELINE / "calm"
    known = run.folder.name == "calm" and (folder / "metrics.jsonl").exists()
    return [read_training(folder, "AR of equal training FLOPs")] if known else []


def _last_scores(run: Training) -> Record:
    """Those of the full evaluation, if it is of the last step, or of the last evaluation in training."""
    last = run.train[-1]["step"] if run.train else None
    if run.full_evaluation and run.full_evaluation.get("step") == last:
        return run.full_evaluation
    return run.evaluations[-1] if run.evaluations else {}


def _facts(run: Training) -> dict[str, str]:
    last = run.train[-1] if run.train else {}
    evaluated = _last_scores(run)
    start = next((event for event in reversed(run.events) if event["event"] == "start"), {})
    tokens, hours = _tokens_and_hours(run)
    ranks = f"{count} rank{'s' if count > 1 else ''}" if (count := start.get("ranks")) else ""
    return {
        "model": _kind(run),
        "parameters": f"{count:,}" if (count := start.get("parameters") or _parameters(run)) else "",
        "step": number(last.get("step")),
        "tokens": f"{tokens[-1]:,.0f}" if tokens else "",
        "hours of training": f"{hours[-1]:.3g}" if hours else "",
        "tokens/s": number(last.get("tokens_per_second")),
        "mfu": f"{last['mfu']:.1%}" if last.get("mfu") else "",
        "training loss": number(last.get("loss")),
        "held-out loss": _with_error(evaluated, "loss") + (" nats" if _kind(run) == "AR" and evaluated else ""),
        "Brier-1": _percent(evaluated, "brier_1"),
        **{f"{name} Brier-1": _percent(evaluated, f"{key}brier_1") for key, (name, _) in BASELINES.items()},
        "BrierLM": _with_error(evaluated, "brier_lm"),
        "machine": ", ".join(filter(None, [start.get("hardware"), ranks, start.get("precision")])),
        "commit": start.get("commit", ""),
    }


def _parameters(run: Training) -> int:
    """The parameters of a run whose records do not say them, from its configuration and tokens; 0 if unknown."""
    try:
        experiment = configuration.load(Experiment, run.folder / "config.yaml", [f"run={run.folder.parent}"])
        shape = model_shape(experiment)
    except UserError:  # settings of another version, or a vocabulary that is not known any more
        return 0
    return 0 if run.folder.name == "autoencoder" else sum(flops.parameters(shape).values())


def _kind(run: Training) -> str:
    """What is trained: the kind of head of a model, which decides the kind of its loss."""
    if run.folder.name == "autoencoder":
        return "autoencoder"
    kind = run.settings.get("head.kind", "energy")
    return "AR" if kind == "softmax" else f"CALM K={run.settings.get('data.k')}, {kind} head"


def _tokens_and_hours(run: Training) -> tuple[list[float], list[float]]:
    """Tokens read and hours of training at each training record; empty where the records do not say."""
    if not run.train or not all(record.get("samples") and record.get("tokens_per_second") for record in run.train):
        return [], []
    settings = run.settings
    section = "autoencoder_training" if run.folder.name == "autoencoder" else "training"
    k = 1 if settings.get("head.kind") == "softmax" and section == "training" else settings.get("data.k", 1)
    each = settings.get(f"{section}.positions", 0) * k
    tokens = [record["samples"] * each for record in run.train]
    seconds, hours = 0.0, []
    for before, now, record in zip([0.0, *tokens], tokens, run.train, strict=False):
        seconds += (now - before) / record["tokens_per_second"]
        hours.append(seconds / 3600)
    return tokens, hours


def _with_other_x(run: Training, trace: Trace | None) -> Trace | None:
    """The trace with tokens and hours for its steps, interpolated between training records."""
    tokens, hours = _tokens_and_hours(run)
    if trace is None or not tokens:
        return trace
    steps = [0, *(record["step"] for record in run.train)]
    columns = {"tokens": tokens, "hours of training": hours}
    return replace(trace, other_x={unit: np.interp(trace.x, steps, [0, *c]).tolist() for unit, c in columns.items()})


def _losses(runs: Sequence[Training], prefix: str) -> list[Figure | Paragraph]:
    """The losses in one figure for each kind of loss: those of different kinds cannot be compared."""
    figures: list[Figure | Paragraph] = []
    kinds = list(dict.fromkeys(map(_kind, runs)))
    if len(kinds) > 1:
        note = f"Losses of {', '.join(kinds)} are of different kinds and cannot be compared: each has its own figure."
        figures.append(Paragraph(note, note=True))
    for kind in kinds:
        traces = []
        for color, run in enumerate(runs):
            if _kind(run) != kind:
                continue
            training = curve(run.train, "loss", f"{run.name} training", color=color)
            held_out = curve_with_band(run.evaluations, "loss", f"{run.name} held-out", color=color, dashed=True)
            traces += [_with_other_x(run, training), _with_other_x(run, held_out)]
        name = f"{prefix}-loss" + (f"-{kinds.index(kind)}" if len(kinds) > 1 else "")
        title = f"loss: {kind}" if len(kinds) > 1 else "loss"
        figures += _figure(runs, name, title, traces, Axis("loss"))
    terms = dict.fromkeys(name for run in runs for record in run.train for name in record)
    known = {*FIGURES, "step", "kind", "loss", "samples"}
    axes = {name: Axis(name) for name in terms if name not in known}
    return figures + _curves(runs, prefix, axes, ", a term of the loss")


def _scores(runs: Sequence[Training], prefix: str) -> list[Figure]:
    figures = []
    for n in range(1, 5):
        traces = _evaluated(runs, f"brier_{n}")
        for baseline, (name, color) in BASELINES.items():
            line = curve(runs[0].evaluations, f"{baseline}brier_{n}", name, color=color, dashed=True)
            traces.append(_with_other_x(runs[0], line))
        figures += _figure(runs, f"{prefix}-brier-{n}", f"Brier-{n}", traces, brier_axis(n))
    shown = {
        "brier_lm": Axis("BrierLM"),
        "collision_1": Axis("collision rate", percent=True),
        "token_accuracy": Axis("tokens reconstructed", percent=True),
    }
    for key, axis in shown.items():
        figures += _figure(runs, f"{prefix}-{key}", axis.label, _evaluated(runs, key), axis)
    return figures


def _evaluated(runs: Sequence[Training], key: str) -> list[Trace | None]:
    return [
        _with_other_x(run, curve_with_band(run.evaluations, key, run.name, color=color))
        for color, run in enumerate(runs)
    ]


def _curves(runs: Sequence[Training], prefix: str, axes: dict[str, Axis], kind: str = "") -> list[Figure]:
    return [
        figure
        for key, axis in axes.items()
        for figure in _figure(
            runs,
            f"{prefix}-{key}",
            axis.label + kind,
            [_with_other_x(run, curve(run.train, key, run.name, color=color)) for color, run in enumerate(runs)],
            axis,
        )
    ]


def _samples(runs: Sequence[Training]) -> list[Paragraph | Table]:
    """The texts of the finished runs, then those on the way, the newest first."""
    rows = [
        [run.name, sample.get("step", "samples.json"), f"{sample['temperature']:g}", sample["prompt"], sample["text"]]
        for run in runs
        for sample in [*run.final_samples, *reversed(run.samples)]
    ]
    return [Table(["run", "step", "temperature", "prompt", "continued"], rows)] if rows else []


def _layout(runs: Sequence[Training]) -> list[Table]:
    tables = []
    for run in runs:
        starts = [event for event in run.events if event["event"] == "start"]
        if not starts:
            continue
        facts = {key: value for key, value in starts[-1].items() if key not in ENVELOPE}
        tables.append(Table(["of " + run.name, ""], [[key, number(value)] for key, value in facts.items()]))
        if stages := starts[-1].get("stages"):
            head = list(stages[0])
            tables.append(Table(head, [[number(stage[key]) for key in head] for stage in stages]))
    return tables


def _faults(runs: Sequence[Training], page_folder: Path) -> list[Table | Paragraph]:
    rows = [
        [run.name, shown_time(incident.time), *incident[1:]]
        for run in runs
        for incident in incidents(run.folder, run.events)
    ]
    table = [Table(["run", "time (UTC)", "step", "what", "details"], rows)] if rows else []
    return [
        *table,
        *_links(runs, page_folder, "stacks of ranks that the watchdog ended", lambda run: stacks(run / "logs")),
    ]


def _profiles(runs: Sequence[Training], page_folder: Path) -> list[Paragraph]:
    traces = "traces open in chrome://tracing or ui.perfetto.dev"
    return _links(runs, page_folder, traces, lambda folder: sorted((folder / "profile").glob("*")))


def _links(
    runs: Sequence[Training], page_folder: Path, title: str, find: Callable[[Path], list[Path]]
) -> list[Paragraph]:
    """Links from a page in the folder `page_folder` to files of the runs."""
    return [
        Paragraph(
            f"{run.name}, {title}:", links={file.name: quote(os.path.relpath(file, page_folder)) for file in files}
        )
        for run in runs
        if (files := find(run.folder))
    ]


def _configuration(runs: Sequence[Training]) -> list[Table | Paragraph]:
    """All settings of each run; marked are those that its base file does not say, or between runs the unequal ones."""
    flat = [run.settings for run in runs]
    keys = list(dict.fromkeys(key for settings in flat for key in settings))
    if len(runs) > 1:
        rows = [[key, *(settings.get(key, "") for settings in flat)] for key in keys]
        unequal = frozenset(i for i, row in enumerate(rows) if len(set(map(str, row[1:]))) > 1)
        rows = [rows[i] for i in sorted(unequal)]
        return [Paragraph("Only what differs is shown.", note=True), Table(["key", *(run.name for run in runs)], rows)]
    base, source = _base(flat[0].get("config_file", ""))
    marked = frozenset(i for i, key in enumerate(keys) if key != "config_file" and base.get(key) != flat[0][key])
    note = Paragraph(f"Marked: what differs from {source}.", note=True)
    rows = [[key, flat[0][key], base.get(key, "") if i in marked else ""] for i, key in enumerate(keys)]
    return [note, Table(["key", "value", f"in {source}"], rows, marked)]


def _base(file: str) -> tuple[dict[str, Any], str]:
    """The settings that a run's configuration file gives, and its name; the defaults where it is not known any more."""
    if file and Path(file).exists():
        try:
            given = configuration.with_absolute_paths(configuration.load(Experiment, Path(file), []))
            return dict(configuration.flatten(configuration.to_dict(given))), file
        except UserError:  # the file has changed since, and is not a configuration any more
            pass
    return dict(configuration.flatten(configuration.to_dict(Experiment()))), "the defaults"


def _figure(runs: Sequence[Training], name: str, title: str, traces: Iterable[Trace | None], y: Axis) -> list[Figure]:
    """A figure of the traces that there are, or none; the axis of steps is as long as the runs."""
    known = [trace for trace in traces if trace is not None]
    most = max((record["step"] for run in runs for record in [*run.train, *run.evaluations]), default=None)
    about = TERMS.get(title, TERMS["Brier-1"] if title.startswith("Brier-") else "")
    return [Figure(name, title, replace(STEPS, least=0, most=most), known, y, about)] if known else []


def _percent(record: Record, key: str) -> str:
    """A score as the terminal shows it."""
    value, half = record.get(key), half_interval(record, key)
    return "" if value is None else f"{value:.3%}" + (f" ± {half:.3%}" if half is not None else "")


def _with_error(record: Record, key: str) -> str:
    value, half = record.get(key), half_interval(record, key)
    return "" if value is None else number(value) + (f" ± {half:.2g}" if half is not None else "")
