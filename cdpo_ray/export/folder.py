"""Files and card -> a folder, put in place whole."""

import contextlib
import importlib
import tempfile
from collections.abc import Iterator
from pathlib import Path

from cdpo_ray.errors import ExportError
from cdpo_ray.export import FORMATS
from cdpo_ray.export.formats import Trained
from cdpo_ray.store import copy_tree, delete, is_local, make_folder, storage_errors_within

CARD = "README.md"


def write_export(format_name: str, trained: Trained, card: str, output_dir: Path) -> None:
    """Write what was trained in a format of `FORMATS`, with its card; whole or not at all on local disk.

    Raises:
        ExportError: the format cannot hold what was trained, or the folder is there already.
        StoreError: the disk or the store fails.
        ModelError: the base model is needed and cannot be loaded.
    """
    if output_dir.exists():
        raise ExportError(f"{output_dir}: is there already; delete it, or give another folder by `--out`")
    module, _, function = FORMATS[format_name].partition(":")
    write = getattr(importlib.import_module(module), function)
    make_folder(output_dir.parent)
    with storage_errors_within(output_dir), _aside(output_dir) as aside:
        write(trained, aside)
        (aside / CARD).write_text(card, encoding="utf-8")
        for path in aside.rglob("*.safetensors"):
            path.chmod(0o644)  # safetensors writes 0600, which shared disks cannot use
        if is_local(output_dir):
            aside.rename(output_dir)
        else:
            copy_tree(aside, output_dir)


@contextlib.contextmanager
def _aside(output_dir: Path) -> Iterator[Path]:
    """An empty local folder, deleted at the end if it is still there; on the same disk if the output is local.

    Its name is fixed, so that the next export deletes what one that was killed left.
    """
    if not is_local(output_dir):
        with tempfile.TemporaryDirectory() as folder:
            yield Path(folder)
        return
    aside = output_dir.with_name(f".{output_dir.name}.partial")
    delete(aside)
    make_folder(aside)
    try:
        yield aside
    finally:
        delete(aside)
