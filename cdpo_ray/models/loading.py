"""Folder, hub id or single file -> modules of a pipeline, with no weight missing or unexpected."""

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from diffusers.loaders.single_file_utils import (
    SD_2_TEXT_ENCODER_KEYS_TO_IGNORE,
    convert_ldm_unet_checkpoint,
    convert_ldm_vae_checkpoint,
    convert_open_clip_checkpoint,
)
from huggingface_hub import snapshot_download
from safetensors import safe_open

from cdpo_ray.config.section import HUB_ID
from cdpo_ray.errors import ModelError
from cdpo_ray.hub import cause_of, how_to_download
from cdpo_ray.models.folder import folder_of, weights_variant
from cdpo_ray.models.layouts import unquoted
from cdpo_ray.models.single_file import NOT_WEIGHTS, OPEN_CLIP, UNET_PREFIX, VAE_PREFIX
from cdpo_ray.testbed import PIPELINE_DIR

UNUSED = ("vision_model.", "visual_projection.", "text_projection.", "logit_scale", "decoder.", "lm_head.")
"""Prefixes of weights that a text encoder's file may hold besides its own: those of the whole CLIP or T5."""
COPIED = ("in_proj_weight", "in_proj_bias", "text_projection")
"""Ends of open_clip's names whose weights the converter splits or transposes."""
CONFIG_FILES = ("*.json", "*.txt", "*.model")
"""Patterns of the files of a hub model that complete a single file: configurations and tokenizers."""
MAX_REASON_CHARACTERS = 500


def fetch(
    pipeline_class: Any, path: str, revision: str | None, left_out: Mapping[str, Any], *, key: str = "model.path"
) -> Path:
    """Folder of a model; a hub id is downloaded unless it is in the cache.

    Args:
        pipeline_class: class of diffusers, which selects the files to download.
        path, revision: a folder, or a hub id at a revision.
        left_out: parts that are not downloaded.
        key: config key to name in errors.

    Raises:
        ModelError: if the folder does not exist or the download fails.
    """
    if Path(path).is_dir():
        return Path(path)
    if not HUB_ID.match(path):
        what = "a single file needs `config`" if Path(path).is_file() else "no such folder"
        raise load_error(key, path, revision, FileNotFoundError(what))
    options = {"revision": revision, "use_safetensors": True, **left_out}
    try:
        try:
            return Path(pipeline_class.download(path, **options))
        except OSError as error:
            if cause_of(error):
                raise
            return Path(pipeline_class.download(path, **options, variant="fp16"))  # the only weights of some models
    except Exception as error:
        if cause_of(error):
            raise ModelError(how_to_download(path, "", revision, error, key=key)) from None
        raise load_error(key, path, revision, error) from None


def fetch_config(path: str, revision: str | None = None) -> Path:
    """Folder of the configurations and tokenizers of a model; a hub id's are downloaded unless they are in the cache.

    Args:
        path, revision: ``embedded``, a folder, or a hub id at a revision.

    Raises:
        ModelError: if they are not on this machine and the download fails.
    """
    if path == "embedded" or Path(path).is_dir():
        return PIPELINE_DIR if path == "embedded" else Path(path)
    try:
        return Path(snapshot_download(path, revision=revision, allow_patterns=[*CONFIG_FILES]))
    except Exception as error:
        if cached := folder_of(path, revision):  # the hub's list may hold files that no part needs
            return cached
        files = " ".join(f"--include '{pattern}'" for pattern in CONFIG_FILES)
        raise ModelError(how_to_download(path, files, revision, error, key="model.config.path")) from None


def load_part(kind: Any, part_dir: Path, dtype: torch.dtype) -> Any:
    """Load a module of diffusers or transformers from a folder's safetensors.

    Args:
        kind: class of the module.

    Raises:
        ValueError: if a weight is missing, which would be initialised at random, or unexpected. Loaders raise others.
    """
    if not part_dir.is_dir():  # a loader would treat it as a hub id
        raise ValueError(f"{part_dir.name}/ is missing")
    is_text_encoder = kind.__module__.startswith("transformers.")
    variant = weights_variant(part_dir, "model" if is_text_encoder else "diffusion_pytorch_model")
    options = {"ignore_mismatched_sizes": True} if is_text_encoder else {}  # else the error names none of them
    module, report = kind.from_pretrained(
        str(part_dir), dtype=dtype, variant=variant, use_safetensors=True, output_loading_info=True, **options
    )
    if report["mismatched_keys"]:
        name, found, expected = min(report["mismatched_keys"])
        raise ValueError(f"{part_dir.name}/ has {unquoted(name)} of shape {list(found)}, not {list(expected)}")
    # for sharded weights, diffusers reports the names in the index
    missing = {*report["missing_keys"], *(name for name, value in module.state_dict().items() if value.is_meta)}
    others = {name for name in report["unexpected_keys"] if not name.endswith("position_ids")}
    if is_text_encoder:
        others = {name for name in others if not name.startswith(UNUSED)}
    if getattr(module, "hf_quantizer", None):  # it stores scales beside the weights
        others = set()
    _refuse_differences(kind, part_dir.name, missing, others)
    return module


