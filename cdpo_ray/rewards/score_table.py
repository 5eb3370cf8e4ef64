"""Scores, one list per prompt -> one table per reward, one row per sample."""

from pathlib import Path

import numpy as np
import pyarrow as pa

from cdpo_ray.errors import StoreError
from cdpo_ray.records import score_column
from cdpo_ray.store import make_folder, read_table, write_table


def write_scores(prompts: pa.Table, reward: str, path: Path) -> None:
    """Write one reward's scores (`records`: 2-scores).

    Args:
        prompts: one row per prompt, in prompt order: `prompt_index`, `prompt_id` and the reward's list of scores, all
            of the same length.
        reward: name of the reward.
        path: of the table.
    """
    lists = prompts[score_column(reward)].combine_chunks()
    num_samples = len(lists[0])
    table = prompts.select(["prompt_index", "prompt_id"]).take(np.repeat(np.arange(len(lists)), num_samples))
    table = table.append_column("sample_index", pa.array(np.tile(np.arange(num_samples), len(lists))))
    make_folder(path.parent)
    write_table(table.append_column(score_column(reward), lists.flatten()), path)


def read_scores(path: Path, reward: str) -> tuple[np.ndarray, np.ndarray]:
    """Read one reward's scores, sorted by prompt and sample.

    Returns:
        Prompt indices ``[prompt]`` and scores ``[prompt, sample]`` float64, NaN for missing scores.

    Raises:
        StoreError: if the table lacks a column, or prompts have different numbers of scores.
    """
    table = read_table(path)
    columns = {"prompt_index": pa.int64(), "sample_index": pa.int64(), score_column(reward): pa.float64()}
    for name, kind in columns.items():
        if table.column_names.count(name) != 1 or table.schema.field(name).type != kind:
            raise StoreError(f"{path}: must have one column `{name}` of {kind}; delete {path.parent} to regenerate it")
    table = table.sort_by([("prompt_index", "ascending"), ("sample_index", "ascending")])
    prompt_index, counts = np.unique(table["prompt_index"].to_numpy(), return_counts=True)
    if len(set(counts.tolist())) != 1:
        raise StoreError(f"{path}: prompts must have equal numbers of scores; delete {path.parent} to regenerate it")
    return prompt_index, table[score_column(reward)].to_numpy().reshape(len(prompt_index), -1)
