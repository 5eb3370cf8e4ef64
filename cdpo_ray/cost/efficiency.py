"""What share of a GPU's peak rate each kind of work reaches, and how long starting takes: all of it ESTIMATED."""

from typing import Literal, NamedTuple

Work = Literal["train", "generate", "decode", "judge"]


class Efficiency(NamedTuple):
    """Share of the dense 16-bit peak rate (of the fp32 rate for a model in float32), 0 to 1."""

    eager: float
    compiled: float


EFFICIENCY: dict[Work, Efficiency] = {
    # None was measured with this code. The published figures are FLOPs of the denoiser alone over a whole image's time.
    #
    # SDXL, 30 denoising steps with guidance (406 TFLOP) on an A100: 3.31 s eager = 0.39 of the peak, 2.54 s compiled =
    # 0.51 (pytorch.org/blog/accelerating-generative-ai-3, batch of 1). An H100 reaches less of its peak: TensorRT's
    # SDXL at 0.68 images/s is 0.28. FLUX.1-dev, 28 steps on an L20: 24.9 s eager = 0.70, 20.2 s compiled = 0.86
    # (flux-faster's page). Near the H100's, so that a smaller GPU is rather faster than estimated.
    "generate": Efficiency(0.25, 0.33),
    # Backward kernels are less efficient than forward ones, and the LoRA's own are small. The released trainers'
    # 0.06 to 0.08 (Diffusion-DPO's README on A100s) includes their VAE, data loading and communication.
    "train": Efficiency(0.22, 0.32),
    # Convolutions at full resolution, limited by memory.
    "decode": Efficiency(0.20, 0.25),
    # Small images in fp32 or TF32, against the 16-bit peak.
    "judge": Efficiency(0.05, 0.05),
}

COMPILE_SECONDS = {
    # Of one graph of the whole denoiser, by family: ESTIMATED from the number of its operators.
    "stable_diffusion": 60.0,
    "latent_consistency": 60.0,
    "stable_diffusion_xl": 120.0,
    "stable_diffusion_3": 60.0,
    "flux": 90.0,
}
GRAPHS: dict[Work, int] = {"generate": 1, "train": 3}
"""Graphs that are compiled: training has forwards with adapters on and off, and a backward."""
LOAD_SECONDS_PER_GIB = 1.0
"""Weights from a local disk to the GPU; ESTIMATED."""
START_SECONDS = 30.0
"""A process's imports and its first kernels; ESTIMATED."""
