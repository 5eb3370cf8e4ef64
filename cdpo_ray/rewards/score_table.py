"""Scores, a list a prompt -> a table a reward, a row a sample."""

from pathlib import Path

import numpy as np
import pyarrow as pa

from cdpo_ray.records import score_column
from cdpo_ray.store import make_folder, read_table, write_table


def write_scores(prompts: pa.Table, reward: str, path: Path) -> None:
    """Write one reward's scores (`records`: 2-scores).

    Args:
        prompts: a row a prompt, in prompt order: `prompt_index`, `prompt_id` and the reward's list of scores, which are
            as many for each prompt.
    """
    lists = prompts[score_column(reward)].combine_chunks()
    num_samples = len(lists[0])
    table = prompts.select(["prompt_index", "prompt_id"]).take(np.repeat(np.arange(len(lists)), num_samples))
    table = table.append_column("sample_index", pa.array(np.tile(np.arange(num_samples), len(lists))))
    make_folder(path.parent)
    write_table(table.append_column(score_column(reward), lists.flatten()), path)


def read_scores(path: Path, reward: str) -> tuple[np.ndarray, np.ndarray]:
    """Read one reward's scores: ``[prompt]`` prompt indices and ``[prompt, sample]`` float64, NaN where one is missing.

    Both are in prompt and sample order, whatever the order of the rows.
    """
    table = read_table(path).sort_by([("prompt_index", "ascending"), ("sample_index", "ascending")])
    prompt_index = np.unique(table["prompt_index"].to_numpy())
    return prompt_index, table[score_column(reward)].to_numpy().reshape(len(prompt_index), -1)
