"""What each step's outcome depends on, and what it draws from."""

from pathlib import Path
from typing import Any

import pytest

from cdpo_ray.config import Config, load_config
from cdpo_ray.prompts.sources import PromptSplit
from cdpo_ray.steps import STEPS, Context
from cdpo_ray.store import RunFolder, differences
from cdpo_ray.store.folder import flat

QUICKSTART = Path(__file__).parents[1] / "configs" / "quickstart.yaml"
NEW = ("training.seed", "prompts.validation.fraction")


def config(*overrides: str) -> Config:
    return load_config(QUICKSTART, overrides)


def settings(*overrides: str) -> dict[str, dict[str, Any]]:
    return {step.verb: flat(step.settings(config(*overrides))) for step in STEPS}


def changed(*overrides: str) -> set[str]:
    """The steps that are made anew by themselves when these values change."""
    then, now = settings(), settings(*overrides)
    return {verb for verb in now if differences(then[verb], now[verb])}


@pytest.mark.parametrize("round_number", [1, 3])
def test_another_training_seed_draws_other_pairs_and_trains_anew_on_the_same_images(round_number: int) -> None:
    def seeds(*overrides: str) -> tuple[int, int]:
        context = Context(config(*overrides), PromptSplit([], [], 0), RunFolder(Path("runs/x")), round=round_number)
        return context.seed, context.training_seed

    images, training = seeds("run.seed=5")
    assert images == training
    assert seeds("run.seed=5", "training.seed=7") == (images, seeds("run.seed=7")[0])
    assert seeds("run.seed=5", "training.seed=0") == (images, seeds("run.seed=0")[0]), "0 is a seed too"
    assert changed("training.seed=7") == {"pairs", "train"}


def test_what_was_made_before_there_were_validation_prompts_and_training_seeds_stays_valid() -> None:
    for then, now in ((settings(), settings()), (settings("run.seed=3"), settings("run.seed=3"))):
        for verb in now:
            old = {key: value for key, value in then[verb].items() if key not in NEW}
            assert not differences(old, now[verb]), verb


def test_validation_prompts_of_their_own_source_change_nothing_and_a_share_of_the_training_source_does() -> None:
    assert changed("prompts.validation={source: scenes}") == set()
    assert changed("prompts.validation={fraction: 0.2}") == {"generate"}
