"""Exported files and model card -> a folder, written atomically."""

import contextlib
import importlib
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from cdpo_ray.errors import ExportError
from cdpo_ray.export import FORMATS
from cdpo_ray.store import copy_tree, delete, is_local, make_folder, storage_errors_within

CARD = "README.md"


def write_export(
    format_name: str, content: Any, card: str, output_dir: Path, pictures: Mapping[str, bytes] | None = None
) -> None:
    """Write trained weights or pairs in a format of `FORMATS`, with a card; atomic on local disk.

    Args:
        format_name: key of `FORMATS`.
        content: argument of the format's function: `Trained`, or `DrawnPairs`.
        card: Markdown of the card.
        output_dir: folder to create.
        pictures: path within the folder -> content, of the images that the card shows.

    Raises:
        ExportError: the format cannot hold a fully fine-tuned model, or the folder exists already.
        StoreError: the disk or the store fails.
        ModelError: the base model is needed and cannot be loaded, or the adapter is damaged.
    """
    if output_dir.exists():
        raise ExportError(f"{output_dir}: exists already; delete it, or choose another folder with `--out`")
    module, _, function = FORMATS[format_name].write.partition(":")
    write = getattr(importlib.import_module(module), function)
    make_folder(output_dir.parent)
    with storage_errors_within(output_dir), _aside(output_dir) as aside:
        write(content, aside)
        (aside / CARD).write_text(card, encoding="utf-8")
        for name, picture in (pictures or {}).items():
            make_folder((aside / name).parent)
            (aside / name).write_bytes(picture)
        for path in aside.rglob("*.safetensors"):
            path.chmod(0o644)  # safetensors writes 0600, which shared disks cannot use
        if is_local(output_dir):
            aside.rename(output_dir)
        else:
            copy_tree(aside, output_dir)


@contextlib.contextmanager
def _aside(output_dir: Path) -> Iterator[Path]:
    """An empty temporary folder, deleted at the end if it still exists; on the same disk if the output is local.

    Its name is fixed, so that the next export deletes the remains of a killed one.
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
