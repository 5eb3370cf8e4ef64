"""How many images go through a net at once: as many as asked for, or as memory allows."""

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
    """Of a GPU, of Python, or of the CPU's allocator, whose error has no class of its own."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or CPU_ALLOCATOR in str(error)


def needed_and_free(error: BaseException, device: str) -> str:
    """What was asked for, as the error tells it, and what is free now."""
    asked = NEEDED.search(str(error))
    if device == "cuda":
        free, _ = torch.cuda.mem_get_info()
    else:
        free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return f"{asked[1] if asked else 'more than there is'} needed, {free} bytes free on {device}"


class BatchSize:
    """Images that go through the net at once; halved when memory does not suffice, and kept so."""

    def __init__(self, num_images: int) -> None:
        self.num_images = num_images

    def halve(
        self, error: BaseException, num_tried: int, model: "TextToImageModel", latent_shape: Sequence[int]
    ) -> None:
        """Take half of what was tried.

        Raises:
            ModelError: it was one image.
        """
        if num_tried == 1:
            height, width = (side * model.pipeline.vae_scale_factor for side in latent_shape[-2:])
            raise ModelError(
                f"`model.path` {model.pipeline.name_or_path}: out of memory with one image of {height}x{width} pixels:"
                f" {needed_and_free(error, model.device)}; choose a smaller image or `model.dtype`, or give the"
                " generators a larger device"
            )
        self.num_images = num_tried // 2
        log.warning("out of memory with %d images at once, going on with %d", num_tried, self.num_images)
