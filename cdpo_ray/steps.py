"""Config -> each step's arguments; the steps in the order of the data's way.

A step's own modules are imported when it runs, so that checking a configuration, or passing over finished steps, needs
neither torch nor ray.
"""

import functools
import logging
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from cdpo_ray.config import HOW_NOT_WHAT, JUDGE_NO_IMAGE, Config, Pool, PromptSource
from cdpo_ray.errors import ConfigError, PreferenceError, StoreError
from cdpo_ray.preferences.files import Source, fingerprint
from cdpo_ray.progress import Progress
from cdpo_ray.prompts import sources
from cdpo_ray.prompts.sources import PromptSplit, held_out
from cdpo_ray.records import (
    EVALUATION,
    HELDOUT,
    LABEL,
    PREFERENCE,
    SAMPLES,
    SCORES,
    STAGES,
    TRAINING,
    VALIDATION,
    score_column,
    score_file,
)
from cdpo_ray.resources import Demand
from cdpo_ray.store import (
    RunFolder,
    StepOutput,
    differences,
    link,
    local_copy,
    make_folder,
    place,
    read_json,
    read_shards,
    refuse_full_disk,
    shard_schema,
)
from cdpo_ray.training.job import ValidationJob

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Context:
    """What every step is given.

    Attributes:
        round: 1-based.
        run: the round's folder.
        previous: folder of the round before.
        progress: told how far the step is.
        validation: how the policy is measured at each stage's end.
        on_stage: called with the summary of each stage that has ended.
    """

    config: Config
    prompts: PromptSplit
    run: RunFolder
    round: int = 1
    previous: RunFolder | None = None
    progress: Progress = field(default_factory=Progress)
    validation: ValidationJob | None = None
    on_stage: Callable[[dict[str, Any]], Any] = lambda summary: None

    @property
    def seed(self) -> int:
        """What generation draws from; each round has its own."""
        return self._in_round(self.config.run.seed)

    @property
    def training_seed(self) -> int:
        """What pairs and training draw from; each round has its own."""
        given = self.config.training.seed
        return self._in_round(self.config.run.seed if given is None else given)

    def _in_round(self, seed: int) -> int:
        from cdpo_ray.models.seeds import seed_of

        return seed if self.round == 1 else seed_of(seed, "round", self.round)

    @property
    def start_dir(self) -> str | None:
        """What the round before trained."""
        return str(self.previous.step(TRAINING).resolve()) if self.previous else None


@dataclass(frozen=True)
class Step:
    """A part of the way: what it depends on decides whether it has been done already.

    Attributes:
        settings: the configuration's values that its outcome depends on.
        inputs: folders of earlier steps that it reads.
        resumable: goes on with what an interrupted attempt left.
        continues: reads what the round before trained.
        grows: each setting is a part of its own, which can be added when others are done.
    """

    verb: str
    folder: str
    settings: Callable[[Config], dict[str, Any]]
    inputs: tuple[str, ...]
    perform: Callable[[Context, Path, StepOutput], None]
    resumable: bool = False
    continues: bool = False
    grows: bool = False

    def fingerprints(self, config: Config, run: RunFolder, previous: RunFolder | None = None) -> dict[str, str]:
        """What tells the files that it reads from others; of the scores it reads only those that rank.

        Raises:
            StoreError: a step before is not done, or has not scored what ranks.
        """
        read = {SCORES: _ranking_files(config)}
        found = {folder: run.fingerprint(folder, read.get(folder)) for folder in self.inputs}
        if previous and self.continues:
            found["the round before"] = previous.fingerprint(TRAINING)
        return found


