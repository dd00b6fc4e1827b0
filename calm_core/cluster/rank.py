"""One rank under srun: `python -m calm_core.cluster.rank RECORDS SCRIPT ARGUMENTS`.

Runs the script as the process that it is in the job, and leaves RECORDS/RANK.json when it has ended, however that was:
srun ends with the code of a process that it killed itself, not with that of the one that failed.
"""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from calm_core.errors import ExitCode
from calm_core.io import write_json


def main(arguments: list[str]) -> int:
    """Run the script; its exit code, but 0 when it was stopped: srun would kill the others while they still save."""
    records, *command = arguments
    rank, environment = os.environ["SLURM_PROCID"], dict(os.environ)
    if os.environ["SLURM_NTASKS"] != "1":
        environment |= {
            "RANK": rank,
            "WORLD_SIZE": os.environ["SLURM_NTASKS"],
            "LOCAL_RANK": os.environ["SLURM_LOCALID"],
        }
    # Slurm signals the script too. A handler, since a child would inherit that a signal is ignored.
    for number in (signal.SIGUSR1, signal.SIGTERM):
        signal.signal(number, lambda *_: None)
    code = subprocess.run([sys.executable, *command], env=environment, check=False).returncode
    node = os.environ.get("SLURMD_NODENAME", "")
    write_json(Path(records) / f"{rank}.json", {"rank": int(rank), "node": node, "code": code, "time": time.time()})
    if code == ExitCode.STOPPED:
        return ExitCode.OK
    return code if code >= 0 else 128 - code


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
