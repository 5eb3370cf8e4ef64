"""Every configuration key: which finished steps another value invalidates."""

import json
from pathlib import Path
from typing import Any

import pytest

from cdpo_ray.config import Config, load_config
from cdpo_ray.config.reference import all_keys
from cdpo_ray.config.search import value_at
from cdpo_ray.steps import STEPS
from cdpo_ray.store import differences
from cdpo_ray.store.manifests import flat

QUICKSTART = Path(__file__).parents[1] / "configs" / "quickstart.yaml"
ALL_MODELS, TRAINING, PAIRS = {"generate", "train", "evaluate"}, {"train"}, {"pairs"}
CLIP = {"score", "evaluate"}
NOTHING: set[str] = set()
SHA256, COMMIT = "0" * 64, "1" * 40

# Key -> overrides that change it, and the steps that they invalidate. A step whose own settings are equal can still be
# invalid because its input changed: manifests' fingerprints find that, see test_run.py.
CHANGES: dict[str, tuple[list[str], set[str]]] = {
    "run.name": (["run.name=other"], NOTHING),
    "run.dir": (["run.dir=elsewhere"], NOTHING),
    "run.samples_from": (["run.samples_from=runs/other"], NOTHING),
    "run.seed": (["run.seed=1"], {"generate", "pairs", "train", "evaluate"}),
    "rounds": (["rounds=2"], NOTHING),
    "prompts.train.source": (["prompts.train.source=animals", "prompts.train.count=40"], {"generate", "evaluate"}),
    "prompts.train.count": (["prompts.train.count=40"], {"generate", "evaluate"}),
    "prompts.heldout.source": (["prompts.heldout={source: animals, count: 5}"], {"evaluate"}),
    "prompts.heldout.count": (["prompts.heldout.count=5"], {"evaluate"}),
    "prompts.heldout.fraction": (["prompts.heldout={fraction: 0.2}"], {"generate", "evaluate"}),
    "prompts.validation": (["prompts.validation={source: scenes, count: 5}"], NOTHING),
    "model.dtype": (["model.dtype=bfloat16"], ALL_MODELS),
    "model.compile": (["model.compile=true"], ALL_MODELS),
    "model.offload": (["model.offload=true"], ALL_MODELS),
    "generation.images_per_prompt": (["generation.images_per_prompt=6"], {"generate", "evaluate"}),
    "generation.num_denoising_steps": (["generation.num_denoising_steps=5"], {"generate", "evaluate"}),
    "generation.guidance_scale": (["generation.guidance_scale=2"], {"generate", "evaluate"}),
    "generation.height": (["generation.height=64"], {"generate", "evaluate"}),
    "generation.width": (["generation.width=64"], {"generate", "evaluate"}),
    "generation.images_per_batch": (["generation.images_per_batch=4"], {"generate", "evaluate"}),
    "generation.keep_images": (["generation.keep_images=false"], {"generate", "evaluate"}),
    "generation.max_bad_fraction": (["generation.max_bad_fraction=0.5"], NOTHING),
    "rewards.names": (["rewards.names=[clip,jpeg_size]"], {"score", "evaluate"}),
    "rewards.rank_by": (
        ["rewards.names=[clip,jpeg_size]", "rewards.rank_by=jpeg_size"],
        {"score", "pairs", "evaluate"},
    ),
    "rewards.arguments": (
        ["rewards=[clip,'m:f']", "rewards.arguments={'m:f': {x: 1}}"],
        {"score", "evaluate"},
    ),
    "rewards.noise_prompts": (["rewards.noise_prompts=4"], {"score", "pairs"}),
    "rewards.placement": (["rewards.placement=pool"], NOTHING),
    "rewards.max_bad_fraction": (["rewards.max_bad_fraction=0.5"], PAIRS),
    "rewards.clip.scale": (["rewards.clip.scale=logit"], CLIP),
    "curriculum.measure": (["curriculum.measure=score_gap"], PAIRS),
    "curriculum.boundaries": (["curriculum.boundaries=equal_count"], PAIRS),
    "curriculum.pacing": (["curriculum.pacing=one_stage"], PAIRS),
    "curriculum.order": (["curriculum.order=hard_to_easy"], PAIRS),
    "curriculum.draws": (["curriculum.draws=by_measure"], PAIRS),
    "curriculum.num_stages": (["curriculum.num_stages=2"], PAIRS),
    "curriculum.updates_per_stage": (["curriculum.updates_per_stage=5"], PAIRS),
    "curriculum.min_rank_gap": (["curriculum.min_rank_gap=3"], PAIRS),
    "curriculum.min_score_gap": (["curriculum.min_score_gap=0.01"], PAIRS),
    "curriculum.max_pairs_per_prompt": (["curriculum.max_pairs_per_prompt=3"], PAIRS),
    "curriculum.label_noise": (["curriculum.label_noise=0.1"], PAIRS),
    "training.seed": (["training.seed=7"], {"pairs", "train"}),
    "training.loss": (["training.loss=ipo"], TRAINING),
    "training.beta": (["training.beta=100"], TRAINING),
    "training.loss.label_smoothing": (["training.loss={name: robust, label_smoothing: 0.2}"], TRAINING),
    "training.loss.sft_weight": (["training.loss.sft_weight=0.1"], TRAINING),
    "training.loss.options": (["training.loss={name: 'm:f', options: {x: 1}}"], TRAINING),
    "training.reference": (["rounds=2", "training.reference=last_round"], TRAINING),
    "training.adaptive_beta": (["training.adaptive_beta=0.6"], TRAINING),
    "training.safeguard": (["training.safeguard=0.9"], TRAINING),
    "training.ema_decay": (["training.ema_decay=0.9"], TRAINING),
    "training.learning_rate": (["training.learning_rate=0.001"], TRAINING),
    "training.schedule.warmup_updates": (["training.schedule.warmup_updates=0"], TRAINING),
    "training.schedule.decay": (["training.schedule.decay=cosine"], TRAINING),
    "training.health.max_error_rise": (["training.health.max_error_rise=0.1"], NOTHING),
    "training.health.window": (["training.health.window=10"], NOTHING),
    "training.health.on_alarm": (["training.health.on_alarm=stop"], TRAINING),
    "training.weight_decay": (["training.weight_decay=0.1"], TRAINING),
    "training.adam_beta1": (["training.adam_beta1=0.8"], TRAINING),
    "training.adam_beta2": (["training.adam_beta2=0.99"], TRAINING),
    "training.max_grad_norm": (["training.max_grad_norm=2"], TRAINING),
    "training.global_batch_size": (["training.global_batch_size=8"], {"pairs", "train"}),
    "training.batch_size_per_worker": (["training.batch_size_per_worker=2"], NOTHING),
    "training.empty_prompt_fraction": (["training.empty_prompt_fraction=0.1"], TRAINING),
    "training.gradient_checkpointing": (["training.gradient_checkpointing=true"], NOTHING),
    "training.timesteps": (["training.timesteps=[249, 499, 749, 999]"], TRAINING),
    "training.lora.rank": (["training.lora.rank=4"], TRAINING),
    "training.lora.initial_rank": (["training.lora.initial_rank=2"], TRAINING),
    "training.lora.unfreeze": (["training.lora.unfreeze=from_output"], TRAINING),
    "training.lora.alpha": (["training.lora.alpha=4"], TRAINING),
    "training.lora.use_rslora": (["training.lora={alpha: 4, use_rslora: true}"], TRAINING),
    "training.lora.use_dora": (["training.lora.use_dora=true"], TRAINING),
    "training.lora.targets": (["training.lora.targets=[to_q]"], TRAINING),
    "training.num_workers": (["training.num_workers=1"], NOTHING),
    "training.zero_stage": (["training.zero_stage=2"], NOTHING),
    "training.updates_per_commit": (["training.updates_per_commit=5"], NOTHING),
    "training.keep_last": (["training.keep_last=1"], NOTHING),
    "training.keep_best": (["training.keep_best=true"], NOTHING),
    "training.preview_prompts": (["training.preview_prompts=0"], NOTHING),
    "training.max_skipped_updates": (["training.max_skipped_updates=1"], NOTHING),
    "training.max_restarts": (["training.max_restarts=1"], NOTHING),
    "training.collective_timeout_seconds": (["training.collective_timeout_seconds=900"], NOTHING),
    "evaluation.images_per_prompt": (["evaluation.images_per_prompt=2"], {"evaluate"}),
    "evaluation.judges": (["evaluation.judges=[clip]"], {"evaluate"}),
    "evaluation.num_margin_draws": (["evaluation.num_margin_draws=1"], {"evaluate"}),
    "evaluation.num_bootstrap_resamples": (["evaluation.num_bootstrap_resamples=200"], {"evaluate"}),
    "evaluation.grid_prompts": (["evaluation.grid_prompts=3"], NOTHING),
    "tracking.mlflow": (["tracking.mlflow={tracking_uri: http://host, experiment: e}"], NOTHING),
    "tracking.wandb": (["tracking.wandb={project: p}"], NOTHING),
    "search": (
        ["prompts.validation={source: scenes, count: 5}", "search={num_trials: 2, space: {training.beta: [100, 200]}}"],
        NOTHING,
    ),
    "judge": (["judge.candidates={mine: {run: runs/mine}}"], NOTHING),
    **{
        f"resources.{key}": ([f"resources.{key}={value}"], NOTHING)
        for role in ("generators", "scorers")
        for key, value in (
            (f"{role}.num_actors", 1),
            (f"{role}.cpus_per_actor", 2),
            (f"{role}.gpus_per_actor", 1),
            (f"{role}.node_labels", "{market: spot}"),
        )
    },
    "resources.trainers.cpus_per_worker": (["resources.trainers.cpus_per_worker=2"], NOTHING),
    "resources.trainers.gpus_per_worker": (["resources.trainers.gpus_per_worker=1"], NOTHING),
    "resources.trainers.node_labels": (["resources.trainers.node_labels={market: on-demand}"], NOTHING),
}
NOT_OF_THIS_RUN = {
    **dict.fromkeys(
        [
            f"prompts.{side}.{key}"
            for side in ("train", "heldout")
            for key in ("path", "file", "revision", "column", "category_column")
        ],
        "of prompts in a file or on the hub; recorded with `prompts`, whole",
    ),
    "prompts.train.fraction": "not allowed for training prompts",
    "preferences": "replaces `generate` by `import`; test_import_run.py",
    **dict.fromkeys(
        ["model.family", "model.path", "model.revision", "model.config", "model.teacher", "model.quantization"],
        "needs another model; recorded with `model`, whole",
    ),
    "rewards.weights": "needs a combination of rewards; test_rescoring.py",
    **dict.fromkeys(["rewards.clip.architecture", "rewards.clip.checkpoint", "rewards.clip.revision"], "needs weights"),
    "curriculum.preset": "only sets other keys, and is recorded with `curriculum`",
    **dict.fromkeys(
        ["curriculum.window", "curriculum.num_margin_draws", "curriculum.min_gap_in_noise"],
        "allowed with other values of other keys only; recorded with `curriculum`, whole",
    ),
    "training.start_from": "needs a file; see below",
    "training.method": "its other value does not allow `training.lora`, which this configuration gives",
    "training.guidance_range": "for guidance-conditioned families",
    "training.consistency_target": "for consistency models",
    "training.optimizer": "needs bitsandbytes",
}
"""Keys that this configuration cannot change alone, and why; options of rewards that it does not use are left out."""


