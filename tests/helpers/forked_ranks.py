"""Runs scripts on several ranks, as torchrun does, in processes that are forked from this one with its imports.

Under torchrun each rank is an interpreter of its own, which imports torch, Megatron-core and DeepSpeed for seconds.
Each line of the standard input asks for a script by its words in JSON: OUTPUT ENVIRONMENT RANKS SCRIPT ARGUMENTS...
No ranks stand for a process that torchrun has not started. Two lines answer: `leader` and the id of the process that
leads the ranks, in a session of its own, and at its end `code` and its exit code.
"""

import ctypes
import gc
import json
import os
import runpy
import signal
import sys
import traceback

# What the ranks need is imported before they are forked. The optimizers of torch need its compiler.
import torch._dynamo  # noqa: F401
import torch.distributed as dist

import calm_core.checkpoint.load
import calm_core.distributed.engine
import calm_core.training.calm_task
import calm_core.training.launch  # noqa: F401

PR_SET_PDEATHSIG = 1  # of prctl(2)


def run(script: str, arguments: list[str]) -> int:
    """Run the script as the main program of this process; its exit code."""
    sys.argv, code = [script, *arguments], 0
    sys.path.insert(0, os.path.dirname(script))
    try:
        runpy.run_path(script, run_name="__main__")
    except SystemExit as ended:
        code = int(ended.code or 0)
    except BaseException:
        print(f"rank {os.environ.get('RANK', 0)}: {traceback.format_exc()}", file=sys.stderr)
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    return code


def run_ranks(ranks: int, script: str, arguments: list[str]) -> int:
    """Fork the ranks; the exit code of the first that fails, which ends the others, or 0."""
    port, running = store_port(), set()
    for rank in range(ranks):
        if (child := os.fork()) == 0:
            end_with_parent()
            world = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "MASTER_PORT": port}
            os.environ |= {name: str(value) for name, value in world.items()}
            os.environ |= {"MASTER_ADDR": "127.0.0.1", "TORCHELASTIC_USE_AGENT_STORE": "True"}
            os._exit(run(script, arguments))
        running.add(child)
    while running:
        child, status = os.wait()
        running.discard(child)
        if status:
            for other in running:
                os.kill(other, signal.SIGKILL)
            return max(os.waitstatus_to_exitcode(status), 1)
    return 0


def store_port() -> int:
    """The port of a store for the ranks to meet at, in a process of its own that ends with this one.

    The store's thread takes locks of the C library (to name an address, say), which a rank forked at that moment would
    hold for ever: so the process that forks the ranks has no such thread.
    """
    reading, writing = os.pipe()
    if os.fork() == 0:
        end_with_parent()
        try:
            store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
            os.write(writing, b"%d\n" % store.port)
            signal.pause()
        finally:
            os._exit(1)
    os.close(writing)
    with open(reading) as answer:
        return int(answer.readline())


def lead(output: str, environment: dict[str, str], ranks: int, script: str, *arguments: str) -> None:
    """Become the parent of the ranks, or with no ranks the script itself, and write to the file `output`."""
    os.setsid()
    end_with_parent()
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    for stream in (1, 2):
        os.dup2(os.open(output, os.O_WRONLY | os.O_APPEND), stream)
    os.environ.clear()
    os.environ |= environment
    code = 1
    try:
        code = run_ranks(ranks, script, list(arguments)) if ranks else run(script, list(arguments))
    finally:
        os._exit(code)


def end_with_parent() -> None:
    """Have Linux kill this process when its parent ends."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def serve() -> None:
    """Run scripts one after the other, until the standard input or its writer ends."""
    end_with_parent()
    gc.collect()
    gc.freeze()  # the ranks collect the garbage of their runs, without going through all that is imported
    for line in sys.stdin:
        if (leader := os.fork()) == 0:
            lead(*json.loads(line))
        print("leader", leader, flush=True)
        print("code", os.waitstatus_to_exitcode(os.waitpid(leader, 0)[1]), flush=True)


if __name__ == "__main__":
    serve()
