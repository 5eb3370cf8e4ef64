"""Images and prompts -> scores of several rewards, in one process."""

import functools
import importlib
import logging
import math
import sys
from collections.abc import Mapping, Sequence
from numbers import Real
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from torch import Tensor

from cdpo_ray.config import REWARDS
from cdpo_ray.dataflow.columns import list_column
from cdpo_ray.dataflow.images import decode_pngs, is_black
from cdpo_ray.dataflow.memory import is_out_of_memory, needed_and_free
from cdpo_ray.errors import RewardError, printable
from cdpo_ray.models import load_model
from cdpo_ray.records import score_column
from cdpo_ray.rewards.crashes import report_crashes
from cdpo_ray.user_code import attribute_errors, load_function

log = logging.getLogger(__name__)
SCORE_KEYS = ("scores", "score", "rewards", "reward")
"""Keys under which a reward may return its scores in a mapping."""


class Reward(Protocol):
    """Scores ``[image]`` of uint8 ``[image, 3, height, width]``, with one prompt each; higher is better.

    A built-in reward that compares the images of a prompt has the attribute ``whole_prompts``, which is true;
    `PixelScorer` then never splits the images of a prompt into several calls. Its options say so too
    (`RewardOptions.whole_prompts`), so that it is not called where images arrive one by one.
    """

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Any: ...


