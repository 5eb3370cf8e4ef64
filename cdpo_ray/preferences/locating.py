"""Path, folder or pattern -> preference files, and the reader of each."""

import glob
import os
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from cdpo_ray.config.section import looked_for
from cdpo_ray.errors import PreferenceError
from cdpo_ray.preferences.arrow_readers import Arrow, Parquet
from cdpo_ray.preferences.formats import no_tables, other_kind
from cdpo_ray.preferences.reader import Reader
from cdpo_ray.preferences.rows import PreferenceSource
from cdpo_ray.preferences.tar_reader import Tar
from cdpo_ray.preferences.text_readers import Delimited, JsonList, Lines, RankedFolders
from cdpo_ray.preferences.values import URL
from cdpo_ray.store import read_untrusted

READERS: dict[str, Reader] = {
    ".parquet": Parquet(),
    ".arrow": Arrow(),
    ".jsonl": Lines(),
    ".jsonl.gz": Lines(),
    ".ndjson": Lines(),
    ".ndjson.gz": Lines(),
    ".tar": Tar(),
    ".tar.gz": Tar(),
    ".tgz": Tar(),
    ".csv": Delimited(",", ";", "\t", "|"),
    ".csv.gz": Delimited(",", ";", "\t", "|"),
    ".tsv": Delimited("\t"),
    ".tsv.gz": Delimited("\t"),
    ".json": JsonList(),
    ".json.gz": JsonList(),
}
"""File extension in lower case -> reader. Of a folder's files, only those of the first kind in this table are read."""
ENDINGS = f"{', '.join(ending for ending in READERS if '.gz' not in ending)} (.tar and text also with .gz)"

DESCRIPTIONS = ("dataset_info.json", "dataset_infos.json", "state.json", "dataset_dict.json")
"""Files of `datasets` about others."""
_STATE: TypeAdapter[dict[str, Any]] = TypeAdapter(dict[str, Any])


def ending_of(path: Path) -> str | None:
    """Extension of a file, if it is in `READERS`."""
    return next((ending for ending in READERS if path.name.lower().endswith(ending)), None)


def reader_of(path: Path) -> Reader:
    """Reader of a file or ranked folder.

    Raises:
        PreferenceError: the file is of another kind.
    """
    if path.is_dir():
        return RankedFolders()
    if (ending := ending_of(path)) is None:
        raise other_kind(path, ENDINGS)
    return READERS[ending]


def locate(source: PreferenceSource) -> tuple[list[Path], list[str]]:
    """Files or ranked folders, sorted by name, and warnings about files that are left out.

    Raises:
        PreferenceError: there are none.
    """
    where = f"`preferences.path` {source.path}"
    if URL.match(source.path):
        raise PreferenceError(f"{where}: is a URL; download the files, and give their folder")
    warnings: list[str] = []
    if source.layout.in_folders:
        found = _ranked_folders(source.path)
        wanted = "a folder that holds one folder per prompt"
    else:
        found = _tables(source.path, warnings)
        wanted = "a file, a folder of files, or a pattern such as data/**/train-*.parquet"
    if not found:
        raise PreferenceError(f"{where}: not found: {looked_for(source.path)}; give {wanted}")
    return found, warnings


def _ranked_folders(text: str) -> list[Path]:
    path = Path(text)
    if (path / "prompt.txt").exists():
        raise PreferenceError(
            f"{path}: is the folder of one prompt; give the folder that holds it, {path.absolute().parent}"
        )
    if path.is_file():
        raise PreferenceError(
            f"{path}: is a file, but `preferences.format` ranked_folders needs a folder that holds one folder per"
            " prompt; set the format of the file"
        )
    found = sorted(Path(path) for path in glob.glob(f"{glob.escape(text)}/*/"))
    if not found and path.is_dir() and (files := sorted(os.listdir(path))):
        raise PreferenceError(
            f"{path}: holds no folders, got {', '.join(files[:3])}; `preferences.format` ranked_folders needs one"
            " folder per prompt, a table another format"
        )
    return found


def _tables(text: str, warnings: list[str]) -> list[Path]:
    """Files of a path, a folder or a pattern, without hidden ones; each once, even if several links lead to it.

    Raises:
        PreferenceError: if a folder holds none.
    """
    found: dict[Path, Path] = {}
    matches = [Path(path) for path in _matches(text)]
    if len(matches) == 1 and matches[0].name in DESCRIPTIONS:
        matches = [matches[0].parent]
    for path in matches:
        files = [path]
        if path.is_dir():
            files = _within(path, warnings, is_alone=matches == [path])
        elif not path.is_file():
            raise PreferenceError(f"{path}: is not a regular file, or is a broken link; give a file")
        for table in files:
            found.setdefault(table.resolve(), table)
    tables = sorted(found.values())
    return tables if len(matches) == 1 else _without_leftovers(tables)


def _within(folder: Path, warnings: list[str], *, is_alone: bool) -> list[Path]:
    """Files of a folder, of one kind."""
    if is_alone and (folder / "dataset_dict.json").is_file():
        splits = sorted(path.parent.name for path in folder.glob("*/state.json"))
        if len(splits) > 1:
            raise PreferenceError(
                f"{folder}: holds the splits {', '.join(splits)} of a `DatasetDict`; give the folder of one, such as"
                f" {folder / splits[0]}, or all as {folder}/*"
            )
    within = map(Path, glob.glob(f"{glob.escape(str(folder))}/**", recursive=True))
    present = [file for file in within if file.is_file()]
    tables = _without_leftovers([file for file in present if ending_of(file)])
    if not tables:
        if is_alone:
            raise no_tables(folder, present, ENDINGS)
        return []
    readers = [type(reader) for reader in READERS.values()]
    first = min((type(reader_of(table)) for table in tables), key=readers.index)
    if others := [table for table in tables if type(reader_of(table)) is not first]:
        endings = Counter(ending_of(table) for table in others)
        listed = ", ".join(f"{count:,} {ending}" for ending, count in endings.items())
        kept = sorted({str(ending_of(table)) for table in tables if table not in others})
        warnings.append(f"{folder}: {listed} left out, {' and '.join(kept)} read; give a pattern to read others")
    return [table for table in tables if type(reader_of(table)) is first]


def _without_leftovers(tables: Iterable[Path]) -> list[Path]:
    """Without descriptions, and, in a folder that `save_to_disk` wrote, without caches and shards of earlier saves.

    Raises:
        PreferenceError: such a folder lacks a shard.
    """
    tables = [table for table in tables if table.name not in DESCRIPTIONS]
    for folder in sorted({table.parent for table in tables if table.suffix.lower() == ".arrow"}):
        if not (folder / "state.json").is_file():
            continue
        state = read_untrusted(folder / "state.json", _STATE, remedy="save the data set again")
        entries = state.get("_data_files")
        files = [entry for entry in entries if isinstance(entry, dict)] if isinstance(entries, list) else []
        names = {entry.get("filename") for entry in files}
        if names and (absent := names - {*os.listdir(folder)}):
            raise PreferenceError(f"{folder}: lacks {', '.join(sorted(map(str, absent)))}; copy the folder again")
        tables = [table for table in tables if table.parent != folder or not names or table.name in names]
    return tables


def _matches(text: str) -> list[str]:
    """Paths that match a path or pattern; existing parents are taken literally, so that `set [v2]/*` is found."""
    existing = next(path for path in (Path(text), *Path(text).parents) if os.path.exists(path))
    pattern = Path(text).relative_to(existing)
    return sorted(glob.glob(str(Path(glob.escape(str(existing)), pattern)), recursive=True))
