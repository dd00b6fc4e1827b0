"""From `head.kind` to the module of the head."""

from importlib import import_module

from calm_core.config.model_config import HEADS
from calm_core.model.heads.protocol import HeadModule


def head_module(kind: str) -> HeadModule:
    """The module of this kind of head.

    Raises:
        KeyError: if the kind is not registered.
    """
    return import_module(HEADS[kind].module)
