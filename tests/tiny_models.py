"""Folders in diffusers layout of the real architectures at reduced width, with random weights."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderDC,
    AutoencoderKL,
    AutoencoderKLFlux2,
    AutoencoderKLQwenImage,
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    Flux2Transformer2DModel,
    FluxPipeline,
    FluxTransformer2DModel,
    LatentConsistencyModelPipeline,
    LCMScheduler,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
    SanaPipeline,
    SanaTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
    ZImagePipeline,
    ZImageTransformer2DModel,
)
from open_clip.tokenizer import bytes_to_unicode
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    Gemma2Config,
    Gemma2Model,
    GemmaTokenizer,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Tokenizer,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3Model,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

from cdpo_ray.models.sana import INSTRUCTION

BuildUnet = Callable[..., UNet2DConditionModel]
SDXL_UNET: dict[str, Any] = {
    "sample_size": 8,
    "layers_per_block": 1,
    "cross_attention_dim": 64,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 6 * 8 + 32,
}


def tiny_tokenizer() -> CLIPTokenizer:
    """A CLIP tokenizer without merges: one token per byte, at most 77 tokens."""
    letters = list(bytes_to_unicode().values())
    tokens = [*letters, *(letter + "</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    vocabulary = {token: number for number, token in enumerate(tokens)}
    return CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=77)


def tiny_unet(**config: int) -> UNet2DConditionModel:
    """UNet of Stable Diffusion 1.5: four levels, cross-attention in three."""
    return UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(32, 64, 64, 64),
        layers_per_block=2,
        down_block_types=("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
        up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
        cross_attention_dim=32,
        attention_head_dim=8,
        **config,
    )


def shallow_unet(**config: int) -> UNet2DConditionModel:
    """Two levels of one layer, each kind of block once: for tests whose time depends on the layers, as with ZeRO 3."""
    return UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(32, 64),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=32,
        attention_head_dim=8,
        **config,
    )


def build_tiny_sd15(
    folder: Path, *, prediction_type: str = "epsilon", seed: int = 0, build_unet: BuildUnet = tiny_unet
) -> Path:
    """Stable Diffusion 1.5 as published (four levels, cross-attention in three, f = 8 VAE), at a tenth of the width."""
    torch.manual_seed(seed)
    tokenizer = tiny_tokenizer()
    unet = build_unet()
    text = CLIPTextConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        vocab_size=len(tokenizer),
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.eos_token_id,
        projection_dim=32,
    )
    StableDiffusionPipeline(
        vae=tiny_vae(4),
        text_encoder=CLIPTextModel(text),
        tokenizer=tokenizer,
        unet=unet,
        scheduler=sd_scheduler(prediction_type),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(folder, safe_serialization=True)
    return folder


def poisoned(model: Path, folder: Path, *, letter: str) -> Path:
    """A copy whose text encoder raises on prompts with the letter, because it lacks that token's embedding."""
    shutil.copytree(model, folder)
    path = folder / "tokenizer" / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    tokenizer["model"]["vocab"] |= {letter: 99_999, f"{letter}</w>": 99_999}
    path.write_text(json.dumps(tokenizer))
    return folder


def tiny_t5_tokenizer() -> T5Tokenizer:
    """A Unigram tokenizer without merges: one token per letter."""
    letters = "abcdefghijklmnopqrstuvwxyz0123456789.,'-"
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("\u2581", -2.0), *((letter, -3.0) for letter in letters)]
    return T5Tokenizer(vocab=pieces, extra_ids=0)


def tiny_clip_config(tokenizer: CLIPTokenizer, *, channels: int = 32, projection: int = 32) -> CLIPTextConfig:
    return CLIPTextConfig(
        hidden_size=channels,
        intermediate_size=2 * channels,
        num_hidden_layers=3,
        num_attention_heads=4,
        vocab_size=len(tokenizer),
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.eos_token_id,
        projection_dim=projection,
    )


def tiny_t5(tokenizer: T5Tokenizer, *, channels: int = 32) -> T5EncoderModel:
    return T5EncoderModel(
        T5Config(
            vocab_size=len(tokenizer),
            d_model=channels,
            d_kv=8,
            d_ff=2 * channels,
            num_layers=2,
            num_heads=4,
            is_encoder_decoder=False,
        )
    )


