"""All sections, and the rules between them."""

from typing import Annotated, Any, ClassVar

from pydantic import Field, ValidationError, model_validator

from cdpo_ray.config.curriculum import RELEASED_MIN_SCORE_GAP, RELEASED_MIN_SCORE_GAPS, CurriculumSection
from cdpo_ray.config.data import PreferencesSection, PromptsSection
from cdpo_ray.config.judge import JudgeSection
from cdpo_ray.config.model import (
    CONSISTENCY,
    CONSISTENCY_TIMESTEPS,
    FLOW_MATCHING,
    GUIDANCE_EMBEDDED,
    GenerationSection,
    ModelSection,
)
from cdpo_ray.config.rewards import COMBINATIONS, RewardName, RewardsSection
from cdpo_ray.config.search import SearchSection, paper_point, with_point
from cdpo_ray.config.section import Place, Section
from cdpo_ray.config.tracking import TrackingSection
from cdpo_ray.config.training import TimestepRange, TrainingSection
from cdpo_ray.records import PERTURBATION, PREFERENCE
from cdpo_ray.user_code import USER_FUNCTION


class RunSection(Section):
    """Folder and seed of a run."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][\w.-]*$", max_length=100)]
    """Name of the run: its folder within `dir`, and its name in trackers and in the model card."""

    dir: Place = "runs"
    """Folder of all runs: a local path (relative to the working directory), `s3://...` or `gs://...`. On a cluster, all
    nodes must be able to access it. In a Ray job it must not be relative, because Ray deletes the job's working
    directory."""

    samples_from: Place | None = None
    """Folder of a finished run whose images are reused instead of generating them, and whose scores are reused where
    the settings agree. Refused unless this run would generate the same images. `null`: generate images."""

    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    """Seed of generated images, of the prompts of `scenes`, of the evaluation, and, unless `training.seed` is given, of
    training."""


class EvaluationSection(Section):
    """Comparison of base and fine-tuned model on the held-out prompts, from the same noise."""

    HOW_NOT_WHAT: ClassVar[frozenset[str]] = frozenset({"grid_prompts"})

    images_per_prompt: Annotated[int, Field(ge=1)] = 4
    """Number of images per held-out prompt and model. Most configurations of published models use 8."""

    judges: Annotated[tuple[RewardName, ...], Field(min_length=1)]
    """Judges of the images, in addition to the run's own rewards that look at images. Name at least one that is not
    used in training: it shows whether the model improved, or only learned its reward."""

    num_margin_draws: Annotated[int, Field(ge=0)] = 4
    """Number of (timestep, noise) draws that the implicit reward of an image is averaged over, to measure how often it
    orders images in the same way as a judge. 0 disables this; with 4 draws, it took 43 % of the CPU time of the
    quickstart's evaluation."""

    num_bootstrap_resamples: Annotated[int, Field(ge=100)] = 10_000
    """Number of bootstrap resamples of prompts for the 95 % confidence intervals. With fewer than 10 prompts, there is
    no interval."""

    grid_prompts: Annotated[int, Field(ge=0)] = 12
    """Number of held-out prompts whose images the report shows. After a change, `cdpo run` only writes the report
    again."""


LABEL_PATTERN = r"[A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?"
NodeLabels = dict[
    Annotated[str, Field(pattern=rf"^([a-z0-9][-a-z0-9.]*/)?{LABEL_PATTERN}$")],
    Annotated[str, Field(pattern=rf"^{LABEL_PATTERN}$")],
]


class Pool(Section):
    """Actors of one role, and what each of them needs."""

    num_actors: Annotated[int, Field(ge=1)] = 1
    """Maximum number of actors. Fewer start if the nodes have no room for more, or if there are fewer calls."""

    cpus_per_actor: Annotated[float, Field(gt=0)] = 1
    """Number of CPUs per actor. Leave at least one CPU of the cluster free: Ray Data reads and writes rows in tasks of
    one CPU."""

    gpus_per_actor: Annotated[float, Field(ge=0)] = 0
    """Number of GPUs per actor: 0 (to run on the CPU), a fraction (to share a GPU), 1, or a larger whole number."""

    node_labels: NodeLabels = Field(default_factory=dict)
    """Labels that a node must have to run these actors, such as `{market: spot}`. Nodes get labels from `ray start
    --labels` or from the cluster file."""

    @model_validator(mode="after")
    def _gpus_are_a_fraction_or_whole(self) -> "Pool":
        if self.gpus_per_actor > 1 and self.gpus_per_actor % 1:
            raise ValueError(f"`gpus_per_actor` must be at most 1 or a whole number, got {self.gpus_per_actor:g}")
        return self


