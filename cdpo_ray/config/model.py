"""The base model, and sampling."""

from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from cdpo_ray.config.section import LocalPath, Section, check_is_safetensors, check_weights, is_single_file

Family = Literal[
    "stable_diffusion",
    "stable_diffusion_xl",
    "latent_consistency",
    "stable_diffusion_3",
    "flux",
    "flux2",
    "z_image",
    "qwen_image",
    "sana",
]
"""`cdpo_ray.models.FAMILIES` maps each to its class; a test compares the two."""

CONSISTENCY = "latent_consistency"
"""The family of consistency models."""

GUIDANCE_FROM_ZERO = ("z_image",)
"""Families whose pipelines in diffusers count the guidance scale from 0, which is none."""

GUIDANCE_EMBEDDED = (CONSISTENCY, "flux")
"""Guidance-conditioned families."""

CONSISTENCY_TIMESTEPS = 50
"""Number of timesteps that a latent consistency model is distilled and sampled at."""

FLOW_MATCHING = {"stable_diffusion_3": 16, "flux": 16, "flux2": 16, "z_image": 16, "qwen_image": 16, "sana": 32}
"""Flow-matching families -> pixels per side of what one position of the denoiser stands for: patches of 2 x 2 latent
values, or in `sana` one."""


SINGLE_FILE_CONFIGS = {
    "stable_diffusion": {
        "path": "stable-diffusion-v1-5/stable-diffusion-v1-5",
        "revision": "451f4fe16113bff5a5d2269ed5ad43b0592e9a14",
    },
    "stable_diffusion_xl": {
        "path": "stabilityai/stable-diffusion-xl-base-1.0",
        "revision": "462165984030d82259a11f4367a4eed129e94a7b",
    },
}
"""Family whose single-file checkpoints are loaded -> default of `model.config`."""


class ModelSource(Section):
    """A model in diffusers layout."""

    path: LocalPath
    """`embedded`, a folder in diffusers layout, or a hub id."""

    revision: str | None = None
    """Full commit (40 hex digits) of a hub id."""

    @model_validator(mode="after")
    def _can_be_found(self) -> Self:
        check_weights(self.path, self.revision)
        return self


class TeacherSection(ModelSource):
    """The diffusion model that a consistency model was distilled from. Required for `training.consistency_target:
    teacher`, except with `path: embedded`; not allowed otherwise."""


class ConfigSource(ModelSource):
    """A model in diffusers layout that provides the configurations and tokenizers for a single file, which has none.
    Its weights are neither read nor downloaded. Default: Stable Diffusion 1.5 or SDXL, as published; there is no
    default for a Stable Diffusion 2 file."""