def config(*overrides: str) -> Config:
    return load_config(QUICKSTART, overrides)


def value_of(config: Config, key: str) -> Any:
    return value_at(config.plain(), key)


def settings(*overrides: str) -> dict[str, dict[str, Any]]:
    return {step.verb: step.settings(config(*overrides)) for step in STEPS}


@pytest.fixture(scope="module")
def before() -> dict[str, dict[str, Any]]:
    return settings()


@pytest.mark.parametrize("key", CHANGES)
def test_another_value_of_a_key_invalidates_exactly_the_steps_whose_outcome_it_decides(
    key: str, before: dict[str, dict[str, Any]]
) -> None:
    overrides, invalidated = CHANGES[key]
    assert value_of(config(*overrides), key) != value_of(config(), key)
    after = settings(*overrides)
    assert {verb for verb in after if differences(before[verb], after[verb])} == invalidated


def test_every_key_is_listed() -> None:
    options = {"rewards." + name for name, value in config().rewards if hasattr(value, "model_dump")} - {"rewards.clip"}
    keys = {key for key in flat(config().plain()) if not key.startswith(tuple(f"{name}." for name in options))}
    keys |= {key for key in all_keys() if key.startswith("training.loss.")} - {"training.loss.name"}
    assert keys - {*CHANGES, *NOT_OF_THIS_RUN} == set(), "a new key belongs into CHANGES"
    assert {*CHANGES, *NOT_OF_THIS_RUN} - keys == set()


