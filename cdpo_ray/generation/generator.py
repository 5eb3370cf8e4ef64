"""Prompts -> samples, in one process."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from torch import Tensor

from cdpo_ray.dataflow.columns import list_column, storable, tensor_column
from cdpo_ray.dataflow.images import is_black
from cdpo_ray.dataflow.memory import BatchSize, is_out_of_memory
from cdpo_ray.dataflow.parts import IMAGES_PER_BATCH, images_of
from cdpo_ray.dataflow.quarantine import Quarantine
from cdpo_ray.generation.perturbation import masked_positions, masked_shares, perturbed
from cdpo_ray.models import load_model
from cdpo_ray.randomness.noise import noise_at
from cdpo_ray.records import PERTURBATION, score_column
from cdpo_ray.store import storage_path

if TYPE_CHECKING:
    from cdpo_ray.models.family import Conditioning, TextToImageModel


class ScoreImages(Protocol):
    """Scores images, uint8 ``[image, 3, height, width]``: one array ``[image]`` per reward."""

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> dict[str, NDArray[np.float64]]: ...


class MakeScores(Protocol):
    """Builds the judges in the actor that uses them."""

    def __call__(self) -> ScoreImages: ...


@dataclass(frozen=True)
class Sampling:
    """Settings of sampling; see `GenerationSection` of the config for their bounds.

    Attributes:
        seed: seed of the run.
        images_per_prompt: number of images per prompt.
        num_denoising_steps: number of sampler steps.
        guidance_scale: classifier-free guidance; 1: none.
        height, width: image size in pixels; `None`: the model's native size.
        images_per_batch: maximum number of images per forward pass.
        max_masked_fraction: share of the prompt that is masked for its last image; the share rises evenly from 0 for
            the first image. `None`: prompts are not masked.
    """

    seed: int
    images_per_prompt: int
    num_denoising_steps: int
    guidance_scale: float
    height: int | None
    width: int | None
    images_per_batch: int
    max_masked_fraction: float | None = None

    @property
    def rows_per_call(self) -> int:
        """Number of prompts per call of an actor."""
        return max(1, self.images_per_batch // self.images_per_prompt)

    @property
    def pieces(self) -> list[range]:
        """Ranges of a prompt's images that separate calls make: at most one batch per call, as even as possible."""
        size = math.ceil(self.images_per_prompt / math.ceil(self.images_per_prompt / self.images_per_batch))
        starts = range(0, self.images_per_prompt, size)
        return [range(start, min(start + size, self.images_per_prompt)) for start in starts]

    def images_per_launch(self, limit: int) -> int:
        """Number of images per forward pass, at most ``limit``, if a call is split evenly."""
        num_images = self.rows_per_call * len(self.pieces[0])
        return math.ceil(num_images / math.ceil(num_images / limit))


@dataclass(frozen=True)
class SampleBatch:
    """Samples of one batch.

    Attributes:
        prompts: one per sample.
        latents: ``[sample, channel, height, width]``, on the device.
        images: uint8 ``[sample, 3, height, width]``, on the device.
        scores: reward -> ``[sample]``; empty without judges.
        is_black: ``[sample]``, true for images without a score, see `images.is_black`.
    """

    prompts: list[str]
    latents: Tensor
    images: Tensor
    scores: dict[str, NDArray[np.float64]]
    is_black: NDArray[np.bool_]


def sample_batches(
    model: "TextToImageModel",
    prompts: Sequence[str],
    conditioning: "Conditioning",
    sampling: Sampling,
    scores: ScoreImages | None = None,
    batch_size: BatchSize | None = None,
    images: Sequence[int] | None = None,
) -> Iterator[SampleBatch]:
    """Yield all images of each prompt, prompt by prompt, in batches; out of memory, batches get smaller.

    The noise of an image is a function of (seed, prompt, index) only. A compiled model sees one batch size: the last
    batch is padded with copies of its last image, which are dropped.

    Args:
        conditioning: one row per prompt.
        scores: judges of each batch; `None`: images are not scored.
        batch_size: number of images per batch, halved out of memory; `None`: starts at ``sampling.images_per_batch``.
        images: indices of the images to make of each prompt; `None`: all.

    Raises:
        ModelError: if memory does not suffice for one image.
    """
    shape = model.latent_shape(sampling.height, sampling.width)
    batch_size = batch_size or BatchSize(sampling.images_per_batch)
    indices = range(sampling.images_per_prompt) if images is None else images
    addresses = [(row, index) for row in range(len(prompts)) for index in indices]

    def size() -> int:
        return sampling.images_per_launch(batch_size.num_images) if model.compiled else batch_size.num_images

    def sampled(batch: list[tuple[int, int]]) -> SampleBatch:
        num_images, batch = len(batch), batch + batch[-1:] * (size() - len(batch) if model.compiled else 0)
        rows = [row for row, _ in batch]
        noise = torch.stack([noise_at(shape, sampling.seed, "image", prompts[row], index) for row, index in batch])
        batch_conditioning = {name: value[rows] for name, value in conditioning.items()}
        if sampling.max_masked_fraction is not None:
            num_tokens = conditioning["prompt_embedding"].shape[1]
            shares = masked_shares(sampling.images_per_prompt, sampling.max_masked_fraction, num_tokens)
            masked = [(prompts[row], shares[index]) for row, index in batch]
            batch_conditioning = _perturbed(model, batch_conditioning, masked, sampling.seed)
        latents = model.sample(
            batch_conditioning,
            noise,
            num_denoising_steps=sampling.num_denoising_steps,
            guidance_scale=sampling.guidance_scale,
        )
        decoded, batch_prompts = model.decode(latents)[:num_images], [prompts[row] for row in rows[:num_images]]
        found = scores(decoded, batch_prompts) if scores else {}
        return SampleBatch(batch_prompts, latents[:num_images], decoded, found, is_black(decoded))

    start = 0
    while start < len(addresses):
        batch = addresses[start : start + size()]
        try:
            samples = sampled(batch)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            batch_size.halve(error, size() if model.compiled else len(batch), model, shape)
            continue
        yield samples
        start += len(batch)


