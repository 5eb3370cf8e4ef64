"""Model name -> folder in diffusers layout: the embedded weights, or Stable Diffusion 1.5 with random weights."""

from pathlib import Path

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    LatentConsistencyModelPipeline,
    LCMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from cdpo_ray.testbed import PIPELINE_DIR

WIDTHS = {"tiny-sd15": 80, "sd15": 320}
"""Channels of the denoiser's first level; all other widths scale with it, so relative costs are as published."""
MODELS = ("embedded", *WIDTHS)
SCHEDULE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


def model_dir(name: str, scratch: Path, *, pixels: int) -> Path:
    """Folder of the model; a model with random weights is built in ``scratch``, for square images of ``pixels``."""
    if name == "embedded":
        return PIPELINE_DIR
    with torch.random.fork_rng():
        torch.manual_seed(0)
        build_sd15(WIDTHS[name], pixels).save_pretrained(scratch / name, safe_serialization=True)
    return scratch / name


def build_sd15(width: int, pixels: int, *, shallow: bool = False) -> StableDiffusionPipeline:
    """Stable Diffusion 1.5 as published, except for its width (published: 320) and its vocabulary.

    The tokenizer is the embedded model's with 77 tokens: random weights ignore the content of a prompt.

    Args:
        width: channels of the denoiser's first level, a multiple of 40.
        pixels: height and width of images.
        shallow: two levels and one layer per block, for rehearsals.
    """
    tokenizer = _tokenizer()
    text = text_config(width, tokenizer, layers=1 if shallow else 12)
    return StableDiffusionPipeline(
        vae=build_vae(width, pixels, shallow=shallow),
        text_encoder=CLIPTextModel(text),
        tokenizer=tokenizer,
        unet=build_unet(width, pixels, text.hidden_size, shallow=shallow),
        scheduler=DDIMScheduler(**SCHEDULE, clip_sample=False, set_alpha_to_one=False, steps_offset=1),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def build_lcm(width: int, pixels: int, *, shallow: bool = False) -> LatentConsistencyModelPipeline:
    """Latent consistency model of Stable Diffusion 1.5, with guidance embedded in 256 channels."""
    tokenizer = _tokenizer()
    text = text_config(width, tokenizer, layers=1 if shallow else 12)
    return LatentConsistencyModelPipeline(
        vae=build_vae(width, pixels, shallow=shallow),
        text_encoder=CLIPTextModel(text),
        tokenizer=tokenizer,
        unet=build_unet(width, pixels, text.hidden_size, shallow=shallow, time_cond_proj_dim=256),
        scheduler=LCMScheduler(**SCHEDULE),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def build_sdxl(width: int, pixels: int, *, shallow: bool = False) -> StableDiffusionXLPipeline:
    """SDXL as published, except for its width, its vocabulary, and DDIM as its scheduler.

    Source: arXiv:2307.01952, and the configuration of its base model.
    """
    tokenizer = _tokenizer()
    first = text_config(width, tokenizer, layers=1 if shallow else 12)
    second = text_config(width, tokenizer, channels=1280, layers=1 if shallow else 32, heads=20)
    size_channels, levels = _scaled(256, width), 2 if shallow else 3
    unet = UNet2DConditionModel(
        sample_size=pixels // 8,
        block_out_channels=(width, 2 * width, 4 * width)[:levels],
        layers_per_block=1 if shallow else 2,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D")[:levels],
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D")[-levels:],
        transformer_layers_per_block=(1, 1) if shallow else (1, 2, 10),
        cross_attention_dim=first.hidden_size + second.hidden_size,
        attention_head_dim=(5, 10, 20)[:levels],
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=size_channels,
        projection_class_embeddings_input_dim=second.hidden_size + 6 * size_channels,
        norm_num_groups=_scaled(32, width),
    )
    return StableDiffusionXLPipeline(
        vae=build_vae(width, pixels, shallow=shallow, scaling_factor=0.13025),
        text_encoder=CLIPTextModel(first),
        text_encoder_2=CLIPTextModelWithProjection(second),
        tokenizer=tokenizer,
        tokenizer_2=_tokenizer(),
        unet=unet,
        scheduler=DDIMScheduler(**SCHEDULE, clip_sample=False, steps_offset=1),
        force_zeros_for_empty_prompt=True,
        add_watermarker=False,
    )


def build_unet(
    width: int, pixels: int, text_channels: int, *, shallow: bool = False, **config: int
) -> UNet2DConditionModel:
    """UNet with four levels, three of them with cross-attention of eight heads; if shallow, two and one."""
    with_attention = 1 if shallow else 3
    return UNet2DConditionModel(
        sample_size=pixels // 8,
        block_out_channels=(width, 2 * width, 4 * width, 4 * width)[: with_attention + 1],
        layers_per_block=1 if shallow else 2,
        down_block_types=("CrossAttnDownBlock2D",) * with_attention + ("DownBlock2D",),
        up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * with_attention,
        cross_attention_dim=text_channels,
        attention_head_dim=8,
        norm_num_groups=_scaled(32, width),
        **config,
    )


def build_vae(width: int, pixels: int, *, shallow: bool = False, **config: float) -> AutoencoderKL:
    """VAE with eight pixels per latent along each axis."""
    return AutoencoderKL(
        block_out_channels=tuple(_scaled(channels, width) for channels in (128, 256, 512, 512)),
        layers_per_block=1 if shallow else 2,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        latent_channels=4,
        norm_num_groups=_scaled(32, width),
        sample_size=pixels,
        **config,
    )


def text_config(
    width: int, tokenizer: CLIPTokenizer, *, channels: int = 768, layers: int = 12, heads: int = 12
) -> CLIPTextConfig:
    """Configuration of a CLIP text encoder, by default CLIP-L; ``channels`` at full width."""
    channels = _scaled(channels, width)
    return CLIPTextConfig(
        hidden_size=channels,
        intermediate_size=4 * channels,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        vocab_size=49408,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        projection_dim=channels,
    )


def _tokenizer() -> CLIPTokenizer:
    return CLIPTokenizer.from_pretrained(PIPELINE_DIR / "tokenizer", model_max_length=77)


def _scaled(published: int, width: int) -> int:
    return published * width // WIDTHS["sd15"]
