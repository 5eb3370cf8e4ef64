"""Count the footprints of published architectures on meta tensors, and compare them with the table of `cost/`.

Needs no weights: the configurations below are the published ones. `--write` updates the table. The largest model takes
about three minutes on one CPU core and 2 GiB of memory.
"""

import argparse
import json
import sys
import time
from typing import Any

import transformers

from cdpo_ray.cost.counting import count, count_folder, denoiser_of
from cdpo_ray.cost.footprint import Footprint
from cdpo_ray.cost.published import TABLE
from cdpo_ray.testbed import PIPELINE_DIR


def clip(width: int, num_layers: int, num_heads: int, projection: int, **rest: Any) -> transformers.CLIPTextConfig:
    return transformers.CLIPTextConfig(
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=num_layers,
        num_attention_heads=num_heads,
        projection_dim=projection,
        **rest,
    )


CLIP_L = clip(768, 12, 12, 768)
CLIP_H = clip(1024, 23, 16, 512)
CLIP_BIG_G = clip(1280, 32, 20, 1280, architectures=["CLIPTextModelWithProjection"])
T5_XXL = transformers.T5Config(
    d_model=4096,
    d_kv=64,
    d_ff=10240,
    num_layers=24,
    num_heads=64,
    feed_forward_proj="gated-gelu",
    is_encoder_decoder=False,
    architectures=["T5EncoderModel"],
)
VAE = {
    "block_out_channels": [128, 256, 512, 512],
    "layers_per_block": 2,
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "latent_channels": 4,
}
QWEN3_4B = transformers.Qwen3Config(
    hidden_size=2560,
    intermediate_size=9728,
    num_hidden_layers=36,
    num_attention_heads=32,
    num_key_value_heads=8,
    head_dim=128,
    tie_word_embeddings=True,
    architectures=["Qwen3ForCausalLM"],
)
VAE_16 = VAE | {"latent_channels": 16, "use_quant_conv": False, "use_post_quant_conv": False}
QWEN_VL = transformers.Qwen2_5_VLConfig(  # 7B
    text_config={
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "vocab_size": 152064,
        "rope_parameters": {"rope_type": "default", "mrope_section": [16, 24, 24], "rope_theta": 1000000.0},
    },
    vision_config={"hidden_size": 1280, "intermediate_size": 3420, "out_hidden_size": 3584},
    architectures=["Qwen2_5_VLForConditionalGeneration"],
    tie_word_embeddings=False,
)
GEMMA_2B = transformers.Gemma2Config(architectures=["Gemma2Model"])
DC_AE: dict[str, Any] = {
    "_class_name": "AutoencoderDC",
    "encoder_block_types": ["ResBlock"] * 3 + ["EfficientViTBlock"] * 3,
    "decoder_block_types": ["ResBlock"] * 3 + ["EfficientViTBlock"] * 3,
    "encoder_block_out_channels": [128, 256, 512, 512, 1024, 1024],
    "decoder_block_out_channels": [128, 256, 512, 512, 1024, 1024],
    "encoder_layers_per_block": [2, 2, 2, 3, 3, 3],
    "decoder_layers_per_block": [3, 3, 3, 3, 3, 3],
    "encoder_qkv_multiscales": [[], [], [], [5], [5], [5]],
    "decoder_qkv_multiscales": [[], [], [], [5], [5], [5]],
    "downsample_block_type": "conv",
    "upsample_block_type": "interpolate",
}
UNET: dict[str, Any] = {"_class_name": "UNet2DConditionModel"}
ARCHITECTURES: dict[str, tuple[dict[str, Any], dict[str, Any], list[Any]]] = {
    "sd15": (UNET | {"cross_attention_dim": 768, "sample_size": 64}, VAE, [CLIP_L]),
    "lcm": (UNET | {"cross_attention_dim": 768, "sample_size": 64, "time_cond_proj_dim": 256}, VAE, [CLIP_L]),
    "sd21": (
        UNET
        | {
            "cross_attention_dim": 1024,
            "attention_head_dim": [5, 10, 20, 20],
            "use_linear_projection": True,
            "sample_size": 96,
        },
        VAE,
        [CLIP_H],
    ),
    "sdxl": (
        UNET
        | {
            "sample_size": 128,
            "block_out_channels": [320, 640, 1280],
            "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
            "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
            "transformer_layers_per_block": [1, 2, 10],
            "attention_head_dim": [5, 10, 20],
            "cross_attention_dim": 2048,
            "use_linear_projection": True,
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 256,
            "projection_class_embeddings_input_dim": 2816,
        },
        VAE,
        [CLIP_L, CLIP_BIG_G],
    ),
    "sd35_medium": (
        {
            "_class_name": "SD3Transformer2DModel",
            "sample_size": 128,
            "num_layers": 24,
            "num_attention_heads": 24,
            "attention_head_dim": 64,
            "caption_projection_dim": 1536,
            "joint_attention_dim": 4096,
            "pooled_projection_dim": 2048,
            "out_channels": 16,
            "pos_embed_max_size": 384,
            "qk_norm": "rms_norm",
            "dual_attention_layers": list(range(13)),
        },
        VAE_16,
        [CLIP_L, CLIP_BIG_G, T5_XXL],
    ),
    "qwen_image": (
        {"_class_name": "QwenImageTransformer2DModel"},
        {"_class_name": "AutoencoderKLQwenImage"},
        [QWEN_VL],
    ),
    "sana_1600m": ({"_class_name": "SanaTransformer2DModel"}, DC_AE, [GEMMA_2B]),
    "flux_dev": ({"_class_name": "FluxTransformer2DModel", "guidance_embeds": True}, VAE_16, [CLIP_L, T5_XXL]),
    "flux2_klein_4b": (
        {
            "_class_name": "Flux2Transformer2DModel",
            "num_layers": 5,
            "num_single_layers": 20,
            "num_attention_heads": 24,
            "joint_attention_dim": 7680,
            "guidance_embeds": False,
        },
        {"_class_name": "AutoencoderKLFlux2"},
        [QWEN3_4B],
    ),
    "z_image": ({"_class_name": "ZImageTransformer2DModel"}, VAE_16, [QWEN3_4B]),
}
DEFINING = (
    "block_out_channels",
    "layers_per_block",
    "down_block_types",
    "cross_attention_dim",
    "transformer_layers_per_block",
    "use_linear_projection",
    "num_layers",
    "num_single_layers",
    "num_attention_heads",
    "attention_head_dim",
    "joint_attention_dim",
    "dual_attention_layers",
    "in_channels",
    "dim",
    "n_layers",
    "n_refiner_layers",
    "cap_feat_dim",
)
"""Keys of a denoiser's configuration that identify its architecture in a folder."""
PUBLISHED_TERAFLOPS = {"sd15": 0.803, "sdxl": 6.76, "sd35_medium": 11.25, "flux_dev": 74.4}
"""Published FLOPs of a forward pass at the model's native size, to verify the counts."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", help=f"from {', '.join((*ARCHITECTURES, 'embedded'))}; default: all")
    parser.add_argument("--write", action="store_true", help="update the table's entries of these models")
    options = parser.parse_args()
    table = json.loads(TABLE.read_text()) if TABLE.is_file() else {}
    failed = False
    print(
        "| model | parameters, M | forward TF | backward TF, LoRA | full | training GiB, LoRA | full | checkpointed |"
    )
    print("|---|---|---|---|---|---|---|---|")
    for name in options.models or (*ARCHITECTURES, "embedded"):
        started = time.monotonic()
        if name == "embedded":
            counted = count_folder(PIPELINE_DIR)
            config = json.loads((PIPELINE_DIR / "unet" / "config.json").read_text())
        else:
            config, vae, text = ARCHITECTURES[name]
            counted = count(config, vae, text)
            config = {"_class_name": config["_class_name"], **denoiser_of(config)[0]().config}
        defining = {key: config[key] for key in ("_class_name", *DEFINING) if key in config}
        found = json.loads(json.dumps({"denoiser": defining, "footprint": counted.plain()}))
        if options.write:
            table[name] = found
            TABLE.write_text(json.dumps(table, indent=1) + "\n")
        agrees = found == table.get(name)
        known = PUBLISHED_TERAFLOPS.get(name)
        if known and abs(counted.forward_flops(counted.native_positions) / 1e12 / known - 1) > 0.005:
            agrees = False
        failed |= not agrees
        print(_row(name, counted), "" if agrees else "DIFFERS", f"{time.monotonic() - started:.0f} s", flush=True)
    return int(failed)


def _row(name: str, counted: Footprint) -> str:
    at = counted.native_positions
    columns = [
        name,
        f"{counted.parameters / 1e6:.1f}",
        f"{counted.forward_flops(at) / 1e12:.4g}",
        f"{counted.backward_flops['lora'](at) / 1e12:.4g}",
        f"{counted.backward_flops['full'](at) / 1e12:.4g}",
        f"{counted.training_bytes['lora'](at) / 2**30:.3g}",
        f"{counted.training_bytes['full'](at) / 2**30:.3g}",
        f"{counted.checkpointed_bytes['lora'](at) / 2**30:.3g}",
    ]
    return f"| {' | '.join(columns)} |"


if __name__ == "__main__":
    sys.exit(main())
