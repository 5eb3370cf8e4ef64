"""Share of a GPU's peak rate that each kind of work reaches, and start-up times: measured where a comment says so."""

from typing import Literal, NamedTuple

Work = Literal["train", "generate", "decode", "judge"]


class Efficiency(NamedTuple):
    """Share of the dense 16-bit peak rate (of the fp32 rate for a model in float32), 0 to 1."""

    eager: float
    compiled: float


EFFICIENCY: dict[Work, Efficiency] = {
    # Measured: SD1.5 at 512 px in bf16 on an H200, 263 (eager) and 370 (compiled) of 989 TFLOP/s; SDXL at 1024 px,
    # eager, 338 (benchmarks/gpu). The published figures below divide the denoiser's FLOPs by the time of a whole image.
    #
    # SDXL, 30 denoising steps with guidance (406 TFLOP) on an A100: 3.31 s eager = 0.39 of the peak, 2.54 s compiled =
    # 0.51 (pytorch.org/blog/accelerating-generative-ai-3, batch of 1). An H100 reaches less of its peak: TensorRT's
    # SDXL at 0.68 images/s is 0.28. FLUX.1-dev, 28 steps on an L20: 24.9 s eager = 0.70, 20.2 s compiled = 0.86
    # (flux-faster's page). A smaller GPU is likely to be faster than estimated.
    "generate": Efficiency(0.27, 0.37),
    # Measured: SD1.5, LoRA, 16 pairs at 512 px in bf16 on an H200, 227 TFLOP/s eager, 258 and 273 compiled; with 4
    # pairs 102; SDXL with checkpointing, eager, 4 pairs 119, 8 pairs 212. The released trainers' 0.06 to 0.08
    # (Diffusion-DPO's README on A100s) includes their VAE, data loading and communication.
    "train": Efficiency(0.23, 0.27),
    # Measured: 16 images of 512 px on an H200, 0.211 s eager, 0.101 s compiled.
    "decode": Efficiency(0.19, 0.40),
    # ESTIMATED: small images in fp32 or TF32, against the 16-bit peak.
    "judge": Efficiency(0.05, 0.05),
}

COMPILE_SECONDS = {
    # One graph of the whole denoiser, by family: ESTIMATED from its number of operators. Measured for SD1.5 on an
    # H200: the first compiled update, with all of its graphs, took 177 and 185 s, the first images 65 s.
    "stable_diffusion": 60.0,
    "latent_consistency": 60.0,
    "stable_diffusion_xl": 120.0,
    "stable_diffusion_3": 60.0,
    "flux": 90.0,
    "flux2": 90.0,
    "z_image": 30.0,  # one graph of a block, not of the denoiser
    "qwen_image": 120.0,
    "sana": 60.0,
}
GRAPHS = {"generate": 1, "train": 3, "evaluate": 2}
"""Number of graphs that each step compiles: forward passes of base and tuned model in training and evaluation, and the
backward pass of training."""
LOAD_SECONDS_PER_GIB = 1.0
"""Loading weights from a local disk to the GPU; ESTIMATED."""
START_SECONDS = 30.0
"""Imports and first kernels of a process; ESTIMATED."""