def generate(context: Context, output_dir: Path, output: StepOutput) -> None:
    if context.config.run.samples_from:
        _take_samples(RunFolder(place(context.config.run.samples_from)), context, output_dir, output)
        return
    from cdpo_ray.generation.pool import generate_samples
    from cdpo_ray.models.sizes import sizes_of
    from cdpo_ray.rewards.pool import score_pixels
    from cdpo_ray.rewards.scorer import Scorer

    config = context.config
    rewards, judges = {name: config.rewards.options(name) for name in config.rewards.names}, config.rewards.judges
    sampling = _sampling(config, config.generation.images_per_prompt, context.seed)
    sampling = replace(sampling, max_masked_fraction=config.rewards.max_masked_fraction)
    if sizes := sizes_of(config.model.family, config.model.path, sampling.height, sampling.width):
        num_images = len(context.prompts.train) * sampling.images_per_prompt
        refuse_full_disk(output_dir, num_images * sizes.latent_bytes(config.model.dtype))  # PNGs: who knows
    fused = config.rewards.placement == "fused" or not judges
    made_with = generate_samples(
        context.prompts.train,
        output_dir,
        family=config.model.family,
        model=_model(config),
        sampling=sampling,
        tuned_dir=context.start_dir,
        keep_images=config.generation.keep_images,
        generators=_pool(config.resources.generators),
        make_scores=functools.partial(Scorer, judges) if fused else None,
        score_in_pool=None
        if fused
        else functools.partial(
            score_pixels,
            rewards=judges,
            scorers=_pool(config.resources.scorers),
            images_per_batch=sampling.images_per_batch,
            rows_per_call=1,
        ),
        max_bad_fraction=config.generation.max_bad_fraction,
        progress=context.progress,
    )
    cut = read_shards(output_dir, ["num_tokens_cut"])["num_tokens_cut"].to_numpy()
    num_images = len(cut) * sampling.images_per_prompt
    output.counts |= {"prompts": len(cut), "images": num_images, "prompts_cut": int((cut > 0).sum())}
    output.counts |= {"lines_doubled": context.prompts.num_doubled, "lines_empty": context.prompts.num_empty}
    in_smaller = {size: num for size, num in made_with.items() if size != sampling.images_per_batch}
    output.counts |= {
        "prompts_set_aside": len(context.prompts.train) - len(cut),
        "prompts_in_smaller_batches": sum(in_smaller.values()),
    }
    output.details["rewards"] = rewards  # how the score columns were made, for the next step to compare
    if output.counts["prompts_cut"]:
        output.warnings.append(
            f"{output.counts['prompts_cut']} prompts are longer than the text encoder reads; their ends were cut"
        )
    if in_smaller:
        output.warnings.append(
            f"memory does not suffice for `generation.images_per_batch` = {sampling.images_per_batch};"
            f" {sum(in_smaller.values())} prompts were made with {', '.join(map(str, sorted(in_smaller)))}"
        )
    _warn_of_set_aside(output)


def _warn_of_set_aside(output: StepOutput) -> None:
    if num_prompts := output.counts["prompts_set_aside"]:
        output.warnings.append(f"{num_prompts} prompts raise inside the model; set_aside.jsonl says which and why")


