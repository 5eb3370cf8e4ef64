"""Tables of a run -> `datasets.Dataset`."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from cdpo_ray.dataflow.images import refuse_other_images
from cdpo_ray.errors import StoreError

if TYPE_CHECKING:
    import datasets


def as_dataset(frame: pd.DataFrame, images: Sequence[str], *, where: str) -> "datasets.Dataset":
    """Convert a table.

    `datasets.Image` would decode any format, so that images are checked first: they may be somebody else's.

    Args:
        images: columns of PNGs, or of lists of PNGs.
        where: location of the table, for messages.

    Raises:
        StoreError: the package `datasets` is not installed, or an image is not a PNG of a limited size.
    """
    try:
        import datasets
    except ImportError:
        raise StoreError('`dataset` needs the package datasets; pip install "cdpo_ray[datasets]"') from None
    dataset = datasets.Dataset.from_pandas(frame, preserve_index=False)
    for column in images:
        has_lists = any(isinstance(value, np.ndarray) for value in frame[column])
        for row, value in enumerate(frame[column]):
            for png in value if has_lists else [value]:
                refuse_other_images(png, f"{where}: `{column}` of row {row}")
        dataset = dataset.cast_column(column, datasets.List(datasets.Image()) if has_lists else datasets.Image())
    return dataset
