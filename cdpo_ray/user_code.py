"""A user's own reward, loss or measure, ``module:function`` in a configuration."""

import builtins
import contextlib
import importlib
import importlib.machinery
import importlib.util
import inspect
import os
import re
import symtable
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FunctionType, ModuleType
from typing import Any

from cdpo_ray.errors import CdpoError, StoreError

USER_FUNCTION = re.compile(r"^[A-Za-z_][\w.]*:[A-Za-z_]\w*$")
WRITTEN_HEADER = "# Written by cdpo_ray.save_function; change the notebook, not this file.\n"
"""First line of the files of `save_function`."""
_executed: dict[str, bytes] = {}
"""Source of each module of the working directory that this process executed, by name."""


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


def save_function(function: Callable[..., Any], file: str | Path) -> str:
    """Write a function of a notebook to a module in the working directory, so that a configuration can name it.

    Rewards, losses and measures run in other processes, which import them; a function that exists only in a notebook
    or an interactive session cannot be imported. The file holds the source of the function, and imports of the modules,
    classes and functions that it uses, so that no pickle is sent and a run records the SHA-256 of the code that it
    used. Each function has a file of its own, because a change of the file invalidates the scores of its function.

    Args:
        function: defined by ``def``; other values of the notebook that it uses must be arguments or defined in it. For
            a class or several functions, write the module by hand, for example with ``%%writefile``.
        file: name of the Python file in the working directory, such as ``"my_reward.py"``. A file that this function
            wrote before is replaced.

    Returns:
        Name for the configuration, ``module:function``: a value of ``rewards.names``, ``training.loss`` or
        ``curriculum.measure``.

    Raises:
        ValueError: the function has no source, or uses a value of the notebook; or the file is not a Python file in the
            working directory, or has the name of an installed module.
        StoreError: a file of this name exists that `save_function` did not write, or it cannot be written.
    """
    path = Path(file)
    module = path.stem
    if path.suffix != ".py" or not module.isidentifier() or path.absolute().parent != Path.cwd():
        raise ValueError(f"`file` must be a Python file in the working directory, as 'my_reward.py', got {str(file)!r}")
    installed = importlib.machinery.PathFinder.find_spec(module, [entry for entry in sys.path if not _is_here(entry)])
    if installed or module in sys.builtin_module_names:
        raise ValueError(f"`file` {str(file)!r} has the name of an installed module; choose another")
    try:
        if path.exists() and not path.read_text("utf-8").startswith(WRITTEN_HEADER):
            raise StoreError(f"{path.absolute()}: exists, and was not written by `save_function`; choose another file")
        path.write_text(WRITTEN_HEADER + _module_source(function), "utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise StoreError(f"{path.absolute()}: cannot be written: {error}; choose another file") from None
    _delete_bytecode(path)
    sys.modules.pop(module, None)  # an earlier version
    importlib.invalidate_caches()
    return f"{module}:{function.__name__}"


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
        place = f" at {trace.tb_frame.f_code.co_filename}:{trace.tb_lineno}" if trace else ""
        where = "" if isinstance(error, SyntaxError) else place  # its message has file and line
        raise error_class(f"{what} `{name}` raised {type(error).__name__}: {error}{where}") from None


def _module(name: str) -> ModuleType:
    """Import a module; the working directory is appended to the path, so that no other file in it hides a module.

    A file of the working directory that has changed since this process executed it is executed again: a run records the
    SHA-256 of the file, not of what was imported earlier.
    """
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    own = Path(f"{name}.py").absolute()
    spec = importlib.util.spec_from_file_location(name, own)
    if not own.is_file() or not spec or not spec.loader or (name in sys.modules and name not in _executed):
        return importlib.import_module(name)
    source = own.read_bytes()
    if name in sys.modules and _executed[name] == source:
        return sys.modules[name]
    _delete_bytecode(own)
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    _executed[name] = source
    return module


def _delete_bytecode(path: Path) -> None:
    """Delete the cached bytecode of a file; Python uses it if the file changed within a second and kept its size."""
    with contextlib.suppress(OSError):
        Path(importlib.util.cache_from_source(path)).unlink()


def _is_here(entry: str) -> bool:
    return Path(entry).absolute() == Path.cwd()


def _module_source(function: Callable[..., Any]) -> str:
    """Source of a module with one function and the imports that it needs.

    Raises:
        ValueError: the function has no source, or uses a value that cannot be imported.
    """
    if not isinstance(function, FunctionType) or not function.__name__.isidentifier():
        raise ValueError(f"`function` must be a function defined by `def`, got {function!r}")
    try:
        source = textwrap.dedent(inspect.getsource(function))
    except OSError as error:
        raise ValueError(f"`function` {function.__name__}: its source is not available: {error}") from None
    future = "from __future__ import annotations\n"  # annotations are not evaluated, so they need no imports
    missing: list[str] = []
    imports: list[str] = []
    for name in sorted(_global_names(symtable.symtable(future + source, "<function>", "exec"))):
        if name == function.__name__ or hasattr(builtins, name):
            continue
        found = function.__globals__.get(name, inspect.getclosurevars(function).nonlocals.get(name))
        line = _import_of(name, found)
        (imports if line else missing).append(line or name)
    if missing:
        raise ValueError(
            f"`function` {function.__name__}: uses {', '.join(map(repr, missing))} of its surroundings, which other"
            " processes do not have; define it in the function"
        )
    return "\n".join(["", future, *imports, "", "", source])


def _global_names(table: symtable.SymbolTable) -> set[str]:
    """Global names that a module's code reads, in it and in its functions."""
    own = {symbol.get_name() for symbol in table.get_symbols() if symbol.is_global() and symbol.is_referenced()}
    return own.union(*map(_global_names, table.get_children()))


def _import_of(name: str, value: Any) -> str | None:
    """Line that imports a value under a name; ``None``: no module holds it."""
    if isinstance(value, ModuleType):
        line, imported = f"import {value.__name__}", value.__name__
        return None if imported == "__main__" else line if imported == name else f"{line} as {name}"
    module, attribute = getattr(value, "__module__", None), getattr(value, "__name__", None)
    if not isinstance(module, str) or not isinstance(attribute, str) or module == "__main__":
        return None
    if getattr(sys.modules.get(module), attribute, None) is not value:
        return None
    return f"from {module} import {attribute}" + ("" if attribute == name else f" as {name}")