def import_preferences(context: Context, output_dir: Path, output: StepOutput) -> None:
    from cdpo_ray.preferences.files import scan
    from cdpo_ray.preferences.pool import import_samples
    from cdpo_ray.rewards.scorer import Scorer

    config, source = context.config, preference_source(context.config)
    preferences = config.preferences
    assert preferences is not None, "the step of a config with preferences"
    found = scan(source)
    found.refuse_faults()
    judges = config.rewards.judges
    context.progress.begin("import", total=found.num_rows, unit="row")
    set_aside = import_samples(
        found.chunks,
        output_dir,
        source=source,
        frame=preference_frame(config),
        num_samples=found.num_samples,
        family=config.model.family,
        model=_model(config),
        images_per_batch=config.generation.images_per_batch,
        keep_images=config.generation.keep_images,
        make_scores=functools.partial(Scorer, judges) if judges else None,
        encoders=_pool(config.resources.generators),
        progress=context.progress,
    )
    too_many = len(set_aside) > preferences.max_bad_fraction * found.num_rows * found.num_samples
    if too_many or not any(output_dir.glob("*.parquet")):
        raise PreferenceError(
            f"`preferences.path` {source.path}: {len(set_aside)} images of {found.num_rows} rows cannot be used, more"
            f" than `preferences.max_bad_fraction` = {preferences.max_bad_fraction}; `cdpo import --check` names each;"
            f" the first: {set_aside[0]['reason']}"
        )
    made = read_shards(output_dir, ["num_tokens_cut", "num_images_cut"])
    output.counts |= {
        "rows": found.num_rows,
        "rows_imported": made.num_rows,
        "rows_tied": found.num_tied,
        "rows_unlabelled": found.num_unlabelled,
        "images_set_aside": len(set_aside),
        "images_cut": int(made["num_images_cut"].to_numpy().sum()),
        "prompts_cut": int((made["num_tokens_cut"].to_numpy() > 0).sum()),
    }
    output.details["rewards"] = {name: config.rewards.options(name) for name in (PREFERENCE, LABEL, *judges)}
    if set_aside:
        output.warnings.append(f"{len(set_aside)} images cannot be used; set_aside.jsonl says which and why")
    if output.counts["prompts_cut"]:
        output.warnings.append(f"{output.counts['prompts_cut']} prompts are longer than the text encoder reads")


def _take_samples(other: RunFolder, context: Context, output_dir: Path, output: StepOutput) -> None:
    """The images of another run, once it is sure that this run's own would be the same."""
    manifest, where = other.manifest(SAMPLES), f"`run.samples_from`: {other.path / SAMPLES}"
    if changed := differences(manifest["settings"], _sample_settings(context.config)):
        raise StoreError(f"{where} was made with {changed}; restore the value, or leave out `run.samples_from`")
    if manifest["inputs"]:
        raise StoreError(f"{where} is of a later round, not of the base model; name the folder of a first round")
    other.refuse_damage(SAMPLES)
    for left in output_dir.rglob("*.parquet"):  # by an attempt to generate, which may have been cut elsewhere
        left.unlink()
    for name in manifest["files"]:
        link(other.path / SAMPLES / name, output_dir / name)
    output.counts |= manifest["counts"]
    output.warnings += manifest["warnings"]
    output.details |= manifest["details"] | {"taken_from": str(other.path)}


def score(context: Context, output_dir: Path, output: StepOutput) -> None:
    from cdpo_ray.rewards.score_table import write_scores

    config, samples_dir = context.config, context.run.step(SAMPLES)
    rewards, settings, parts = config.rewards, _score_settings(config), _score_parts(config)
    with_images = context.run.manifest(SAMPLES)["details"]["rewards"]
    other_dir, there = _scores_elsewhere(context)
    num_samples = shard_schema(samples_dir).field("latents").type.shape[0]
    missing: dict[bool, list[str]] = {False: [], True: []}
    for part in output.parts:
        reward, second = parts[part]
        path = output_dir / score_file(reward, second=second)
        if there.get(part) == settings[part]:
            make_folder(path.parent)
            link(other_dir / score_file(reward, second=second), path)
        elif with_images.get(reward) == rewards.options(reward) and (reward in JUDGE_NO_IMAGE or not second):
            rows = read_shards(samples_dir, ["prompt_index", "prompt_id", "prompt", score_column(reward)])
            rows = rows.sort_by("prompt_index")
            if reward == LABEL:
                unseen = held_out(rows["prompt"].to_pylist(), config.prompts.heldout.fraction)
                rows = rows.filter([not held for held in unseen])
            write_scores(rows[: rewards.noise_prompts] if second else rows, reward, path)
        else:
            missing[second].append(reward)
    output.counts |= {"scores": 0, "scores_computed_now": 0}
    for second, names in missing.items():
        if names:
            from cdpo_ray.rewards.pool import rescore

            scored = rescore(
                samples_dir,
                rewards={name: rewards.options(name) for name in names},
                scorers=_pool(config.resources.scorers),
                images_per_batch=config.generation.images_per_batch,
                images_per_prompt=num_samples,
                keep_images=config.generation.keep_images,
                family=config.model.family,
                model=_model(config),
                num_prompts=rewards.noise_prompts if second else None,
                progress=context.progress,
            )
            for name in names:
                write_scores(scored, name, output_dir / score_file(name, second=second))
            num_images = scored.num_rows * num_samples
            output.counts["scores_computed_now"] += num_images * len(names)
    for part in output.parts:
        if parts[part][0] not in (PREFERENCE, LABEL):  # what people did not say is no fault of a judge
            _describe_scores(*parts[part], context, output_dir, output)


