"""Trained adapter or model -> files of each format; `kohya` has a module of its own."""

from pathlib import Path
from typing import Any

from diffusers import ConfigMixin
from peft import LoraConfig
from safetensors.torch import save_file

from cdpo_ray.export.factors import merge, read_factors
from cdpo_ray.export.trained import Trained
from cdpo_ray.models import load_model, model_class
from cdpo_ray.models.lora import LORA_DIR, SECOND, read_lora, write_lora

PEFT_PREFIX = "base_model.model"
PEFT_WEIGHTS = "adapter_model.safetensors"


def write_diffusers(trained: Trained, output_dir: Path) -> None:
    """Write the LoRA for ``pipe.load_lora_weights(folder)`` of diffusers, with alpha equal to the rank.

    The second factors are scaled instead, so that programs that ignore alpha apply the same weight change.

    Raises:
        ExportError: the run used full fine-tuning.
        ModelError: the LoRA is damaged.
    """
    saved = read_lora(trained.lora_dir("diffusers"), trained.denoiser_name)
    factors = {name: value * saved.scale if name.endswith(SECOND) else value for name, value in saved.tensors().items()}
    config = LoraConfig(
        r=saved.rank, lora_alpha=saved.rank, target_modules=list(saved.targets), use_dora=bool(saved.magnitudes)
    )
    write_lora(model_class(trained.family).pipeline_class, trained.denoiser_name, factors, config, output_dir)


def write_peft(trained: Trained, output_dir: Path) -> None:
    """Write the LoRA for ``PeftModel.from_pretrained(denoiser, folder)`` of peft.

    Raises:
        ExportError: the run used full fine-tuning.
        ModelError: the LoRA is damaged.
    """
    saved = read_lora(trained.lora_dir("peft"), trained.denoiser_name)
    config = LoraConfig(
        r=saved.rank,
        lora_alpha=saved.alpha,
        target_modules=list(saved.targets),
        use_rslora=saved.use_rslora,
        use_dora=bool(saved.magnitudes),
    )
    config.base_model_name_or_path, config.inference_mode = trained.base_name, True
    config.save_pretrained(output_dir)
    tensors = {f"{PEFT_PREFIX}.{name}": value for name, value in saved.tensors().items()}
    save_file(tensors, output_dir / PEFT_WEIGHTS, metadata={"format": "pt"})


def write_merged(trained: Trained, output_dir: Path) -> None:
    """Write the whole pipeline with merged weights, for ``DiffusionPipeline.from_pretrained`` of diffusers.

    Its scheduler is the one that generated the run's images. A LoRA that was trained on a quantised base is merged into
    the original weights of that base.

    Raises:
        ModelError: the base model cannot be loaded, or the LoRA is damaged or does not fit it.
    """
    as_published = {**trained.model, "compile": False, "quantization": None, "offload": False}
    model = load_model(trained.family, **as_published, device="cpu")
    if trained.is_lora:
        read_lora(trained.training_dir / LORA_DIR, trained.denoiser_name).check_fits(model.denoiser)
        merge(model.denoiser, read_factors(trained.training_dir / LORA_DIR, trained.denoiser_name))
    else:
        model.load_tuned(trained.training_dir)
        model.use_tuned(True)
    _name_base(model.pipeline, trained.base_name)
    model.pipeline.save_pretrained(output_dir, safe_serialization=True)


def _name_base(pipeline: Any, base_name: str) -> None:
    """Put the base model's name where the pipeline and its parts hold the paths that they were loaded from."""
    for part in (pipeline, *pipeline.components.values()):
        if isinstance(part, ConfigMixin) and "_name_or_path" in part.config:  # transformers saves no path
            part.register_to_config(_name_or_path=base_name)
