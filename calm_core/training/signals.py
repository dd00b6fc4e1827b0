"""Being asked to save or to stop: by a signal or a file, acted upon by all ranks at the same step boundary."""

import signal
from dataclasses import dataclass
from pathlib import Path
from types import FrameType, TracebackType

import torch
import torch.distributed as dist


@dataclass(frozen=True)
class Asked:
    """What all ranks have agreed to do after this step."""

    save: bool
    stop: bool


class Requests:
    """What a person or a scheduler asks of a running training, within its block.

    To stop: SIGTERM or SIGUSR1 to any rank, as schedulers send ahead of preemption or a time limit, or a file `stop`
    in the run's folder. To save a checkpoint and go on: a file `save` there. A file is removed once it is obeyed.
    """

    def __init__(self, folder: Path) -> None:
        self._signalled = False
        self._save, self._stop = folder / "save", folder / "stop"

    def __enter__(self) -> "Requests":
        self._before = {number: signal.signal(number, self._note) for number in (signal.SIGTERM, signal.SIGUSR1)}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def agreed(self, device: torch.device) -> Asked:
        """What any rank has been asked for. Collective; rank 0 alone looks for the files."""
        first = dist.get_rank() == 0
        save, stop = first and self._save.exists(), self._signalled or (first and self._stop.exists())
        asked = torch.tensor([float(save), float(stop)], device=device)
        dist.all_reduce(asked, op=dist.ReduceOp.MAX)
        return Asked(*(bool(each) for each in asked.tolist()))

    def obeyed(self, asked: Asked) -> None:
        """Remove the files behind `asked`: it is done."""
        if dist.get_rank() == 0:
            for wanted, file in ((asked.save, self._save), (asked.stop, self._stop)):
                if wanted:
                    file.unlink(missing_ok=True)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._signalled = True