class Generator:
    """Rows of prompts -> rows of samples (`records`: 1-samples); a plain class that an actor pool wraps.

    Args:
        family, model: name in `FAMILIES` and arguments of its ``load``.
        tuned_dir: `4-training` of an earlier round, whose model is sampled instead of the base model.
        make_scores: builds the judges that score images in this actor; `None`: no score columns.
        keep_pixels: add the raw pixels, which later tasks score or encode as PNG while the model continues sampling.
        quarantine: quarantine of prompts that raise inside the model; `None`: the error is raised.
    """

    def __init__(
        self,
        family: str,
        model: dict[str, Any],
        sampling: Sampling,
        *,
        tuned_dir: str | None = None,
        make_scores: MakeScores | None = None,
        keep_pixels: bool = True,
        quarantine: Quarantine | None = None,
    ) -> None:
        self.model = load_model(family, **model)
        if tuned_dir:
            self.model.load_tuned(storage_path(tuned_dir))
            self.model.use_tuned(True)
        self.sampling = sampling
        self.scores = make_scores() if make_scores else None
        self.keep_pixels = keep_pixels
        self.quarantine = quarantine
        self.batch_size = BatchSize(sampling.images_per_batch)
        self.encoded = Encoded(self.model)

    def __call__(self, rows: pa.Table) -> pa.Table:
        return self.quarantine.apply(self.generate, rows) if self.quarantine else self.generate(rows)

    def generate(self, rows: pa.Table) -> pa.Table:
        """Samples of some prompts, one row per prompt, or a piece of one prompt."""
        prompts, sampling = rows["prompt"].to_pylist(), self.sampling
        conditioning, num_tokens_cut = self.encoded(prompts)
        indices = images_of(rows) or range(sampling.images_per_prompt)
        latents, pixels, scores, are_black = [], [], [], []
        for batch in sample_batches(
            self.model, prompts, conditioning, sampling, self.scores, self.batch_size, images=indices
        ):
            scores.append(batch.scores)
            are_black.append(batch.is_black)
            latents.append(batch.latents.cpu())
            if self.keep_pixels:
                pixels.append(batch.images.cpu().numpy())
        num_samples = len(indices)
        black = np.concatenate(are_black)
        if self.quarantine:
            self.quarantine.add_images(rows, black, indices, sampling.images_per_prompt)
        rows = rows.append_column("latents", tensor_column(storable(torch.cat(latents)), num_samples))
        for name, value in conditioning.items():
            rows = rows.append_column(name, tensor_column(storable(value.cpu())))
        rows = rows.append_column("num_tokens_cut", pa.array(num_tokens_cut, pa.int64()))
        if pixels:
            rows = rows.append_column("pixels", tensor_column(np.concatenate(pixels), num_samples))
        if sampling.max_masked_fraction is not None:
            num_tokens = conditioning["prompt_embedding"].shape[1]
            shares = masked_shares(sampling.images_per_prompt, sampling.max_masked_fraction, num_tokens)
            perturbation_scores = np.negative([shares[index] for index in indices])
            values = np.where(black, np.nan, np.tile(perturbation_scores, len(prompts)))
            column = list_column(values, num_samples, pa.float64())
            rows = rows.append_column(score_column(PERTURBATION), column)
        for name in scores[0]:
            values = np.concatenate([batch[name] for batch in scores])
            rows = rows.append_column(score_column(name), list_column(values, num_samples, pa.float64()))
        return rows.append_column(IMAGES_PER_BATCH, pa.array([self.batch_size.num_images] * len(prompts), pa.int64()))


class Encoded:
    """Conditioning of the prompts of a call; kept for the next call, which often is of the same prompt."""

    def __init__(self, model: "TextToImageModel") -> None:
        self.model = model
        self.prompts: list[str] = []
        self.found: Any = None

    def __call__(self, prompts: list[str]) -> "tuple[Conditioning, list[int]]":
        if prompts != self.prompts:
            self.found, self.prompts = self.model.encode_prompts(prompts), prompts
        return self.found


def _perturbed(
    model: "TextToImageModel", conditioning: "Conditioning", samples: Sequence[tuple[str, float]], seed: int
) -> "Conditioning":
    """Conditioning of samples, given as (prompt, share), with that share of the prompt masked."""
    num_tokens = conditioning["prompt_embedding"].shape[1]
    masks = torch.stack([masked_positions(num_tokens, share, seed=seed, prompt=prompt) for prompt, share in samples])
    return perturbed(conditioning, model.empty_conditioning, [share for _, share in samples], masks)
