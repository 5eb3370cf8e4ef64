"""A policy measured at the end of a stage, against the evaluation of the trained adapter."""

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from finished_runs import change, save_policy

from cdpo_ray.config.training import LoraSection
from cdpo_ray.dataflow.quarantine import Quarantine
from cdpo_ray.evaluation.appearance_columns import add_appearance
from cdpo_ray.evaluation.comparison import Comparer
from cdpo_ray.generation.generator import Generator, Sampling
from cdpo_ray.models import load_model
from cdpo_ray.policy.policy import Policy, make_policy
from cdpo_ray.rewards.scorer import Scorer
from cdpo_ray.training.job import ValidationJob
from cdpo_ray.training.validation import Validator

pytestmark = pytest.mark.slow
FAMILY, MODEL = "stable_diffusion", {"path": "embedded", "device": "cpu"}
PROMPTS = ["a red circle", "two blue squares", "a green triangle"]
JUDGES: dict[str, dict[str, Any]] = {"clip": {}, "jpeg_size": {}}
SAMPLING = {
    "seed": 5,
    "images_per_prompt": 2,
    "num_denoising_steps": 3,
    "guidance_scale": 1.5,
    "height": None,
    "width": None,
    "images_per_batch": 4,
}


def rows() -> pa.Table:
    return pa.table({"prompt_index": pa.array(range(len(PROMPTS)), pa.int64()), "prompt": PROMPTS})


@pytest.fixture(scope="module")
def base(embedded: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Samples of the base model, as a search stores them."""
    folder = tmp_path_factory.mktemp("base")
    made = Generator(FAMILY, MODEL, Sampling(**SAMPLING), make_scores=partial(Scorer, JUDGES))(rows())
    pq.write_table(made, folder / "samples-000000000000.parquet")
    return folder


def start(*, trained: bool) -> tuple[Any, Policy]:
    model = load_model(FAMILY, **MODEL, for_training=True, keep_vae=True)
    model.empty_conditioning  # noqa: B018 - as a worker has it before it drops the text encoders
    model.drop_text_encoders()
    policy = make_policy(model, LoraSection(rank=4, targets=("to_q", "to_v")))
    if trained:
        change(policy.trainable)
    model.denoiser.train()
    return model, policy


def validator_of(base: Path, **job: Any) -> Validator:
    asked: dict[str, Any] = {"early_prompts": None, "only_last": False, "num_margin_draws": 2} | job
    return Validator(ValidationJob(str(base), SAMPLING, JUDGES, **asked))


def measured(validator: Validator, policy: Policy, *, is_last: bool = True, rank: int = 0, num_workers: int = 1) -> Any:
    return validator.measure(policy, is_last=is_last, worker_rank=rank, num_workers=num_workers)


def scores_of(base: Path, judge: str) -> np.ndarray:
    table = pq.read_table(base / "samples-000000000000.parquet")
    return np.array(table[f"score_{judge}"].to_pylist())


def test_before_the_first_update_a_policy_generates_the_base_models_images(base: Path) -> None:
    found = measured(validator_of(base), start(trained=False)[1])
    for judge in JUDGES:
        np.testing.assert_allclose(found["scores"][judge], scores_of(base, judge), atol=1e-5)
    assert not np.any(found["implicit_values"])


def test_a_policy_is_judged_as_the_evaluation_judges_the_trained_adapter(base: Path, tmp_path: Path) -> None:
    model, policy = start(trained=True)
    found = measured(validator_of(base), policy)
    save_policy(model, tmp_path)
    comparer = Comparer(
        FAMILY,
        MODEL,
        Sampling(**SAMPLING),
        training_dir=tmp_path,
        make_scores=partial(Scorer, JUDGES),
        num_margin_draws=0,
        quarantine=Quarantine(tmp_path, len(PROMPTS), 0.0),
    )
    compared = add_appearance(comparer(rows()))
    for judge in JUDGES:
        np.testing.assert_allclose(
            found["scores"][judge], np.array(compared[f"tuned_score_{judge}"].to_pylist()), atol=1e-4
        )
        assert np.abs(np.array(found["scores"][judge]) - scores_of(base, judge)).max() > 1e-3
    np.testing.assert_allclose(found["diversity"], compared["tuned_diversity"].to_pylist(), atol=1e-4)


def test_workers_share_the_prompts_and_together_give_the_result_of_one(base: Path, group_of_one: None) -> None:
    _, policy = start(trained=True)
    validator = validator_of(base, num_margin_draws=0)
    alone = measured(validator, policy)
    shares = [measured(validator, policy, rank=rank, num_workers=2) for rank in (0, 1)]
    for judge in JUDGES:
        share_sum = np.sum([share["scores"][judge] for share in shares], axis=0)  # in a group of one, none is added
        np.testing.assert_allclose(share_sum, alone["scores"][judge], atol=1e-4)
        assert not np.any(shares[0]["scores"][judge][1]) and not np.any(shares[1]["scores"][judge][0::2])
    np.testing.assert_allclose(shares[0]["diversity"] + np.array(shares[1]["diversity"]), alone["diversity"], atol=1e-4)


def test_early_stages_measure_the_first_prompts_only_or_none_at_all(base: Path) -> None:
    _, policy = start(trained=True)
    whole = measured(validator_of(base), policy)
    early = measured(validator_of(base, early_prompts=2), policy, is_last=False)
    for judge in JUDGES:
        np.testing.assert_allclose(early["scores"][judge], whole["scores"][judge][:2], atol=1e-4)
    np.testing.assert_allclose(early["implicit_values"], whole["implicit_values"][:2], atol=1e-5)
    assert measured(validator_of(base, only_last=True), policy, is_last=False) == {}


def test_measuring_leaves_the_policy_in_training_mode_and_the_rng_state_unchanged(base: Path) -> None:
    validator, (model, policy) = validator_of(base), start(trained=True)
    before, state = [parameter.clone() for parameter in policy.trainable], torch.get_rng_state()
    measured(validator, policy)
    assert model.denoiser.training
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(now, then) for now, then in zip(policy.trainable, before, strict=True))
    assert all(parameter.grad is None for parameter in policy.trainable)
