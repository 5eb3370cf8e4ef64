"""Peak GPU memory of each process of a run, by purpose; plain arithmetic."""

from collections.abc import Sequence
from dataclasses import dataclass

from cdpo_ray.cost.footprint import Footprint
from cdpo_ray.models.sizes import BYTES_OF

CONTEXT_BYTES = 0.9 * 2**30
"""CUDA context, library workspaces and NCCL buffers of one process; ESTIMATED."""
USABLE_SHARE = 0.95
"""Of a GPU's memory; the rest is lost to fragmentation; ESTIMATED."""
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
    """How a model's weights are stored; see `ModelSection` of the config."""

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
        """Bytes of activations in this dtype, from their bytes in 16 bits."""
        return bytes_16_bit * self.value_bytes / 2


@dataclass(frozen=True)
class Peak:
    """Peak memory of one process in bytes.

    Attributes:
        weights: resident for the whole process, optimizer state included.
        work: largest of the temporary uses: activations, the optimizer's temporaries, loading.
        context: see `CONTEXT_BYTES`.
    """

    weights: float
    work: float
    context: float = CONTEXT_BYTES

    @property
    def total(self) -> float:
        return self.weights + self.work + self.context

    def fits(self, gpu_bytes: float) -> bool:
        """Whether it fits into the usable share of this much memory."""
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
        with_vae: the worker decodes images, as a search does to validate.
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
    if teacher:  # one forward without gradient, both samples with and without prompt
        activations = max(activations, 4 * pairs * teacher.inference_bytes(positions))
    # fp32 gradients and AdamW's temporaries of the same size, once activations are freed
    stepping = 2 * 4 * trainable * (share if zero_stage >= 1 else 1)
    vae_at_rest = 0 if storage.offload else vae
    weights += vae_at_rest
    # text encoders are dropped before training; with offload they are done before the denoiser is put on the GPU
    loading = text + vae_at_rest + (0 if storage.offload else denoiser) - weights
    return Peak(weights, max(storage.scaled(activations), stepping, loading))


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

    With offload only the denoiser is resident; text encoders and VAE are on the GPU while they run.

    Args:
        images: per batch.
        passes: forwards per denoising step: 2 with classifier-free guidance, otherwise 1.
        judge_parameters: of the judges that run in the same process.
        extra_parameters: of other resident models: a fully fine-tuned net, a teacher.
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
        asked: `training.gradient_checkpointing`; `auto` decides by the peak.
        peak_without: estimated peak bytes without it; ``None``: unknown, then `auto` checkpoints.
        gpu_bytes: memory of the GPU, or of the worker's share of it; ``None``: there is no GPU.
    """
    if isinstance(asked, bool):
        return asked
    if gpu_bytes is None:
        return False
    return peak_without is None or peak_without > USABLE_SHARE * gpu_bytes