def load_converted(kind: Any, part_dir: Path, checkpoint: Path, prefix: str, dtype: torch.dtype) -> Any:
    """Load a module from a single-file checkpoint, whose weights have the original names.

    Args:
        kind: class of the module.
        part_dir: folder of the module's configuration.
        prefix: of the names of the module's weights in the file.

    Raises:
        ValueError: if a weight is missing, unexpected, unused or of another shape. Converters raise others.
    """
    with safe_open(checkpoint, framework="pt") as file:
        names = [name for name in file.keys() if name.startswith(prefix)]  # noqa: SIM118 - not a mapping
        original = {name: file.get_tensor(name).to(dtype) for name in names if not name.startswith(NOT_WEIGHTS)}
    is_text_encoder = kind.__module__.startswith("transformers.")
    with init_empty_weights():
        if is_text_encoder:
            module = kind(kind.config_class.from_pretrained(str(part_dir), local_files_only=True))
        else:
            module = kind.from_config(kind.load_config(str(part_dir)))
    weights = _converted(module, original, prefix)
    expected = module.state_dict()
    for name, value in sorted(weights.items()):
        if name in expected and value.shape != expected[name].shape:
            shapes = f"{list(value.shape)}, not {list(expected[name].shape)}"
            raise ValueError(f"{part_dir.name}: {unquoted(name)} is of shape {shapes}")
    used = {value.data_ptr() for value in weights.values()}
    others = {name for name, value in original.items() if value.data_ptr() not in used and not name.endswith(COPIED)}
    others = (others | (weights.keys() - expected.keys())) - {*SD_2_TEXT_ENCODER_KEYS_TO_IGNORE}
    others = {name for name in others if not name.endswith(("position_ids", "logit_scale"))}
    if is_text_encoder:
        others = {name for name in others if not name.startswith(UNUSED)}
    _refuse_differences(kind, part_dir.name, expected.keys() - weights.keys(), others)
    module.load_state_dict(weights, strict=False, assign=True)
    return module.eval()


def _converted(module: Any, original: Mapping[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    """Weights of a module with the names of diffusers or transformers."""
    if prefix == UNET_PREFIX:
        return convert_ldm_unet_checkpoint(original, module.config)
    if prefix == VAE_PREFIX:
        return convert_ldm_vae_checkpoint(original, module.config)
    if prefix.endswith(OPEN_CLIP):
        weights = convert_open_clip_checkpoint(module, original, prefix=prefix)
    else:
        weights = {name.removeprefix(prefix): value for name, value in original.items()}
    if hasattr(module, "text_model"):
        return weights
    return {name.removeprefix("text_model."): value for name, value in weights.items()}  # transformers >= 5.6


def _refuse_differences(kind: Any, part: str, missing: Collection[str], others: Collection[str]) -> None:
    what = []
    if missing:
        what.append(f"lacks {len(missing)} weights of {kind.__name__}, the first {unquoted(min(missing))}")
    if others:
        what.append(f"has {len(others)} weights that {kind.__name__} lacks, the first {unquoted(min(others))}")
    if what:
        has_adapter = any(".base_layer." in name or ".lora_" in name for name in others)
        advice = "; it was saved with a LoRA attached: merge or unload the LoRA, and save it again"
        raise ValueError(f"{part}/ {', and '.join(what)}{advice if has_adapter else ''}")


def load_error(key: str, path: str, revision: str | None, error: Exception) -> ModelError:
    """Error to raise for a model whose files exist and cannot be loaded."""
    text = "".join(each if each.isprintable() else ascii(each)[1:-1] for each in " ".join(str(error).split()))
    reason = text if len(text) <= MAX_REASON_CHARACTERS else f"{text[:MAX_REASON_CHARACTERS]} ..."
    named = reason if isinstance(error, OSError | ValueError) else f"{type(error).__name__}: {reason}"
    return ModelError(
        f"`{key}` {path} (revision {revision}): cannot be loaded: {named}; give a folder in diffusers layout with"
        " safetensors weights"
    )