def _scores_elsewhere(context: Context) -> tuple[Path, dict[str, Any]]:
    """Where the run that gave the images keeps their scores, and with what settings it made them."""
    other = RunFolder(place(context.config.run.samples_from or ""))
    if context.config.run.samples_from and other.has(SCORES):
        other.refuse_damage(SCORES)
        manifest = other.manifest(SCORES)
        if manifest["inputs"] == {SAMPLES: context.run.fingerprint(SAMPLES)}:
            return other.step(SCORES), manifest["settings"]
    return other.path, {}


def _describe_scores(reward: str, second: bool, context: Context, output_dir: Path, output: StepOutput) -> None:
    import numpy as np

    from cdpo_ray.curriculum.noise import score_noise
    from cdpo_ray.rewards.score_table import read_scores

    first_path = output_dir / score_file(reward)
    if not first_path.is_file():  # made before; this is its second scoring
        first_path = context.run.step(SCORES) / score_file(reward)
    _, scores = read_scores(first_path, reward)
    if second:
        _, again = read_scores(output_dir / score_file(reward, second=True), reward)
        noise = score_noise(scores[: len(again)], again)
        output.details[f"noise_{reward}"] = noise if np.isfinite(noise) else None
        log.info("score: `%s` scored %d prompts twice: its noise is %.4g", reward, len(again), noise)
        return
    num_bad = scores.size - int(np.isfinite(scores).sum())
    output.counts["scores"] += scores.size
    output.counts[f"not_finite_{reward}"] = num_bad
    if num_bad:
        output.warnings.append(f"{num_bad} of {scores.size} scores of `{reward}` are not finite; they form no pairs")


def pairs(context: Context, output_dir: Path, output: StepOutput) -> None:
    from cdpo_ray.curriculum.dataset import read_ranking_scores, write_stages

    config = context.config
    output.counts |= write_stages(
        read_ranking_scores(context.run.step(SCORES), _ranking_rule(config)),
        output_dir,
        schedule=_schedule(config),
        pairs_per_stage=_pairs_per_stage(config),
        max_bad_fraction=config.rewards.max_bad_fraction,
        seed=context.training_seed,
    )
    if output.counts["prompts_without_pairs"]:
        output.warnings.append(
            f"{output.counts['prompts_without_pairs']} prompts form no pair: their scores are equal, or differ by no"
            " more than `curriculum.min_score_gap` or `curriculum.min_gap_in_noise` allows"
        )


