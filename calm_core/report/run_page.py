"""The page of a training run, or of several side by side: everything on it is read from the run folders."""

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote

from calm_core import config as configuration
from calm_core.config.experiment import Experiment
from calm_core.errors import UserError
from calm_core.io import read_json
from calm_core.report.page import Figure, Section, Table, Text, Trace, write_page
from calm_core.training.run_log import read_records
from calm_core.training.watchdog import hangs, stacks

Record = dict[str, Any]

# What a training record may hold beside its loss, and how the page calls it; other numbers in it are terms of the loss.
PACE = {
    "gradient_norm": "gradient norm",
    "learning_rate": "learning rate",
    "tokens_per_second": "tokens/s",
    "mfu": "model FLOPs utilisation",
    "memory_gib": "memory of a rank, GiB",
    "data_wait": "share of time waiting for data",
    "skipped_updates": "updates skipped so far",
    "spikes": "updates skipped as spikes so far",
}

BASELINES = {"unigram_": "unigram", "bigram_": "bigram"}

TRAININGS = ("calm", "autoencoder")

# Of an event, what has a place of its own on the page.
_ENVELOPE = {"step", "kind", "event", "time", "stages"}


@dataclass(frozen=True)
class Training:
    """The records of one training run, `said` being the texts that it has come to in the end."""

    name: str
    folder: Path
    train: list[Record]
    evaluations: list[Record]
    events: list[Record]
    samples: list[Record]
    said: list[Record]


class Happening(NamedTuple):
    """Something that befell a run: when (seconds since 1970, 0 where nobody noted it), at what step, what, and how."""

    time: float
    step: Any
    what: str
    details: str


def read_training(folder: Path, name: str) -> Training:
    """Read what a training run has recorded so far.

    Raises:
        UserError: if there is no run.
    """
    if not (folder / "metrics.jsonl").exists():
        raise UserError(f"{folder} holds no training run (metrics.jsonl is missing): give a folder such as runs/demo.")
    records = read_records(folder / "metrics.jsonl")
    kinds = ([r for r in records if r["kind"] == kind] for kind in ("train", "eval", "event", "sample"))
    said = folder.parent / "samples.json"
    return Training(name, folder, *kinds, read_json(said) if folder.name == "calm" and said.exists() else [])


