"""Header of a single-file checkpoint -> its architecture and what it says of sampling; does not import torch."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from cdpo_ray.models.layouts import Configs, Faults, config_path, one_of, shown, unquoted

MAX_HEADER_BYTES = 2**24  # SDXL's has about 300 KB
Shapes = Mapping[str, list[int]]
"""Name of a weight -> its shape."""

UNET_PREFIX, VAE_PREFIX = "model.diffusion_model.", "first_stage_model."
OPEN_CLIP = ".model."
"""End of the prefix of a text encoder with open_clip's names; others have those of transformers."""
PREDICTS_V, ZERO_SNR = "v_pred", "ztsnr"
"""Names of empty tensors by which a file says how it is sampled."""
NOT_WEIGHTS = (
    *("betas", "alphas_cumprod", "sqrt_", "log_one_minus_", "posterior_", "lvlb_weights", "logvar", "scale_factor"),
    *("denoiser.", "global_step", PREDICTS_V, ZERO_SNR),
    *("model_ema.", f"{VAE_PREFIX}loss."),  # of the original training
)
"""Prefixes of tensors that no part of the pipeline has: noise schedules, averaged weights, the VAE's discriminator."""


@dataclass(frozen=True)
class Architecture:
    """Names in the files of one architecture.

    Attributes:
        name: for people.
        family: name in `LAYOUTS`.
        prefixes: part of the pipeline -> prefix of the names of its weights.
    """

    name: str
    family: str
    prefixes: Mapping[str, str]


_NETS = {"unet": UNET_PREFIX, "vae": VAE_PREFIX}
ARCHITECTURES = (
    Architecture(
        "Stable Diffusion 1",
        "stable_diffusion",
        _NETS | {"text_encoder": "cond_stage_model.transformer."},
    ),
    Architecture(
        "Stable Diffusion 2",
        "stable_diffusion",
        _NETS | {"text_encoder": f"cond_stage_model{OPEN_CLIP}"},
    ),
    Architecture(
        "SDXL",
        "stable_diffusion_xl",
        _NETS
        | {
            "text_encoder": "conditioner.embedders.0.transformer.",
            "text_encoder_2": f"conditioner.embedders.1{OPEN_CLIP}",
        },
    ),
)


_UNET_INPUTS = (
    ("in_channels", ".input_blocks.0.0.weight", "inpainting and editing models have more than text-to-image models"),
    ("cross_attention_dim", ".attn2.to_k.weight", "the width of the text encoders"),
)
"""Key of a UNet's configuration, end of the name of a weight whose second dimension it is, and what it means."""


def read_shapes(path: Path) -> dict[str, list[int]]:
    """Shapes of a file's weights, from its header.

    Raises:
        ValueError: if it is not a safetensors file, or its header is too large.
    """
    try:
        with path.open("rb") as opened:
            num_bytes = int.from_bytes(opened.read(8), "little")
        if num_bytes > MAX_HEADER_BYTES:
            raise ValueError(f"its header must not have more than {MAX_HEADER_BYTES:,} bytes, got {num_bytes:,}")
        with safe_open(path, framework="np") as file:
            return {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118 - not a mapping
    except (OSError, SafetensorError) as error:
        raise ValueError(f"it is not a whole safetensors file ({unquoted(str(error))})") from None


def architecture_of(shapes: Shapes) -> Architecture:
    """Architecture of a file's weights.

    Raises:
        ValueError: if a part is missing, or no architecture has its names.
    """
    for found in ARCHITECTURES:
        if all(any(name.startswith(prefix) for name in shapes) for prefix in found.prefixes.values()):
            return found
    if any("lora_" in name for name in shapes):
        raise ValueError("it holds a LoRA, not a model")
    absent = [prefix for prefix in _NETS.values() if not any(name.startswith(prefix) for name in shapes)]
    encoders = [each.prefixes[part] for each in ARCHITECTURES for part in each.prefixes.keys() - _NETS]
    what = f"{' and '.join(absent)}" if absent else f"those of a text encoder: {one_of(sorted(encoders))}"
    raise ValueError(f"it lacks weights whose names start with {what}")


def stated_by(path: Path) -> dict[str, Any]:
    """Values for the scheduler's configuration that a checked file states by the presence of tensors."""
    shapes = read_shapes(path)
    values: dict[str, Any] = {"prediction_type": "v_prediction"} if PREDICTS_V in shapes else {}
    if ZERO_SNR in shapes:
        # with trailing timesteps, sampling ends without noise; see `StableDiffusion`
        values |= {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing", "set_alpha_to_one": True}
    return values


def file_faults(architecture: Architecture, shapes: Shapes, configs: Configs) -> Faults:
    """Weights of a file that do not fit a UNet's configuration, or that no part has."""
    for key, end, why in _UNET_INPUTS:
        shape = next(
            (shape for name, shape in shapes.items() if name.startswith(UNET_PREFIX) and name.endswith(end)), []
        )
        expected = configs.get("unet", {}).get(key)
        if len(shape) > 1 and isinstance(expected, int) and shape[1] != expected:
            yield f"its UNet has `{key}` {shape[1]}, {config_path('unet')} of `model.config` has {expected} ({why})"
    known = (*architecture.prefixes.values(), *NOT_WEIGHTS)
    if others := [name for name in shapes if not name.startswith(known) and not name.endswith("logit_scale")]:
        yield f"it has {len(others)} weights that no part of {architecture.name} has, the first {shown(min(others))}"