def train(context: Context, output_dir: Path, output: StepOutput) -> None:
    from cdpo_ray.curriculum.capacity import stage_capacities
    from cdpo_ray.training.job import CommitJob, LoraJob, LossJob, OnlineJob, Optimization, TrainingJob
    from cdpo_ray.training.trainer import COMMITS_DIR, train_adapter

    config, training = context.config, context.config.training
    job = TrainingJob(
        samples_dir=str(context.run.step(SAMPLES).resolve()),
        stages_dir=str(context.run.step(STAGES).resolve()),
        num_stages=config.curriculum.num_stages,
        family=config.model.family,
        model=_model(config),
        lora=LoraJob(
            training.lora.rank,
            training.lora.alpha or training.lora.rank,
            training.lora.targets,
            stage_capacities(training.lora.rank, config.curriculum.num_stages, **training.lora.growth),
            from_output=training.lora.unfreeze == "from_output",
        )
        if training.method == "lora"
        else None,
        loss=LossJob(training.loss, training.beta, training.label_smoothing, training.sft_weight),
        empty_prompt_fraction=training.empty_prompt_fraction,
        gradient_checkpointing=training.gradient_checkpointing,
        optimization=Optimization(
            learning_rate=training.learning_rate,
            weight_decay=training.weight_decay,
            adam_beta1=training.adam_beta1,
            adam_beta2=training.adam_beta2,
            max_grad_norm=training.max_grad_norm,
            global_batch_size=training.global_batch_size,
            pairs_per_launch=training.pairs_per_launch,
            zero_stage=training.zero_stage,
        ),
        seed=context.training_seed,
        output_dir=str(output_dir),
        commits=CommitJob(
            str(output_dir / COMMITS_DIR), training.updates_per_commit, training.keep_last, training.keep_best
        ),
        max_skipped_updates=training.max_skipped_updates,
        collective_timeout_seconds=training.collective_timeout_seconds,
        guidance_range=training.guidance_range,
        start_dir=context.start_dir,
        reference_is_start=training.reference == "last_round",
        online=OnlineJob(
            str(context.run.step(SCORES).resolve()),
            _ranking_rule(config),
            _schedule(config),
            _pairs_per_stage(config),
            config.curriculum.num_margin_draws,
        )
        if config.curriculum.num_margin_draws
        else None,
        validation=context.validation,
    )
    num_updates = config.curriculum.num_stages * config.curriculum.updates_per_stage
    state = train_adapter(
        job,
        output_dir,
        num_updates=num_updates,
        num_workers=training.num_workers,
        cpus_per_worker=config.resources.trainers.cpus_per_worker,
        gpus_per_worker=config.resources.trainers.gpus_per_worker,
        max_restarts=training.max_restarts,
        progress=context.progress,
        on_stage=context.on_stage,
    )
    skipped = len(state["skipped"])
    output.counts |= {
        "updates": num_updates - skipped,
        "pairs": (num_updates - skipped) * training.global_batch_size,
        "updates_skipped": skipped,
    }
    output.details["training"] = training.model_dump(mode="json", include=HOW_NOT_WHAT)
    if skipped:
        output.warnings.append(
            f"{skipped} of {num_updates} updates were skipped, for their loss or gradient was not finite:"
            f" {', '.join(map(str, state['skipped'][:10]))}{', ...' * (skipped > 10)}"
        )


def evaluate(context: Context, output_dir: Path, output: StepOutput) -> None:
    from cdpo_ray.evaluation.labelled import LabelledSamples
    from cdpo_ray.evaluation.pool import evaluate_adapter
    from cdpo_ray.rewards.scorer import Scorer

    config = context.config
    judges = config.evaluation_judges
    metrics = evaluate_adapter(
        context.prompts.heldout,
        output_dir,
        training_dir=context.run.step(TRAINING).resolve(),
        family=config.model.family,
        model=_model(config),
        sampling=_sampling(config, config.evaluation.images_per_prompt, config.run.seed),
        judges=list(judges),
        make_scores=functools.partial(Scorer, judges),
        num_margin_draws=config.evaluation.num_margin_draws,
        guidance_range=config.training.guidance_range,
        generators=_pool(config.resources.generators),
        num_resamples=config.evaluation.num_bootstrap_resamples,
        seed=config.run.seed,
        max_bad_fraction=config.generation.max_bad_fraction,
        progress=context.progress,
        labelled=LabelledSamples(
            context.run.step(SAMPLES),
            fraction,
            tuple(config.rewards.judges),
            config.generation.images_per_batch,
        )
        if config.preferences and (fraction := config.prompts.heldout.fraction)
        else None,
    )
    for judge, found in metrics["judges"].items():
        base, tuned, difference = found["base"], found["tuned"], found["difference"]
        log.info(
            "%s: %.4f -> %.4f, difference %+.4f [%+.4f, %+.4f], win rate %.2f",
            judge, base["mean"], tuned["mean"], difference["mean"], difference["low"], difference["high"],
            found["win_rate"]["mean"],
        )  # fmt: skip
    num_prompts = metrics["num_prompts"]
    context.progress.record(
        {
            f"{judge}/{name}": found[name]["mean"]
            for judge, found in metrics["judges"].items()
            for name in ("base", "tuned", "difference", "win_rate")
        },
        update=context.run.manifest(TRAINING)["counts"]["updates"],
    )
    output.counts |= {
        "prompts": num_prompts,
        "images": 2 * num_prompts * config.evaluation.images_per_prompt,
        "prompts_set_aside": len(context.prompts.heldout) - num_prompts,
    }
    _warn_of_set_aside(output)