class ModelSection(Section):
    """The base model that is fine-tuned."""

    family: Family = "stable_diffusion"
    """Architecture and sampler. `stable_diffusion`: SD 1.5, 2.1; `stable_diffusion_xl`: SDXL; `latent_consistency`:
    LCM; `stable_diffusion_3`: SD 3.5; `flux`: FLUX.1; `flux2`: FLUX.2 klein; `z_image`: Z-Image; `qwen_image`:
    Qwen-Image; `sana`: SANA 1.0, 1.5."""

    path: LocalPath
    """`embedded` (the tiny model of the package), a folder in diffusers layout, a hub id, or, for `stable_diffusion`
    and `stable_diffusion_xl`, a single `.safetensors` file with the original names of the weights."""

    revision: str | None = None
    """Full commit (40 hex digits), so that the weights cannot change; required if `path` is a hub id."""

    config: ConfigSource | None = None

    teacher: TeacherSection | None = None

    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Number format of the frozen weights and of activations; a LoRA is always float32. float32 suits CPUs and the
    embedded model; all configurations of published models use bfloat16, which halves memory. float16 overflows more
    easily, and is only for a LoRA."""

    compile: bool | Literal["auto"] = False
    """Compile the denoiser and the VAE's decoder with `torch.compile`. `auto`: in those steps where this is estimated
    to save more time than it takes. Off by default, because it saves time only in long runs on a GPU."""

    quantization: Literal["int8", "nf4"] | None = None
    """Storage format of the frozen denoiser's linear layers under a LoRA, for GPUs of 24 GB and less. `int8`: 8 bits;
    `nf4`: 4 bits, less accurate, needs bitsandbytes. `null`: the format of `dtype`."""

    offload: bool = False
    """Keep text encoders and VAE in host memory while they are not in use, for small GPUs."""

    @model_validator(mode="before")
    @classmethod
    def _complete_a_single_file(cls, values: Any) -> Any:
        if not isinstance(values, dict) or values.get("config") or not is_single_file(values.get("path")):
            return values
        default = SINGLE_FILE_CONFIGS.get(values.get("family", cls.model_fields["family"].default))
        return values | {"config": default} if default else values

    @model_validator(mode="after")
    def _can_be_found(self) -> Self:
        if not is_single_file(self.path):
            check_weights(self.path, self.revision)
            if self.config:
                raise ValueError("`config` completes a single file, got no file as `path`; leave it out")
            return self
        check_is_safetensors(self.path)
        if self.family not in SINGLE_FILE_CONFIGS:
            raise ValueError(
                f"`path` must be a folder in diffusers layout or a hub id for the family {self.family!r}, got the file"
                f" {self.path!r}; single files are loaded for {' and '.join(SINGLE_FILE_CONFIGS)}"
            )
        return self

    @property
    def layout(self) -> ModelSource | Self:
        """Path and revision of the model in diffusers layout that holds the configurations and tokenizers."""
        return self.config or self


class GenerationSection(Section):
    """Sampling of training, validation and held-out images."""

    HOW_NOT_WHAT: ClassVar[frozenset[str]] = frozenset({"max_bad_fraction"})

    images_per_prompt: Annotated[int, Field(ge=2)] = 2
    """Number of images per training prompt, M; required unless `preferences` is given. The images form up to M (M - 1)
    / 2 pairs with M - 1 rank gaps. Time and disk space are proportional to it. The paper uses 500; most configurations
    of published models use 50."""

    num_denoising_steps: Annotated[int, Field(ge=1, le=1000)]
    """Number of denoising steps per image; time is proportional to it. The configurations use 30 for SD, SDXL and most
    flow-matching models, and 20 for SANA. Usual values for `latent_consistency` are 1 to 8; it allows at most 50."""

    guidance_scale: Annotated[float, Field(ge=1)]
    """Guidance scale of the sampler; 1 means no guidance. Above 1, a denoising step takes two forward passes, except in
    guidance-conditioned families, where it is an input of the model (`flux`: as given; `latent_consistency`: minus 1).
    Distilled FLUX.2 klein models have no guidance. diffusers' Z-Image pipeline and its model card count from 0, so
    their 4 is 5 here."""

    height: Annotated[int, Field(ge=8, multiple_of=8)] | None = None
    """Height of images in pixels; a multiple of 16 for flow-matching families, of 32 for `sana`. `null`: the model's
    own height. Imported images are scaled and cropped to it, so it is required with `preferences` and a hub id."""

    width: Annotated[int, Field(ge=8, multiple_of=8)] | None = None
    """Width of images in pixels; same rules as for `height`."""

    images_per_batch: Annotated[int, Field(ge=1)] = 8
    """Maximum number of images per forward pass of denoiser, VAE and judges. Raise it on a large GPU; if memory does
    not suffice, it is halved with a warning. It is also the maximum number of images of one prompt per call of an
    actor, so that several actors can share the images of one prompt, as evenly as possible."""

    keep_images: bool = True
    """Keep a PNG of each training image. `false` saves disk space, but rewards that are added later must decode the
    latents again."""

    max_bad_fraction: Annotated[float, Field(ge=0, le=1)] = 0.01
    """Maximum share of prompts that may fail in the model (an image without a score counts as its share of its prompt);
    above it, the step fails. It does not affect what is generated."""
