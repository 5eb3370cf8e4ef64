"""The score table as the pairs step reads it."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from cdpo_ray.curriculum.combination import RankingRule
from cdpo_ray.curriculum.dataset import read_ranking_scores
from cdpo_ray.curriculum.ranking import rank_samples
from cdpo_ray.curriculum.schedule import Schedule, plan_stage


def test_pairs_do_not_depend_on_the_order_of_rows(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    prompts, samples = np.repeat([3, 4, 8, 11], 6), np.tile(np.arange(6), 4)
    table = pa.table({"prompt_index": prompts, "sample_index": samples, "score_clip": random.normal(size=24)})
    drawn = []
    for name, order in (("in_order", np.arange(24)), ("mixed", random.permutation(24))):
        (tmp_path / name).mkdir()
        pq.write_table(table.take(order), tmp_path / name / "clip.parquet")
        read = read_ranking_scores(tmp_path / name, RankingRule("clip", {"clip": 1.0}))
        assert read.prompt_index.tolist() == [3, 4, 8, 11]
        pairs, _ = plan_stage(rank_samples(read.scores), schedule=Schedule(), stage=4, num_draws=100, seed=0)
        columns = read.prompt_index[pairs.prompt], pairs.chosen, pairs.rejected, pairs.rank_gap
        drawn.append([column.tolist() for column in columns])
    assert drawn[0] == drawn[1]
    scores = dict(
        zip(zip(prompts.tolist(), samples.tolist(), strict=True), table["score_clip"].to_pylist(), strict=True)
    )
    assert all(scores[p, w] > scores[p, lost] for p, w, lost, _ in zip(*drawn[0], strict=True))
