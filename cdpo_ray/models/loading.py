"""Folder or hub id -> the nets of a pipeline, with every weight that they need and no other."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from cdpo_ray.config.section import HUB_ID
from cdpo_ray.errors import ModelError
from cdpo_ray.hub import cause_of, how_to_stage
from cdpo_ray.models.folder import weights_variant
from cdpo_ray.models.layouts import unquoted

UNUSED = ("vision_model.", "visual_projection.", "text_projection.", "logit_scale", "decoder.", "lm_head.")
"""Beginnings of the names of weights that a text encoder may have besides its own: of all of CLIP or T5."""
MAX_REASON_CHARACTERS = 500


def fetch(
    pipeline_class: Any, path: str, revision: str | None, left_out: Mapping[str, Any], *, key: str = "model.path"
) -> Path:
    """Folder of a model; that of a hub id is downloaded if it is not in the cache.

    Args:
        pipeline_class: of diffusers; says what to download.
        left_out: parts that are not downloaded.
        key: of the configuration, to name in errors.

    Raises:
        ModelError: it is not here and cannot be fetched.
    """
    if Path(path).is_dir():
        return Path(path)
    if not HUB_ID.match(path):
        raise cannot_be_loaded(key, path, revision, FileNotFoundError("there is no such folder"))
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
            raise ModelError(how_to_stage(path, "", revision, error, key=key)) from None
        raise cannot_be_loaded(key, path, revision, error) from None


def load_part(kind: Any, part_dir: Path, dtype: torch.dtype) -> Any:
    """A net of diffusers or transformers from a folder's safetensors.

    Args:
        kind: its class.

    Raises:
        ValueError: a weight is missing, which would be drawn at random, or there are others. Loaders raise more.
    """
    if not part_dir.is_dir():  # a loader would take it for a hub id
        raise ValueError(f"{part_dir.name}/ is missing")
    is_text_encoder = kind.__module__.startswith("transformers.")
    variant = weights_variant(part_dir, "model" if is_text_encoder else "diffusion_pytorch_model")
    options = {"ignore_mismatched_sizes": True} if is_text_encoder else {}  # else the first of them is not named
    net, report = kind.from_pretrained(
        str(part_dir), dtype=dtype, variant=variant, use_safetensors=True, output_loading_info=True, **options
    )
    if report["mismatched_keys"]:
        name, found, expected = min(report["mismatched_keys"])
        raise ValueError(f"{part_dir.name}/ has {unquoted(name)} of shape {list(found)}, not {list(expected)}")
    # of sharded weights, diffusers reports what the index promises
    missing = {*report["missing_keys"], *(name for name, value in net.state_dict().items() if value.is_meta)}
    others = {name for name in report["unexpected_keys"] if not name.endswith("position_ids")}
    if is_text_encoder:
        others = {name for name in others if not name.startswith(UNUSED)}
    if getattr(net, "hf_quantizer", None):  # keeps what it quantized by beside the weights
        others = set()
    if not missing and not others:
        return net
    what = []
    if missing:
        what.append(f"lacks {len(missing)} weights of {kind.__name__}, the first {unquoted(min(missing))}")
    if others:
        what.append(f"has {len(others)} weights that {kind.__name__} does not have, the first {unquoted(min(others))}")
    has_adapter = any(".base_layer." in name or ".lora_" in name for name in others)
    advice = "; it was saved with a LoRA attached: merge or unload the LoRA, and save it again" if has_adapter else ""
    raise ValueError(f"{part_dir.name}/ {', and '.join(what)}{advice}")


def cannot_be_loaded(key: str, path: str, revision: str | None, error: Exception) -> ModelError:
    """What to tell of weights that are here and do not load."""
    text = "".join(each if each.isprintable() else ascii(each)[1:-1] for each in " ".join(str(error).split()))
    reason = text if len(text) <= MAX_REASON_CHARACTERS else f"{text[:MAX_REASON_CHARACTERS]} ..."
    named = reason if isinstance(error, OSError | ValueError) else f"{type(error).__name__}: {reason}"
    return ModelError(
        f"`{key}` {path} (revision {revision}): cannot be loaded: {named}; give a folder in diffusers layout with"
        " safetensors weights"
    )