def sample_to_compare(context: Context, output_dir: Path, output: StepOutput, *, side: str) -> None:
    """What the base model makes of the prompts of a side, judged by all: made once, for all trials of a search."""
    import numpy as np

    from cdpo_ray.generation.images import decode_png, pairwise_rms_distance
    from cdpo_ray.generation.pool import generate_samples
    from cdpo_ray.rewards.scorer import Scorer

    config, prompts = context.config, getattr(context.prompts, side)
    generate_samples(
        prompts,
        output_dir,
        family=config.model.family,
        model=_model(config),
        sampling=sampling_to_compare(config, side),
        tuned_dir=None,
        keep_images=True,
        generators=_pool(config.resources.generators),
        make_scores=functools.partial(Scorer, config.evaluation_judges),
        score_in_pool=None,
        max_bad_fraction=config.generation.max_bad_fraction,
        progress=context.progress,
    )
    images = read_shards(output_dir, ["images"])["images"]
    apart = [pairwise_rms_distance(np.stack([decode_png(png.as_py()) for png in pngs])) for pngs in images]
    output.details["diversity"] = float(np.mean(apart))
    output.counts |= {"prompts": len(images), "prompts_set_aside": len(prompts) - len(images)}
    _warn_of_set_aside(output)


def sampling_to_compare(config: Config, side: str) -> Any:
    """How a search samples the prompts of a side: base and every policy from the same noise."""
    assert config.search is not None, "asked of a config with a search"
    num_images = config.search.images_per_prompt if side == VALIDATION else config.evaluation.images_per_prompt
    return _sampling(config, num_images, config.run.seed)


def export(context: Context, format_name: str, output_dir: Path) -> None:
    from cdpo_ray.export.card import RunFacts, model_card
    from cdpo_ray.export.folder import write_export
    from cdpo_ray.export.formats import Trained

    config, run = context.config, context.run
    name = config.run.name
    trained = Trained(name, local_copy(run.step(TRAINING)), config.model.family, _model(config))
    facts = RunFacts(
        name=name,
        settings=config.plain(),
        round=context.round,
        num_prompts=len(context.prompts.train),
        num_heldout=len(context.prompts.heldout),
        ranking=config.rewards.ranking_sentence,
        curriculum=config.curriculum.sentence,
        training=run.manifest(TRAINING),
        metrics=read_json(run.step(EVALUATION) / "metrics.json") if run.has(EVALUATION) else None,
    )
    write_export(format_name, trained, model_card(facts, format_name, trained.denoiser_name), output_dir)


def _settings_to_compare(config: Config, *, side: str) -> dict[str, Any]:
    source = getattr(config.prompts, side)
    return (
        _section(config, "model")
        | {"generation": config.generation.outcome}
        | _seed(config)
        | {f"prompts.{side}": source.model_dump(), f"prompts.{side}.sha256": _prompts_sha256(source)}
        | {"prompts.train": config.prompts.train and config.prompts.train.model_dump()}
        | {"images_per_prompt": sampling_to_compare(config, side).images_per_prompt}
        | {f"rewards.{name}": options for name, options in config.evaluation_judges.items()}
    )


