"""The ablation: arms and their pairs, records, differences between arms, and the page of its results."""

import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks import ablation
from benchmarks.ablation import (
    ARMS,
    BASE,
    PAPER,
    PLAIN,
    Setting,
    append_record,
    differences,
    findings,
    read_records,
    table,
    update_page,
)

TINY = Setting("diffusion", "clip", updates=8, prompts=4, images=8, heldout=10, heldout_images=1)
ROOT = Path(__file__).parents[2]


def run(oracle: list[float], clip: float = 0.9) -> dict[str, object]:
    return {"oracle": oracle, "clip": [clip] * len(oracle), "seconds": 1.0}


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    num_threads = torch.get_num_threads()
    folder = tmp_path_factory.mktemp("pool")
    ablation.make_pool(folder, 0, ablation.WORLDS["diffusion"], TINY)  # in this process: it sets one thread
    yield folder
    torch.set_num_threads(num_threads)


def gaps(arm: str, pool: Path) -> list[np.ndarray]:
    return [stage.rank_gap for stage in ablation.draw(ARMS[arm], TINY, 0, pool)]


def test_every_arm_on_pairs_draws_as_many_pairs_as_it_trains_on(pool: Path) -> None:
    for name, arm in ARMS.items():
        if arm.schedule:
            assert [len(each) for each in gaps(name, pool)] == [2 * 16] * 4, name


def test_the_control_arms_share_the_papers_pairs(pool: Path) -> None:
    paper, reversed_stages, shuffled = (gaps(name, pool) for name in (PAPER, "reversed-stages", "shuffled"))
    assert all(np.array_equal(a, b) for a, b in zip(paper, reversed_stages[::-1], strict=True))
    assert sorted(np.concatenate(paper)) == sorted(np.concatenate(shuffled))
    assert min(np.concatenate(gaps("easiest-only", pool))) == 6 and min(np.concatenate(gaps("reliable", pool))) == 4
    stages = [ablation.draw(ARMS[name], TINY, 0, pool) for name in (PAPER, "reversed-labels")]
    for original, control in zip(*stages, strict=True):
        assert np.array_equal(original.chosen, control.rejected) and np.array_equal(original.rejected, control.chosen)


@pytest.mark.nightly
def test_finished_runs_are_recorded_and_not_repeated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    sizes = ["--updates=8", "--prompts=4", "--heldout=10", "--heldout-images=1", "--seeds=1", "--processes=1"]
    command = ["benchmarks/ablation.py", "--arms=paper-safe", *sizes]
    command += [f"--records={tmp_path / 'records.jsonl'}", f"--work-dir={tmp_path}"]
    first = subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, text=True, check=True)
    records = read_records(tmp_path / "records.jsonl")
    assert [key[1] for key in records] == [BASE, "paper-safe"] and "2/2" in first.stderr
    for (_, arm, _, _), found in records.items():
        assert len(found["oracle"]) == len(found["clip"]) == 10
        assert (found.get("chosen_error_change", 0.0) != 0) == (arm != BASE)
    assert (tmp_path / "diffusion-clip-8.png").stat().st_size > 10_000
    monkeypatch.setattr(sys, "argv", command)
    ablation.main()
    assert capsys.readouterr().out == first.stdout
    assert read_records(tmp_path / "records.jsonl") == records


def test_a_finished_run_is_read_back_under_its_key(tmp_path: Path) -> None:
    key = (TINY, PAPER, 3, 1)
    append_record(tmp_path / "records.jsonl", key, run([0.25, 0.5]))
    append_record(tmp_path / "records.jsonl", (replace(TINY, updates=16), PAPER, 3, 1), run([1.0, 1.0]))
    records = read_records(tmp_path / "records.jsonl")
    assert records[key] == run([0.25, 0.5]) and len(records) == 2


def test_arms_are_compared_on_the_seeds_and_pools_that_both_have() -> None:
    records = {
        (TINY, BASE, 0, 0): run([0.5, 0.5]),
        (TINY, PLAIN, 0, 0): run([0.5, 0.75]),
        (TINY, PLAIN, 1, 1): run([1.0, 1.0]),
        (TINY, PAPER, 0, 0): run([1.0, 1.0]),
        (TINY, PAPER, 2, 0): run([0.0, 0.0]),
    }
    assert differences(records, TINY, PAPER, PLAIN, "oracle").tolist() == [[0.5, 0.25]]
    assert differences(records, TINY, PLAIN, BASE, "oracle").tolist() == [[0.0, 0.25], [0.5, 0.5]]


def test_a_row_has_an_interval_from_three_runs_on_and_the_base_no_difference() -> None:
    prompts = np.linspace(0.2, 0.6, 10)
    records = {(TINY, BASE, 0, 0): run([0.1] * 10)}
    records |= {(TINY, PLAIN, seed, 0): run(list(prompts + 0.01 * seed)) for seed in range(3)}
    base, plain = findings(records, TINY)
    assert base["runs"] == 1 and not any(key.startswith("oracle_to") for key in base)
    assert plain["oracle_to_base"]["mean"] == pytest.approx(0.31)
    assert plain["oracle_to_base"]["low"] < 0.31 < plain["oracle_to_base"]["high"]
    assert "+0.310 [" in table(TINY, [base, plain])


def test_the_page_of_results_has_the_tables_of_the_recorded_runs() -> None:
    records = read_records(ROOT / "benchmarks" / "ablation.jsonl")
    page = (ROOT / "docs" / "results.md").read_text()
    tables = {
        setting: table(setting, findings(records, setting)) for setting in dict.fromkeys(key[0] for key in records)
    }
    assert update_page(page, tables) == page, "run `python benchmarks/ablation.py --table --page docs/results.md`"


def test_the_tables_of_a_page_are_replaced_by_their_titles_and_new_ones_appended() -> None:
    old, new, other = (
        table(setting, findings({(setting, BASE, 0, 0): run([score])}, setting))
        for setting, score in ((TINY, 0.1), (TINY, 0.2), (replace(TINY, updates=16), 0.3))
    )
    assert update_page(f"# Results\n\n{old}\n\nText.\n", {TINY: new}) == f"# Results\n\n{new}\n\nText.\n"
    assert (
        update_page(f"# Results\n\n{old}\n", {replace(TINY, updates=16): other}) == f"# Results\n\n{old}\n\n{other}\n"
    )
