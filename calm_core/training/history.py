"""Which samples a step of a run consumed, read from the run's folder."""

from pathlib import Path

from calm_core.errors import UserError
from calm_core.training.run_log import read_metrics


def samples_of_step(run: Path, step: int) -> range:
    """The global indices of the samples of training step `step`, counted from 1.

    Every start and resume of a run records its step, the samples consumed and the global batch from there on, so a
    batch size that changed on the way is accounted for.

    Raises:
        UserError: if the run has not come that far.
    """
    done = max((record["step"] for record in read_metrics(run / "metrics.jsonl", "train")), default=0)
    starts = [event for event in read_metrics(run / "metrics.jsonl", "event") if event["event"] == "start"]
    before = [start for start in starts if start["step"] < step]
    if not before or step > done:
        raise UserError(f"{run} has recorded steps 1 to {done}, not {step}: choose another --step.")
    start = before[-1]
    first = start["samples"] + (step - 1 - start["step"]) * start["global_batch"]
    return range(first, first + start["global_batch"])
