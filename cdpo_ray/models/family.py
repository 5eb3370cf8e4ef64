"""A text-to-image family: what all of them do alike, and what each must say of itself."""

import contextlib
import functools
import importlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from diffusers import DiffusionPipeline, ModelMixin
from diffusers.utils import logging as diffusers_logging
from torch import Tensor
from transformers.utils import logging as transformers_logging

from cdpo_ray.errors import ModelError
from cdpo_ray.models.folder import check_folder, named_parts, other_parts
from cdpo_ray.models.loading import cannot_be_loaded, fetch, load_part
from cdpo_ray.models.lora import LORA_DIR, LORA_WEIGHTS, Adapters, read_lora
from cdpo_ray.models.noising import squared_error
from cdpo_ray.models.quantization import quantize_linears
from cdpo_ray.store import local_copy

diffusers_logging.set_verbosity_error()
diffusers_logging.disable_progress_bar()
transformers_logging.set_verbosity_error()
transformers_logging.disable_progress_bar()

Conditioning = dict[str, Tensor]
"""What the text encoders made of prompts, a row a prompt (or a sample): ``prompt_embedding [row, token, channel]`` and,
where the family has one, ``pooled_embedding [row, channel]``."""

PIPELINE_NAMES = {"prompt_embedding": "prompt_embeds", "pooled_embedding": "pooled_prompt_embeds"}
"""Conditioning -> the argument by which every pipeline takes it; after ``negative_``, what guidance leads away from."""

Times = dict[str, Tensor]
"""What else a pair is trained at, a number a row: ``timestep`` and, where the net is told of it, ``guidance``."""

Net = Callable[..., Any]
"""What is called to run a denoiser: the net itself, or the engine around it."""


@dataclass(frozen=True)
class DenoisingTask:
    """A question to the net and the right answer, a row a sample.

    Attributes:
        noisy_latents: ``[sample, channel, height, width]`` in the net's type.
        times: ``[sample]`` each.
        conditioning: a row a sample.
        target: ``[sample, channel, height, width]`` fp32.
    """

    noisy_latents: Tensor
    times: Times
    conditioning: Conditioning
    target: Tensor


def rows_of(values: Mapping[str, Tensor], rows: Any) -> dict[str, Tensor]:
    """These rows of each tensor: an index, a list or a slice."""
    return {name: value[rows] for name, value in values.items()}


