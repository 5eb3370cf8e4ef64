"""Folder or hub id -> modules of a pipeline, with no weight missing or unexpected."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from cdpo_ray.config.section import HUB_ID
from cdpo_ray.errors import ModelError
from cdpo_ray.hub import cause_of, how_to_download
from cdpo_ray.models.folder import weights_variant
from cdpo_ray.models.layouts import unquoted

UNUSED = ("vision_model.", "visual_projection.", "text_projection.", "logit_scale", "decoder.", "lm_head.")
"""Prefixes of weights that a text encoder's file may hold besides its own: those of the whole CLIP or T5."""
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
        raise load_error(key, path, revision, FileNotFoundError("no such folder"))
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
    if not missing and not others:
        return module
    what = []
    if missing:
        what.append(f"lacks {len(missing)} weights of {kind.__name__}, the first {unquoted(min(missing))}")
    if others:
        what.append(f"has {len(others)} weights that {kind.__name__} lacks, the first {unquoted(min(others))}")
    has_adapter = any(".base_layer." in name or ".lora_" in name for name in others)
    advice = "; it was saved with a LoRA attached: merge or unload the LoRA, and save it again" if has_adapter else ""
    raise ValueError(f"{part_dir.name}/ {', and '.join(what)}{advice}")


def load_error(key: str, path: str, revision: str | None, error: Exception) -> ModelError:
    """Error to raise for a model whose files exist and cannot be loaded."""
    text = "".join(each if each.isprintable() else ascii(each)[1:-1] for each in " ".join(str(error).split()))
    reason = text if len(text) <= MAX_REASON_CHARACTERS else f"{text[:MAX_REASON_CHARACTERS]} ..."
    named = reason if isinstance(error, OSError | ValueError) else f"{type(error).__name__}: {reason}"
    return ModelError(
        f"`{key}` {path} (revision {revision}): cannot be loaded: {named}; give a folder in diffusers layout with"
        " safetensors weights"
    )
