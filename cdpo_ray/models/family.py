"""Base class of the text-to-image families: shared behaviour, and the methods that each family implements."""

import contextlib
import functools
import importlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Protocol, Self

import torch
from diffusers import DiffusionPipeline, ModelMixin
from diffusers.utils import logging as diffusers_logging
from torch import Tensor
from transformers.utils import logging as transformers_logging

from cdpo_ray.errors import ModelError
from cdpo_ray.models.folder import check_folder, check_single_file, named_parts, other_parts
from cdpo_ray.models.loading import fetch, fetch_config, load_converted, load_error, load_part
from cdpo_ray.models.lora import LORA_DIR, LORA_WEIGHTS, Adapters, read_lora
from cdpo_ray.models.noising import squared_error
from cdpo_ray.models.quantization import quantize_linears
from cdpo_ray.models.single_file import architecture_of, read_shapes
from cdpo_ray.models.timesteps import TimestepRule
from cdpo_ray.store import local_copy

diffusers_logging.set_verbosity_error()
diffusers_logging.disable_progress_bar()
transformers_logging.set_verbosity_error()
transformers_logging.disable_progress_bar()

Conditioning = dict[str, Tensor]
"""Outputs of the text encoders, one row per prompt or per sample: ``prompt_embedding [row, token, channel]`` and, in
some families, ``pooled_embedding [row, channel]``. The number of tokens is the family's, so that a row does not depend
on the other prompts; where the denoiser masks padding, its embeddings are zero."""

PIPELINE_NAMES = {"prompt_embedding": "prompt_embeds", "pooled_embedding": "pooled_prompt_embeds"}
"""Conditioning -> keyword argument of the pipelines; with the prefix ``negative_``, that of the empty prompt."""

Times = dict[str, Tensor]
"""``timestep [row]`` and, for guidance-conditioned models, ``guidance [row]``."""

Net = Callable[..., Any]
"""Callable that runs a denoiser: the module itself, or a wrapper such as a DeepSpeed engine."""


@dataclass(frozen=True)
class DenoisingTask:
    """Model inputs and target, one row per sample.

    Attributes:
        noisy_latents: ``[sample, channel, height, width]`` in the denoiser's dtype.
        times: ``[sample]`` each.
        conditioning: one row per sample.
        target: ``[sample, channel, height, width]`` fp32.
    """

    noisy_latents: Tensor
    times: Times
    conditioning: Conditioning
    target: Tensor


