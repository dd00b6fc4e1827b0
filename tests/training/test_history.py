import json
from pathlib import Path

import pytest

from calm_core.errors import UserError
from calm_core.training.history import samples_of_step


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """Ten steps: 8 samples each, 6 since a resume at step 4, after attempts from steps 7 and 4 that are done again."""
    starts = [(0, 0, 8), (7, 56, 2), (4, 32, 3), (4, 32, 6)]
    records = [
        {"step": step, "kind": "event", "event": "start", "samples": samples, "global_batch": batch}
        for step, samples, batch in starts
    ]
    records += [{"step": step, "kind": "train"} for step in (5, 10)]
    (tmp_path / "metrics.jsonl").write_text("\n".join(json.dumps(record) for record in records))
    return tmp_path


@pytest.mark.parametrize(
    ("step", "samples"), [(1, range(8)), (4, range(24, 32)), (5, range(32, 38)), (10, range(62, 68))]
)
def test_samples_follow_the_batch_size_of_their_time(run, step, samples):
    assert samples_of_step(run, step) == samples


def test_steps_partition_the_samples(run):
    together = [sample for step in range(1, 11) for sample in samples_of_step(run, step)]
    assert together == list(range(68))


@pytest.mark.parametrize("step", [0, -1, 11])
def test_a_step_that_was_not_taken_is_refused(run, step):
    with pytest.raises(UserError, match="steps 1 to 10"):
        samples_of_step(run, step)
