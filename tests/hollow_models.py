"""Folders of published models without weights: published configurations, empty weight files; no torch."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

VAE = {"_class_name": "AutoencoderKL", "block_out_channels": [128, 256, 512, 512], "latent_channels": 4}
CLIP_L = {"model_type": "clip_text_model", "hidden_size": 768, "projection_dim": 768, "max_position_embeddings": 77}
CLIP_G = CLIP_L | {"hidden_size": 1280, "projection_dim": 1280}
T5_XXL = {"model_type": "t5", "d_model": 4096}
BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "num_train_timesteps": 1000}
FLOW = {"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1000, "shift": 3.0}
SD_UNET = {"_class_name": "UNet2DConditionModel", "sample_size": 64, "cross_attention_dim": 768}
CLIP_TOKENIZER = {"tokenizer_class": "CLIPTokenizer", "model_max_length": 77}
QWEN3_4B = {"model_type": "qwen3", "hidden_size": 2560, "num_hidden_layers": 36, "max_position_embeddings": 40_960}
QWEN_TOKENIZER = {"tokenizer_class": "Qwen2Tokenizer", "model_max_length": 131_072}
QWEN_TEXT = {"model_type": "qwen2_5_vl", "hidden_size": 3584, "max_position_embeddings": 128000}
GEMMA_TOKENIZER = {"tokenizer_class": "GemmaTokenizer", "model_max_length": 10**30}
GEMMA = {"model_type": "gemma2", "hidden_size": 2304, "max_position_embeddings": 8192}
QWEN_VAE = {
    "_class_name": "AutoencoderKLQwenImage",
    "z_dim": 16,
    "dim_mult": [1, 2, 4, 4],
    "temperal_downsample": [False, True, True],
    "latents_mean": [0.1] * 16,
    "latents_std": [2.0] * 16,
}
SANA_VAE = {
    "_class_name": "AutoencoderDC",
    "latent_channels": 32,
    "encoder_block_out_channels": [128, 256, 512, 512, 1024, 1024],
    "scaling_factor": 0.41407,
}
DPM_FLOW = {
    "_class_name": "DPMSolverMultistepScheduler",
    "prediction_type": "flow_prediction",
    "use_flow_sigmas": True,
    "flow_shift": 3.0,
    "num_train_timesteps": 1000,
    "lambda_min_clipped": float("-inf"),  # written as -Infinity, as in the published file
}
T5_TOKENIZER = {"tokenizer_class": "T5Tokenizer", "model_max_length": 512}

Parts = dict[str, tuple[str, Mapping[str, Any]]]
"""Part -> class and content of its configuration file."""

SD_PARTS: Parts = {
    "unet": ("UNet2DConditionModel", SD_UNET),
    "vae": ("AutoencoderKL", VAE),
    "text_encoder": ("CLIPTextModel", CLIP_L),
    "tokenizer": ("CLIPTokenizer", CLIP_TOKENIZER),
    "scheduler": ("PNDMScheduler", {"_class_name": "PNDMScheduler", "steps_offset": 1} | BETAS),
}
LCM_SCHEDULER = {"_class_name": "LCMScheduler", "original_inference_steps": 50, "prediction_type": "epsilon"} | BETAS
SDXL_UNET = SD_UNET | {
    "sample_size": 128,
    "cross_attention_dim": 2048,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
SD3_TRANSFORMER = {
    "_class_name": "SD3Transformer2DModel",
    "sample_size": 128,
    "in_channels": 16,
    "out_channels": 16,
    "joint_attention_dim": 4096,
    "pooled_projection_dim": 2048,
}
MODELS: dict[str, tuple[str, Parts]] = {
    "stable_diffusion": ("StableDiffusionPipeline", SD_PARTS),
    "latent_consistency": (
        "LatentConsistencyModelPipeline",
        SD_PARTS
        | {
            "unet": ("UNet2DConditionModel", SD_UNET | {"time_cond_proj_dim": 256}),
            "scheduler": ("LCMScheduler", LCM_SCHEDULER),
        },
    ),
    "stable_diffusion_xl": (
        "StableDiffusionXLPipeline",
        SD_PARTS
        | {
            "unet": ("UNet2DConditionModel", SDXL_UNET),
            "text_encoder_2": ("CLIPTextModelWithProjection", CLIP_G),
            "tokenizer_2": ("CLIPTokenizer", CLIP_TOKENIZER),
            "scheduler": ("EulerDiscreteScheduler", {"_class_name": "EulerDiscreteScheduler"} | BETAS),
        },
    ),
    "stable_diffusion_3": (
        "StableDiffusion3Pipeline",
        {
            "transformer": ("SD3Transformer2DModel", SD3_TRANSFORMER),
            "vae": ("AutoencoderKL", VAE | {"latent_channels": 16}),
            "text_encoder": ("CLIPTextModelWithProjection", CLIP_L),
            "text_encoder_2": ("CLIPTextModelWithProjection", CLIP_G),
            "text_encoder_3": ("T5EncoderModel", T5_XXL),
            "tokenizer": ("CLIPTokenizer", CLIP_TOKENIZER),
            "tokenizer_2": ("CLIPTokenizer", CLIP_TOKENIZER),
            "tokenizer_3": ("T5TokenizerFast", T5_TOKENIZER),
            "scheduler": ("FlowMatchEulerDiscreteScheduler", FLOW),
        },
    ),
    "flux": (
        "FluxPipeline",
        {
            "transformer": (
                "FluxTransformer2DModel",
                {
                    **{"_class_name": "FluxTransformer2DModel", "in_channels": 64},
                    **{"joint_attention_dim": 4096, "pooled_projection_dim": 768},
                },
            ),
            "vae": ("AutoencoderKL", VAE | {"latent_channels": 16}),
            "text_encoder": ("CLIPTextModel", CLIP_L),
            "text_encoder_2": ("T5EncoderModel", T5_XXL),
            "tokenizer": ("CLIPTokenizer", CLIP_TOKENIZER),
            "tokenizer_2": ("T5TokenizerFast", T5_TOKENIZER),
            "scheduler": ("FlowMatchEulerDiscreteScheduler", FLOW),
        },
    ),
    "flux2": (
        "Flux2KleinPipeline",
        {
            "transformer": (
                "Flux2Transformer2DModel",
                {
                    **{"_class_name": "Flux2Transformer2DModel", "in_channels": 128},
                    **{"joint_attention_dim": 7680, "guidance_embeds": False},
                },
            ),
            "vae": ("AutoencoderKLFlux2", {"_class_name": "AutoencoderKLFlux2", "patch_size": [2, 2]}),
            "text_encoder": ("Qwen3ForCausalLM", QWEN3_4B),
            "tokenizer": ("Qwen2TokenizerFast", QWEN_TOKENIZER),
            "scheduler": ("FlowMatchEulerDiscreteScheduler", FLOW),
        },
    ),
    "z_image": (
        "ZImagePipeline",
        {
            "transformer": ("ZImageTransformer2DModel", {"_class_name": "ZImageTransformer2DModel", "in_channels": 16}),
            "vae": ("AutoencoderKL", VAE | {"latent_channels": 16}),
            "text_encoder": ("Qwen3Model", QWEN3_4B),
            "tokenizer": ("Qwen2Tokenizer", QWEN_TOKENIZER),
            "scheduler": ("FlowMatchEulerDiscreteScheduler", FLOW),
        },
    ),
    "qwen_image": (
        "QwenImagePipeline",
        {
            "transformer": (
                "QwenImageTransformer2DModel",
                {
                    **{"_class_name": "QwenImageTransformer2DModel", "in_channels": 64, "out_channels": 16},
                    **{"joint_attention_dim": 3584, "guidance_embeds": False},
                },
            ),
            "vae": ("AutoencoderKLQwenImage", QWEN_VAE),
            "text_encoder": ("Qwen2_5_VLForConditionalGeneration", QWEN_TEXT),
            "tokenizer": ("Qwen2Tokenizer", QWEN_TOKENIZER),
            "scheduler": ("FlowMatchEulerDiscreteScheduler", FLOW),
        },
    ),
    "sana": (
        "SanaPipeline",
        {
            "transformer": (
                "SanaTransformer2DModel",
                {"_class_name": "SanaTransformer2DModel", "sample_size": 32, "caption_channels": 2304},
            ),
            "vae": ("AutoencoderDC", SANA_VAE),
            "text_encoder": ("Gemma2Model", GEMMA),
            "tokenizer": ("GemmaTokenizerFast", GEMMA_TOKENIZER),
            "scheduler": ("DPMSolverMultistepScheduler", DPM_FLOW),
        },
    ),
}


def build_hollow(folder: Path, family: str) -> Path:
    """A folder that `cdpo check` accepts as a model of the family, with empty weight files."""
    pipeline, parts = MODELS[family]
    index: dict[str, Any] = {"_class_name": pipeline, "_diffusers_version": "0.35.0"}
    for name, (kind, config) in parts.items():
        (folder / name).mkdir(parents=True)
        library = "transformers" if name.startswith(("text", "token")) else "diffusers"
        index[name] = [library, kind]
        if name.startswith("tokenizer"):
            (folder / name / "tokenizer.json").write_text("{}")
        elif name != "scheduler":
            stem = "model" if library == "transformers" else "diffusion_pytorch_model"
            (folder / name / f"{stem}.safetensors").touch()
        config_path(folder, name).write_text(json.dumps(config))
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


def config_path(folder: Path, part: str) -> Path:
    """Path of a part's configuration."""
    prefix = {"scheduler": "scheduler_", "tokenizer": "tokenizer_"}.get(part.partition("_")[0], "")
    return folder / part / f"{prefix}config.json"


def change(folder: Path, part: str, **values: Any) -> None:
    """Set keys of a part's configuration, or those of the pipeline's index (`model_index`)."""
    path = folder / "model_index.json" if part == "model_index" else config_path(folder, part)
    path.write_text(json.dumps(json.loads(path.read_text()) | values))
