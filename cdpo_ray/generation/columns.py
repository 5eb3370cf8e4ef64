"""Arrays -> columns of a table."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from torch import Tensor


def tensor_column(values: NDArray[Any], num_samples: int | None = None) -> pa.Array:
    """``[row, ...]`` (or ``[row * sample, ...]`` with ``num_samples``) -> a column that keeps its shape in Parquet."""
    if num_samples is not None:
        values = values.reshape(-1, num_samples, *values.shape[1:])
    return pa.FixedShapeTensorArray.from_numpy_ndarray(np.ascontiguousarray(values))


def list_column(values: Sequence[Any] | NDArray[Any], num_samples: int, item: pa.DataType) -> pa.Array:
    """``[row * sample]`` -> a list of ``num_samples`` items a row."""
    offsets = np.arange(0, len(values) + 1, num_samples, dtype=np.int32)
    return pa.ListArray.from_arrays(offsets, pa.array(values, item))


def storable(values: Tensor) -> NDArray[Any]:
    """numpy has no bfloat16; latents fit fp16, whose fraction is longer."""
    return (values.half() if values.dtype == torch.bfloat16 else values).numpy()
