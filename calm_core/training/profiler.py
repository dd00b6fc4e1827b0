"""A profile of some training steps, on demand: a Chrome trace and a table of the heaviest operators for every rank."""

from pathlib import Path
from types import TracebackType

from torch.profiler import ProfilerActivity, profile

from calm_core.parallel.topology import Topology
from calm_core.training.profile_config import ProfileConfig

ROWS = 30  # operators in the table


class StepProfiler:
    """Profiles the steps that the configuration names; otherwise it costs nothing.

    Each rank writes `rank-R.json.gz`, which chrome://tracing and Perfetto open, and `rank-R.txt` into the folder.
    """

    def __init__(self, config: ProfileConfig, folder: Path, topology: Topology) -> None:
        self._first, self._last = config.steps or (0, 0)
        self._folder, self._topology = folder, topology
        self._profile: profile | None = None

    def __enter__(self) -> "StepProfiler":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._profile is not None:  # the run ends inside the range
            self._finish(self._profile)

    def begin(self, step: int) -> None:
        """Called before step `step`."""
        if step == self._first:
            activities = [ProfilerActivity.CPU]
            if self._topology.device.type == "cuda":
                activities.append(ProfilerActivity.CUDA)
            self._profile = profile(activities=activities)
            self._profile.start()

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
        self._topology.say(f"profile of steps {self._first} to {self._last}: {self._folder}")
