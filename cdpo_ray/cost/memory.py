"""Peak GPU memory of the processes of a run, by what the bytes are for; plain arithmetic."""

from collections.abc import Sequence
from dataclasses import dataclass

from cdpo_ray.cost.footprint import Footprint
from cdpo_ray.models.sizes import BYTES_OF

CONTEXT_BYTES = 0.9 * 2**30
"""CUDA context, libraries' workspaces and NCCL's buffers of one process; ESTIMATED."""
USABLE_SHARE = 0.95
"""Of a GPU's memory: the allocator's blocks are never all full; ESTIMATED."""
QUANTIZED_BYTES = {"nf4": 0.53, "int8": 1.01}
"""Per parameter of a linear layer: 4 bits and a scale per block of 64 that is itself quantized; 8 bits and a scale per
row."""
MOMENTS_BYTES = {"adamw": 2 * 4.0, "adamw_8bit": 2 * 1.02}
"""Both moments, per trainable parameter: fp32; 8 bits and a scale per block of 256."""
REDUCE_BUCKET_VALUES = 5e8
"""DeepSpeed's default buffer, in which ZeRO 1 to 3 gather gradients."""
JUDGE_BYTES = 4
"""Per parameter: judges are loaded in fp32."""


@dataclass(frozen=True)
class DenoiserStorage:
    """How the weights of a model are kept; see `ModelSection` of the config."""

    dtype: str
    quantization: str | None = None
    offload: bool = False

    @property
    def value_bytes(self) -> int:
        """Of one weight or activation."""
        return BYTES_OF[self.dtype]

    def denoiser_bytes(self, footprint: Footprint) -> float:
        """Weights of the denoiser."""
        if self.quantization is None:
            return float(footprint.parameters * self.value_bytes)
        others = footprint.parameters - footprint.linear_parameters
        return footprint.linear_parameters * QUANTIZED_BYTES[self.quantization] + others * self.value_bytes

    def scaled(self, bytes_16_bit: float) -> float:
        """Activations of this type, by their bytes in 16 bits."""
        return bytes_16_bit * self.value_bytes / 2


@dataclass(frozen=True)
class Peak:
    """Peak memory of one process in bytes.

    Attributes:
        weights: that stay, optimizer included.
        work: the largest of what comes and goes on top: activations, the optimizer's temporaries, loading.
        context: of CUDA itself.
    """

    weights: float
    work: float
    context: float = CONTEXT_BYTES

    @property
    def total(self) -> float:
        return self.weights + self.work + self.context

    def fits(self, gpu_bytes: float) -> bool:
        """Whether it fits this much memory of a GPU, or of a share of one."""
        return self.total <= USABLE_SHARE * gpu_bytes


def trainer_peak(
    footprint: Footprint,
    storage: DenoiserStorage,
    *,
    positions: int,
    pairs: int,
    lora: tuple[int, Sequence[str]] | None,
    checkpointing: bool,
    optimizer: str,
    zero_stage: int,
    num_workers: int,
    teacher: Footprint | None = None,
    with_vae: bool = False,
) -> Peak:
    """Peak of a training worker.

    A LoRA's reference is the same denoiser with adapters off; full fine-tuning keeps a frozen copy, which ZeRO does not
    shard.

    Args:
        positions: latent positions of a sample.
        pairs: in one launch.
        lora: rank and targets; ``None``: full fine-tuning.
        teacher: of a consistency model.
        with_vae: a search validates in the worker.
    """
    share = 1 / num_workers
    trainable = footprint.lora_parameters(*lora) if lora else footprint.parameters
    denoiser = storage.denoiser_bytes(footprint) * (share if zero_stage == 3 else 1)
    masters = 4.0 if storage.value_bytes == 2 else 0.0
    state = trainable * (masters + MOMENTS_BYTES[optimizer]) * (share if zero_stage >= 1 else 1)
    gradients = trainable * storage.value_bytes * (share if zero_stage >= 2 else 1)
    weights = denoiser + state + gradients
    if lora:
        weights += trainable * storage.value_bytes * (share if zero_stage == 3 else 1)
    else:
        weights += footprint.parameters * storage.value_bytes
    if teacher:
        weights += teacher.parameters * storage.value_bytes
    if zero_stage:
        weights += REDUCE_BUCKET_VALUES * storage.value_bytes
    vae = footprint.vae_parameters * storage.value_bytes if with_vae else 0
    text = footprint.text_parameters * storage.value_bytes
    activations = 2 * pairs * footprint.activation_bytes(positions, lora=lora, checkpointing=checkpointing)
    if teacher:  # with and without prompt, at once, without gradient
        activations = max(activations, 4 * pairs * teacher.inference_bytes(positions))
    # fp32 gradients and AdamW's temporaries of as much again, once the activations are gone
    stepping = 2 * 4 * trainable * (share if zero_stage >= 1 else 1)
    loading = max(0.0, denoiser * (not storage.offload) + text + vae - weights)  # text encoders leave before training
    return Peak(weights + vae * (not storage.offload), max(storage.scaled(activations), stepping, loading))


def generator_peak(
    footprint: Footprint,
    storage: DenoiserStorage,
    *,
    positions: int,
    images: int,
    passes: int,
    judge_parameters: int = 0,
    extra_parameters: int = 0,
) -> Peak:
    """Peak of a process that samples and decodes images.

    With offload the denoiser stays, and text encoders and VAE come to it when they are needed.

    Args:
        images: at once.
        passes: 2 with guidance by a second pass, else 1.
        judge_parameters: of judges that score the images in the same process.
        extra_parameters: that stay too: a tuned whole net, a teacher.
    """
    judges = judge_parameters * JUDGE_BYTES
    denoiser = storage.denoiser_bytes(footprint) + extra_parameters * storage.value_bytes
    text, vae = (number * storage.value_bytes for number in (footprint.text_parameters, footprint.vae_parameters))
    denoising = storage.scaled(images * passes * footprint.inference_bytes(positions))
    decoding = storage.scaled(images * footprint.decode_bytes(positions))
    if not storage.offload:
        return Peak(denoiser + text + vae + judges, max(denoising, decoding))
    return Peak(denoiser + judges, max(text, denoising, vae + decoding))


def use_checkpointing(asked: bool | str, peak_without: float | None, gpu_bytes: float | None) -> bool:
    """Whether training checkpoints activations.

    Args:
        asked: `training.gradient_checkpointing`.
        peak_without: estimated peak bytes without it; ``None``: not known.
        gpu_bytes: memory of the GPU, or of the worker's share of it; ``None``: there is no GPU.
    """
    if isinstance(asked, bool):
        return asked
    if gpu_bytes is None:
        return False
    return peak_without is None or peak_without > USABLE_SHARE * gpu_bytes