def test_an_evaluation_of_an_earlier_version_stays_valid_whatever_its_grid_was(
    before: dict[str, dict[str, Any]],
) -> None:
    recorded = before["evaluate"] | {"evaluation": before["evaluate"]["evaluation"] | {"grid_prompts": 99}}
    assert not differences(recorded, before["evaluate"])


@pytest.mark.parametrize(
    ("earlier", "loss"),
    [
        ({"loss": "dpo", "sft_weight": 0.0, "label_smoothing": 0.0}, "dpo"),
        ({"loss": "sft", "sft_weight": 0.0, "label_smoothing": 0.0}, "sft"),
        ({"loss": "ipo", "sft_weight": 0.2, "label_smoothing": 0.0}, "{name: ipo, sft_weight: 0.2}"),
        ({"loss": "robust", "sft_weight": 0.0, "label_smoothing": 0.1}, "robust"),
        ({"loss": "robust", "sft_weight": 0.2, "label_smoothing": 0.1}, "{name: robust, sft_weight: 0.2}"),
        ({"loss": "robust", "sft_weight": 0.0, "label_smoothing": 0.3}, "{name: robust, label_smoothing: 0.3}"),
    ],
)
def test_a_training_of_an_earlier_version_stays_valid_with_the_same_loss(earlier: dict[str, Any], loss: str) -> None:
    now = settings(f"training.loss={loss}")["train"]
    recorded = now | {"training": {key: value for key, value in now["training"].items() if key != "loss"} | earlier}
    assert not differences(recorded, now)
    assert differences(recorded, settings("training.loss=hinge")["train"])


