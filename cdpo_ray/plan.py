"""Config -> what a run will make and need, before it starts; imports neither torch nor ray."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cdpo_ray.config import Config, SearchSection
from cdpo_ray.cost.judges import num_model_questions
from cdpo_ray.curriculum.capacity import stage_capacities
from cdpo_ray.curriculum.stages import ORDERED, admitted_gaps, admitted_levels, count_pairs
from cdpo_ray.evaluation.statistics import MIN_PROMPTS, MIN_RUNS
from cdpo_ray.models.sizes import Sizes, sizes_of
from cdpo_ray.preferences.files import Scan
from cdpo_ray.prompts.questions import read_questions
from cdpo_ray.prompts.sources import PromptSplit
from cdpo_ray.prompts.syntax import literal_syntax, quoted_texts
from cdpo_ray.store import storage_path

MANY_REPEATS = 20
"""Number of times that a pair may be drawn in one stage without a warning."""
PNG_BYTES_PER_PIXEL = 1.6  # photographs; drawings take less


@dataclass(frozen=True)
class Plan:
    """Lines to print, made by `make_plan`."""

    lines: list[str]

    def __str__(self) -> str:
        return "\n".join(self.lines)


def make_plan(config: Config, prompts: PromptSplit, cost: Sequence[str] = (), scanned: Scan | None = None) -> Plan:
    """Describe what `cdpo run` would do with a configuration.

    Args:
        cost: further lines, the last of them of the cost estimate, see `cost_lines`.
        scanned: preferences of the configuration.
    """
    per_prompt, curriculum, training = config.generation.images_per_prompt, config.curriculum, config.training
    num_images = len(prompts.train) * per_prompt
    samples = (
        f"  generation   {num_images:,} images ({per_prompt} per prompt),"
        f" {config.generation.num_denoising_steps} denoising steps, guidance {config.generation.guidance_scale:g}"
    )
    preferences = config.preferences
    if preferences:
        samples = f"  preferences  {preferences.path} ({preferences.format}), difficulty by {preferences.difficulty}"
        samples = "\n               ".join([samples, *(scanned.lines() if scanned else ())])
    num_updates = curriculum.num_stages * curriculum.updates_per_stage
    heldout_images = 2 * len(prompts.heldout) * config.evaluation.images_per_prompt
    noise_prompts = min(config.rewards.noise_prompts, len(prompts.train))
    noise = f"; {noise_prompts} prompts scored twice to measure the rewards' noise" if noise_prompts else ""
    validated = f", {len(prompts.validation):,} for validation" if prompts.validation else ""
    lines = [
        f"run {config.run.name} in {storage_path(config.run.dir) / config.run.name}",
        f"  prompts      {len(prompts.train):,} for training, {len(prompts.heldout):,} held out{validated}"
        f" (of {prompts.num_read:,}; dropped: {prompts.num_doubled:,} duplicate, {prompts.num_empty:,} empty,"
        f" {prompts.num_beyond_count:,} beyond `count`)",
        *_categories(prompts),
        *(f"               {line}" for line in literal_syntax([*prompts.train, *prompts.heldout, *prompts.validation])),
        samples,
        f"  rewards      {', '.join(config.rewards.names)} ({config.rewards.placement}); ranked by"
        f" {config.rewards.ranking_sentence}{noise}",
        *_unquoted(config, prompts),
        *_model_questions(config, prompts),
        f"  curriculum   {curriculum.num_stages} stages of {curriculum.updates_per_stage} updates;"
        f" {curriculum.sentence}",
    ]
    drawn = curriculum.updates_per_stage * training.global_batch_size
    # The stages of any other schedule depend on the scores: `cdpo pairs --explain` prints them later.
    by_rank_gap = (curriculum.measure, curriculum.boundaries) == ("rank_gap", "linear") and curriculum.order in ORDERED
    if by_rank_gap and not preferences:
        for stage in range(1, curriculum.num_stages + 1):
            levels = admitted_levels(
                stage,
                curriculum.num_stages,
                order=curriculum.order,
                pacing=curriculum.pacing,
                window=curriculum.window,
            )
            smallest, largest = admitted_gaps(
                per_prompt, curriculum.num_stages, *levels, min_gap=curriculum.min_rank_gap
            )
            candidates = count_pairs(per_prompt, smallest, largest) * len(prompts.train)
            lines.append(
                f"    stage {stage}    rank gaps {smallest} to {largest}: up to {candidates:,} pairs, {drawn:,} drawn"
            )
            if drawn > MANY_REPEATS * candidates:
                lines.append(
                    f"    warning: each pair is drawn {drawn / candidates:.0f} times; lower"
                    " `curriculum.updates_per_stage`, or give more prompts or images per prompt"
                )
    else:
        lines.append(f"    each stage {drawn:,} pairs drawn")
    if training.method == "lora" and training.lora.grows:
        lines += [f"    stage {stage}    {line}" for stage, line in enumerate(_growth(config), start=1)]
    num_workers, pairs_per_launch = training.num_workers, training.pairs_per_launch
    launches = training.global_batch_size // (num_workers * pairs_per_launch)
    lines += [
        f"  training     {num_updates:,} updates of {training.global_batch_size} pairs:"
        f" {num_workers} workers x {launches} launches x {pairs_per_launch} pairs; ZeRO {training.zero_stage}",
        f"               {_method(config)}",
        f"               {_draws(config)}",
        *([f"               warning: {config.guidance_mismatch}"] if config.guidance_mismatch else []),
        f"               beta {training.beta:g}, kappa = beta/2 = {training.beta / 2:g}"
        " (errors are means over latent values); equivalent settings elsewhere:",
        *(f"                 {line}" for line in same_beta_elsewhere(training.beta, _num_latent_values(config))),
        f"  evaluation   {heldout_images:,} images of {_counted(len(prompts.heldout), 'held-out prompt')}, judged by"
        f" {', '.join(config.evaluation_judges)}",
        *_few_heldout(len(prompts.heldout)),
        f"  disk         {_disk(config, num_images)}",
    ]
    if config.rounds > 1:
        lines.append(
            f"  rounds       {config.rounds}, each with all of the above; its trained model generates the images of the"
            " next"
        )
    if config.search:
        lines += _search(config, config.search, len(prompts.validation))
    return Plan([*lines, *cost])


def same_beta_elsewhere(beta: float, num_latent_values: int | None) -> list[str]:
    """The equivalent of a beta in other codebases, one line per convention.

    Args:
        num_latent_values: of one sample, for code that sums errors instead of averaging them; `None`: unknown.
    """
    kappa = beta / 2
    by_sum = f"{kappa / num_latent_values:g} (N = {num_latent_values:,})" if num_latent_values else "kappa / N"
    return [
        f"Diffusion-DPO, diffusers' SDXL script, flow-matching DPO (kappa = beta/2): beta {beta:g}",
        f"diffusers' SD script (kappa = beta): beta {kappa:g}",
        f"released Curriculum-DPO code (kappa fixed at 1000, beta unused): this is {kappa / 1000:g} times as strong",
        f"errors summed over N latent values: kappa {by_sum}",
    ]


def _search(config: Config, search: SearchSection, num_prompts: int) -> list[str]:
    """Describe what `cdpo tune` would do with the samples and scores of the run."""
    curriculum = config.curriculum
    num_stages = search.largest("curriculum.num_stages", curriculum.num_stages)
    num_updates, num_trials = search.max_updates(curriculum), search.max_trials(config.plain())
    objectives = f"{search.objectives[0]} by {config.search_judge}"
    if len(search.objectives) > 1:
        objectives += f", and {', '.join(search.objectives[1:])}; the Pareto front is kept"
    stops = search.stop_early.stages(num_stages) if search.stop_early else []
    stopping = "no early stopping"
    if search.stop_early and stops:
        one_in = f"{search.stop_early.reduction_factor:g}"
        stopping = f"early stopping after stage {', '.join(map(str, stops))}: about one trial in {one_in} continues"
    at_once = search.max_concurrent_trials or "as many as fit"
    early = min(search.early_prompts or num_prompts, num_prompts)
    before = f" (before the last stage: {early:,} prompts)" if early < num_prompts else ""
    confirmed = 2 * search.confirm_seeds
    up_to = "" if search.num_trials else "up to "
    return [
        f"  search       {up_to}{num_trials:,} trials by {search.algorithm} for {objectives};"
        " the first is the paper's schedule",
        *(f"                 {knob.sentence}" for knob in search.knobs),
        f"               {stopping}; concurrent trials: {at_once}",
        f"               at most {num_trials * num_updates:,} updates, {num_updates:,} per trial",
        f"  validation   {num_prompts * search.images_per_prompt:,} images of {num_prompts:,} prompts after each"
        f" stage{before}",
        f"  confirmation {confirmed} trainings: the best and the paper's schedule with {search.confirm_seeds} other"
        f" seeds, at most {confirmed * num_updates:,} updates; half of the held-out prompts choose, half judge"
        + ("" if search.confirm_seeds >= MIN_RUNS else f"; no verdict, which needs at least {MIN_RUNS} seeds")
        if confirmed
        else "  confirmation off, because `search.confirm_seeds` is 0",
    ]


def _model_questions(config: Config, prompts: PromptSplit) -> list[str]:
    """Questions that each vision-language judge asks, which an endpoint is paid for."""
    generated = config.generation.images_per_prompt
    asked_about = [
        ("training images", config.rewards.judges if not config.preferences else {}, prompts.train, generated),
        ("the noise", config.rewards.judges, prompts.train[: config.rewards.noise_prompts], generated),
        ("evaluation", config.evaluation_judges, [*prompts.heldout] * 2, config.evaluation.images_per_prompt),
    ]
    lines = []
    for name, options in (config.rewards.judges | config.evaluation_judges).items():
        counts = {
            what: num_model_questions(name, options, asked, num_images)
            for what, judges, asked, num_images in asked_about
            if name in judges
        }
        if total := sum(counts.values()):
            endpoint = options.get("endpoint")
            where = (
                f" to {endpoint['url']}, except for answers that are known" if endpoint else ", answered in the scorer"
            )
            lines.append(f"  questions    {name}: {total:,} ({_parts(counts)}){where}")
        if config.search and name in config.evaluation_judges:
            lines += _search_questions(config, config.search, name, prompts)
        if name == "vqa":
            validated = prompts.validation if config.search else []
            lines += _without_questions(options, [*prompts.train, *prompts.heldout, *validated])
    return lines


def _search_questions(config: Config, search: SearchSection, name: str, prompts: PromptSplit) -> list[str]:
    """Questions of `cdpo tune` to a judge, if no trial is stopped early."""
    num_stages = search.largest("curriculum.num_stages", config.curriculum.num_stages)
    per_stage = search.validated_prompts(num_stages, len(prompts.validation))
    in_trial = [prompt for num_prompts in per_stage for prompt in prompts.validation[:num_prompts]]

    def asked(about: Sequence[str], images_per_prompt: int) -> int:
        return num_model_questions(name, config.evaluation_judges[name], about, images_per_prompt)

    of_heldout = asked(prompts.heldout, config.evaluation.images_per_prompt)
    counts = {
        "the base model": asked(prompts.validation, search.images_per_prompt) + of_heldout,
        "the trials": search.max_trials(config.plain()) * asked(in_trial, search.images_per_prompt),
        "the confirmation": 2 * search.confirm_seeds * of_heldout,
    }
    if not (total := sum(counts.values())):
        return []
    return [f"               {name}: at most {total:,} by `cdpo tune`, in place of the evaluation's ({_parts(counts)})"]


def _parts(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{count:,} for {what}" for what, count in counts.items() if count)


def _without_questions(options: Mapping[str, Any], prompts: Sequence[str]) -> list[str]:
    known = read_questions(Path(options["questions"]))
    num_without = sum(prompt not in known for prompt in prompts)
    if not num_without:
        return []
    return [
        f"               warning: {num_without:,} of {len(prompts):,} prompts have no questions in"
        f" {options['questions']}; their images have no score"
    ]


def _method(config: Config) -> str:
    training = config.training
    start = f" from {training.start_from}" if training.start_from else ""
    method = f"LoRA of rank {training.lora.rank}{start}" if training.method == "lora" else "full fine-tuning"
    references = {"base": "base model", "start": "`training.start_from`", "last_round": "previous round"}
    reference = references[training.reference]
    return f"{method}; loss {training.loss.sentence}; reference: {reference}"


def _draws(config: Config) -> str:
    """Timesteps and guidance that training draws."""
    rule, guidance = config.timestep_rule, config.guidance_range
    timesteps = "all timesteps"
    if "num_denoising_steps" in rule:
        timesteps = f"timesteps of the sampler with {rule['num_denoising_steps']} denoising steps"
    elif "listed" in rule:
        timesteps = f"timesteps {', '.join(map(str, rule['listed']))}"
    elif rule:
        timesteps = f"timesteps {rule['low']} to {rule['high']}"
    if not guidance:
        return timesteps
    low, high = guidance
    return f"{timesteps}; guidance {low:g}" + (f" to {high:g}" if high > low else "")


def _counted(number: int, what: str) -> str:
    return f"{number:,} {what}{'s' * (number != 1)}"


def _categories(prompts: PromptSplit) -> list[str]:
    sizes = Counter(prompts.categories.values())
    if not sizes:
        return []
    line = f"               held-out prompts of {len(sizes):,} {'category' if len(sizes) == 1 else 'categories'}"
    if num_small := sum(size < MIN_PROMPTS for size in sizes.values()):
        line += f", {num_small:,} with fewer than {MIN_PROMPTS} prompts, which is too few for an interval"
    if prompts.num_recategorized:
        line += f"; {prompts.num_recategorized:,} duplicates had another category, which is dropped"
    return [line]


def _few_heldout(num_prompts: int) -> list[str]:
    if num_prompts >= MIN_PROMPTS:
        return []
    return [
        f"               warning: with fewer than {MIN_PROMPTS} held-out prompts, the report has no intervals and no"
        " verdict"
    ]


def _unquoted(config: Config, prompts: PromptSplit) -> list[str]:
    judged = {"training": prompts.train if "ocr" in config.rewards.judges else ()}
    judged["held-out"] = prompts.heldout if "ocr" in config.evaluation_judges else ()
    without = {side: sum(not quoted_texts(prompt) for prompt in asked) for side, asked in judged.items()}
    return [
        f"               warning: `ocr` gives no score to images of {number:,} of {len(judged[side]):,} {side} prompts,"
        " which have no text in quotes"
        for side, number in without.items()
        if number
    ]


def _num_latent_values(config: Config) -> int | None:
    sizes = _sizes(config)
    return sizes.num_latent_values if sizes else None


def _growth(config: Config) -> list[str]:
    """Trainable rank and blocks of the LoRA in each stage."""
    lora = config.training.lora
    capacities = stage_capacities(lora.rank, config.curriculum.num_stages, **lora.growth)
    wheres = ["all" if each.block_share == 1 else f"{each.block_share} of the" for each in capacities]
    later = " (round 1; later rounds train all of it)" if config.rounds > 1 else ""
    return [
        f"LoRA of rank {each.rank} in {where} blocks{later}" for each, where in zip(capacities, wheres, strict=True)
    ]


def _disk(config: Config, num_images: int) -> str:
    if config.preferences:
        return "mean and deviation of the latents, and a PNG, per image; size known once the images are read"
    sizes = _sizes(config)
    if sizes is None:
        return "unknown; put the model on this machine, or set `generation.height` and `generation.width`"
    latents = num_images * sizes.latent_bytes(config.model.dtype)
    images = num_images * sizes.height * sizes.width * PNG_BYTES_PER_PIXEL if config.generation.keep_images else 0
    return f"latents {_bytes(latents)}, images up to {_bytes(images)}"


def _sizes(config: Config) -> Sizes | None:
    generation = config.generation
    return sizes_of(config.model.family, config.model.layout.path, generation.height, generation.width)


def _bytes(number: float) -> str:
    for unit in ("B", "KB", "MB", "GB"):
        if number < 1000:
            return f"{number:.3g} {unit}"
        number /= 1000
    return f"{number:.3g} TB"
