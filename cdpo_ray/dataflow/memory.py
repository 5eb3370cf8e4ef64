"""Batch sizes that are halved when memory runs out."""

import logging
import os
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from cdpo_ray.errors import ModelError

if TYPE_CHECKING:
    from cdpo_ray.models.family import TextToImageModel

log = logging.getLogger(__name__)
CPU_ALLOCATOR = "DefaultCPUAllocator: can't allocate memory"
NEEDED = re.compile(r"tried to allocate ([\d.]+ ?\w+)", re.IGNORECASE)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether the error is a GPU's, Python's or the CPU allocator's; the latter's has no class of its own."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or CPU_ALLOCATOR in str(error)


def needed_and_free(error: BaseException, device: str) -> str:
    """Memory that the error says was needed, and bytes that are free now, as text."""
    needed = NEEDED.search(str(error))
    if device == "cuda":
        free, _ = torch.cuda.mem_get_info()
    else:
        free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return f"{needed[1] + ' needed' if needed else 'more memory needed than available'}, {free} bytes free on {device}"


class BatchSize:
    """Number of images per forward pass; halved when memory runs out, and never raised again."""

    def __init__(self, num_images: int) -> None:
        self.num_images = num_images

    def halve(
        self, error: BaseException, num_tried: int, model: "TextToImageModel", latent_shape: Sequence[int]
    ) -> None:
        """Halve the batch size after an out-of-memory error.

        Args:
            error: the out-of-memory error.
            num_tried: number of images of the failed pass.
            model, latent_shape: model and shape of the latents, for the message.

        Raises:
            ModelError: a single image does not fit in memory.
        """
        if num_tried == 1:
            height, width = (side * model.pixels_per_latent for side in latent_shape[-2:])
            raise ModelError(
                f"`model.path` {model.pipeline.name_or_path}: out of memory with one image of {height}x{width} pixels:"
                f" {needed_and_free(error, model.device)}; choose a smaller image or `model.dtype`, or give the"
                " generators a larger device"
            )
        self.num_images = num_tried // 2
        log.warning("out of memory with %d images at once, continuing with %d", num_tried, self.num_images)
