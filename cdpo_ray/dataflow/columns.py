"""Arrays -> columns of a table."""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from cdpo_ray.errors import GenerationError

if TYPE_CHECKING:
    from torch import Tensor

MAX_ROW_VALUES = 2**31
"""A row of a tensor column must hold fewer values: Arrow counts them with 31 bits."""


def tensor_column(values: NDArray[Any], num_samples: int | None = None) -> pa.Array:
    """Fixed-shape tensor column of an array.

    Args:
        values: ``[row, ...]``, or ``[row * sample, ...]`` if ``num_samples`` is given.
        num_samples: number of samples per row.

    Raises:
        GenerationError: a row holds `MAX_ROW_VALUES` or more.
    """
    if num_samples is not None:
        values = values.reshape(-1, num_samples, *values.shape[1:])
    num_values = math.prod(values.shape[1:])
    if num_values >= MAX_ROW_VALUES:  # pyarrow's error does not name the cause and would quarantine every prompt
        raise GenerationError(
            f"a row of a table must hold fewer than 2**31 values, got shape {list(values.shape[1:])}; lower"
            " `generation.images_per_prompt`, or the size of the images"
        )
    return pa.FixedShapeTensorArray.from_numpy_ndarray(np.ascontiguousarray(values))


def list_column(values: Sequence[Any] | NDArray[Any], num_samples: int, item: pa.DataType) -> pa.Array:
    """``[row * sample]`` -> a column with a list of ``num_samples`` items per row."""
    offsets = np.arange(0, len(values) + 1, num_samples, dtype=np.int32)
    return pa.ListArray.from_arrays(offsets, pa.array(values, item))


def storable(values: "Tensor") -> NDArray[Any]:
    """CPU tensor -> numpy array; bfloat16, which numpy lacks, becomes fp16: latents fit, and its fraction is longer."""
    import torch  # lazy: tasks that only write files import this module too

    return (values.half() if values.dtype == torch.bfloat16 else values).numpy()