class Scorer:
    """Several rewards behind one call; a reward cannot modify another's inputs or the stored images.

    Args:
        rewards: name (in `REWARDS`, or a user's ``module:function``) -> keyword arguments of its class.
    """

    def __init__(self, rewards: Mapping[str, Mapping[str, Any]]) -> None:
        self.rewards = {name: load_reward(name, options) for name, options in rewards.items()}
        self.max_images = dict.fromkeys(self.rewards, sys.maxsize)

    def __call__(
        self, images: Tensor, prompts: Sequence[str], names: Sequence[str] | None = None
    ) -> dict[str, NDArray[np.float64]]:
        """Scores ``[image]`` per reward; NaN for all-black images.

        Args:
            images: uint8 ``[image, 3, height, width]``.
            prompts: one per image.
            names: rewards to compute; `None`: all.

        Raises:
            RewardError: if a reward raises, ends its process, runs out of memory with one image, or does not return one
                number per image.
        """
        black = is_black(images)
        wanted = self.rewards if names is None else names
        return {name: np.where(black, np.nan, self._scores(name, images, prompts)) for name in wanted}

    def compares(self, name: str) -> bool:
        """Whether a reward needs all images of a prompt in one call."""
        return bool(getattr(self.rewards[name], "whole_prompts", False))

    def _scores(self, name: str, images: Tensor, prompts: Sequence[str]) -> NDArray[np.float64]:
        """Scores ``[image]``; out of memory, the batch size is halved for all later calls."""
        while True:
            size = max(1, min(self.max_images[name], len(prompts)))
            try:
                return np.concatenate(
                    [
                        _checked(name, self.rewards[name], images[start : start + size], prompts[start : start + size])
                        for start in range(0, len(prompts), size)
                    ]
                )
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
                if size == 1 or self.compares(name):
                    raise RewardError(
                        f"reward `{name}`: out of memory with {'one image' if size == 1 else 'the images of a prompt'}:"
                        f" {needed_and_free(error, images.device.type)}; choose a smaller image, or give the actors"
                        " that run it a larger device"
                    ) from None
                self.max_images[name] = size // 2
            log.warning("reward `%s`: out of memory with %d images at once, retrying with %d", name, size, size // 2)


def load_reward(name: str, options: Mapping[str, Any]) -> Reward:
    """Load a built-in reward by name, or a user's ``module:function``, also from the working directory.

    Args:
        options: keyword arguments of the class, or of each call of a user's function.

    Raises:
        RewardError: if it cannot be imported or instantiated, or is not callable.
    """
    with report_crashes(name, ["load"]), attribute_errors("reward", name, RewardError):
        if name in REWARDS:
            module_name, _, attribute = REWARDS[name].partition(":")
            found = getattr(importlib.import_module(module_name), attribute)(**options)
        else:
            found = load_function("reward", name, RewardError)
            if isinstance(found, type) and any("__call__" in vars(each) for each in found.__mro__):
                found = found(**options)
            elif options and callable(found):
                found = functools.partial(found, **options)
    if not callable(found) or isinstance(found, type):
        raise RewardError(
            f"reward `{name}`: must be a function of images and prompts, or a class of such callables, got"
            f" {(found if isinstance(found, type) else type(found)).__name__}"
        )
    return found


def _checked(name: str, reward: Reward, images: Tensor, prompts: Sequence[str]) -> NDArray[np.float64]:
    with (
        report_crashes(name, prompts),
        attribute_errors("reward", name, RewardError, but=is_out_of_memory),
    ):  # fewer images may fit
        returned = reward(images.clone(), list(prompts))  # copies: a reward may modify them
    scores = as_scores(returned, len(prompts))
    if scores is None:
        raise RewardError(
            f"reward `{name}`: must return one score per image, a tensor, an array or a list of {len(prompts)} numbers,"
            f" got {_described(returned)}"
        )
    return scores


def as_scores(returned: Any, num_images: int) -> NDArray[np.float64] | None:
    """Convert a reward's return value to scores ``[image]``; `None`: it is not one number per image.

    Accepts tensors of any device and dtype, with or without gradients; arrays; lists of numbers or tensors; additional
    dimensions of size 1; tuples in which only the first item is scores, such as ``(scores, info)``; and mappings with
    one of `SCORE_KEYS`.
    """
    if returned is None:
        return None
    if isinstance(returned, Mapping):
        keys = [key for key in SCORE_KEYS if key in returned]
        return as_scores(returned[keys[0]], num_images) if len(keys) == 1 else None
    if isinstance(returned, tuple) and len(returned) > 1 and not isinstance(returned[0], Real):
        # a plain number is information, also beside the scores of a single image
        others = [item for item in returned[1:] if not isinstance(item, Real)]
        first = as_scores(returned[0], num_images)
        if first is not None and all(as_scores(other, num_images) is None for other in others):
            return first
    try:
        scores = np.array(_plain(returned), dtype=np.float64)  # a copy: a reward may return the same buffer each time
    except (TypeError, ValueError):
        return None
    return scores.reshape(num_images) if scores.size == num_images and num_images in (*scores.shape, 1) else None


def _plain(values: Any) -> Any:
    """Convert tensors, also in lists, to arrays."""
    if isinstance(values, Tensor):
        return values.detach().double().cpu().numpy()
    return [_plain(value) for value in values] if isinstance(values, list | tuple) else values


def _described(returned: Any) -> str:
    kind = type(returned).__name__
    if isinstance(returned, Mapping):
        return printable(f"a {kind} with the keys {list(returned)}, not one of {', '.join(SCORE_KEYS)}")
    if isinstance(returned, list | tuple):
        return f"a {kind} of {len(returned)} items ({', '.join(sorted({type(item).__name__ for item in returned}))})"
    return f"{kind} of shape {list(returned.shape)}, {returned.dtype}" if hasattr(returned, "dtype") else kind


class PixelScorer:
    """Rows with `pixels` -> the same rows with score columns; a plain class that an actor pool wraps.

    Args:
        rewards: as in `Scorer`.
        images_per_batch: maximum number of images per call of a reward.
        keep_pixels: keep the pixels in the rows, for the task that writes them.
        mixed: see `batches_of`.
    """

    def __init__(
        self,
        rewards: Mapping[str, Mapping[str, Any]],
        images_per_batch: int,
        *,
        keep_pixels: bool = False,
        mixed: bool = False,
    ) -> None:
        self.scores = Scorer(rewards)
        self.images_per_batch = images_per_batch
        self.keep_pixels = keep_pixels
        self.mixed = mixed

    def __call__(self, rows: pa.Table) -> pa.Table:
        pixels = rows["pixels"].combine_chunks().to_numpy_ndarray()
        return self.add_scores(rows if self.keep_pixels else rows.drop_columns("pixels"), pixels)

    def add_scores(self, rows: pa.Table, pixels: NDArray[np.uint8]) -> pa.Table:
        """Append score columns.

        Args:
            pixels: ``[row, sample, 3, height, width]``; not a column, because a row of one holds fewer than 2**31
                values.
        """
        num_samples = pixels.shape[1]
        images = torch.from_numpy(pixels.reshape(-1, *pixels.shape[2:]))
        prompts = [prompt for prompt in rows["prompt"].to_pylist() for _ in range(num_samples)]
        scores = {name: np.empty(len(prompts)) for name in self.scores.rewards}
        for together in {1, num_samples}:
            names = [name for name in scores if together == (num_samples if self.scores.compares(name) else 1)]
            batches = batches_of(len(prompts), self.images_per_batch, mixed=self.mixed, together=together)
            for batch in batches if names else ():
                found = self.scores(images[batch], [prompts[image] for image in batch], names)
                for name, values in found.items():
                    scores[name][batch] = values
        for name, values in scores.items():
            rows = rows.append_column(score_column(name), list_column(values, num_samples, pa.float64()))
        return rows


def batches_of(num_images: int, images_per_batch: int, *, mixed: bool, together: int = 1) -> list[NDArray[np.intp]]:
    """Split the images of a call into batches of at most ``images_per_batch``, in order.

    Args:
        mixed: use twice as many batches (but pairs at least, if possible) of images that are not neighbours. A score
            that depends on the rest of its batch then differs.
        together: number of neighbours, all images of a prompt, that are never separated, even if they are more than
            ``images_per_batch``; ``mixed`` batches have them in reverse order.

    Returns:
        Numbers of each batch's images.
    """
    groups = np.arange(num_images).reshape(-1, together)
    num_groups, per_batch = len(groups), max(1, images_per_batch // together)
    num_batches = math.ceil(num_groups / per_batch)
    if mixed:
        num_batches = max(num_batches, min(2 * num_batches, math.ceil(num_groups / 2)))
        return [groups[first::num_batches, ::-1].ravel() for first in range(num_batches)]
    return [groups[first : first + per_batch].ravel() for first in range(0, num_groups, per_batch)]


class PixelReader:
    """Rows of 1-samples -> pixels, from the PNGs if present, else from the latents."""

    def __init__(self, family: str, model: dict[str, Any], images_per_batch: int) -> None:
        self.family, self.model_arguments = family, model
        self.model: Any = None
        self.images_per_batch = images_per_batch

    def __call__(self, rows: pa.Table) -> NDArray[np.uint8]:
        """``[row, sample, 3, height, width]``."""
        read = self._from_pngs if "images" in rows.column_names else self._from_latents
        return np.stack([read(rows, row) for row in range(rows.num_rows)])

    def _from_pngs(self, rows: pa.Table, row: int) -> NDArray[np.uint8]:
        pngs, where = rows["images"][row].as_py(), f"1-samples: prompt {rows['prompt_index'][row]}"
        return decode_pngs(pngs, [f"{where}, image {number}" for number in range(len(pngs))])

    def _from_latents(self, rows: pa.Table, row: int) -> NDArray[np.uint8]:
        if self.model is None:
            self.model = load_model(self.family, **self.model_arguments)
        latents = torch.from_numpy(rows["latents"].combine_chunks().to_numpy_ndarray()[row].copy())
        batches = latents.split(self.images_per_batch)
        return torch.cat([self.model.decode(batch).cpu() for batch in batches]).numpy()


class SampleScorer:
    """Rows of 1-samples -> the same rows with score columns, without images; reads and scores in one actor."""

    def __init__(
        self,
        family: str,
        model: dict[str, Any],
        rewards: Mapping[str, Mapping[str, Any]],
        images_per_batch: int,
        *,
        mixed: bool = False,
    ) -> None:
        self.read = PixelReader(family, model, images_per_batch)
        self.score = PixelScorer(rewards, images_per_batch, mixed=mixed)

    def __call__(self, rows: pa.Table) -> pa.Table:
        kept = rows.select([name for name in rows.column_names if name not in ("images", "latents")])
        return self.score.add_scores(kept, self.read(rows))