def trainings(runs: Sequence[Path]) -> list[Training]:
    """The training runs below the folders of experiments, or those that the folders are, each once.

    Their names are the ends of their paths, of two parts or as many more as tell them apart.

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
    write_page(page, ", ".join(map(str, runs)), sections)


def _sections(runs: Sequence[Training], title: str, beside: Path) -> list[Section]:
    """All that there is to show of some runs, on a page in the folder `beside`."""
    prefix = title.replace("/", "-")
    parts: list[tuple[str, Callable[[], list[Any]]]] = [
        ("", lambda: [_summary(runs), *_losses(runs, prefix)]),
        (": scores on held-out documents", lambda: _scores(runs, prefix)),
        (": pace and health", lambda: _curves(runs, prefix, PACE)),
        (": samples", lambda: _samples(runs)),
        (": layout", lambda: _layout(runs)),
        (": restarts and faults", lambda: _faults(runs, beside)),
        (": profiles", lambda: _profiles(runs, beside)),
        (": configuration", lambda: _configuration(runs)),
    ]
    return [Section(f"{title}{heading}", make()) for heading, make in parts]


def _summary(runs: Sequence[Training]) -> Table:
    rows = []
    for run in runs:
        last = run.train[-1] if run.train else {}
        shown = (last.get(name) for name in ("step", "loss", "tokens_per_second", "mfu"))
        evaluated = run.evaluations[-1] if run.evaluations else {}
        rows.append([run.name, *map(_number, shown), *(_with_error(evaluated, name) for name in ("loss", "brier_1"))])
    head = ["run", "step", "training loss", "tokens/s", "mfu", "held-out loss", "Brier-1"]
    return Table(head, rows)


def _losses(runs: Sequence[Training], prefix: str) -> list[Figure]:
    both = [
        trace
        for run in runs
        for trace in (
            _trace(run.train, "loss", f"{run.name} training", run.name),
            _evaluated(run.evaluations, "loss", f"{run.name} held-out", f"{run.name} held-out"),
        )
    ]
    figures = _figure(f"{prefix}-loss", "loss", both)
    terms = dict.fromkeys(name for run in runs for record in run.train for name in record)
    known = {*PACE, "step", "kind", "loss", "samples"}
    return figures + _curves(runs, prefix, {name: f"{name}, a term of the loss" for name in terms if name not in known})


def _scores(runs: Sequence[Training], prefix: str) -> list[Figure]:
    figures = []
    for n in range(1, 5):
        traces = [_evaluated(run.evaluations, f"brier_{n}", run.name, run.name) for run in runs]
        for baseline, name in BASELINES.items():
            traces.append(_trace(runs[0].evaluations, f"{baseline}brier_{n}", name, name))
        figures += _figure(f"{prefix}-brier-{n}", f"Brier-{n}", traces)
    shown = {"brier_lm": "BrierLM (where all four are significant)", "collision_1": "collision rate of the next token"}
    shown |= {"token_accuracy": "tokens rebuilt"}
    for key, title in shown.items():
        figures += _figure(f"{prefix}-{key}", title, [_evaluated(r.evaluations, key, r.name, r.name) for r in runs])
    return figures


def _curves(runs: Sequence[Training], prefix: str, names: dict[str, str]) -> list[Figure]:
    return [
        figure
        for key, title in names.items()
        for figure in _figure(f"{prefix}-{key}", title, [_trace(run.train, key, run.name, run.name) for run in runs])
    ]


def _samples(runs: Sequence[Training]) -> list[Text | Table]:
    """The texts of the finished runs, then those on the way, the newest first."""
    rows = [
        [run.name, sample.get("step", "samples.json"), f"{sample['temperature']:g}", sample["prompt"], sample["text"]]
        for run in runs
        for sample in [*run.said, *reversed(run.samples)]
    ]
    return [Table(["run", "step", "temperature", "prompt", "continued"], rows)] if rows else []


def _layout(runs: Sequence[Training]) -> list[Table]:
    tables = []
    for run in runs:
        starts = [event for event in run.events if event["event"] == "start"]
        if not starts:
            continue
        facts = {key: value for key, value in starts[-1].items() if key not in _ENVELOPE}
        tables.append(Table(["of " + run.name, ""], [[key, _number(value)] for key, value in facts.items()]))
        if stages := starts[-1].get("stages"):
            head = list(stages[0])
            tables.append(Table(head, [[_number(stage[key]) for key in head] for stage in stages]))
    return tables


def _faults(runs: Sequence[Training], beside: Path) -> list[Table | Text]:
    rows = []
    for run in runs:
        happened = sorted([*_recorded(run), *_hung(run), *_of_jobs(run)], key=lambda one: one.time)
        rows += [[run.name, _clock(time), *rest] for time, *rest in happened]
    table = [Table(["run", "time (UTC)", "step", "what", "details"], rows)] if rows else []
    return [*table, *_links(runs, beside, "stacks of ranks that the watchdog ended", lambda run: stacks(run / "logs"))]


def _recorded(run: Training) -> Iterator[Happening]:
    """What the run itself has written down; a start that follows no word of an end follows a crash."""
    last = ""
    for event in run.events:
        what = event["event"]
        if what == "start" and last:
            what = "restart" if last in ("stopped", "finished") else "restart after a crash"
        if what not in ("start", "checkpoint", "finished"):
            yield Happening(event.get("time", 0.0), event["step"], what, _details(event))
        if event["event"] in ("start", "stopped", "finished", "failed"):
            last = event["event"]


def _hung(run: Training) -> Iterator[Happening]:
    for time, title in hangs(run.folder / "logs"):
        yield Happening(time, "", "ended by the watchdog", title)


def _of_jobs(run: Training) -> Iterator[Happening]:
    """What the jobs of the experiment on a cluster noted: those of the autoencoder's stages, or those of all others."""
    for journal in sorted((run.folder.parent / "slurm").glob("*/journal.jsonl")):
        stage = journal.parent.name
        if ("autoencoder" in stage) != (run.folder.name == "autoencoder"):
            continue
        trained = stage.startswith(f"train_{run.folder.name}")  # other stages count other things
        for event in read_records(journal):
            step = event.get("step", "") if trained else ""
            yield Happening(event["time"], step, f"{stage}: {event['event']}", _details(event))


