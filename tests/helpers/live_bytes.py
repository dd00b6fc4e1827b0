"""Bytes of the tensors that are alive, and the most there have been."""

import gc
import weakref
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter


class LiveBytes(TorchDispatchMode):
    """Follows every storage from an operation that makes or uses it until it is freed; those alive at the start count.

    On a CPU the backward pass runs in the thread that asked for it, so this mode sees it, too.

    Args:
        older: storages (see `storages`) of no concern.
    """

    def __init__(self, older: dict[int, weakref.ref]) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._older = older
        self._known: dict[int, weakref.ref] = {}
        for tensor in _tensors():
            self._follow(tensor)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for thing in tree_iter((out, args)):
            if isinstance(thing, torch.Tensor):
                self._follow(thing)
        return out

    def _follow(self, tensor: torch.Tensor) -> None:
        if not _has_bytes(tensor):
            return
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self._known or (key in self._older and self._older[key]() is not None):
            return

        def freed(_: Any) -> None:
            self.now -= size
            self._known.pop(key, None)

        self._known[key] = weakref.ref(storage, freed)
        self.now += size
        self.peak = max(self.peak, self.now)


def storages() -> dict[int, weakref.ref]:
    """The storages of all tensors that are alive."""
    found = (tensor.untyped_storage() for tensor in _tensors())
    return {storage._cdata: weakref.ref(storage) for storage in found}


def _tensors() -> list[torch.Tensor]:
    gc.collect()
    return [x for x in gc.get_objects() if isinstance(x, torch.Tensor) and _has_bytes(x)]


def _has_bytes(tensor: torch.Tensor) -> bool:
    return tensor.layout == torch.strided and tensor.device.type != "meta"