def test_a_training_of_an_earlier_version_stays_valid_with_a_constant_learning_rate_without_warm_up() -> None:
    now = settings("training.schedule.warmup_updates=0")["train"]
    earlier = {key: value for key, value in now["training"].items() if key != "schedule"}
    assert not differences(now | {"training": earlier}, now)
    assert "`training.schedule.warmup_updates` = 0, config says 10" in differences(
        now | {"training": earlier}, settings()["train"]
    )


def test_the_bound_of_an_alarm_that_stops_training_decides_its_outcome() -> None:
    stops = "training.health.on_alarm=stop"
    before = settings(stops)["train"]
    for change in ("training.health.max_error_rise=0.1", "training.health.window=10"):
        assert differences(before, settings(stops, change)["train"])


def test_another_lora_to_start_from_and_other_content_of_it_invalidate_training_alone(
    tmp_path: Path, before: dict[str, dict[str, Any]]
) -> None:
    path = tmp_path / "given.safetensors"
    made = []
    for content in (b"one", b"other"):
        path.write_bytes(content)
        made.append(settings(f"training.start_from={path}", "training.reference=start"))
    for then, now in ((before, made[0]), made):
        assert {verb for verb in now if differences(then[verb], now[verb])} == TRAINING
    assert "`training.start_from.sha256` = " in differences(made[0]["train"], made[1]["train"])


def test_other_questions_in_the_file_invalidate_their_scores(tmp_path: Path) -> None:
    path, made = tmp_path / "q.jsonl", []
    for content in ("one", "other"):
        path.write_text(content)
        made.append(settings("rewards=[clip,vqa]", f"rewards.vqa={{questions: {path}, checkpoint: {tmp_path}}}"))
    assert {verb for verb in made[0] if differences(made[0][verb], made[1][verb])} == CLIP
    assert "rewards.vqa.questions.sha256" in differences(made[0]["evaluate"], made[1]["evaluate"])


def test_settings_of_a_vision_language_judge_are_the_same_after_they_were_stored() -> None:
    now = settings("rewards=[vlm_judge]", "rewards.vlm_judge={checkpoint: ., scale: [0, 9]}")
    assert json.loads(json.dumps(now)) == now