def _details(record: Record) -> str:
    return ", ".join(f"{key}: {_number(value)}" for key, value in record.items() if key not in _ENVELOPE)


def _clock(time: float) -> str:
    return datetime.fromtimestamp(time, UTC).strftime("%Y-%m-%d %H:%M:%S") if time else ""


def _profiles(runs: Sequence[Training], beside: Path) -> list[Text]:
    traces = "traces open in chrome://tracing or ui.perfetto.dev"
    return _links(runs, beside, traces, lambda folder: sorted((folder / "profile").glob("*")))


def _links(runs: Sequence[Training], beside: Path, title: str, find: Callable[[Path], list[Path]]) -> list[Text]:
    """Links from a page in the folder `beside` to files of the runs."""
    return [
        Text(f"{run.name}, {title}:", links={file.name: quote(os.path.relpath(file, beside)) for file in files})
        for run in runs
        if (files := find(run.folder))
    ]


def _configuration(runs: Sequence[Training]) -> list[Table | Text]:
    """All settings of each run; marked are those that its base file does not say, or between runs the unequal ones."""
    flat = [dict(configuration.flatten(configuration.read_yaml(run.folder / "config.yaml"))) for run in runs]
    keys = list(dict.fromkeys(key for settings in flat for key in settings))
    if len(runs) > 1:
        rows = [[key, *(settings.get(key, "") for settings in flat)] for key in keys]
        unequal = frozenset(i for i, row in enumerate(rows) if len(set(map(str, row[1:]))) > 1)
        rows = [rows[i] for i in sorted(unequal)]
        return [Text("Only what differs is shown.", note=True), Table(["key", *(run.name for run in runs)], rows)]
    base, source = _base(flat[0].get("config_file", ""))
    marked = frozenset(i for i, key in enumerate(keys) if key != "config_file" and base.get(key) != flat[0][key])
    note = Text(f"Marked: what differs from {source}.", note=True)
    rows = [[key, flat[0][key], base.get(key, "") if i in marked else ""] for i, key in enumerate(keys)]
    return [note, Table(["key", "value", f"in {source}"], rows, marked)]


def _base(file: str) -> tuple[dict[str, Any], str]:
    """The settings that a run's configuration file gives, and its name; the defaults where it is not known any more."""
    if file and Path(file).exists():
        try:
            given = configuration.with_absolute_paths(configuration.load(Experiment, Path(file), []))
            return dict(configuration.flatten(configuration.to_dict(given))), file
        except UserError:  # the file has changed since, and is no configuration now
            pass
    return dict(configuration.flatten(configuration.to_dict(Experiment()))), "the defaults"


def _figure(name: str, title: str, traces: Iterable[Trace | None]) -> list[Figure]:
    """A figure of the traces that there are, or none."""
    known = [trace for trace in traces if trace is not None]
    return [Figure(name, title, "step", known)] if known else []


def _trace(records: Sequence[Record], key: str, name: str, group: str) -> Trace | None:
    known = [record for record in records if key in record]
    return Trace(name, [r["step"] for r in known], [r[key] for r in known], group=group) if known else None


def _evaluated(records: Sequence[Record], key: str, name: str, group: str) -> Trace | None:
    """A trace with a band of two standard errors."""
    known = [record for record in records if record.get(key) is not None]
    if not known:
        return None
    errors = [record.get(f"{key}_error") for record in known]
    band = [None if error is None else 2 * error for error in errors] if any(errors) else None
    return Trace(name, [r["step"] for r in known], [r[key] for r in known], band, group, points=True)


def _with_error(record: Record, key: str) -> str:
    value, error = record.get(key), record.get(f"{key}_error")
    return "" if value is None else _number(value) + (f" ± {error:.2g}" if error is not None else "")


def _number(value: Any) -> str:
    if value is None:
        return ""
    if not isinstance(value, float):
        return str(value)
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
