"""Published weights -> verified files on this machine; code in pickles never runs."""

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
from cdpo_ray.hub import FETCH_ERRORS, how_to_download

CONVERTED_DIR = Path(HF_HOME) / "cdpo_ray"
"""Folder of converted pickles, named by the SHA-256 of the original."""

MODEL_FILES = ("*.json", "*.txt", "*.jinja", "*.model", "*.safetensors")
"""Files of a model folder that are needed: all but pickles and code."""


def hub_file(checkpoint: str, filename: str, revision: str | None, *, key: str) -> Path:
    """Path of a local file, or of a downloaded file of a hub id at a revision.

    Args:
        checkpoint: path of a local file, or hub id.
        filename: name of the file in the hub id's repository.
        key: config key to name in errors.

    Raises:
        RewardError: if the download fails.
    """
    if Path(checkpoint).is_file():
        return Path(checkpoint)
    try:
        return Path(hf_hub_download(checkpoint, filename, revision=revision))
    except FETCH_ERRORS as error:
        raise RewardError(how_to_download(checkpoint, filename, revision, error, key=key)) from None


def hub_folder(checkpoint: str, revision: str | None, *, key: str, files: Sequence[str] = MODEL_FILES) -> Path:
    """Path of a local folder, or of the downloaded snapshot of a hub id at a revision.

    Args:
        checkpoint: path of a local folder, or hub id.
        files: patterns of the files to download.
        key: config key to name in errors.

    Raises:
        RewardError: if the download fails.
    """
    if Path(checkpoint).is_dir():
        return Path(checkpoint)
    try:
        return Path(snapshot_download(checkpoint, revision=revision, allow_patterns=list(files)))
    except FETCH_ERRORS as error:
        included = " ".join(f'--include "{pattern}"' for pattern in files)
        raise RewardError(how_to_download(checkpoint, included, revision, error, key=key)) from None


def from_folder(kind: Any, folder: Path, *, key: str, **options: Any) -> Any:
    """Load an object of a class of transformers from a folder; code in the folder does not run.

    Args:
        kind: class of transformers.
        key: config key to name in errors.

    Raises:
        RewardError: if the folder is incomplete, or requires custom code.
    """
    try:
        return kind.from_pretrained(folder, trust_remote_code=False, **options)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise RewardError(f"`{key}` {folder}: cannot be loaded as {kind.__name__}: {_first_line(error)}") from None


def model_from_folder(
    kind: Any, folder: Path, *, key: str, dtype: torch.dtype | str = torch.float32, unused: Sequence[str] = ()
) -> Any:
    """Load a model of transformers from a folder's safetensors.

    Args:
        kind: class of transformers.
        key: config key to name in errors.
        unused: name prefixes of weights that may be missing, because their outputs are not used.

    Raises:
        RewardError: if weights are missing, which transformers would initialise at random, or as in `from_folder`.
    """
    model, found = from_folder(kind, folder, key=key, use_safetensors=True, dtype=dtype, output_loading_info=True)
    missing = sorted(name for name in found["missing_keys"] if not name.startswith(tuple(unused)))
    if missing:
        raise RewardError(
            f"`{key}` {folder}: lacks {len(missing)} weights of {kind.__name__}, the first {missing[0]!r};"
            " give an undamaged folder of this kind of model"
        )
    return model


def converted(path: Path, sha256: str, *, key: str) -> dict[str, Tensor]:
    """Tensors of an untrusted ``torch.save`` file, verified by its SHA-256 and read without running code.

    The file is converted once to safetensors in `CONVERTED_DIR`; later calls read that.

    Args:
        sha256: expected SHA-256 of the file, 64 hex digits.
        key: config key to name in errors.

    Returns:
        Name -> tensor.

    Raises:
        RewardError: if the SHA-256 differs, or the file holds more than tensors.
    """
    with path.open("rb") as handle:
        found = hashlib.file_digest(handle, "sha256").hexdigest()
    if found != sha256:
        raise RewardError(
            f"`{key}` {path}: SHA-256 must be {sha256}, got {found}; the file differs or is damaged: download it again"
        )
    safe = CONVERTED_DIR / f"{sha256}.safetensors"
    if not safe.is_file():
        tensors = _read_pickle(path, key)
        CONVERTED_DIR.mkdir(parents=True, exist_ok=True)
        temporary = safe.with_name(f"{safe.name}.{os.getpid()}.tmp")  # several actors may convert concurrently
        save_file(tensors, temporary)
        temporary.chmod(0o644)  # the folder may be shared
        temporary.replace(safe)
    return load_file(safe)


def _read_pickle(path: Path, key: str) -> dict[str, Tensor]:
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise RewardError(f"`{key}` {path}: holds more than tensors and was not run: {_first_line(error)}") from None
    tensors = content.get("state_dict", content) if isinstance(content, dict) else content
    if not isinstance(tensors, dict) or not all(isinstance(value, Tensor) for value in tensors.values()):
        raise RewardError(f"`{key}` {path}: must hold a dict of tensors, got {type(tensors).__name__} of other values")
    # clones: safetensors refuses views of shared memory
    return {name: value.clone(memory_format=torch.contiguous_format) for name, value in tensors.items()}


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0]
