"""Host time to switch a LoRA off and on around a reference launch: ours beside PEFT's and diffusers' own functions.

Published architectures with a LoRA on their attention layers, on the meta device: no arithmetic is timed. A training
launch switches twice, once off and once on; with 16-bit weights, PEFT's cast of each layer's input to the factors' fp32
was switched off and on around it as well.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from architectures import build_unet
from diffusers import UNet2DConditionModel
from peft.helpers import disable_input_dtype_casting
from training_step import TARGETS

from cdpo_ray.models.lora import Adapters, attach_lora


def sd15() -> UNet2DConditionModel:
    return build_unet(320, 512, 768)


def sdxl() -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=128,
        block_out_channels=(320, 640, 1280),
        layers_per_block=2,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 2, 10),
        cross_attention_dim=2048,
        attention_head_dim=(5, 10, 20),
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=256,
        projection_class_embeddings_input_dim=2816,
    )


def milliseconds(work: Callable[[], None], repeats: int) -> float:
    """Median host time of one call."""
    took = []
    for _ in range(repeats):
        start = time.perf_counter()
        work()
        took.append(time.perf_counter() - start)
    return 1e3 * statistics.median(took)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=15)
    options = parser.parse_args()
    print(f"{'model':6} {'layers':>6} {'ours':>8} {'diffusers':>10} {'and PEFT casting':>17}   (ms)")
    for name, build in {"sd15": sd15, "sdxl": sdxl}.items():
        with torch.device("meta"):
            net = build()
        attach_lora(net, rank=8, alpha=8, targets=TARGETS, seed=0)
        adapters = Adapters(net)

        def ours(adapters: Adapters = adapters) -> None:
            with adapters.off():
                pass

        def stock(net: UNet2DConditionModel = net) -> None:
            net.disable_adapters()
            net.enable_adapters()

        def casting(net: UNet2DConditionModel = net) -> None:
            with disable_input_dtype_casting(net):
                pass

        mine, switching, cast = (milliseconds(work, options.repeats) for work in (ours, stock, casting))
        print(f"{name:6} {len(adapters.layers):6} {mine:8.2f} {switching:10.1f} {switching + cast:17.1f}", flush=True)


if __name__ == "__main__":
    main()