def tiny_vae(channels: int, **config: float) -> AutoencoderKL:
    """A VAE with eight pixels per latent along each side."""
    return AutoencoderKL(
        block_out_channels=(32, 32, 32, 32),
        layers_per_block=1,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        latent_channels=channels,
        sample_size=64,
        **config,
    )


def build_tiny_lcm(folder: Path, *, build_unet: BuildUnet = tiny_unet) -> Path:
    """A latent consistency model as published: guidance-conditioned Stable Diffusion 1.5."""
    torch.manual_seed(3)
    tokenizer = tiny_tokenizer()
    LatentConsistencyModelPipeline(
        vae=tiny_vae(4),
        text_encoder=CLIPTextModel(tiny_clip_config(tokenizer)),
        tokenizer=tokenizer,
        unet=build_unet(time_cond_proj_dim=256),
        scheduler=LCMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear"),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(folder, safe_serialization=True)
    return folder


def tiny_sdxl_unet() -> UNet2DConditionModel:
    """UNet of SDXL: three levels, cross-attention in two, size conditioning."""
    return UNet2DConditionModel(
        **SDXL_UNET,
        block_out_channels=(32, 64, 64),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 2, 2),
        attention_head_dim=(4, 8, 8),
    )


def shallow_sdxl_unet() -> UNet2DConditionModel:
    """Two levels, each kind of block once."""
    return UNet2DConditionModel(
        **SDXL_UNET,
        block_out_channels=(32, 64),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 1),
        attention_head_dim=(4, 8),
    )


def build_tiny_sdxl(folder: Path, *, build_unet: BuildUnet = tiny_sdxl_unet) -> Path:
    """SDXL as published (three levels, cross-attention in two, two text encoders, size conditioning), narrow."""
    torch.manual_seed(0)
    tokenizer = tiny_tokenizer()
    unet = build_unet()
    StableDiffusionXLPipeline(
        vae=tiny_vae(4, scaling_factor=0.13025),
        text_encoder=CLIPTextModel(tiny_clip_config(tokenizer)),
        text_encoder_2=CLIPTextModelWithProjection(tiny_clip_config(tokenizer)),
        tokenizer=tokenizer,
        tokenizer_2=tiny_tokenizer(),
        unet=unet,
        scheduler=EulerDiscreteScheduler(
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
            steps_offset=1,
            timestep_spacing="leading",
        ),
        force_zeros_for_empty_prompt=True,
        add_watermarker=False,
    ).save_pretrained(folder, safe_serialization=True)
    return folder


def build_tiny_sd3(folder: Path) -> Path:
    """SD3 as published (joint transformer blocks, two CLIP encoders and T5, 16 latent channels), narrow."""
    torch.manual_seed(0)
    tokenizer, t5_tokenizer = tiny_tokenizer(), tiny_t5_tokenizer()
    transformer = SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=16,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=4,
        joint_attention_dim=64,
        caption_projection_dim=32,
        pooled_projection_dim=64,
        out_channels=16,
        pos_embed_max_size=16,
        qk_norm="rms_norm",
        dual_attention_layers=(0,),
    )
    StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=tiny_vae(16, scaling_factor=1.5305, shift_factor=0.0609),
        text_encoder=CLIPTextModelWithProjection(tiny_clip_config(tokenizer)),
        tokenizer=tokenizer,
        text_encoder_2=CLIPTextModelWithProjection(tiny_clip_config(tokenizer)),
        tokenizer_2=tiny_tokenizer(),
        text_encoder_3=tiny_t5(t5_tokenizer, channels=64),
        tokenizer_3=t5_tokenizer,
    ).save_pretrained(folder, safe_serialization=True)
    return folder


