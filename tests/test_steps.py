"""Settings and seeds of each step."""

from pathlib import Path
from typing import Any

import pytest

from cdpo_ray.config import Config, load_config
from cdpo_ray.cost.estimate import VERBS, training_peak
from cdpo_ray.cost.gpus import DEFAULT_GPU, GPUS
from cdpo_ray.prompts.sources import PromptSplit
from cdpo_ray.resources import Node
from cdpo_ray.run import cluster_gpu
from cdpo_ray.steps import STEPS, Context
from cdpo_ray.steps.arguments import model_arguments
from cdpo_ray.steps.training import train
from cdpo_ray.store import RunFolder, differences
from cdpo_ray.store.folder import flat
from cdpo_ray.training.job import TrainingJob, ValidationJob

QUICKSTART = Path(__file__).parents[1] / "configs" / "quickstart.yaml"
NEW = ("training.seed", "prompts.validation.fraction")


def config(*overrides: str) -> Config:
    return load_config(QUICKSTART, overrides)


def settings(*overrides: str) -> dict[str, dict[str, Any]]:
    return {step.verb: flat(step.settings(config(*overrides))) for step in STEPS}


def changed(*overrides: str) -> set[str]:
    """The steps whose own settings change with these values."""
    then, now = settings(), settings(*overrides)
    return {verb for verb in now if differences(then[verb], now[verb])}


@pytest.mark.parametrize("round_number", [1, 3])
def test_another_training_seed_redraws_pairs_and_retrains_on_the_same_images(round_number: int) -> None:
    def seeds(*overrides: str) -> tuple[int, int]:
        context = Context(config(*overrides), PromptSplit([], [], 0), RunFolder(Path("runs/x")), round=round_number)
        return context.seed, context.training_seed

    images, training = seeds("run.seed=5")
    assert images == training
    assert seeds("run.seed=5", "training.seed=7") == (images, seeds("run.seed=7")[0])
    assert seeds("run.seed=5", "training.seed=0") == (images, seeds("run.seed=0")[0]), "0 is a seed too"
    assert changed("training.seed=7") == {"pairs", "train"}


def test_runs_older_than_validation_prompts_and_training_seeds_stay_valid() -> None:
    for then, now in ((settings(), settings()), (settings("run.seed=3"), settings("run.seed=3"))):
        for verb in now:
            old = {key: value for key, value in then[verb].items() if key not in NEW}
            assert not differences(old, now[verb]), verb


def test_validation_prompts_change_the_samples_only_if_they_are_a_fraction_of_the_training_prompts() -> None:
    assert changed("prompts.validation={source: scenes}") == set()
    assert changed("prompts.validation={fraction: 0.2}") == {"generate"}


SD15 = QUICKSTART.with_name("sd15.yaml")
PROMPTS = PromptSplit([f"t{i}" for i in range(100)], [f"h{i}" for i in range(20)], 120)


def context_of(*overrides: str, path: Path = SD15, **values: Any) -> Context:
    return Context(load_config(path, overrides), PROMPTS, RunFolder(Path("runs/x")), **values)


def test_compile_auto_is_decided_per_step_for_the_given_gpu() -> None:
    context = context_of("model.compile=auto", gpu=GPUS["h100"])
    assert [context.compiles(verb) for verb in VERBS] == [True, True, False]  # 320 images are too few
    assert context_of("model.compile=auto", gpu=GPUS["l4"]).compiles("evaluate")
    assert model_arguments(context.config, compiles=True)["compile"] is True
    assert model_arguments(context.config)["compile"] is False


def test_compile_auto_is_off_without_a_gpu_and_for_a_model_of_unknown_size() -> None:
    no_gpu = "resources.generators.gpus_per_actor=0", "resources.trainers.gpus_per_worker=0"
    unknown = ("model.path=someone/their-model",)
    for overrides in (no_gpu, unknown):
        context = context_of("model.compile=auto", *overrides)
        assert not any(context.compiles(verb) for verb in VERBS)


def test_a_step_on_gpus_is_predicted_and_one_on_cpus_is_not() -> None:
    context = context_of(gpu=GPUS["a100"])
    predicted = context.predicted("generate")
    assert predicted is not None and predicted["gpu"] == "a100" and 600 < predicted["seconds"] < 36_000
    assert context.predicted("pairs") is None
    assert context_of("run.samples_from=runs/other").predicted("generate") is None
    assert all(context_of(path=QUICKSTART).predicted(verb) is None for verb in VERBS)


def test_a_worker_that_validates_is_known_to_need_more_memory_when_checkpointing_is_decided(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A trial's own configuration has no `search`."""
    jobs: list[TrainingJob] = []

    def stop(job: TrainingJob, **_: Any) -> None:
        jobs.append(job)
        raise KeyboardInterrupt

    monkeypatch.setattr("cdpo_ray.training.trainer.train_adapter", stop)
    monkeypatch.setattr(RunFolder, "step", lambda run, folder: run.path / folder)
    validation = ValidationJob("samples", {}, {}, None, False, 0)
    for context in (context_of(), context_of(validation=validation)):
        with pytest.raises(KeyboardInterrupt):
            train(context, Path("out"), None)  # type: ignore[arg-type]
    workload = context_of().workload
    assert workload is not None
    peaks = [training_peak(workload, checkpointing=False, validates=validates).total for validates in (False, True)]
    assert [job.plain_peak_bytes for job in jobs] == peaks
    assert peaks[1] > peaks[0]


def test_estimates_use_the_clusters_gpu_if_it_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cdpo_ray.run.visible_gpu", lambda: None)
    head, unknown, gpus = Node("a", 4), Node("b", 4, (1.0,), "G"), Node("c", 4, (1.0,), "L4")
    assert cluster_gpu([head, unknown, gpus]) == GPUS["l4"]
    assert cluster_gpu([head, unknown]) == DEFAULT_GPU
    monkeypatch.setattr("cdpo_ray.run.visible_gpu", lambda: GPUS["4090"])
    assert cluster_gpu([head, unknown]) == GPUS["4090"]
