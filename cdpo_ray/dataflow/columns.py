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


def tensor_column(values: NDArray[Any], num_samples: int | None = None) -> pa.Array:
    """``[row, ...]`` (or ``[row * sample, ...]`` with ``num_samples``) -> a column that keeps its shape in Parquet."""
    if num_samples is not None:
        values = values.reshape(-1, num_samples, *values.shape[1:])
    num_values = math.prod(values.shape[1:])
    if num_values >= 2**31:  # pyarrow would not name the cause, and every prompt would be quarantined for it
        raise GenerationError(
            f"a row of a table must hold fewer than 2**31 values, got {list(values.shape[1:])}; lower"
            " `generation.images_per_prompt`, or the size of the images"
        )
    return pa.FixedShapeTensorArray.from_numpy_ndarray(np.ascontiguousarray(values))


def list_column(values: Sequence[Any] | NDArray[Any], num_samples: int, item: pa.DataType) -> pa.Array:
    """``[row * sample]`` -> a list of ``num_samples`` items a row."""
    offsets = np.arange(0, len(values) + 1, num_samples, dtype=np.int32)
    return pa.ListArray.from_arrays(offsets, pa.array(values, item))


def storable(values: "Tensor") -> NDArray[Any]:
    """numpy has no bfloat16; latents fit fp16, whose fraction is longer."""
    import torch  # here: tasks that only write files import this module too

    return (values.half() if values.dtype == torch.bfloat16 else values).numpy()