def build_tiny_flux(folder: Path, *, guidance_embeds: bool = True) -> Path:
    """FLUX.1 as published (joint and single blocks, packed latents, rotary positions, guidance embedding), narrow."""
    torch.manual_seed(0)
    tokenizer, t5_tokenizer = tiny_tokenizer(), tiny_t5_tokenizer()
    transformer = FluxTransformer2DModel(
        patch_size=1,
        in_channels=64,
        num_layers=1,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=32,
        guidance_embeds=guidance_embeds,
        axes_dims_rope=(4, 6, 6),
    )
    FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
        vae=tiny_vae(16, scaling_factor=0.3611, shift_factor=0.1159),
        text_encoder=CLIPTextModel(tiny_clip_config(tokenizer)),
        tokenizer=tokenizer,
        text_encoder_2=tiny_t5(t5_tokenizer),
        tokenizer_2=t5_tokenizer,
        transformer=transformer,
    ).save_pretrained(folder, safe_serialization=True)
    return folder


CHAT = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)
"""Chat template of Qwen3 for one message."""


def tiny_qwen_tokenizer() -> Qwen2Tokenizer:
    """A Qwen tokenizer without merges: one token per byte, special tokens of chats, and Qwen3's template."""
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>", "</think>"]
    vocabulary = {token: number for number, token in enumerate([*bytes_to_unicode().values(), *special])}
    tokenizer = Qwen2Tokenizer(vocab=vocabulary, merges=[], model_max_length=131_072)
    tokenizer.add_tokens(special, special_tokens=True)
    tokenizer.chat_template = CHAT
    return tokenizer


def tiny_qwen3(tokenizer: Qwen2Tokenizer, *, num_layers: int, **config: Any) -> Qwen3Config:
    """Qwen3 as published (grouped queries, tied embeddings), narrow."""
    return Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=num_layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=40_960,
        tie_word_embeddings=True,
        **config,
    )


def build_tiny_flux2(folder: Path, *, is_distilled: bool = False) -> Path:
    """FLUX.2 klein as published (joint and single blocks, batch-normalised patches, three layers of Qwen3), narrow."""
    torch.manual_seed(0)
    tokenizer = tiny_qwen_tokenizer()
    vae = AutoencoderKLFlux2(block_out_channels=(32, 32, 32, 32), layers_per_block=1, latent_channels=8, sample_size=64)
    vae.bn.running_mean.normal_()
    vae.bn.running_var.uniform_(0.5, 2)
    transformer = Flux2Transformer2DModel(
        in_channels=32,
        num_layers=1,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=3 * 32,
        guidance_embeds=False,
        axes_dims_rope=(4, 4, 4, 4),
    )
    with torch.no_grad():  # the gates of blocks with random weights are nearly zero
        for name in ("double_stream_modulation_img", "double_stream_modulation_txt", "single_stream_modulation"):
            getattr(transformer, name).linear.weight *= 10
    Flux2KleinPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
        vae=vae,
        text_encoder=Qwen3ForCausalLM(tiny_qwen3(tokenizer, num_layers=28)),
        tokenizer=tokenizer,
        transformer=transformer,
        is_distilled=is_distilled,
    ).save_pretrained(folder, safe_serialization=True)
    return folder


def build_tiny_z_image(folder: Path) -> Path:
    """Z-Image as published (one stream, refiners, prompts of their own length), narrow."""
    torch.manual_seed(0)
    tokenizer = tiny_qwen_tokenizer()
    transformer = ZImageTransformer2DModel(
        in_channels=16,
        dim=32,
        n_layers=2,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
        cap_feat_dim=32,
        axes_dims=(4, 6, 6),
    )
    with torch.no_grad():
        for token in (transformer.x_pad_token, transformer.cap_pad_token):
            token.normal_()
    ZImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=6.0),
        vae=tiny_vae(16, scaling_factor=0.3611, shift_factor=0.1159),
        text_encoder=Qwen3Model(tiny_qwen3(tokenizer, num_layers=3)),
        tokenizer=tokenizer,
        transformer=transformer,
    ).save_pretrained(folder, safe_serialization=True)
    return folder


