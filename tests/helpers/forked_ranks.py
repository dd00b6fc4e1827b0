"""A script on several ranks that share their imports: `forked_ranks.py RANKS SCRIPT ARGUMENTS`, as torchrun runs it.

Under torchrun each rank is an interpreter of its own, which imports torch, Megatron-core and DeepSpeed for seconds.
"""

import gc
import os
import runpy
import signal
import sys
import traceback

# What the ranks need is imported before they are forked. The optimizers of torch need its compiler.
import torch.distributed as dist

import calm_core.checkpoint.load
import calm_core.distributed.engine
import calm_core.training.calm_task
import calm_core.training.launch  # noqa: F401


def run_rank(rank: int, ranks: int, port: int, script: str, arguments: list[str]) -> None:
    """Become this rank, run the script and end the process."""
    world = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "MASTER_PORT": port}
    os.environ |= {name: str(value) for name, value in world.items()}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "TORCHELASTIC_USE_AGENT_STORE": "True"}
    sys.argv, code = [script, *arguments], 0
    sys.path.insert(0, os.path.dirname(script))
    try:
        runpy.run_path(script, run_name="__main__")
    except SystemExit as ended:
        code = int(ended.code or 0)
    except BaseException:
        print(f"rank {rank}: {traceback.format_exc()}", file=sys.stderr)
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def main(ranks: int, script: str, arguments: list[str]) -> int:
    """Fork the ranks; the exit code of the first that fails, which ends the others, or 0."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    gc.collect()
    gc.freeze()  # the ranks collect the garbage of their runs, without going through all that is imported
    running = set()
    for rank in range(ranks):
        if (child := os.fork()) == 0:
            run_rank(rank, ranks, store.port, script, arguments)
        running.add(child)
    while running:
        child, status = os.wait()
        running.discard(child)
        if status:
            for other in running:
                os.kill(other, signal.SIGKILL)
            return max(os.waitstatus_to_exitcode(status), 1)
    return 0


if __name__ == "__main__":
    raise SystemExit(main(int(sys.argv[1]), sys.argv[2], sys.argv[3:]))
