"""A user's own reward, loss or measure, ``module:function`` in a configuration."""

import contextlib
import importlib
import importlib.machinery
import importlib.util
import os
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

from cdpo_ray.errors import CdpoError

USER_FUNCTION = re.compile(r"^[A-Za-z_][\w.]*:[A-Za-z_]\w*$")


def load_function(what: str, name: str, error_class: type[CdpoError]) -> Any:
    """Import a ``module:function`` from the file of that name in the working directory, or an installed module.

    Args:
        what: what it serves as, for messages: ``reward``.

    Raises:
        CdpoError: of ``error_class``, if it cannot be imported.
    """
    module_name, _, attribute = name.partition(":")
    with attribute_errors(what, name, error_class):
        try:
            return getattr(_module(module_name), attribute)
        except (ImportError, AttributeError) as error:
            raise error_class(
                f"{what} `{name}`: cannot be imported: {error}; the module must be installed, or be in the working"
                " directory of the command"
            ) from None


def source_files(name: str) -> dict[str, Path]:
    """File of a function's module, or all files of its package, found as `load_function` does, without importing it."""
    module = name.partition(":")[0].partition(".")[0]
    if (own := Path(f"{module}.py").absolute()).is_file():
        return {module: own}
    spec = importlib.machinery.PathFinder.find_spec(module, [*sys.path, os.getcwd()])
    if spec is None:
        return {}
    if spec.submodule_search_locations is None:
        return {module: Path(spec.origin)} if spec.origin else {}
    folders = map(Path, spec.submodule_search_locations)
    return {str(file.relative_to(folder)): file for folder in folders for file in sorted(folder.rglob("*.py"))}


@contextlib.contextmanager
def attribute_errors(
    what: str,
    name: str,
    error_class: type[CdpoError],
    but: Callable[[BaseException], bool] = lambda error: False,
) -> Iterator[None]:
    """Turn every exception of a user's code into one of ``error_class``, with its name and line.

    This includes `SystemExit`, which would end the process.

    Args:
        but: exceptions for which this is true are raised unchanged.
    """
    try:
        yield
    except CdpoError:
        raise
    except (Exception, SystemExit) as error:
        if but(error):
            raise
        trace = error.__traceback__
        while trace and trace.tb_next:
            trace = trace.tb_next
        where = f" at {trace.tb_frame.f_code.co_filename}:{trace.tb_lineno}" if trace else ""
        raise error_class(f"{what} `{name}` raised {type(error).__name__}: {error}{where}") from None


def _module(name: str) -> ModuleType:
    """Import a module; the working directory is appended to the path, so that no other file in it hides a module."""
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    spec = importlib.util.spec_from_file_location(name, Path(f"{name}.py").absolute())
    if name in sys.modules or not Path(f"{name}.py").is_file() or not spec or not spec.loader:
        return importlib.import_module(name)
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module