def tiny_qwen_image_tokenizer() -> Qwen2Tokenizer:
    """One token per byte, and one per word of the pipeline's template, whose first part then has 34, as published."""
    vocabulary = {letter: number for number, letter in enumerate(bytes_to_unicode().values())}
    tokenizer = Qwen2Tokenizer(vocab=vocabulary, merges=[])
    words = "Describe image by detailing color shape size texture quantity text spatial relationships of objects and"
    tokenizer.add_tokens([*(f" {word}" for word in words.split()), " the", " background", "Describe"])
    tokenizer.add_tokens(["system", "user", "assistant", "<|im_start|>", "<|im_end|>"])
    return tokenizer


def build_tiny_qwen_image(folder: Path) -> Path:
    """Qwen-Image as published (joint blocks, packed latents of a video VAE, Qwen2.5-VL, dynamic shift), narrow."""
    torch.manual_seed(0)
    tokenizer = tiny_qwen_image_tokenizer()
    text = Qwen2_5_VLConfig(
        text_config={
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "vocab_size": len(tokenizer),
            "max_position_embeddings": 2048,
            "rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0},
        },
        vision_config={
            "depth": 1,
            "hidden_size": 16,
            "intermediate_size": 32,
            "num_heads": 2,
            "out_hidden_size": 32,
            "fullatt_block_indexes": [0],
        },
    )
    transformer = QwenImageTransformer2DModel(
        patch_size=2,
        in_channels=64,
        out_channels=16,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        axes_dims_rope=(4, 6, 6),
    )
    vae = AutoencoderKLQwenImage(base_dim=8, num_res_blocks=1)
    with torch.no_grad():  # else the pixels would hardly depend on the prompt and on a LoRA
        transformer.proj_out.weight *= 4
        vae.decoder.conv_out.weight *= 4
    QwenImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(
            use_dynamic_shifting=True, max_shift=0.9, max_image_seq_len=8192, shift_terminal=0.02
        ),
        vae=vae,
        text_encoder=Qwen2_5_VLForConditionalGeneration(text),
        tokenizer=tokenizer,
        transformer=transformer,
    ).save_pretrained(folder, safe_serialization=True)
    return folder


def tiny_gemma_tokenizer() -> GemmaTokenizer:
    """One token per byte, and one before them; the lines of the pipeline's instruction are one token each."""
    names = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", *(f"<0x{byte:02X}>" for byte in range(256))]
    vocabulary = {name: number for number, name in enumerate(names)}
    tokenizer = GemmaTokenizer(vocab=vocabulary, merges=[], add_bos_token=True)
    tokenizer.add_tokens(INSTRUCTION)
    return tokenizer


def build_tiny_sana(folder: Path) -> Path:
    """SANA as published (linear attention, convolutions, 32x autoencoder, Gemma 2, DPM-Solver++), narrow."""
    torch.manual_seed(0)
    tokenizer = tiny_gemma_tokenizer()
    text = Gemma2Config(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        vocab_size=len(tokenizer),
    )
    transformer = SanaTransformer2DModel(
        in_channels=32,
        out_channels=32,
        num_attention_heads=4,
        attention_head_dim=8,
        num_layers=2,
        num_cross_attention_heads=2,
        cross_attention_head_dim=16,
        cross_attention_dim=32,
        caption_channels=32,
        sample_size=2,
    )
    blocks = {
        "block_types": ("ResBlock",) * 3 + ("EfficientViTBlock",) * 3,
        "block_out_channels": (8, 8, 8, 16, 16, 32),
        "layers_per_block": (1,) * 6,
        "qkv_multiscales": ((),) * 3 + ((5,),) * 3,
    }
    vae = AutoencoderDC(
        latent_channels=32,
        attention_head_dim=8,
        **{f"{half}_{key}": value for half in ("encoder", "decoder") for key, value in blocks.items()},
        upsample_block_type="interpolate",
        scaling_factor=0.41407,
    )
    SanaPipeline(
        tokenizer=tokenizer,
        text_encoder=Gemma2Model(text),
        vae=vae,
        transformer=transformer,
        scheduler=DPMSolverMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0),
    ).save_pretrained(folder, safe_serialization=True)
    return folder


def sd_scheduler(prediction_type: str = "epsilon") -> DDIMScheduler:
    """Scheduler with Stable Diffusion's noise schedule."""
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        prediction_type=prediction_type,
    )
