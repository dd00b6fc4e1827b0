"""Work shared among processes of this machine."""

import multiprocessing
import signal
import traceback
from collections.abc import Callable, Iterable, Iterator
from multiprocessing.connection import Connection, wait
from typing import TypeVar

from calm_core.errors import UserError

Task = TypeVar("Task")
Result = TypeVar("Result")


def spread(function: Callable[[Task], Result], tasks: Iterable[Task], workers: int) -> Iterator[Result]:
    """`function` of each task, in the order they get done; `workers` processes do them, or this one if it is one.

    The processes are forks: `function` may be anything, only tasks and results must pickle. Tasks are drawn as they are
    needed, one ahead of those that are being done, and none is kept here.

    Raises:
        UserError: that a task has raised.
        RuntimeError: with the trace of anything else that a task has raised, or that a process has died.
    """
    if workers == 1:
        yield from map(function, tasks)
        return
    context = multiprocessing.get_context("fork")
    processes, idle, busy, done = [], [], [], []
    try:
        for _ in range(workers):
            here, there = context.Pipe()
            process = context.Process(target=_work, args=(function, there, [*idle, here]), daemon=True)
            process.start()
            there.close()  # or the end of the process would not end the pipe
            processes.append(process)
            idle.append(here)
        remaining = iter(tasks)
        upcoming = next(remaining, None)
        while upcoming is not None or busy:
            while idle and upcoming is not None:
                connection = idle.pop()
                connection.send(upcoming)
                busy.append(connection)
                upcoming = next(remaining, None)
            yield from done  # the processes are at work again while the caller looks at what they have done
            finished = wait(busy)
            done = [_result(connection) for connection in finished]
            busy = [connection for connection in busy if connection not in finished]
            idle += finished
        yield from done
    finally:
        for process in processes:
            process.terminate()
        for process in processes:
            process.join()


def _work(function: Callable[[Task], Result], connection: Connection, inherited: Iterable[Connection]) -> None:
    """Do tasks until the other end is gone."""
    for end in inherited:
        end.close()  # a copy of the other end: kept here, it would outlive the parent
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # an interrupt is for the parent to answer
    while True:
        try:
            task = connection.recv()
        except EOFError:
            return
        try:
            answer = function(task), None
        except UserError as error:
            answer = None, error
        except Exception:
            answer = None, RuntimeError(f"in a worker process:\n{traceback.format_exc()}")
        try:
            connection.send(answer)
        except BrokenPipeError:
            return


def _result(connection: Connection) -> Result:
    try:
        result, error = connection.recv()
    except EOFError:
        raise RuntimeError("A worker process was killed, perhaps for want of memory: use fewer workers.") from None
    if error is not None:
        raise error
    return result
