"""The real architectures at reduced width, with random weights, as folders in diffusers layout."""

import string
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from open_clip.tokenizer import bytes_to_unicode
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5TokenizerFast,
)


def tiny_tokenizer(**options: Any) -> CLIPTokenizer:
    """A CLIP tokenizer without merges: a token a byte, 77 tokens at the most."""
    letters = list(bytes_to_unicode().values())
    tokens = [*letters, *(letter + "</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    vocabulary = {token: number for number, token in enumerate(tokens)}
    return CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=77, **options)


def tiny_t5_tokenizer() -> T5TokenizerFast:
    """A T5 tokenizer of single letters."""
    special = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    return T5TokenizerFast(vocab=[*special, *((letter, -2.0) for letter in "\u2581" + string.printable.strip())])


def tiny_vae(**options: Any) -> AutoencoderKL:
    """Eight pixels a latent, as in all of these families."""
    return AutoencoderKL(
        block_out_channels=(32, 32, 32, 32),
        layers_per_block=1,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        sample_size=64,
        **{"latent_channels": 4} | options,
    )


def tiny_clip(tokenizer: CLIPTokenizer, *, width: int = 32) -> CLIPTextConfig:
    return CLIPTextConfig(
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=2,
        num_attention_heads=4,
        vocab_size=len(tokenizer),
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        projection_dim=width,
    )


def tiny_t5(tokenizer: T5TokenizerFast) -> T5EncoderModel:
    config = T5Config(
        vocab_size=len(tokenizer),
        d_model=32,
        d_kv=8,
        d_ff=64,
        num_layers=2,
        num_heads=4,
        feed_forward_proj="gated-gelu",
    )
    return T5EncoderModel(config)


def build_tiny_sd15(folder: Path, *, prediction_type: str = "epsilon", seed: int = 0) -> Path:
    """Stable Diffusion 1.5 as published (four levels, cross-attention in three, f = 8 VAE), at a tenth of its width."""
    torch.manual_seed(seed)
    tokenizer = tiny_tokenizer()
    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(32, 64, 64, 64),
        layers_per_block=2,
        down_block_types=("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
        up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
        cross_attention_dim=32,
        attention_head_dim=8,
    )
    vae = tiny_vae()
    text = tiny_clip(tokenizer)
    scheduler = DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        prediction_type=prediction_type,
    )
    StableDiffusionPipeline(
        vae=vae,
        text_encoder=CLIPTextModel(text),
        tokenizer=tokenizer,
        unet=unet,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(folder, safe_serialization=True)
    return folder


def build_tiny_sdxl(folder: Path, *, seed: int = 0) -> Path:
    """Stable Diffusion XL as published (three levels, deepest attention last, size conditioning), tiny."""
    torch.manual_seed(seed)
    tokenizers = tiny_tokenizer(), tiny_tokenizer(pad_token="!")
    widths = 16, 32
    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(16, 32, 32),
        norm_num_groups=8,
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 1, 2),
        attention_head_dim=(2, 4, 4),
        use_linear_projection=True,
        cross_attention_dim=sum(widths),
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=widths[1] + 6 * 8,
    )
    text_encoder = CLIPTextModel(tiny_clip(tokenizers[0], width=widths[0]))
    text_encoder_2 = CLIPTextModelWithProjection(tiny_clip(tokenizers[1], width=widths[1]))
    scheduler = EulerDiscreteScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        steps_offset=1,
        timestep_spacing="leading",
    )
    StableDiffusionXLPipeline(
        vae=tiny_vae(scaling_factor=0.13025),
        text_encoder=text_encoder,
        text_encoder_2=text_encoder_2,
        tokenizer=tokenizers[0],
        tokenizer_2=tokenizers[1],
        unet=unet,
        scheduler=scheduler,
    ).save_pretrained(folder, safe_serialization=True)
    return folder


def build_tiny_sd3(folder: Path, *, seed: int = 0) -> Path:
    """Stable Diffusion 3.5 medium as published (dual attention in the first block, normed queries and keys), tiny."""
    torch.manual_seed(seed)
    tokenizers, t5_tokenizer = (tiny_tokenizer(), tiny_tokenizer(pad_token="!")), tiny_t5_tokenizer()
    widths = 8, 16
    transformer = SD3Transformer2DModel(
        sample_size=8,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=32,
        caption_projection_dim=16,
        pooled_projection_dim=sum(widths),
        pos_embed_max_size=16,
        dual_attention_layers=(0,),
        qk_norm="rms_norm",
    )
    StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=tiny_vae(latent_channels=16, scaling_factor=1.5305, shift_factor=0.0609),
        text_encoder=CLIPTextModelWithProjection(tiny_clip(tokenizers[0], width=widths[0])),
        text_encoder_2=CLIPTextModelWithProjection(tiny_clip(tokenizers[1], width=widths[1])),
        text_encoder_3=tiny_t5(t5_tokenizer),
        tokenizer=tokenizers[0],
        tokenizer_2=tokenizers[1],
        tokenizer_3=t5_tokenizer,
    ).save_pretrained(folder, safe_serialization=True)
    return folder


def build_tiny_flux(folder: Path, *, guidance_embeds: bool = True, seed: int = 0) -> Path:
    """FLUX.1 as published (joint blocks, then single ones; packed latents), tiny: dev, or schnell without guidance."""
    torch.manual_seed(seed)
    tokenizer, t5_tokenizer = tiny_tokenizer(), tiny_t5_tokenizer()
    transformer = FluxTransformer2DModel(
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=32,
        guidance_embeds=guidance_embeds,
        axes_dims_rope=(4, 6, 6),
    )
    FluxPipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True)
        if guidance_embeds
        else FlowMatchEulerDiscreteScheduler(),
        vae=tiny_vae(latent_channels=16, scaling_factor=0.3611, shift_factor=0.1159),
        text_encoder=CLIPTextModel(tiny_clip(tokenizer)),
        text_encoder_2=tiny_t5(t5_tokenizer),
        tokenizer=tokenizer,
        tokenizer_2=t5_tokenizer,
    ).save_pretrained(folder, safe_serialization=True)
    return folder
