"""Pretraining of Continuous Autoregressive Language Models (CALM, arXiv 2510.27688) at scale.

    import calm_core as calm
    model = calm.load("runs/demo")
    print(model.generate("The", temperature=0.5))

Importing the package is cheap: torch is imported by `load`.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from calm_core.api import LanguageModel, load

__all__ = ["LanguageModel", "__version__", "load"]


def __getattr__(name: str) -> Any:
    if name in ("LanguageModel", "load"):
        from calm_core import api

        return getattr(api, name)
    if name == "__version__":
        from importlib.metadata import version

        return version("calm")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
