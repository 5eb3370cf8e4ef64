"""LoRA -> one file as sd-scripts writes it, which most programs other than diffusers read."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import save_file
from torch import Tensor

from cdpo_ray.errors import ExportError
from cdpo_ray.export.factors import Factors, read_factors
from cdpo_ray.export.original_names import in_original_layers
from cdpo_ray.export.trained import Trained
from cdpo_ray.models.folder import folder_of
from cdpo_ray.models.layouts import config_path
from cdpo_ray.models.single_file import stated_by

PREFIX = "lora_unet_"
"""Of every key, for UNets and transformers."""


class Architecture(NamedTuple):
    """Names of a base model in the metadata.

    Attributes:
        spec: of ``modelspec.architecture``, without ``/lora``.
        base_version: of ``ss_base_model_version``.
        implementation: of ``modelspec.implementation``: whose layer names the file has.
        network: module of sd-scripts or musubi-tuner that reads the file.
        size: usual image size in pixels.
        prediction_type: ``epsilon`` or ``v``; `None` for flow matching.
    """

    spec: str
    base_version: str
    implementation: str
    network: str
    size: int
    prediction_type: str | None = None


def write_kohya(trained: Trained, output_dir: Path) -> None:
    """Write the LoRA with the keys of sd-scripts, one alpha per layer, and its metadata: ``<run>.safetensors``.

    Layers have the names of the authors' checkpoints, see `original_names`, or diffusers' where these are the same;
    dots are underscores.

    Raises:
        ExportError: the run used full fine-tuning, the LoRA is a DoRA, or no program reads such a file of the family.
        ModelError: the LoRA is damaged, or has layers that the family does not have.
    """
    if trained.family not in ARCHITECTURES:
        raise ExportError(
            f"`--format` kohya: no program is known to read such a file of the family {trained.family!r}; use"
            " `--format diffusers` or `--format peft`"
        )
    factors = read_factors(trained.lora_dir("kohya"), trained.denoiser_name)
    if any(found.magnitudes is not None for found in factors.values()):
        raise ExportError(
            "`--format` kohya: the LoRA is a DoRA (`training.lora.use_dora`), whose `dora_scale` programs apply in"
            " different ways, or not at all; use `--format` diffusers, peft or merged"
        )
    metadata = kohya_metadata(trained, next(iter(factors.values())))
    save_file(kohya_tensors(trained.family, factors), kohya_path(output_dir, trained.name), metadata=metadata)


def kohya_tensors(family: str, factors: Mapping[str, Factors]) -> dict[str, Tensor]:
    """Content of the file that `write_kohya` writes.

    Args:
        family: name in `FAMILIES`.
        factors: by layer of diffusers' denoiser.
    """
    tensors: dict[str, Tensor] = {}
    for layer, found in in_original_layers(family, factors).items():
        key = PREFIX + layer.replace(".", "_")
        tensors[f"{key}.lora_down.weight"] = found.down.contiguous()
        tensors[f"{key}.lora_up.weight"] = found.up.contiguous()
        tensors[f"{key}.alpha"] = torch.tensor(found.alpha)
    return tensors


def kohya_path(output_dir: Path, name: str) -> Path:
    """Path of the file that `write_kohya` writes."""
    return output_dir / f"{name}.safetensors"


def kohya_metadata(trained: Trained, factors: Factors) -> dict[str, str]:
    """Metadata that programs read to recognize the base model; sizes of a LoRA before layers are fused.

    Source: ModelSpec 1.0 of Stability AI (``modelspec.*``) and sd-scripts (``ss_*``).
    """
    architecture = architecture_of(trained)
    width, height = trained.image_size or (architecture.size, architecture.size)
    found = {
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.architecture": f"{architecture.spec}/lora",
        "modelspec.implementation": architecture.implementation,
        "modelspec.title": trained.name,
        "modelspec.date": trained.created,
        "modelspec.resolution": f"{width}x{height}",
        "modelspec.prediction_type": architecture.prediction_type,
        "ss_base_model_version": architecture.base_version,
        "ss_network_module": architecture.network,
        "ss_network_dim": str(len(factors.down)),
        "ss_network_alpha": str(factors.alpha),
        "ss_output_name": trained.name,
        "ss_sd_model_name": trained.base_name,
        "ss_v2": str(architecture.base_version.startswith("sd_v2")),
    }
    return {"format": "pt"} | {key: value for key, value in found.items() if value}


def architecture_of(trained: Trained) -> Architecture:
    """Architecture of the base model, by its family and, if its folder is on this machine, its configurations."""
    model, config = trained.model, trained.model.get("config")
    folder = folder_of(**config or {"path": model["path"], "revision": model.get("revision")})
    scheduler = _read_config(folder, "scheduler") | (stated_by(Path(model["path"])) if config else {})
    return ARCHITECTURES[trained.family](_read_config(folder, trained.denoiser_name), scheduler.get("prediction_type"))


def _stable_diffusion(denoiser: Mapping[str, Any], prediction_type: str | None) -> Architecture:
    predicts_v = prediction_type == "v_prediction"
    is_v2 = denoiser.get("cross_attention_dim") == 1024
    spec = "stable-diffusion-v1" if not is_v2 else f"stable-diffusion-v2-{'768-v' if predicts_v else '512'}"
    version = f"sd_v{2 if is_v2 else 1}{'_v' if predicts_v else ''}"
    size = 768 if is_v2 and predicts_v else 512
    return Architecture(spec, version, "diffusers", "networks.lora", size, "v" if predicts_v else "epsilon")


def _stable_diffusion_xl(denoiser: Mapping[str, Any], prediction_type: str | None) -> Architecture:
    predicts = "v" if prediction_type == "v_prediction" else "epsilon"
    return Architecture("stable-diffusion-xl-v1-base", "sdxl_base_v1-0", "diffusers", "networks.lora", 1024, predicts)


def _stable_diffusion_3(denoiser: Mapping[str, Any], prediction_type: str | None) -> Architecture:
    is_large = denoiser.get("num_layers") == 38
    kind = "5-medium" if denoiser.get("dual_attention_layers") else "5-large" if is_large else "m"
    source = "https://github.com/Stability-AI/generative-models"
    return Architecture(f"stable-diffusion-3-{kind}", "sd3", source, "networks.lora_sd3", 1024)


def _flux(denoiser: Mapping[str, Any], prediction_type: str | None) -> Architecture:
    spec = "flux-1-dev" if denoiser.get("guidance_embeds", True) else "flux-1-schnell"
    return Architecture(spec, "flux1", "https://github.com/black-forest-labs/flux", "networks.lora_flux", 1024)


def _flux2(denoiser: Mapping[str, Any], prediction_type: str | None) -> Architecture:
    size = "9b" if denoiser.get("joint_attention_dim") == 12288 else "4b"
    source = "https://github.com/black-forest-labs/flux2"
    return Architecture(f"Flux.2-klein-{size}", f"flux_2_klein_{size}", source, "networks.lora_flux_2", 1024)


def _z_image(denoiser: Mapping[str, Any], prediction_type: str | None) -> Architecture:
    return Architecture("Z-Image", "z_image", "https://github.com/Tongyi-MAI/Z-Image", "networks.lora_zimage", 1024)


def _qwen_image(denoiser: Mapping[str, Any], prediction_type: str | None) -> Architecture:
    source = "https://github.com/QwenLM/Qwen-Image"
    return Architecture("Qwen-Image", "qwen_image", source, "networks.lora_qwen_image", 1328)


ARCHITECTURES: Mapping[str, Callable[[Mapping[str, Any], str | None], Architecture]] = {
    "stable_diffusion": _stable_diffusion,
    "latent_consistency": _stable_diffusion,
    "stable_diffusion_xl": _stable_diffusion_xl,
    "stable_diffusion_3": _stable_diffusion_3,
    "flux": _flux,
    "flux2": _flux2,  # this name and the next as musubi-tuner writes them
    "z_image": _z_image,
    "qwen_image": _qwen_image,
}
"""Family -> architecture, by the configuration of the denoiser and the prediction type of the scheduler; only families
whose file a program is known to read."""


def _read_config(folder: Path | None, part: str) -> dict[str, Any]:
    """Configuration of a part of a checked model folder; empty if it is not on this machine."""
    path = folder / config_path(part) if folder else None
    found: dict[str, Any] = json.loads(path.read_text()) if path and path.is_file() else {}
    return found
