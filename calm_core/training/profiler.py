"""A profile of configured training steps: a Chrome trace and a table of the slowest operators for every rank."""

from pathlib import Path
from types import TracebackType

from torch.profiler import ProfilerActivity, profile

from calm_core.config.experiment import ProfileConfig
from calm_core.distributed.topology import Topology

ROWS = 30  # operators in the table


class StepProfiler:
    """Profiles the steps that the configuration names, as far as they are not done yet.

    Each rank writes `rank-R.json.gz`, which chrome://tracing and Perfetto open, and `rank-R.txt` into the folder.
    """

    def __init__(self, config: ProfileConfig, folder: Path, topology: Topology, done: int) -> None:
        self._first, self._last = config.steps or (0, 0)
        self._folder, self._topology = folder, topology
        self._done = done  # steps done when the run starts or resumes
        self._profile: profile | None = None
        self._profiled: list[int] = []

    def __enter__(self) -> "StepProfiler":
        if 0 < self._last <= self._done:
            steps = f"profile.steps=[{self._first}, {self._last}]"
            self._topology.say(f"{steps}: nothing is profiled, the run resumes after step {self._done}")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._profile is not None:  # the run ends inside the range
            self._finish(self._profile)

    def begin(self, step: int) -> None:
        """Called before step `step`."""
        if not self._first <= step <= self._last:
            return
        if self._profile is None:
            activities = [ProfilerActivity.CPU]
            if self._topology.device.type == "cuda":
                activities.append(ProfilerActivity.CUDA)
            self._profile = profile(activities=activities)
            self._profile.start()
        self._profiled.append(step)

    def end(self, step: int) -> None:
        """Called after step `step`."""
        if self._profile is not None and step == self._last:
            self._finish(self._profile)

    def _finish(self, profiled: profile) -> None:
        profiled.stop()
        self._profile = None
        self._folder.mkdir(parents=True, exist_ok=True)
        name = f"rank-{self._topology.rank}"
        profiled.export_chrome_trace(str(self._folder / f"{name}.json.gz"))
        heaviest = f"self_{self._topology.device.type}_time_total"
        (self._folder / f"{name}.txt").write_text(profiled.key_averages().table(sort_by=heaviest, row_limit=ROWS))
        self._topology.say(f"profile of steps {self._profiled[0]} to {self._profiled[-1]}: {self._folder}")
