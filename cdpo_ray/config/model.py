"""The base model and how it is sampled."""

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from cdpo_ray.config.section import LocalPath, Section, check_weights

Family = Literal["stable_diffusion", "stable_diffusion_xl", "latent_consistency", "stable_diffusion_3", "flux"]
"""`cdpo_ray.models.FAMILIES` maps each to its class (a test keeps the two alike)."""

GUIDANCE_EMBEDDED = ("latent_consistency", "flux")
"""Families whose net is told of the guidance."""

CONSISTENCY_TIMESTEPS = 50
"""That a latent consistency model is distilled and sampled at."""


PATCHED = ("stable_diffusion_3", "flux")
"""Families whose net takes patches of 2 x 2 latent values, 16 x 16 pixels."""


class TeacherSection(Section):
    """The diffusion model that a consistency model was distilled from: a folder, or a hub id with its revision."""

    path: LocalPath
    revision: str | None = None

    @model_validator(mode="after")
    def _can_be_found(self) -> "TeacherSection":
        check_weights(self.path, self.revision)
        return self


class ModelSection(Section):
    """The base model: `embedded`, a folder in diffusers layout, or a hub id with its revision."""

    family: Family = "stable_diffusion"
    path: LocalPath
    revision: str | None = None
    teacher: TeacherSection | None = None
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    compile: bool | Literal["auto"] = False
    """`auto`: compile the denoiser for the steps in which it is estimated to save more time than it takes."""
    quantization: Literal["int8", "nf4"] | None = None
    """Storage format of the frozen denoiser under a LoRA; `None`: `dtype`."""
    offload: bool = False
    """Keep text encoders and VAE in host memory while they are not needed."""

    @model_validator(mode="after")
    def _can_be_found(self) -> "ModelSection":
        check_weights(self.path, self.revision)
        return self

    @model_validator(mode="after")
    def _teacher_goes_with_consistency(self) -> "ModelSection":
        if self.teacher and self.family != "latent_consistency":
            raise ValueError(f"`teacher` belongs to the family 'latent_consistency', got it with {self.family!r}")
        if self.family == "latent_consistency" and not self.teacher and self.path != "embedded":
            raise ValueError("`teacher` must name the model that the consistency model was distilled from")
        return self


class GenerationSection(Section):
    images_per_prompt: Annotated[int, Field(ge=2)] = 2
    num_denoising_steps: Annotated[int, Field(ge=1, le=1000)]
    guidance_scale: Annotated[float, Field(ge=1)]
    height: Annotated[int, Field(ge=8, multiple_of=8)] | None = None
    width: Annotated[int, Field(ge=8, multiple_of=8)] | None = None
    images_per_batch: Annotated[int, Field(ge=1)] = 8
    keep_images: bool = True
    max_bad_fraction: Annotated[float, Field(ge=0, le=1)] = 0.01

    @property
    def outcome(self) -> dict[str, Any]:
        """What decides what is generated, as plain values; `max_bad_fraction` decides only whether a run goes on."""
        return self.model_dump(mode="json", exclude={"max_bad_fraction"})