class TrainerResources(Section):
    """Resources of each training worker. The number of workers is `training.num_workers`."""

    cpus_per_worker: Annotated[float, Field(gt=0)] = 1
    """Number of CPUs per worker."""

    gpus_per_worker: Annotated[float, Field(ge=0)] = 0
    """Number of GPUs per worker: 0 (to train on the CPU) or 1. A fraction lets the trials of a search share a GPU, and
    needs `training.num_workers: 1`."""

    node_labels: NodeLabels = Field(default_factory=dict)
    """Labels that a node must have to run workers, such as `{market: on-demand}`. On-demand nodes are preferable,
    because the loss of one node restarts all workers from the last checkpoint."""


class ResourcesSection(Section):
    """CPUs and GPUs of each role. The defaults run on a machine without a GPU."""

    generators: Pool = Pool()
    """Actors that generate images, for training and evaluation, or encode imported images."""

    scorers: Pool = Pool()
    """Actors of `rewards.placement: pool`, and of rewards that are added to a finished run."""

    trainers: TrainerResources = TrainerResources()


class Config(Section):
    """The whole configuration of a run."""

    run: RunSection

    rounds: Annotated[int, Field(ge=1)] = 1
    """Number of rounds. From the second round on, the model of the previous round generates the images. The paper uses
    1."""

    prompts: PromptsSection

    preferences: PreferencesSection | None = None

    model: ModelSection

    generation: GenerationSection

    rewards: RewardsSection

    curriculum: CurriculumSection

    training: TrainingSection

    evaluation: EvaluationSection

    resources: ResourcesSection = ResourcesSection()

    tracking: TrackingSection = TrackingSection()

    search: SearchSection | None = None

    judge: JudgeSection | None = None

    @model_validator(mode="before")
    @classmethod
    def _released_code_drops_near_ties(cls, given: Any) -> Any:
        match given:
            case {"curriculum": {"preset": "released-code"} as curriculum, "rewards": {"rank_by": str(reward)}}:
                pass
            case {"curriculum": {"preset": "released-code"} as curriculum, "rewards": {"names": [reward, *_]}}:
                pass
            case _:
                return given
        if reward in COMBINATIONS:  # the released code has none
            return given
        min_score_gap = RELEASED_MIN_SCORE_GAPS.get(str(reward), RELEASED_MIN_SCORE_GAP)
        return given | {"curriculum": {"min_score_gap": min_score_gap} | curriculum}

    @model_validator(mode="after")
    def _samples_come_from_somewhere(self) -> "Config":
        generated, named = "images_per_prompt" in self.generation.model_fields_set, PREFERENCE in self.rewards.names
        if not self.preferences:
            faults = ["`prompts.train` is missing"] if not self.prompts.train else []
            faults += ["`generation.images_per_prompt` is missing"] if not generated else []
            faults += ["`rewards.names` 'preference' needs the section `preferences`"] if named else []
        else:
            given = {
                "prompts.train": bool(self.prompts.train),
                "prompts.validation": bool(self.prompts.validation),
                "rewards.names 'perturbation'": PERTURBATION in self.rewards.names,
                "rounds": self.rounds > 1,
                "run.samples_from": self.run.samples_from is not None,
                "search": self.search is not None,
            }
            faults = [f"`{key}` must not be given with `preferences`" for key, wrong in given.items() if wrong]
            if self.preferences.format == "ranked_folders":
                if self.rewards.ranking_reward != PREFERENCE:
                    faults.append(
                        "`rewards.rank_by` must be 'preference' for ranked folders, whose ranks are the labels"
                    )
            elif self.preferences.difficulty != "label" and self.rewards.ranking_reward != PREFERENCE:
                faults.append(
                    f"`preferences.difficulty` {self.preferences.difficulty!r} needs `rewards.rank_by` 'preference',"
                    f" got {self.rewards.ranking_reward!r}, which measures difficulty itself"
                )
            elif (
                self.preferences.has_pairs_only and self.curriculum.cuts_by_rank_gap and self.curriculum.num_stages > 1
            ):
                faults.append(
                    "`curriculum.measure` must not be 'rank_gap' for pairs, whose rank gap is always 1; choose"
                    " 'score_gap_quantile', 'score_gap' or 'margin', or `order` 'none'"
                )
        if faults:
            raise ValueError("; ".join(faults))
        return self

    @model_validator(mode="after")
    def _rewards_have_their_options(self) -> "Config":
        used = dict.fromkeys([*self.rewards.names, *self.evaluation.judges])
        faults = [fault for name in used if (fault := self.rewards.fault(name))]
        own = [name for name in used if USER_FUNCTION.match(name)]
        faults += [
            f"`rewards.arguments` must be of your own rewards among `rewards.names` and `evaluation.judges`, which are"
            f" {own}, got {name!r}"
            for name in self.rewards.arguments
            if name not in own
        ]
        faults += [
            f"`evaluation.judges` must not have {name!r} with `mode: pairwise`, whose scores compare the images of one"
            " model with each other, not those of two models; name another judge"
            for name in self.evaluation.judges
            if self.rewards.needs_whole_prompts(name)
        ]
        if faults:
            raise ValueError("; ".join(faults))
        return self

    @model_validator(mode="after")
    def _noise_is_measured(self) -> "Config":
        if self.curriculum.min_gap_in_noise and not self.rewards.noise_prompts:
            raise ValueError(
                "`curriculum.min_gap_in_noise` needs `rewards.noise_prompts`, the number of prompts to score twice"
            )
        return self

    @model_validator(mode="after")
    def _samples_are_taken_once(self) -> "Config":
        if self.run.samples_from and self.rounds > 1:
            raise ValueError(
                f"`run.samples_from` gives the images of one round, but `rounds` is {self.rounds}; leave out one"
            )
        return self

    @model_validator(mode="after")
    def _stages_fit_the_ranks(self) -> "Config":
        if self.preferences:
            return self  # known only once the files are read
        num_images, min_gap = self.generation.images_per_prompt, self.curriculum.min_rank_gap
        num_gaps = max(num_images - min_gap, 0)
        if not num_gaps:
            raise ValueError(
                f"`curriculum.min_rank_gap` is {min_gap}, but {num_images} images per prompt have rank gaps of at most"
                f" {num_images - 1}; lower it, or raise `generation.images_per_prompt`"
            )
        if self.curriculum.cuts_by_rank_gap and self.curriculum.num_stages > num_gaps:
            counted = f"{num_gaps} rank gaps" + (f" of at least {min_gap}" if min_gap > 1 else "")
            raise ValueError(
                f"`curriculum.num_stages` is {self.curriculum.num_stages}, but {num_images} images per prompt have"
                f" only {counted}; lower it, or raise `generation.images_per_prompt`"
            )
        return self

    @model_validator(mode="after")
    def _denoising_steps_fit_the_model(self) -> "Config":
        steps = self.generation.num_denoising_steps
        if self.model.family == CONSISTENCY and steps > CONSISTENCY_TIMESTEPS:
            raise ValueError(
                f"`generation.num_denoising_steps` is {steps}, but a latent consistency model has only"
                f" {CONSISTENCY_TIMESTEPS} timesteps; lower it: 1 to 8 are usual"
            )
        return self

    @model_validator(mode="after")
    def _image_is_whole_patches(self) -> "Config":
        for side in ("height", "width"):
            size = getattr(self.generation, side)
            multiple = FLOW_MATCHING.get(self.model.family, 1)
            if size is not None and size % multiple:
                raise ValueError(
                    f"`generation.{side}` must be a multiple of {multiple} for the family {self.model.family!r}, got"
                    f" {size}"
                )
        return self

    @model_validator(mode="after")
    def _target_fits_the_model(self) -> "Config":
        faults, model, training = [], self.model, self.training
        has_teacher = training.consistency_target == "teacher"
        if has_teacher and model.family != CONSISTENCY:
            faults.append(
                f"`training.consistency_target` 'teacher' needs the family {CONSISTENCY!r}, got {model.family!r}"
            )
        elif has_teacher and not model.teacher and model.path != "embedded":
            faults.append("`model.teacher` must name the model that the consistency model was distilled from")
        if model.teacher and not has_teacher:
            faults.append(
                "`model.teacher` is used with `training.consistency_target` 'teacher' only, got"
                f" {training.consistency_target!r}; leave it out, or set the target"
            )
        if training.timesteps == "sampler" and model.family in FLOW_MATCHING:
            faults.append(
                f"`training.timesteps` 'sampler' is not known for the family {model.family!r}, whose timesteps depend"
                " on the image's size; give a list or a range"
            )
        if model.family == CONSISTENCY and isinstance(training.timesteps, TimestepRange):
            low, high = training.timesteps.low, training.timesteps.high
            if not any(low <= timestep <= high for timestep in range(19, 1000, 1000 // CONSISTENCY_TIMESTEPS)):
                faults.append(f"`training.timesteps` {low} to {high} holds none of 19, 39, ..., 999; widen it")
        if faults:
            raise ValueError("; ".join(faults))
        return self

    @model_validator(mode="after")
    def _training_fits_the_model(self) -> "Config":
        if self.training.guidance_range and self.model.family not in GUIDANCE_EMBEDDED:
            raise ValueError(
                f"`training.guidance_range` needs a guidance-conditioned family ({', '.join(GUIDANCE_EMBEDDED)}), got"
                f" {self.model.family!r}; leave it out"
            )
        if self.model.quantization and self.training.method == "full":
            raise ValueError(
                f"`model.quantization` {self.model.quantization!r} freezes the weights, which `training.method` 'full'"
                " trains; leave it out, or train a LoRA"
            )
        if self.model.dtype == "float16" and self.training.method == "full":
            raise ValueError(
                "`model.dtype` 'float16' must not be given with `training.method` 'full', whose gradients it cannot"
                " hold; use 'bfloat16' or 'float32', or train a LoRA, which is always float32"
            )
        if self.model.quantization and self.training.zero_stage == 3:
            raise ValueError(
                "`training.zero_stage` 3 shards the base model, which quantised weights do not support; use 0 to 2"
                " with `model.quantization`"
            )
        if self.model.quantization and self.training.lora.use_dora:
            raise ValueError(
                "`training.lora.use_dora` must not be given with `model.quantization`, because it would learn the norms"
                " of the rounded weights; leave out one"
            )
        if self.training.reference == "last_round" and self.rounds == 1:
            raise ValueError("`training.reference` 'last_round' needs `rounds` > 1")
        if self.training.lora.grows and self.curriculum.num_stages == 1:
            raise ValueError(
                "`training.lora` grows from stage to stage, but `curriculum.num_stages` is 1; raise it, or leave out"
                " `initial_rank` and `unfreeze`"
            )
        return self

    @model_validator(mode="after")
    def _workers_do_not_share_a_gpu(self) -> "Config":
        gpus, workers = self.resources.trainers.gpus_per_worker, self.training.num_workers
        if gpus > 1:
            raise ValueError(
                f"`resources.trainers.gpus_per_worker` must be at most 1, because a worker trains on one GPU, got"
                f" {gpus:g}; raise `training.num_workers`"
            )
        if 0 < gpus < 1 and workers > 1:
            raise ValueError(
                f"`resources.trainers.gpus_per_worker` must be 1 for {workers} workers, got {gpus:g}: NCCL does not"
                " support two workers on one GPU; set `training.num_workers` to 1, or give each worker a GPU"
            )
        return self

    @model_validator(mode="after")
    def _candidates_fit_the_rest(self) -> "Config":
        judge = self.judge
        if judge is None:
            return self
        faults, judges = [], [*self.evaluation_judges]
        for name, candidate in judge.candidates.items():
            faults += [
                f"`judge.candidates.{name}.trained_on` must be of {judges}, the judges of the evaluation, got {other!r}"
                for other in candidate.trained_on
                if other not in judges
            ]
            try:
                self.model_of(name)
            except ValidationError as error:
                for fault in error.errors():
                    reason = fault["msg"].removeprefix("Value error, ")
                    faults.append(f"`judge.candidates.{name}.model`: {reason}")
        if faults:
            raise ValueError("\n".join(faults))
        return self

    @model_validator(mode="after")
    def _search_fits_the_rest(self) -> "Config":
        search = self.search
        if search is None:
            return self
        faults = []
        if not self.prompts.validation:
            faults.append(
                "`search` needs `prompts.validation`, prompts to judge trials by; give a `source` or a `fraction`"
            )
        if self.rounds > 1:
            faults.append(f"`search` trains one round per trial, but `rounds` is {self.rounds}; leave out one")
        judges = [*self.evaluation_judges]
        if search.judge is None and self.search_judge is None:
            faults.append(f"`search.judge` is missing: no ranking reward looks at images; give one of {judges}")
        elif self.search_judge not in judges:
            faults.append(f"`search.judge` must be one of {judges}, the judges of the evaluation, got {search.judge!r}")
        plain = self.plain()
        point = paper_point(search.knobs, plain)
        outside = [knob for knob in search.knobs if knob.key in point and not knob.holds(point[knob.key])]
        faults += [
            f"`search.space.{knob.key}` must include {point[knob.key]}, the value of the first trial, the paper's"
            " schedule; widen it"
            for knob in outside
        ]
        if search.updates_per_trial:
            most = search.largest("curriculum.num_stages", self.curriculum.num_stages)
            if search.updates_per_trial < most:
                faults.append(
                    f"`search.updates_per_trial` must be at least {most}, one update for each stage, got"
                    f" {search.updates_per_trial}"
                )
        if not faults:
            try:
                given = self.model_dump(mode="json", exclude_unset=True, exclude={"search"})
                Config.model_validate(with_point(given, search.knobs, point))
            except ValidationError as error:
                reasons = "; ".join(fault["msg"].removeprefix("Value error, ") for fault in error.errors())
                faults.append(f"`search` starts with the paper's schedule, which is invalid here: {reasons}")
        if faults:
            raise ValueError("\n".join(faults))
        return self

    def model_of(self, candidate: str) -> ModelSection:
        """The model that samples a candidate of `judge`: its own, or the base model.

        Raises:
            ValidationError: its own is not one of the family.
        """
        section = self.judge.candidates.get(candidate) if self.judge else None
        if section is None or section.model is None:
            return self.model
        own = section.model.model_dump(exclude_none=True)
        return ModelSection.model_validate(self.model.model_dump(exclude={"path", "revision", "config"}) | own)

    @property
    def search_judge(self) -> str | None:
        """Judge of a search; by default the first ranking reward that looks at images."""
        given = self.search.judge if self.search else None
        judges = self.rewards.judges_of_one_image
        return given or next((name for name in self.rewards.ranking_weights if name in judges), None)

    @property
    def evaluation_judges(self) -> dict[str, dict[str, Any]]:
        """Judges of held-out images, the run's own rewards first, each with the keyword arguments of its class.

        A reward that compares the images of a prompt is left out: the mean of its scores is 0 for every model.
        """
        own = self.rewards.judges_of_one_image
        return own | {name: self.rewards.options(name) for name in self.evaluation.judges}

    @property
    def sampled_guidance(self) -> float:
        """Guidance that images are sampled with, as the family's `training.guidance_range` gives it."""
        scale = self.generation.guidance_scale
        return scale - 1 if self.model.family == CONSISTENCY else scale

    @property
    def guidance_range(self) -> tuple[float, float] | None:
        """Bounds of the guidance drawn in training; `None`: the family is not guidance-conditioned."""
        if self.model.family not in GUIDANCE_EMBEDDED:
            return None
        return self.training.guidance_range or (self.sampled_guidance, self.sampled_guidance)

    @property
    def guidance_mismatch(self) -> str | None:
        """Warning if the model is not trained with the guidance that images are sampled with."""
        sampled, given = self.sampled_guidance, self.guidance_range
        if given is None or given[0] <= sampled <= given[1]:
            return None
        return (
            f"`training.guidance_range` {list(given)} does not include {sampled:g}, the guidance that images are"
            " sampled with; leave it out, or widen it"
        )

    @property
    def timestep_rule(self) -> dict[str, Any]:
        """Keyword arguments of `cdpo_ray.models.timesteps.TimestepRule`."""
        given = self.training.timesteps
        few_steps = self.model.family == CONSISTENCY and self.training.consistency_target == "image"
        if given == "sampler" or (given is None and few_steps):
            return {"num_denoising_steps": self.generation.num_denoising_steps}
        if isinstance(given, TimestepRange):
            return given.model_dump()
        return {"listed": given} if isinstance(given, tuple) else {}

    @property
    def keys_that_need_bitsandbytes(self) -> list[str]:
        """Keys and values that need the optional package bitsandbytes, for a message."""
        given = {"model.quantization": self.model.quantization, "training.optimizer": self.training.optimizer}
        return [f"`{key}` {value}" for key, value in given.items() if value in ("nf4", "adamw_8bit")]

    def plain(self) -> dict[str, Any]:
        """The whole configuration, defaults included, as plain values."""
        return self.model_dump(mode="json")