IMPORT = Step(
    "import",
    SAMPLES,
    lambda config: (
        _section(config, "model", "preferences")
        | {
            "preferences.files": fingerprint(preference_source(config)),
            "generation": config.generation.model_dump(include={"height", "width", "keep_images"}),
        }
    ),
    (),
    import_preferences,
)
STEPS = (
    Step(
        "generate",
        SAMPLES,
        lambda config: _sample_settings(config),
        (),
        generate,
        resumable=True,
        continues=True,
    ),
    Step(
        "score",
        SCORES,
        lambda config: _score_settings(config),
        (SAMPLES,),
        score,
        grows=True,
    ),
    Step(
        "pairs",
        STAGES,
        lambda config: (
            _section(config, "curriculum")
            | _seed(config)
            | {
                "rewards.rank_by": config.rewards.ranking_reward,
                "rewards.weights": config.rewards.ranking_weights,
                "rewards.noise_prompts": config.rewards.noise_prompts,
                "rewards.max_bad_fraction": config.rewards.max_bad_fraction,
                "training.global_batch_size": config.training.global_batch_size,
                "training.seed": config.training.seed,
            }
        ),
        (SCORES,),
        pairs,
    ),
    Step(
        "train",
        TRAINING,
        lambda config: _section(config, "model") | {"training": config.training.outcome} | _seed(config),
        (SAMPLES, SCORES, STAGES),
        train,
        resumable=True,
        continues=True,
    ),
    Step(
        "evaluate",
        EVALUATION,
        lambda config: (
            _section(config, "model")
            | {"prompts": config.prompts.model_dump(mode="json", exclude={"validation"})}
            | {"generation": config.generation.outcome}
            | {"evaluation": config.plain()["evaluation"] | {"judges": list(config.evaluation_judges)}}
            | _seed(config)
            | {f"rewards.{name}": options for name, options in config.evaluation_judges.items()}
            | {"prompts.heldout.sha256": _prompts_sha256(config.prompts.heldout)}
        ),
        (TRAINING,),
        evaluate,
        resumable=True,
    ),
)


SIDES_COMPARED = tuple(
    Step(
        f"sample {side}",
        side,
        functools.partial(_settings_to_compare, side=side),
        (),
        functools.partial(sample_to_compare, side=side),
        resumable=True,
    )
    for side in (VALIDATION, HELDOUT)
)


def steps_of(config: Config) -> tuple[Step, ...]:
    """The steps of a configuration's way: images are generated, or imported with preferences."""
    return (IMPORT, *STEPS[1:]) if config.preferences else STEPS


def demands_of(step: Step, config: Config) -> list[Demand]:
    """The actors of a step, which run at the same time; a pool begins with one and takes more as they find room."""
    resources, trainers = config.resources, config.resources.trainers
    generators = Demand("resources.generators", "actor", *_actors(resources.generators))
    scorers = Demand("resources.scorers", "actor", *_actors(resources.scorers))
    if step.folder == TRAINING:
        num = config.training.num_workers
        return [Demand("training.num_workers", "worker", num, num, trainers.cpus_per_worker, trainers.gpus_per_worker)]
    if step.folder in (SAMPLES, EVALUATION, VALIDATION, HELDOUT):
        apart = step.folder == SAMPLES and config.rewards.placement == "pool" and config.rewards.judges
        return [generators, scorers] if apart else [generators]
    return [scorers] if step.folder == SCORES else []


def _actors(pool: Pool) -> tuple[int, int, float, float]:
    return pool.num_actors, 1, pool.cpus_per_actor, pool.gpus_per_actor


def preference_source(config: Config) -> Source:
    """Where the preferences of a configuration lie."""
    assert config.preferences is not None, "asked of a config with preferences"
    return Source(**config.preferences.model_dump(include={"path", "format", "columns", "difficulty"}))


