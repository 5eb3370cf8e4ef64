"""Images and prompts -> scores of several rewards, in one process."""

import importlib
import importlib.util
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from torch import Tensor

from cdpo_ray.errors import RewardError
from cdpo_ray.generation.columns import list_column, tensor_column
from cdpo_ray.generation.images import decode_png
from cdpo_ray.generation.memory import is_out_of_memory
from cdpo_ray.models import load_model
from cdpo_ray.records import score_column
from cdpo_ray.rewards import REWARDS


class Reward(Protocol):
    """Scores ``[image]`` of uint8 ``[image, 3, height, width]``, a prompt each; higher is better."""

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> NDArray[Any]: ...


class Scorer:
    """Several rewards behind one call.

    Args:
        rewards: name (of `REWARDS`, or one's own ``module:function``) -> keyword arguments of its class.
    """

    def __init__(self, rewards: Mapping[str, Mapping[str, Any]]) -> None:
        self.rewards = {name: load_reward(name, options) for name, options in rewards.items()}

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> dict[str, NDArray[np.float64]]:
        """Scores ``[image]`` a reward.

        Raises:
            RewardError: a reward raised, or did not return one number an image.
        """
        return {name: _checked(name, reward, images, prompts) for name, reward in self.rewards.items()}


def load_reward(name: str, options: Mapping[str, Any]) -> Reward:
    """A built-in reward by its name, or one's own ``module:function``, looked up in the working folder too.

    Raises:
        RewardError: it cannot be imported.
    """
    module_name, _, attribute = REWARDS.get(name, name).partition(":")
    try:
        module = importlib.import_module(module_name) if name in REWARDS else _own_module(module_name)
        found = getattr(module, attribute)
    except (ImportError, AttributeError) as error:
        raise RewardError(
            f"reward `{name}`: cannot be imported: {error}; the module must be installed, or lie in the folder"
            " that the command is started in"
        ) from None
    return found(**options) if name in REWARDS else found


def _own_module(name: str) -> ModuleType:
    """Import the file of this name in the working folder if there is one, else an installed module.

    The folder itself comes last on the import path: no other file there hides a module.
    """
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    spec = importlib.util.spec_from_file_location(name, Path(f"{name}.py").absolute())
    if name in sys.modules or not Path(f"{name}.py").is_file() or not spec or not spec.loader:
        return importlib.import_module(name)
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def _checked(name: str, reward: Reward, images: Tensor, prompts: Sequence[str]) -> NDArray[np.float64]:
    try:
        scores = np.asarray(reward(images, prompts), dtype=np.float64)
    except RewardError:
        raise
    except Exception as error:
        if is_out_of_memory(error):  # which fewer images at once may mend
            raise
        # somebody else's code: whatever it raises, say whose it was and where
        trace = error.__traceback__
        while trace and trace.tb_next:
            trace = trace.tb_next
        place = f" at {trace.tb_frame.f_code.co_filename}:{trace.tb_lineno}" if trace else ""
        raise RewardError(f"reward `{name}` raised {type(error).__name__}: {error}{place}") from None
    if scores.shape != (len(prompts),):
        raise RewardError(
            f"reward `{name}`: must return one score an image, [{len(prompts)}], got shape {list(scores.shape)}"
        )
    return scores


class PixelScorer:
    """Rows with `pixels` -> the same rows with score columns; what a pool of judges wraps.

    Args:
        keep_pixels: leave the pixels in the rows, for the task that writes them.
    """

    def __init__(
        self, rewards: Mapping[str, Mapping[str, Any]], images_per_batch: int, *, keep_pixels: bool = False
    ) -> None:
        self.scores = Scorer(rewards)
        self.images_per_batch = images_per_batch
        self.keep_pixels = keep_pixels

    def __call__(self, rows: pa.Table) -> pa.Table:
        pixels = rows["pixels"].combine_chunks().to_numpy_ndarray()
        num_samples = pixels.shape[1]
        images = torch.from_numpy(pixels.reshape(-1, *pixels.shape[2:]))
        prompts = [prompt for prompt in rows["prompt"].to_pylist() for _ in range(num_samples)]
        scores = [
            self.scores(images[start : start + self.images_per_batch], prompts[start : start + self.images_per_batch])
            for start in range(0, len(prompts), self.images_per_batch)
        ]
        if not self.keep_pixels:
            rows = rows.drop_columns("pixels")
        for name in self.scores.rewards:
            values = np.concatenate([batch[name] for batch in scores])
            rows = rows.append_column(score_column(name), list_column(values, num_samples, pa.float64()))
        return rows


class PixelReader:
    """Rows of 1-samples -> the same rows with `pixels`: from the PNGs if they were kept, else from the latents."""

    def __init__(self, family: str, model: dict[str, Any], images_per_batch: int) -> None:
        self.family, self.model_arguments = family, model
        self.model: Any = None
        self.images_per_batch = images_per_batch

    def __call__(self, rows: pa.Table) -> pa.Table:
        read = self._from_pngs if "images" in rows.column_names else self._from_latents
        pixels = np.stack([read(rows, row) for row in range(rows.num_rows)])
        kept = rows.select([name for name in rows.column_names if name not in ("images", "latents")])
        return kept.append_column("pixels", tensor_column(pixels))

    def _from_pngs(self, rows: pa.Table, row: int) -> NDArray[np.uint8]:
        return np.stack([decode_png(png) for png in rows["images"][row].as_py()])

    def _from_latents(self, rows: pa.Table, row: int) -> NDArray[np.uint8]:
        if self.model is None:
            self.model = load_model(self.family, **self.model_arguments)
        latents = torch.from_numpy(rows["latents"].combine_chunks().to_numpy_ndarray()[row].copy())
        batches = latents.split(self.images_per_batch)
        return torch.cat([self.model.decode(batch).cpu() for batch in batches]).numpy()


class SampleScorer:
    """Rows of 1-samples -> the same rows with score columns, read and judged in one place; what a pool wraps."""

    def __init__(
        self, family: str, model: dict[str, Any], rewards: Mapping[str, Mapping[str, Any]], images_per_batch: int
    ) -> None:
        self.read = PixelReader(family, model, images_per_batch)
        self.score = PixelScorer(rewards, images_per_batch)

    def __call__(self, rows: pa.Table) -> pa.Table:
        return self.score(self.read(rows))