class Rows(Protocol):
    """A tensor, or a column that is indexed like one and read from disk."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    def __getitem__(self, index: Any, /) -> Tensor: ...


def rows_of(values: Mapping[str, Rows], rows: Any) -> dict[str, Tensor]:
    """Selected rows of each tensor.

    Args:
        rows: index, list of indices or slice of the first dimension.
    """
    return {name: value[rows] for name, value in values.items()}


class TextToImageModel(ABC):
    """A diffusers pipeline with the operations of generation, training and evaluation.

    Latents are scaled as the denoiser takes them.
    """

    family: ClassVar[str]
    """Key in `FAMILIES` and `LAYOUTS`."""
    pipeline_class: ClassVar[type[DiffusionPipeline]]
    denoiser_name: ClassVar[str] = "unet"
    text_encoders: ClassVar[tuple[str, ...]] = ("text_encoder",)
    load_options: ClassVar[Mapping[str, Any]] = {}
    embedded_dir: ClassVar[Path | None] = None
    """Folder of this family's model in the embedded world; `None`: there is none."""
    compiled: bool = False
    """Whether denoiser and decoder are compiled: a new batch size then triggers a recompilation."""
    guidance_range: tuple[float, float] | None = None
    """Bounds of the uniform draw of the guidance in training, for guidance-conditioned models."""
    timesteps: TimestepRule = TimestepRule()
    """Restriction of the timesteps drawn in training."""
    offload: bool = False
    """Whether text encoders and VAE stay in host memory while they are not in use; see `on_device`."""

    def __init__(self, pipeline: Any, *, dtype: torch.dtype, device: str) -> None:
        self.pipeline = pipeline
        self.denoiser: ModelMixin = getattr(pipeline, self.denoiser_name)
        self.dtype = dtype
        self.device = device
        self._base, self._tuned = self.denoiser, None
        self._adapters = Adapters(self.denoiser)
        pipeline.set_progress_bar_config(disable=True)

    @classmethod
    def load(
        cls,
        path: str,
        *,
        revision: str | None = None,
        config: Mapping[str, Any] | None = None,
        dtype: str = "float32",
        device: str | None = None,
        compile: bool = False,
        for_training: bool = False,
        keep_vae: bool = False,
        quantization: str | None = None,
        offload: bool = False,
        guidance_range: tuple[float, float] | None = None,
        timesteps: Mapping[str, Any] | None = None,
    ) -> Self:
        """Load from ``embedded``, a folder in diffusers layout, a hub id at a revision, or a file; safetensors only.

        Args:
            path: ``embedded``, path of a folder, hub id, or path of a single-file checkpoint.
            revision: revision of the hub id; `None`: the hub's default branch.
            config: ``path`` and ``revision`` of the model in diffusers layout whose configurations and tokenizers
                complete a single-file checkpoint; `None` for all others.
            dtype: name of the torch dtype of all parts.
            device: ``cuda`` if available, else ``cpu``, by default.
            compile: compile the denoiser and the VAE's decoder in place; pays off in long runs on a GPU.
            for_training: load what denoising tasks need, and no VAE, which only decoding needs.
            keep_vae: load the VAE for training, too.
            quantization: ``int8`` or ``nf4``: storage of the denoiser's linear layers, which must stay frozen; see
                `quantize_linears`.
            offload: keep text encoders and VAE in host memory while they are not in use. For training, the empty
                prompt is encoded before the denoiser is moved to the device.
            guidance_range: bounds of the guidance drawn in training; `None`: the family's.
            timesteps: keyword arguments of the `TimestepRule` of training; `None`: no restriction.

        Raises:
            ModelError: if nothing loadable is found, the model belongs to another family, its weights do not match its
                modules, or a package that ``quantization`` needs is missing.
        """
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        torch_dtype: torch.dtype = getattr(torch, dtype)
        left_out = {"vae": None} if for_training and not keep_vae else {}
        if config:
            pipeline = cls.load_single_file(Path(path), config, torch_dtype, left_out)
        else:
            pipeline = cls.load_pipeline(path, revision, torch_dtype, left_out)
        model = cls(pipeline, dtype=torch_dtype, device=device)
        model.compiled, model.offload = compile, offload
        model.guidance_range = guidance_range or cls.guidance_range
        model.restrict_timesteps(TimestepRule(**timesteps or {}))
        if offload and for_training:
            _ = model.empty_conditioning  # fills the cache
        if quantization:
            quantize_linears(model.denoiser, quantization, device)
        (model.denoiser if offload else pipeline).to(device)
        model.prepare(model.denoiser)
        if compile and pipeline.vae is not None:
            use_channels_last(pipeline.vae, device)
            pipeline.vae.decoder.compile(dynamic=False)
        return model

    def prepare(self, denoiser: torch.nn.Module) -> None:
        """Compile a denoiser if `compiled`, in the memory format for it; in place."""
        if not self.compiled:
            return
        if self.denoiser_name == "unet":  # transformers keep channels last between their convolutions, if any
            use_channels_last(denoiser, self.device)
        denoiser.compile()

    @classmethod
    def load_pipeline(cls, path: str, revision: str | None, dtype: torch.dtype, left_out: Mapping[str, None]) -> Any:
        """Load the diffusers pipeline, without the parts ``left_out``.

        Raises:
            ModelError: if nothing loadable is found, or the model belongs to another family.
        """
        model_dir = cls.embedded_dir
        if path != "embedded":
            model_dir = fetch(cls.pipeline_class, path, revision, {**cls.load_options, **left_out})
        if model_dir is None:
            raise ModelError(
                f"`model.path` embedded: the embedded world has no model for {cls.pipeline_class.__name__};"
                " use the family `stable_diffusion` or `latent_consistency`, or give a folder or a hub id"
            )
        check_folder(cls.family, model_dir, partial=not Path(path).is_dir())
        try:
            return cls._assemble(model_dir, dtype, left_out, load_part)
        except Exception as error:  # an untrusted configuration can make a constructor raise anything
            raise load_error("model.path", path, revision, error) from None

    @classmethod
    def load_single_file(
        cls, path: Path, config: Mapping[str, Any], dtype: torch.dtype, left_out: Mapping[str, None]
    ) -> Any:
        """Load the diffusers pipeline from a single-file checkpoint, without the parts ``left_out``.

        Args:
            config: ``path`` and ``revision`` of the model with the configurations and tokenizers.

        Raises:
            ModelError: if it cannot be loaded, or belongs to another family.
        """
        config_dir = fetch_config(**config)
        scheduler = check_single_file(cls.family, path, config_dir)
        prefixes = architecture_of(read_shapes(path)).prefixes

        def load(kind: Any, part_dir: Path, dtype: torch.dtype) -> Any:
            return load_converted(kind, part_dir, path, prefixes[part_dir.name], dtype)

        try:
            pipeline = cls._assemble(config_dir, dtype, left_out, load)
        except Exception as error:
            raise load_error("model.path", str(path), None, error) from None
        pipeline.scheduler.register_to_config(**scheduler)
        pipeline.register_to_config(_name_or_path=str(path))
        return pipeline

    @classmethod
    def _assemble(
        cls, model_dir: Path, dtype: torch.dtype, left_out: Mapping[str, None], load: Callable[..., Any]
    ) -> Any:
        """Load the pipeline of a checked folder.

        Args:
            load: called with class, folder and dtype of each part with weights.
        """
        nets = {
            name: load(getattr(importlib.import_module(part.library), part.classes[0]), model_dir / name, dtype)
            for name, part in named_parts(cls.family, model_dir).items()
            if part.weights and name not in left_out
        }
        others = dict.fromkeys(other_parts(cls.family, model_dir))
        return cls.pipeline_class.from_pretrained(
            str(model_dir), dtype=dtype, use_safetensors=True, **nets, **{**cls.load_options, **left_out, **others}
        )

    @property
    def pixels_per_latent(self) -> int:
        """Pixels per latent value along each side of an image."""
        factor: int = self.pipeline.vae_scale_factor
        return factor

    def latent_shape(self, height: int | None, width: int | None) -> tuple[int, int, int]:
        """Channel, height and width of one sample's latents.

        Args:
            height, width: image size in pixels; `None`: the model's native size.
        """
        native, factor = self.denoiser.config.sample_size, self.pixels_per_latent
        return (
            self.denoiser.config.in_channels,
            height // factor if height else native,
            width // factor if width else native,
        )

    @contextlib.contextmanager
    def on_device(self, *names: str) -> Iterator[None]:
        """Context manager that keeps these parts of the pipeline on the device; with `offload`, they leave it on exit.

        The weights do not change, so the host copies are kept during the block instead of being copied back.
        """
        parts = [part for name in names if self.offload and (part := getattr(self.pipeline, name)) is not None]
        on_host = [(parameter, parameter.data) for part in parts for parameter in part.parameters()]
        try:
            for part in parts:
                part.to(self.device)
            yield
        finally:
            for parameter, value in on_host:
                parameter.data = value
            for part in parts:
                part.to("cpu")  # buffers

    @abstractmethod
    def encode_prompts(self, prompts: list[str]) -> tuple[Conditioning, list[int]]:
        """Encode prompts.

        Returns:
            Conditioning, one row per prompt, on the device; and the number of tokens of each prompt beyond the limit of
            every text encoder.
        """

    @functools.cached_property
    def empty_conditioning(self) -> Conditioning:
        """Conditioning of the empty prompt, one row; the unconditional input of guidance."""
        return self.encode_prompts([""])[0]

    def drop_text_encoders(self) -> None:
        """Free the memory of the text encoders once all prompts are encoded."""
        for name in self.text_encoders:
            setattr(self.pipeline, name, None)

    @torch.no_grad()
    def sample(
        self, conditioning: Conditioning, noise: Tensor, *, num_denoising_steps: int, guidance_scale: float
    ) -> Tensor:
        """Sample clean latents ``[sample, channel, height, width]`` with the pipeline.

        Args:
            conditioning: one row per sample.
            noise: initial noise, ``[sample, channel, height, width]``.
            num_denoising_steps: number of sampler steps.
            guidance_scale: classifier-free guidance; 1: none. Source: arXiv:2207.12598.
        """
        return self.run_pipeline(
            conditioning, noise, num_denoising_steps=num_denoising_steps, guidance_scale=guidance_scale
        )

    def run_pipeline(
        self, conditioning: Conditioning, noise: Tensor, *, num_denoising_steps: int, guidance_scale: float, **more: Any
    ) -> Tensor:
        """Latents that the pipeline returns.

        Args:
            conditioning, noise, num_denoising_steps, guidance_scale: as for `sample`.
            more: further arguments of the pipeline.
        """
        factor = self.pixels_per_latent
        latents: Tensor = self.pipeline(
            **{"guidance_scale": guidance_scale} | self.pipeline_arguments(conditioning, guidance_scale),
            latents=self.pipeline_latents(noise.to(self.device)),
            height=noise.shape[-2] * factor,
            width=noise.shape[-1] * factor,
            num_inference_steps=num_denoising_steps,
            generator=self.sampler_generators(noise),
            output_type="latent",
            **more,
        ).images
        return latents

    def pipeline_latents(self, noise: Tensor) -> Tensor:
        """Noise in the layout and dtype that the pipeline takes."""
        return noise.to(self.dtype)

    def sampler_generators(self, noise: Tensor) -> list[torch.Generator] | None:
        """One generator per sample for the noise that the sampler adds; `None`: the sampler is deterministic."""
        return None

    def pipeline_arguments(self, conditioning: Conditioning, guidance_scale: float) -> dict[str, Any]:
        """Keyword arguments that replace the prompts in a pipeline call; with guidance, also those of the empty one."""
        arguments = {PIPELINE_NAMES[name]: value for name, value in conditioning.items()}
        if guidance_scale > 1:
            for name, value in conditioning.items():
                arguments[f"negative_{PIPELINE_NAMES[name]}"] = self.empty_conditioning[name].expand_as(value)
        return arguments

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Latents -> images, uint8 ``[sample, 3, height, width]``, on the device.

        An image with non-finite latents or pixels becomes all black, and so has no score; see `is_black`.
        """
        shift, factor = self.vae_scaling()
        scaled = latents.to(self.device, self.pipeline.vae.dtype) / factor
        with self.on_device("vae"):
            pixels = self.vae_decode(scaled + shift)
        finite = scaled.flatten(1).isfinite().all(dim=1) & pixels.flatten(1).isfinite().all(dim=1)
        pixels.masked_fill_(~finite[:, None, None, None], -1)
        return ((pixels.float() / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8)

    @torch.no_grad()
    def encode(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Images, uint8 ``[sample, 3, height, width]`` -> mean and standard deviation of their latents, on the device.

        The inverse of `decode`; a training draw is ``mean + std * noise``.
        """
        shift, factor = self.vae_scaling()
        with self.on_device("vae"):
            mean, std = self.vae_encode((images.to(self.device).float() / 127.5 - 1).to(self.pipeline.vae.dtype))
        return (mean - shift) * factor, std * factor

    def vae_scaling(self) -> tuple[Any, Any]:
        """Shift and factor from the VAE's latents to the denoiser's, ``(latents - shift) * factor``: numbers, or
        tensors ``[channel, 1, 1]``."""
        config = self.pipeline.vae.config
        return config.get("shift_factor") or 0, config.scaling_factor

    def vae_decode(self, latents: Tensor) -> Tensor:
        """Images of the VAE's latents, from -1 to 1."""
        pixels: Tensor = self.pipeline.vae.decode(latents).sample
        return pixels

    def vae_encode(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of the VAE's latents of images from -1 to 1."""
        posterior = self.pipeline.vae.encode(pixels).latent_dist
        return posterior.mean, posterior.std

    def restrict_timesteps(self, rule: TimestepRule) -> None:
        """Restrict the timesteps that `draw_times` draws.

        Raises:
            ModelError: if the rule asks for the sampler's timesteps, and they depend on the image's size.
        """
        if rule.num_denoising_steps:
            rule = TimestepRule(listed=self.sampler_timesteps(rule.num_denoising_steps))
        self.timesteps = rule

    def sampler_timesteps(self, num_denoising_steps: int) -> tuple[int, ...]:
        """Timesteps at which the sampler calls the denoiser, highest first.

        Raises:
            ModelError: if the family's timesteps depend on the image's size.
        """
        raise ModelError(
            f"`training.timesteps` 'sampler': the timesteps of the family {self.family!r} depend on the image's size;"
            " give a list or a range"
        )

    @abstractmethod
    def draw_times(self, generator: torch.Generator) -> Times:
        """Draw the timestep, and the guidance of a guidance-conditioned model, of one pair: scalars."""

    @abstractmethod
    def denoising_task(
        self, reference: Net, latents: Tensor, conditioning: Conditioning, times: Times, noise: Tensor
    ) -> DenoisingTask:
        """Noisy latents and their target; policy and reference share one task.

        Args:
            reference: frozen denoiser, for families whose target it computes.
            latents, noise: ``[sample, channel, height, width]``.
            conditioning: one row per sample.
            times: values of `draw_times`, stacked to ``[sample]`` each.
        """

    @abstractmethod
    def predict(self, denoiser: Net, task: DenoisingTask) -> Tensor:
        """Prediction of a denoiser, ``[sample, channel, height, width]``."""

    def error(self, prediction: Tensor, target: Tensor) -> Tensor:
        """Distance between prediction and target: ``[sample]`` fp32, mean over channel, height and width."""
        return squared_error(prediction, target)

    def errors(self, denoiser: Net, task: DenoisingTask) -> Tensor:
        """Error of each sample under a denoiser (policy or reference): ``[sample]`` fp32."""
        return self.error(self.predict(denoiser, task), task.target)

    def load_tuned(self, training_dir: Path) -> None:
        """Load the LoRA or fully fine-tuned denoiser that training wrote; `use_tuned` switches it on.

        Args:
            training_dir: folder of the step `4-training`.

        Raises:
            ModelError: if it cannot be loaded, does not fit the model, or holds non-finite values.
        """
        training_dir = local_copy(training_dir)
        if (training_dir / LORA_DIR).is_dir():
            saved = read_lora(training_dir / LORA_DIR, self.denoiser_name)
            saved.check_fits(self.denoiser)
            self.pipeline.load_lora_weights(
                str(training_dir / LORA_DIR), weight_name=LORA_WEIGHTS, use_safetensors=True
            )
            saved.restore_magnitudes(self.denoiser)
            self._adapters = Adapters(self.denoiser)
            return
        try:
            tuned = load_part(type(self._base), training_dir / self.denoiser_name, self.dtype)
        except Exception as error:
            raise load_error("trained weights", str(training_dir), None, error) from None
        if bad := [name for name, value in tuned.named_parameters() if not value.isfinite().all()]:
            raise ModelError(
                f"{training_dir / self.denoiser_name}: {len(bad)} weights are not finite, the first {bad[0]}; train"
                " again, or do not use it"
            )
        self.prepare(tuned.to(self.device))
        self._tuned = tuned

    def use_tuned(self, on: bool) -> None:
        """Make `sample` use the weights of `load_tuned`, or those of the base model."""
        if self._tuned is None:
            self._adapters.enable(on)
            return
        self.denoiser = self._tuned if on else self._base
        setattr(self.pipeline, self.denoiser_name, self.denoiser)

    @contextlib.contextmanager
    def base_of(self, tuned: Net) -> Iterator[Net]:
        """Context manager that yields the base model, the reference of ``tuned``; `use_tuned` must be on."""
        self.use_tuned(False)
        try:
            yield self.denoiser
        finally:
            self.use_tuned(True)


def use_channels_last(net: torch.nn.Module, device: str) -> None:
    """Store convolution weights with the channels last on CUDA, which is faster there for compiled networks; in place.

    PyTorch's own group normalization on CUDA works on contiguous activations only, so that without compilation the
    activations would be converted before and after each convolution.
    """
    if torch.device(device).type == "cuda":
        for layer in net.modules():
            if isinstance(layer, torch.nn.Conv2d):  # a 3-D convolution, as in video VAEs, has no such format
                layer.to(memory_format=torch.channels_last)


def uniform_between(bounds: tuple[float, float], generator: torch.Generator) -> Tensor:
    """Uniform random number between the bounds, fp32 scalar."""
    low, high = bounds
    return low + (high - low) * torch.rand((), generator=generator)
