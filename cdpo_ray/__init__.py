"""Curriculum DPO for text-to-image models, on Ray.

`__all__` is the Python API. Its names are imported on first use, so that `import cdpo_ray` imports neither torch nor
Ray.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from cdpo_ray.version import __version__ as __version__

if TYPE_CHECKING:
    from cdpo_ray.api.pipeline import run_pipeline
    from cdpo_ray.api.results import Run, open_run
    from cdpo_ray.config import Config, load_config
    from cdpo_ray.errors import CdpoError
    from cdpo_ray.user_code import save_function

__all__ = ["CdpoError", "Config", "Run", "load_config", "open_run", "run_pipeline", "save_function"]
_MODULES = {
    "CdpoError": "cdpo_ray.errors",
    "Config": "cdpo_ray.config",
    "Run": "cdpo_ray.api.results",
    "load_config": "cdpo_ray.config",
    "open_run": "cdpo_ray.api.results",
    "run_pipeline": "cdpo_ray.api.pipeline",
    "save_function": "cdpo_ray.user_code",
}
"""Public name -> its module."""


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_MODULES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