def preference_frame(config: Config) -> Any:
    """What imported images are made to fit.

    Raises:
        ConfigError: the size is not given and cannot be known.
    """
    from cdpo_ray.models.sizes import sizes_of
    from cdpo_ray.preferences.images import Frame

    generation, preferences = config.generation, config.preferences
    assert preferences is not None, "asked of a config with preferences"
    sizes = sizes_of(config.model.family, config.model.path, generation.height, generation.width)
    if sizes is None:
        raise ConfigError("`generation.height` and `generation.width` must be given to import images for a hub model")
    return Frame(sizes.height, sizes.width, preferences.max_image_bytes, preferences.max_image_pixels)


def _sample_settings(config: Config) -> dict[str, Any]:
    return (
        _section(config, "model")
        | {"generation": config.generation.outcome}
        | _seed(config)
        | {
            "prompts.train": config.prompts.train.model_dump() if config.prompts.train else None,
            "prompts.train.sha256": _prompts_sha256(config.prompts.train),
            "prompts.heldout.fraction": config.prompts.heldout.fraction,
            "prompts.validation.fraction": config.prompts.validation.fraction if config.prompts.validation else None,
            "rewards.perturbation.max_masked_fraction": config.rewards.max_masked_fraction,
        }
    )


def _score_settings(config: Config) -> dict[str, Any]:
    """What each file of the step was made with: a reward's scores, and its second scores."""
    rewards = config.rewards
    settings = {
        part: rewards.noise_prompts if second else rewards.options(reward)
        for part, (reward, second) in _score_parts(config).items()
    }
    if config.preferences:
        settings[LABEL] = {"prompts.heldout.fraction": config.prompts.heldout.fraction}
    return settings


def _score_parts(config: Config) -> dict[str, tuple[str, bool]]:
    """By its setting, the reward and whether it is its second scores."""
    rewards = config.rewards
    parts = {f"rewards.{name}": (name, False) for name in rewards.names}
    if config.preferences:
        parts[LABEL] = (LABEL, False)
    return parts | {f"rewards.noise_prompts.{name}": (name, True) for name in rewards.names if rewards.noise_prompts}


def _ranking_files(config: Config) -> list[str]:
    scorings = (False, True) if config.rewards.noise_prompts else (False,)
    files = [score_file(name, second=second) for second in scorings for name in config.rewards.ranking_weights]
    return [*files, score_file(LABEL)] if config.preferences else files


def _ranking_rule(config: Config) -> Any:
    from cdpo_ray.curriculum.combination import RankingRule

    rewards = config.rewards
    return RankingRule(
        rewards.ranking_reward,
        rewards.ranking_weights,
        with_noise=rewards.noise_prompts > 0,
        with_labels=config.preferences is not None,
    )


def _section(config: Config, *names: str) -> dict[str, Any]:
    plain = config.plain()
    return {name: plain[name] for name in names}


def prompt_source(section: PromptSource) -> sources.Source:
    return sources.Source(**section.model_dump())


def _prompts_sha256(section: PromptSource | None) -> str | None:
    return sources.content_sha256(prompt_source(section)) if section else None


def _seed(config: Config) -> dict[str, Any]:
    return {"run.seed": config.run.seed}


def _schedule(config: Config) -> Any:
    from cdpo_ray.curriculum.schedule import Schedule

    return Schedule(**config.curriculum.model_dump(exclude={"preset", "updates_per_stage", "num_margin_draws"}))


def _pairs_per_stage(config: Config) -> int:
    return config.curriculum.updates_per_stage * config.training.global_batch_size


def _model(config: Config) -> dict[str, Any]:
    return config.model.model_dump(exclude={"family"}, exclude_none=True)


def _pool(pool: Pool) -> Any:
    from cdpo_ray.streams import PoolSize

    return PoolSize(**pool.model_dump())


def _sampling(config: Config, images_per_prompt: int, seed: int) -> Any:
    from cdpo_ray.generation.generator import Sampling

    generation = config.generation
    return Sampling(
        seed=seed,
        images_per_prompt=images_per_prompt,
        num_denoising_steps=generation.num_denoising_steps,
        guidance_scale=generation.guidance_scale,
        height=generation.height,
        width=generation.width,
        images_per_batch=generation.images_per_batch,
    )