class TextToImageModel(ABC):
    """A pipeline and what each step of the way needs of it. Latents are scaled as the denoiser sees them."""

    family: ClassVar[str]
    """Its name in `FAMILIES` and `LAYOUTS`."""
    pipeline_class: ClassVar[type[DiffusionPipeline]]
    denoiser_name: ClassVar[str] = "unet"
    text_encoders: ClassVar[tuple[str, ...]] = ("text_encoder",)
    load_options: ClassVar[Mapping[str, Any]] = {}
    embedded_dir: ClassVar[Path | None] = None
    """Folder of the embedded world's model of this family, where it has one."""
    compiled: bool = False
    """Whether the nets are compiled: a new batch size then triggers a recompilation."""
    guidance_range: tuple[float, float] | None = None
    """Guidance that the net is told of in training, where it has an embedding of it; bounds of a uniform draw."""
    offload: bool = False
    """Whether text encoders and VAE are kept in host memory while they are not in use; see `on_device`."""

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
        dtype: str = "float32",
        device: str | None = None,
        compile: bool = False,
        for_training: bool = False,
        keep_vae: bool = False,
        quantization: str | None = None,
        offload: bool = False,
    ) -> Self:
        """Load from ``embedded``, a folder in diffusers layout, or a hub id at a revision; safetensors only.

        Args:
            device: ``cuda`` where there is one, by default.
            compile: compile the denoiser and the VAE's decoder in place; pays on a GPU when the run is long.
            for_training: with what makes denoising tasks, and without the VAE, which only decoding needs.
            keep_vae: for training and decoding both.
            quantization: ``int8`` or ``nf4``: storage of the denoiser's linear layers, which must stay frozen; see
                `quantize_linears`.
            offload: keep text encoders and VAE in host memory while they are not in use. For training, the empty
                prompt is encoded before the denoiser is put on the device.

        Raises:
            ModelError: nothing that can be loaded is there, it is a model of another family, its weights are not those
                of its nets, or a package that ``quantization`` needs is missing.
        """
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        torch_dtype: torch.dtype = getattr(torch, dtype)
        left_out = {"vae": None} if for_training and not keep_vae else {}
        pipeline = cls.load_pipeline(path, revision, torch_dtype, left_out)
        model = cls(pipeline, dtype=torch_dtype, device=device)
        model.compiled, model.offload = compile, offload
        if offload and for_training:
            _ = model.empty_conditioning  # cached
        if quantization:
            quantize_linears(model.denoiser, quantization, device)
        (model.denoiser if offload else pipeline).to(device)
        model.prepare(model.denoiser)
        if pipeline.vae is not None:
            lay_out(pipeline.vae, device)
            if compile:
                pipeline.vae.decoder.compile(dynamic=False)
        return model

    def prepare(self, denoiser: torch.nn.Module) -> None:
        """Choose a denoiser's memory format for the device, and compile it if the model is compiled; in place."""
        if self.denoiser_name == "unet":  # a transformer's only convolution, if any, embeds patches
            lay_out(denoiser, self.device)
        if self.compiled:
            denoiser.compile()

    @classmethod
    def load_pipeline(cls, path: str, revision: str | None, dtype: torch.dtype, left_out: Mapping[str, None]) -> Any:
        """The stock pipeline, without the parts ``left_out``.

        Raises:
            ModelError: nothing that can be loaded is there, or it is a model of another family.
        """
        options = {**cls.load_options, **left_out}
        model_dir = cls.embedded_dir if path == "embedded" else fetch(cls.pipeline_class, path, revision, options)
        if model_dir is None:
            raise ModelError(
                f"`model.path` embedded: the embedded world has no model for {cls.pipeline_class.__name__};"
                " use the family `stable_diffusion` or `latent_consistency`, or give a folder or a hub id"
            )
        check_folder(cls.family, model_dir, partial=not Path(path).is_dir())
        options |= dict.fromkeys(other_parts(cls.family, model_dir))
        try:
            nets = {
                name: load_part(
                    getattr(importlib.import_module(part.library), part.classes[0]), model_dir / name, dtype
                )
                for name, part in named_parts(cls.family, model_dir).items()
                if part.weights and name not in left_out
            }
            return cls.pipeline_class.from_pretrained(
                str(model_dir), dtype=dtype, use_safetensors=True, **nets, **options
            )
        except Exception as error:  # a stranger's configuration can make a constructor raise anything
            raise cannot_be_loaded("model.path", path, revision, error) from None

    def latent_shape(self, height: int | None, width: int | None) -> tuple[int, int, int]:
        """Channel, height and width of one sample's latents, for an image size in pixels (default: the model's own)."""
        native, factor = self.denoiser.config.sample_size, self.pipeline.vae_scale_factor
        return (
            self.denoiser.config.in_channels,
            height // factor if height else native,
            width // factor if width else native,
        )

    @contextlib.contextmanager
    def on_device(self, *names: str) -> Iterator[None]:
        """Within the block these parts of the pipeline are on the device; with `offload`, in host memory after it.

        The weights do not change, so their host copies are kept during the block instead of being copied back.
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
        """Conditioning, a row a prompt, and how many tokens of each prompt no text encoder had room for."""

    @functools.cached_property
    def empty_conditioning(self) -> Conditioning:
        """Conditioning of the empty prompt, one row; what guidance leads away from."""
        return self.encode_prompts([""])[0]

    def drop_text_encoders(self) -> None:
        """Free their memory once all prompts are encoded."""
        for name in self.text_encoders:
            setattr(self.pipeline, name, None)

    @torch.no_grad()
    def sample(
        self, conditioning: Conditioning, noise: Tensor, *, num_denoising_steps: int, guidance_scale: float
    ) -> Tensor:
        """From ``noise`` ``[sample, channel, height, width]`` to clean latents of the same shape, by the pipeline.

        Args:
            conditioning: a row a sample.
            guidance_scale: 1 is without guidance. Source: arXiv:2207.12598.
        """
        factor = self.pipeline.vae_scale_factor
        latents: Tensor = self.pipeline(
            **self.pipeline_arguments(conditioning, guidance_scale),
            latents=self.pipeline_latents(noise.to(self.device, self.dtype)),
            height=noise.shape[-2] * factor,
            width=noise.shape[-1] * factor,
            num_inference_steps=num_denoising_steps,
            guidance_scale=guidance_scale,
            generator=self.sampler_generators(noise),
            output_type="latent",
        ).images
        return latents

    def pipeline_latents(self, noise: Tensor) -> Tensor:
        """The noise as the pipeline takes it."""
        return noise

    def sampler_generators(self, noise: Tensor) -> list[torch.Generator] | None:
        """Of what the sampler adds on its way, a generator a sample; none where it adds nothing."""
        return None

    def pipeline_arguments(self, conditioning: Conditioning, guidance_scale: float) -> dict[str, Any]:
        """What the pipeline is called with in place of prompts; with guidance, the empty prompt's too."""
        arguments = {PIPELINE_NAMES[name]: value for name, value in conditioning.items()}
        if guidance_scale > 1:
            for name, value in conditioning.items():
                arguments[f"negative_{PIPELINE_NAMES[name]}"] = self.empty_conditioning[name].expand_as(value)
        return arguments

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Latents -> images, uint8 ``[sample, 3, height, width]``, on the device.

        An image of latents or pixels that are not finite is black everywhere, and so has no score; see `is_black`.
        """
        vae = self.pipeline.vae
        scaled = latents.to(self.device, vae.dtype) / vae.config.scaling_factor
        with self.on_device("vae"):
            pixels = vae.decode(scaled + (vae.config.get("shift_factor") or 0)).sample
        finite = scaled.flatten(1).isfinite().all(dim=1) & pixels.flatten(1).isfinite().all(dim=1)
        pixels.masked_fill_(~finite[:, None, None, None], -1)
        return ((pixels.float() / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8)

    @torch.no_grad()
    def encode(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Images, uint8 ``[sample, 3, height, width]`` -> mean and standard deviation of their latents, on the device.

        What `decode` turns back; a training draw is ``mean + std * noise``.
        """
        vae = self.pipeline.vae
        with self.on_device("vae"):
            posterior = vae.encode((images.to(self.device).float() / 127.5 - 1).to(vae.dtype)).latent_dist
        factor = vae.config.scaling_factor
        return (posterior.mean - (vae.config.get("shift_factor") or 0)) * factor, posterior.std * factor

    @abstractmethod
    def draw_times(self, generator: torch.Generator) -> Times:
        """Timestep (and guidance, if the net is told of it) to train one pair at: scalars from the generator."""

    @abstractmethod
    def denoising_task(
        self, reference: Net, latents: Tensor, conditioning: Conditioning, times: Times, noise: Tensor
    ) -> DenoisingTask:
        """Noise the latents and say what a right answer is; one task serves policy and reference.

        Args:
            reference: the frozen net, for families whose target it makes.
            latents, noise: ``[sample, channel, height, width]``.
            times: as `draw_times` gives them, ``[sample]`` each.
        """

    @abstractmethod
    def predict(self, denoiser: Net, task: DenoisingTask) -> Tensor:
        """The net's answer, ``[sample, channel, height, width]``."""

    def error(self, prediction: Tensor, target: Tensor) -> Tensor:
        """Distance of an answer from the right one: ``[sample]`` fp32, a mean over channel, height and width."""
        return squared_error(prediction, target)

    def errors(self, denoiser: Net, task: DenoisingTask) -> Tensor:
        """Error of each sample under ``denoiser`` (policy or reference): ``[sample]`` fp32."""
        return self.error(self.predict(denoiser, task), task.target)

    def load_tuned(self, training_dir: Path) -> None:
        """Add what a training wrote (`4-training`), a LoRA or a whole net; `use_tuned` switches it.

        Raises:
            ModelError: it cannot be loaded, does not fit the model, or holds values that are not finite.
        """
        training_dir = local_copy(training_dir)
        if (training_dir / LORA_DIR).is_dir():
            read_lora(training_dir / LORA_DIR, self.denoiser_name).refuse_misfit(self.denoiser)
            self.pipeline.load_lora_weights(
                str(training_dir / LORA_DIR), weight_name=LORA_WEIGHTS, use_safetensors=True
            )
            self._adapters = Adapters(self.denoiser)
            return
        try:
            tuned = load_part(type(self._base), training_dir / self.denoiser_name, self.dtype)
        except Exception as error:
            raise cannot_be_loaded("trained weights", str(training_dir), None, error) from None
        if bad := [name for name, value in tuned.named_parameters() if not value.isfinite().all()]:
            raise ModelError(
                f"{training_dir / self.denoiser_name}: {len(bad)} weights are not finite: {bad[0]}; train again, or do"
                " not use it"
            )
        self.prepare(tuned.to(self.device))
        self._tuned = tuned

    def use_tuned(self, on: bool) -> None:
        """Whether `sample` uses what `load_tuned` added."""
        if self._tuned is None:
            self._adapters.enable(on)
            return
        self.denoiser = self._tuned if on else self._base
        setattr(self.pipeline, self.denoiser_name, self.denoiser)

    @contextlib.contextmanager
    def base_of(self, tuned: Net) -> Iterator[Net]:
        """Within the block, the base model of what `load_tuned` added and `use_tuned` switched on: its reference."""
        self.use_tuned(False)
        try:
            yield self.denoiser
        finally:
            self.use_tuned(True)


def lay_out(net: torch.nn.Module, device: str) -> None:
    """Store convolution weights in the memory format that is fast on a device: channels last on CUDA; in place."""
    if torch.device(device).type == "cuda":
        net.to(memory_format=torch.channels_last)


def uniform_between(bounds: tuple[float, float], generator: torch.Generator) -> Tensor:
    """A number between the bounds, fp32 scalar."""
    low, high = bounds
    return low + (high - low) * torch.rand((), generator=generator)
