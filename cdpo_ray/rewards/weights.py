"""Published weights -> files on this machine: pinned, and never a pickle that runs code."""

import hashlib
import os
import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import hf_hub_download, snapshot_download
from huggingface_hub.constants import HF_HOME
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from cdpo_ray.errors import RewardError
from cdpo_ray.hub import FETCH_ERRORS, how_to_stage

CONVERTED_DIR = Path(HF_HOME) / "cdpo_ray"
"""Where foreign pickles lie once they are converted, by the SHA-256 of what they were."""

MODEL_FILES = ("*.json", "*.txt", "*.jinja", "*.model", "*.safetensors")
"""What a model's folder needs: all but pickles and code."""


def hub_file(checkpoint: str, filename: str, revision: str | None, *, key: str) -> Path:
    """A file that is here, or a file of a hub id at a revision.

    Args:
        checkpoint: path of a local file, or a hub id.
        filename: of the file within the hub id.
        key: of the configuration, to name in errors.

    Raises:
        RewardError: it is not here and cannot be fetched.
    """
    if Path(checkpoint).is_file():
        return Path(checkpoint)
    try:
        return Path(hf_hub_download(checkpoint, filename, revision=revision))
    except FETCH_ERRORS as error:
        raise RewardError(how_to_stage(checkpoint, filename, revision, error, key=key)) from None


def hub_folder(checkpoint: str, revision: str | None, *, key: str, files: Sequence[str] = MODEL_FILES) -> Path:
    """A folder that is here, or that of a hub id at a revision.

    Args:
        checkpoint: path of a local folder, or a hub id.
        files: patterns of the hub id's files to fetch.
        key: of the configuration, to name in errors.

    Raises:
        RewardError: it is not here and cannot be fetched.
    """
    if Path(checkpoint).is_dir():
        return Path(checkpoint)
    try:
        return Path(snapshot_download(checkpoint, revision=revision, allow_patterns=list(files)))
    except FETCH_ERRORS as error:
        included = " ".join(f'--include "{pattern}"' for pattern in files)
        raise RewardError(how_to_stage(checkpoint, included, revision, error, key=key)) from None


def from_folder(kind: Any, folder: Path, *, key: str, **options: Any) -> Any:
    """What a class of transformers reads from a folder; code that lies in it is not run.

    Raises:
        RewardError: the folder does not hold it whole, or holds one that needs its own code.
    """
    try:
        return kind.from_pretrained(folder, trust_remote_code=False, **options)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise RewardError(f"`{key}` {folder}: is no {kind.__name__}: {_first_line(error)}") from None


def model_from_folder(
    kind: Any, folder: Path, *, key: str, dtype: torch.dtype | str = torch.float32, unread: Sequence[str] = ()
) -> Any:
    """A model of transformers from a folder's safetensors.

    Args:
        unread: beginnings of the names of weights that may be missing: what they compute is not used.

    Raises:
        RewardError: the folder does not hold it whole; transformers would draw what is missing at random.
    """
    model, found = from_folder(kind, folder, key=key, use_safetensors=True, dtype=dtype, output_loading_info=True)
    missing = sorted(name for name in found["missing_keys"] if not name.startswith(tuple(unread)))
    if missing:
        raise RewardError(
            f"`{key}` {folder}: lacks {len(missing)} weights of {kind.__name__}, the first {missing[0]!r};"
            " it is of another kind, or was damaged"
        )
    return model


def converted(path: Path, sha256: str, *, key: str) -> dict[str, Tensor]:
    """Tensors of a foreign ``torch.save`` file, checked against its SHA-256, then read without running its code.

    Converted once to safetensors in `CONVERTED_DIR`; later calls read that.

    Args:
        sha256: of the file, 64 hex digits.
        key: of the configuration, to name in errors.

    Raises:
        RewardError: the file is another one, or holds more than tensors.
    """
    with path.open("rb") as handle:
        found = hashlib.file_digest(handle, "sha256").hexdigest()
    if found != sha256:
        raise RewardError(
            f"`{key}` {path}: SHA-256 must be {sha256}, got {found}; it is another file, or was damaged: fetch it anew"
        )
    safe = CONVERTED_DIR / f"{sha256}.safetensors"
    if not safe.is_file():
        tensors = _read_pickle(path, key)
        CONVERTED_DIR.mkdir(parents=True, exist_ok=True)
        aside = safe.with_name(f"{safe.name}.{os.getpid()}.tmp")  # several actors may convert at once
        save_file(tensors, aside)
        aside.chmod(0o644)  # others may share the folder
        aside.replace(safe)
    return load_file(safe)


def _read_pickle(path: Path, key: str) -> dict[str, Tensor]:
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise RewardError(f"`{key}` {path}: holds more than tensors, and was not run: {_first_line(error)}") from None
    tensors = content.get("state_dict", content) if isinstance(content, dict) else content
    if not isinstance(tensors, dict) or not all(isinstance(value, Tensor) for value in tensors.values()):
        raise RewardError(f"`{key}` {path}: must hold tensors by name, got {type(tensors).__name__} of other things")
    # each on its own: safetensors takes no views of one memory
    return {name: value.clone(memory_format=torch.contiguous_format) for name, value in tensors.items()}


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0]
