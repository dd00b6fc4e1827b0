"""Bytes of the tensors that are alive, and the most there have been."""

import gc
import weakref
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter


class LiveBytes(TorchDispatchMode):
    """Follows every storage that an operation makes until it is freed; `now` and `peak` count those alive at the start.

    On a CPU the backward pass runs in the thread that asked for it, so this mode sees it, too.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known: dict[int, weakref.ref] = {}
        gc.collect()
        for thing in gc.get_objects():
            if isinstance(thing, torch.Tensor):
                self._follow(thing)
        self.start = self.now

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for thing in tree_iter((out, args)):
            if isinstance(thing, torch.Tensor):
                self._follow(thing)
        return out

    def _follow(self, tensor: torch.Tensor) -> None:
        if tensor.layout != torch.strided:
            return
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self._known:
            return

        def freed(_: Any) -> None:
            self.now -= size
            self._known.pop(key, None)

        self._known[key] = weakref.ref(storage, freed)
        self.now += size
        self.peak = max(self.peak, self.now)
