from pathlib import Path

from calm_core import config
from calm_core.experiment import Experiment
from calm_core.training.launch import run_calm


def test_runs_one_after_another_let_go_of_their_process_groups(tiny: Path) -> None:
    """Gloo's threads poll: those of groups that nobody frees slow the whole machine."""
    left = []
    for steps in (1, 2):
        assert run_calm(config.load(Experiment, tiny / "config.yaml", [f"run={tiny}", f"training.steps={steps}"])) == 0
        left.append(sum((task / "comm").read_text() == "gloo_tcp_loop\n" for task in Path("/proc/self/task").iterdir()))
    assert left[1] <= left[0] + 1  # DeepSpeed keeps one; a run makes about twenty
