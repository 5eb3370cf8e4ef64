"""Peak GPU memory of each process of a run; plain arithmetic."""

from collections.abc import Sequence
from dataclasses import dataclass

from cdpo_ray.cost.footprint import Footprint
from cdpo_ray.models.sizes import BYTES_OF

CONTEXT_BYTES = 0.9 * 2**30
"""CUDA context, library workspaces and NCCL buffers of one process; ESTIMATED."""
USABLE_SHARE = 0.95
"""Usable share of a GPU's memory, without fragmentation; ESTIMATED."""
QUANTIZED_BYTES = {"nf4": 0.53, "int8": 1.01}
"""Bytes per parameter of a linear layer: 4 bits and a quantized scale per block of 64; 8 bits and a scale per row."""
MOMENTS_BYTES = {"adamw": 2 * 4.0, "adamw_8bit": 2 * 1.02}
"""Bytes of both moments per trainable parameter: fp32; 8 bits and a scale per block of 256."""
DORA_ACTIVATIONS = 1.17
"""Activations of a DoRA relative to a LoRA's, counted for attention layers of SD 1.5; 1.07 with checkpointing."""
REDUCE_BUCKET_VALUES = 5e8
"""Number of values in DeepSpeed's default buffer for gathering gradients in ZeRO 1 to 3."""


@dataclass(frozen=True)
class DenoiserStorage:
    """Storage of a model's weights; see `ModelSection` of the config."""

    dtype: str
    quantization: str | None = None
    offload: bool = False

    @property
    def value_bytes(self) -> int:
        """Bytes of one weight or activation."""
        return BYTES_OF[self.dtype]

    def denoiser_bytes(self, footprint: Footprint) -> float:
        """Bytes of the denoiser's weights."""
        if self.quantization is None:
            return float(footprint.parameters * self.value_bytes)
        others = footprint.parameters - footprint.linear_parameters
        return footprint.linear_parameters * QUANTIZED_BYTES[self.quantization] + others * self.value_bytes

    def scaled(self, bytes_16_bit: float) -> float:
        """Bytes of activations in this dtype, from their bytes in 16 bits."""
        return bytes_16_bit * self.value_bytes / 2


@dataclass(frozen=True)
class Peak:
    """Peak memory of one process in bytes.

    Attributes:
        weights: resident memory, optimizer state included.
        work: largest temporary memory: activations, the optimizer's temporaries, or loading.
        context: see `CONTEXT_BYTES`.
    """

    weights: float
    work: float
    context: float = CONTEXT_BYTES

    @property
    def total(self) -> float:
        return self.weights + self.work + self.context

    def fits(self, gpu_bytes: float) -> bool:
        """Whether the total fits into the usable share of a GPU's memory."""
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
    use_dora: bool = False,
    validated_images: int = 0,
    passes: int = 1,
    judges_bytes: int = 0,
) -> Peak:
    """Peak memory of a training worker.

    A LoRA's reference is the same denoiser with adapters off; full fine-tuning keeps a frozen copy, which ZeRO does not
    shard.

    Args:
        positions: number of latent positions of a sample.
        pairs: number of pairs per forward pass.
        lora: rank and targets; `None`: full fine-tuning.
        checkpointing: whether activations are checkpointed.
        optimizer: key of `MOMENTS_BYTES`.
        zero_stage: DeepSpeed ZeRO stage, 0 to 3.
        num_workers: number of training workers.
        teacher: footprint of a consistency model's teacher.
        with_vae: whether the worker decodes images: previews, or the validation of a search.
        use_dora: whether the LoRA is a DoRA.
        validated_images: number of images per batch that the worker samples and judges between stages; 0: none.
        passes: number of forward passes per denoising step of these images, as in `generator_peak`.
        judges_bytes: bytes of the weights of the judges in the same process.
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
    if use_dora:
        activations *= DORA_ACTIVATIONS
    if teacher:  # one forward pass without gradient, both samples with and without prompt
        activations = max(activations, 4 * pairs * teacher.inference_bytes(positions))
    # fp32 gradients and AdamW's temporaries of the same size, once activations are freed
    stepping = 2 * 4 * trainable * (share if zero_stage >= 1 else 1)
    vae_at_rest = 0 if storage.offload else vae
    weights += vae_at_rest
    # text encoders are freed before training; with offload, before the denoiser is moved to the GPU
    loading = text + vae_at_rest + (0 if storage.offload else denoiser) - weights
    sampling = _sampling_work(footprint, storage, positions=positions, images=validated_images, passes=passes)
    # judges are on the GPU while the model is loaded, too
    return Peak(weights + judges_bytes, max(storage.scaled(activations), stepping, loading, sampling))


def generator_peak(
    footprint: Footprint,
    storage: DenoiserStorage,
    *,
    positions: int,
    images: int,
    passes: int,
    judges_bytes: int = 0,
    extra_parameters: int = 0,
) -> Peak:
    """Peak memory of a process that samples and decodes images.

    With offload only the denoiser is resident; text encoders and VAE are on the GPU while they run.

    Args:
        positions: number of latent positions of a sample.
        images: number of images per batch.
        passes: number of forward passes per denoising step: 2 with classifier-free guidance, else 1.
        judges_bytes: bytes of the weights of the judges in the same process.
        extra_parameters: number of parameters of other resident models: a fully fine-tuned denoiser, a teacher.
    """
    denoiser = storage.denoiser_bytes(footprint) + extra_parameters * storage.value_bytes
    text, vae = (number * storage.value_bytes for number in (footprint.text_parameters, footprint.vae_parameters))
    work = _sampling_work(footprint, storage, positions=positions, images=images, passes=passes)
    if not storage.offload:
        return Peak(denoiser + text + vae + judges_bytes, work)
    return Peak(denoiser + judges_bytes, max(text, work))


def _sampling_work(
    footprint: Footprint, storage: DenoiserStorage, *, positions: int, images: int, passes: int
) -> float:
    """Temporary bytes of sampling and decoding a batch of images; with offload, the VAE is on the GPU to decode."""
    if not images:
        return 0.0
    vae = footprint.vae_parameters * storage.value_bytes if storage.offload else 0
    denoising = storage.scaled(images * passes * footprint.inference_bytes(positions))
    return max(denoising, vae + storage.scaled(images * footprint.decode_bytes(positions)))


def use_checkpointing(setting: bool | str, peak_without: float | None, gpu_bytes: float | None) -> bool:
    """Whether training checkpoints activations.

    Args:
        setting: `training.gradient_checkpointing`; `auto` decides by the peak.
        peak_without: estimated peak bytes without checkpointing; `None`: unknown, `auto` then checkpoints.
        gpu_bytes: memory of the worker's share of the GPU; `None`: there is no GPU.
    """
    if isinstance(setting, bool):
        return setting
    if gpu_bytes is None:
        return False
    return peak_without is None or peak_without > USABLE_SHARE * gpu_bytes
