"""YAML -> Config: every knob once, one section a step of the way.

Importable without torch and ray, so that a configuration can be checked anywhere.
"""

import difflib
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

from cdpo_ray.errors import ConfigError
from cdpo_ray.records import PERTURBATION, PREFERENCE

REWARD_NAMES = (
    "clip",
    "hpsv2",
    "imagereward",
    "pickscore",
    "aesthetic",
    "vlm_alignment",
    "jpeg_size",
    "oracle",
    "oracle_strict",
)
"""Built-in rewards; `cdpo_ray.rewards.REWARDS` maps each to its class (a test keeps the two alike)."""

JUDGE_NO_IMAGE = (PERTURBATION, PREFERENCE)
"""What scores images without looking at them: by how each was made, or by what people said of it."""

COMBINATIONS = ("weighted_sum", "mean_rank", "pareto")
"""Ways to rank by several rewards; `cdpo_ray.curriculum.combination` maps each to its function."""

OWN_REWARD = re.compile(r"^[A-Za-z_][\w.]*:[A-Za-z_]\w*$")
HUB_ID = re.compile(r"^[\w.-]+/[\w.-]+$")
COMMIT = re.compile(r"^[0-9a-f]{40}$")
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


def _known_reward(name: str, *others: str) -> str:
    known = (*REWARD_NAMES, *others)
    if name not in known and not OWN_REWARD.match(name):
        near = difflib.get_close_matches(name, known, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"must be one of {', '.join(map(repr, known))} or 'module:function'{hint}")
    return name


def _known_score(name: str) -> str:
    return name if name in JUDGE_NO_IMAGE else _known_reward(name)


def _known_ranking(name: str) -> str:
    return _known_reward(name, *JUDGE_NO_IMAGE, *COMBINATIONS)


RewardName = Annotated[str, AfterValidator(_known_reward)]
ScoreName = Annotated[str, AfterValidator(_known_score)]
"""What can score training images: a judge of images, or one of `JUDGE_NO_IMAGE`."""
RankingName = Annotated[str, AfterValidator(_known_ranking)]


def ranking_weights(rewards: Mapping[str, Any]) -> dict[str, float]:
    """The rewards that rank training images, each with its weight (1, but for ``weighted_sum``).

    Args:
        rewards: `RewardsSection` as plain values.
    """
    names, rank_by, weights = rewards["names"], rewards["rank_by"], rewards.get("weights", {})
    if rank_by not in COMBINATIONS:
        return {rank_by or names[0]: 1.0}
    return {name: weights.get(name, 1.0) for name in names if weights.get(name, 1.0)}


class Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class RunSection(Section):
    """Where a run lives, what seeds it, and the run whose images it takes in place of making its own."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][\w.-]*$", max_length=100)]
    dir: str = "runs"
    samples_from: Annotated[str, Field(min_length=1)] | None = None
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0


class PromptSource(Section):
    """A built-in set, a file by its ending, or a ``file`` of a hub data set at its ``revision``.

    Built-in are `scenes`, `animals` and `animal_photos`. Files are text with one prompt a line, or CSV, JSONL and
    Parquet with a ``column`` of prompts.
    """

    source: str | None = None
    file: str | None = None
    revision: str | None = None
    column: str = "prompt"
    count: Annotated[int, Field(ge=1)] | None = None
    fraction: Annotated[float, Field(gt=0, lt=1)] | None = None

    @model_validator(mode="after")
    def _hub_file_is_pinned(self) -> "PromptSource":
        if self.file is None and self.revision is None:
            return self
        if self.source is None or not HUB_ID.match(self.source):
            raise ValueError(f"`file` and `revision` are of a hub data set, but `source` is no hub id: {self.source!r}")
        if self.file is None or ".." in Path(self.file).parts:
            raise ValueError(f"`file` must name a file within the hub data set, got {self.file!r}")
        if self.revision is None or not COMMIT.match(self.revision):
            raise ValueError(f"`revision` must be a commit of 40 hex digits for a hub id, got {self.revision!r}")
        return self


class PromptsSection(Section):
    train: PromptSource | None = None
    heldout: PromptSource

    @model_validator(mode="after")
    def _heldout_is_named(self) -> "PromptsSection":
        if self.train and self.train.source is None:
            raise ValueError("`train.source` must name a prompt set, a file or a hub data set")
        if self.train and self.train.fraction is not None:
            raise ValueError("`fraction` belongs to `heldout`: the share of the training source that is held out")
        if (self.heldout.source is None) == (self.heldout.fraction is None):
            raise ValueError("`heldout` must have either `source` or `fraction` (of the training source)")
        return self


class PreferencesSection(Section):
    """Preferences that people have, trained on in place of generated images; see `preferences/files.py` for formats."""

    path: Annotated[str, Field(min_length=1)]
    format: Literal["pickapic", "pairs", "ranked_folders"]
    columns: dict[str, str] = {}
    difficulty: Literal["label", "score", "rank"] = "label"
    max_image_bytes: Annotated[int, Field(ge=1)] = 50_000_000
    max_image_pixels: Annotated[int, Field(ge=1)] = 50_000_000
    max_bad_fraction: Annotated[float, Field(ge=0, le=1)] = 0.01

    @model_validator(mode="after")
    def _columns_are_known(self) -> "PreferencesSection":
        if self.format == "ranked_folders" and (self.columns or self.difficulty != "label"):
            raise ValueError("`columns` and `difficulty` belong to tables; folders are ranked by their images' names")
        return self


Family = Literal["stable_diffusion", "stable_diffusion_xl", "latent_consistency", "stable_diffusion_3", "flux"]
"""`cdpo_ray.models.FAMILIES` maps each to its class (a test keeps the two alike)."""

GUIDANCE_EMBEDDED = ("latent_consistency", "flux")
"""Families whose net is told of the guidance."""

CONSISTENCY_TIMESTEPS = 50
"""That a latent consistency model is distilled and sampled at."""


PATCHED = ("stable_diffusion_3", "flux")
"""Families whose net takes patches of 2 x 2 latent values, 16 x 16 pixels."""


def _check_weights(path: str, revision: str | None) -> None:
    if path == "embedded" or Path(path).is_dir():
        return
    if not HUB_ID.match(path) or path.startswith(("./", "../")):
        raise ValueError(f"`path` must be 'embedded', an existing folder or a hub id, got {path!r}: no such folder")
    if revision is None or not COMMIT.match(revision):
        raise ValueError(
            f"`path` {path!r} is no folder here, so it is read as a hub id, which needs `revision`"
            f" (a full commit of 40 hex digits), got {revision!r}"
        )


class TeacherSection(Section):
    """The diffusion model that a consistency model was distilled from: a folder, or a hub id with its revision."""

    path: Annotated[str, Field(min_length=1)]
    revision: str | None = None

    @model_validator(mode="after")
    def _can_be_found(self) -> "TeacherSection":
        _check_weights(self.path, self.revision)
        return self


class ModelSection(Section):
    """The base model: `embedded`, a folder in diffusers layout, or a hub id with its revision."""

    family: Family = "stable_diffusion"
    path: Annotated[str, Field(min_length=1)]
    revision: str | None = None
    teacher: TeacherSection | None = None
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    compile: bool = False

    @model_validator(mode="after")
    def _can_be_found(self) -> "ModelSection":
        _check_weights(self.path, self.revision)
        return self

    @model_validator(mode="after")
    def _teacher_goes_with_consistency(self) -> "ModelSection":
        if self.teacher and self.family != "latent_consistency":
            raise ValueError(f"`teacher` belongs to the family 'latent_consistency', got it with {self.family!r}")
        if self.family == "latent_consistency" and not self.teacher and self.path != "embedded":
            raise ValueError("`teacher` must name the model that the consistency model was distilled from")
        return self


class GenerationSection(Section):
    images_per_prompt: Annotated[int, Field(ge=2)] = 2
    num_denoising_steps: Annotated[int, Field(ge=1, le=1000)]
    guidance_scale: Annotated[float, Field(ge=1)]
    height: Annotated[int, Field(ge=8, multiple_of=8)] | None = None
    width: Annotated[int, Field(ge=8, multiple_of=8)] | None = None
    images_per_batch: Annotated[int, Field(ge=1)] = 8
    keep_images: bool = True


def _check_pinned(place: str, revision: str | None, *, key: str, revision_key: str, kind: str) -> None:
    """A file or folder (`kind`) that is here, or a hub id at a commit; the keys are named in errors."""
    if Path(place).is_file() if kind == "file" else Path(place).is_dir():
        return
    if not HUB_ID.match(place):
        raise ValueError(f"`{key}` must be an existing {kind} or a hub id, got {place!r}")
    if revision is None or not COMMIT.match(revision):
        raise ValueError(f"`{revision_key}` must be a commit of 40 hex digits for a hub id, got {revision!r}")


class ClipOptions(Section):
    """An open_clip model: `embedded`, or an architecture with a checkpoint (a file, or a hub id with its revision)."""

    architecture: str = "embedded"
    checkpoint: str | None = None
    revision: str | None = None
    scale: Literal["cosine", "logit"] = "cosine"

    @model_validator(mode="after")
    def _checkpoint_goes_with_architecture(self) -> "ClipOptions":
        if self.architecture == "embedded":
            return self
        if self.checkpoint is None:
            raise ValueError("`checkpoint` must be a file or a hub id when `architecture` is not 'embedded'")
        _check_pinned(self.checkpoint, self.revision, key="checkpoint", revision_key="revision", kind="file")
        return self


class HpsV2Options(Section):
    """HPS v2.1: the released file or its hub id."""

    architecture: str = "ViT-H-14"
    checkpoint: str = "xswu/HPSv2"
    revision: str | None = "697403c78157020a1ae59d23f111aa58ced35b0a"
    sha256: Sha256 = "c57a38fb4a2f7e7c15bf00da2ea377cdf165448b4dd1052a484c215a998c9837"

    @model_validator(mode="after")
    def _is_pinned(self) -> "HpsV2Options":
        _check_pinned(self.checkpoint, self.revision, key="checkpoint", revision_key="revision", kind="file")
        return self


class PickScoreOptions(Section):
    """PickScore: its model, and whose tokenizer and image settings it goes with; folders or hub ids."""

    checkpoint: str = "yuvalkirstain/PickScore_v1"
    revision: str | None = "a4e4367c6dfa7288a00c550414478f865b875800"
    processor: str = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"
    processor_revision: str | None = "1c2b8495b28150b8a4922ee1c8edee224c284c0c"

    @model_validator(mode="after")
    def _is_pinned(self) -> "PickScoreOptions":
        _check_pinned(self.checkpoint, self.revision, key="checkpoint", revision_key="revision", kind="folder")
        _check_pinned(
            self.processor, self.processor_revision, key="processor", revision_key="processor_revision", kind="folder"
        )
        return self


class AestheticOptions(Section):
    """LAION's aesthetic predictor: the head, a file that no hub has under a name of its authors, on CLIP."""

    head: str | None = None
    head_sha256: Sha256 = "21dd590f3ccdc646f0d53120778b296013b096a035a2718c9cb0d511bff0f1e0"
    checkpoint: str = "openai/clip-vit-large-patch14"
    revision: str | None = "32bd64288804d66eefd0ccbe215aa642df71cc41"

    @model_validator(mode="after")
    def _is_pinned(self) -> "AestheticOptions":
        if self.head is not None and not Path(self.head).is_file():
            raise ValueError(f"`head` must be an existing file, got {self.head!r}")
        _check_pinned(self.checkpoint, self.revision, key="checkpoint", revision_key="revision", kind="folder")
        return self


class ImageRewardOptions(Section):
    """The released checkpoint and BERT's vocabulary, each a file or its hub id."""

    checkpoint: str = "zai-org/ImageReward"
    revision: str | None = "5736be03b2652728fb87788c9797b0570450ab72"
    sha256: Sha256 | None = None
    vocabulary: str = "google-bert/bert-base-uncased"
    vocabulary_revision: str | None = "86b5e0934494bd15c9632b12f734a8a67f723594"

    @model_validator(mode="after")
    def _is_pinned(self) -> "ImageRewardOptions":
        _check_pinned(self.checkpoint, self.revision, key="checkpoint", revision_key="revision", kind="file")
        _check_pinned(
            self.vocabulary, self.vocabulary_revision, key="vocabulary", revision_key="vocabulary_revision", kind="file"
        )
        return self


class EndpointSection(Section):
    """An OpenAI-compatible server; `token_variable` names the environment variable that holds its token."""

    url: Annotated[str, Field(pattern=r"^https?://[^@\s?#]+$")]
    model: Annotated[str, Field(min_length=1)]
    token_variable: Annotated[str, Field(pattern=r"^[A-Za-z_]\w*$")] | None = None
    timeout_seconds: Annotated[float, Field(gt=0)] = 60
    max_retries: Annotated[int, Field(ge=0, le=20)] = 4
    num_concurrent_requests: Annotated[int, Field(ge=1, le=64)] = 4


class VlmAlignmentOptions(Section):
    """Who captions (`captioner`: a folder or hub id run here; or `endpoint`), and who compares caption and prompt."""

    captioner: str | None = None
    captioner_revision: str | None = None
    endpoint: EndpointSection | None = None
    instruction: Annotated[str, Field(min_length=1)] = "Describe this image in one sentence."
    max_caption_tokens: Annotated[int, Field(ge=1, le=1000)] = 64
    sentence_encoder: str = "sentence-transformers/all-MiniLM-L6-v2"
    sentence_encoder_revision: str | None = "c9745ed1d9f207416be6d2e6f8de32d1f16199bf"

    @model_validator(mode="after")
    def _is_pinned(self) -> "VlmAlignmentOptions":
        if self.captioner and self.endpoint:
            raise ValueError("`captioner` and `endpoint` are two ways to the same: one of them must be left out")
        models = {"sentence_encoder": (self.sentence_encoder, self.sentence_encoder_revision)}
        if self.captioner:
            models["captioner"] = (self.captioner, self.captioner_revision)
        for key, (place, revision) in models.items():
            _check_pinned(place, revision, key=key, revision_key=f"{key}_revision", kind="folder")
        return self


class JpegSizeOptions(Section):
    quality: Annotated[int, Field(ge=1, le=100)] = 90


class PerturbationOptions(Section):
    """Images of ever more masked prompts, of which the less masked is the better: a ranking without a judge."""

    max_masked_fraction: Annotated[float, Field(gt=0, le=1)] = 0.9


class RewardsSection(Section):
    """The judges that score training images; `rank_by` decides the ranking: the first, another, or a combination."""

    names: Annotated[tuple[ScoreName, ...], Field(min_length=1)]
    rank_by: RankingName | None = None
    weights: dict[str, float] = {}
    noise_prompts: Annotated[int, Field(ge=0)] = 0
    placement: Literal["fused", "pool"] = "fused"
    max_bad_fraction: Annotated[float, Field(ge=0, le=1)] = 0.01
    clip: ClipOptions = ClipOptions()
    hpsv2: HpsV2Options = HpsV2Options()
    imagereward: ImageRewardOptions = ImageRewardOptions()
    pickscore: PickScoreOptions = PickScoreOptions()
    aesthetic: AestheticOptions = AestheticOptions()
    vlm_alignment: VlmAlignmentOptions = VlmAlignmentOptions()
    jpeg_size: JpegSizeOptions = JpegSizeOptions()
    perturbation: PerturbationOptions = PerturbationOptions()

    @model_validator(mode="after")
    def _rank_by_is_scored(self) -> "RewardsSection":
        if len(set(self.names)) != len(self.names):
            raise ValueError(f"`names` must not repeat a reward, got {list(self.names)}")
        if self.rank_by not in (None, *COMBINATIONS, *self.names):
            raise ValueError(
                f"`rank_by` must be one of `names` {list(self.names)}, or {', '.join(map(repr, COMBINATIONS))},"
                f" got {self.rank_by!r}"
            )
        if self.weights and self.rank_by != "weighted_sum":
            raise ValueError(f"`weights` belong to `rank_by` 'weighted_sum', got {self.rank_by!r}")
        if unknown := sorted({*self.weights} - {*self.names}):
            raise ValueError(f"`weights` must be of `names` {list(self.names)}, got {unknown}")
        if self.rank_by in COMBINATIONS and len(self.ranking_weights) < 2:
            raise ValueError(
                f"`rank_by` {self.rank_by!r} needs two rewards with a say, got {list(self.ranking_weights)}; name more"
            )
        return self

    @property
    def ranking_reward(self) -> str:
        """What ranks: a reward, or a combination."""
        return self.rank_by or self.names[0]

    @property
    def ranking_weights(self) -> dict[str, float]:
        return ranking_weights(dict(self))

    @property
    def ranking_sentence(self) -> str:
        """What ranks, for people."""
        if self.rank_by not in COMBINATIONS:
            return self.ranking_reward
        weighted = self.rank_by == "weighted_sum"
        parts = [f"{weight:g} {name}" if weighted else name for name, weight in self.ranking_weights.items()]
        return f"{self.rank_by} of {', '.join(parts)}"

    @property
    def max_masked_fraction(self) -> float | None:
        """Of the perturbation, where it ranks or scores; none: prompts are used as they are."""
        return self.perturbation.max_masked_fraction if PERTURBATION in self.names else None

    @property
    def judges(self) -> dict[str, dict[str, Any]]:
        """Those that look at images, with the keyword arguments of each one's class."""
        return {name: self.options(name) for name in self.names if name not in JUDGE_NO_IMAGE}

    def options(self, name: str) -> dict[str, Any]:
        """Keyword arguments of one reward's class."""
        section = getattr(self, name, None) if name in (*REWARD_NAMES, PERTURBATION) else None
        return section.model_dump() if section is not None else {}


PRESETS: dict[str, dict[str, Any]] = {
    "paper": {},
    "released-code": {"measure": "score_gap", "boundaries": "linear", "num_stages": 5},
    "plain-dpo": {"order": "none"},
}
"""What each preset says where the paper's settings, which are the defaults, are not meant."""

RELEASED_MIN_SCORE_GAPS = {"hpsv2": 0.02, "vlm_alignment": 0.02, "aesthetic": 0.2}
RELEASED_MIN_SCORE_GAP = 0.1  # of any other reward


class CurriculumSection(Section):
    """What training is shown and when; see `curriculum/schedule.py` for what the words mean."""

    preset: Literal["paper", "released-code", "plain-dpo"] = "paper"
    measure: Literal["rank_gap", "score_gap", "score_gap_quantile", "margin"] = "rank_gap"
    boundaries: Literal["linear", "equal_count"] = "linear"
    pacing: Literal["cumulative", "one_stage", "sliding_window"] = "cumulative"
    window: Annotated[int, Field(ge=1)] | None = None
    order: Literal["easy_to_hard", "hard_to_easy", "random", "shuffled", "none", "best_against_worst"] = "easy_to_hard"
    draws: Literal["uniform", "by_measure"] = "uniform"
    num_margin_draws: Annotated[int, Field(ge=1)] | None = None
    num_stages: Annotated[int, Field(ge=1)] = 5
    updates_per_stage: Annotated[int, Field(ge=1)]
    min_score_gap: Annotated[float, Field(ge=0)] = 0.0
    min_gap_in_noise: Annotated[float, Field(gt=0)] | None = None
    max_pairs_per_prompt: Annotated[int, Field(ge=1)] | None = None
    label_noise: Annotated[float, Field(ge=0, le=1)] = 0.0

    @model_validator(mode="before")
    @classmethod
    def _preset_fills_what_is_not_given(cls, given: Any) -> Any:
        if not isinstance(given, dict):
            return given
        filled = PRESETS.get(str(given.get("preset")), {}) | given
        own = {"window": 2} if filled.get("pacing") == "sliding_window" else {}
        own |= {"num_margin_draws": 4} if filled.get("measure") == "margin" else {}
        return own | filled

    @model_validator(mode="after")
    def _choices_go_together(self) -> "CurriculumSection":
        faults = []
        if self.window is not None and self.pacing != "sliding_window":
            faults.append(f"`window` belongs to `pacing` 'sliding_window', got {self.pacing!r}")
        if self.num_margin_draws is not None and self.measure != "margin":
            faults.append(f"`num_margin_draws` belongs to `measure` 'margin', got {self.measure!r}")
        if self.measure == "margin":
            if self.boundaries != "equal_count":
                faults.append(f"`measure` 'margin' needs `boundaries` 'equal_count', got {self.boundaries!r}")
            if self.draws != "uniform":
                faults.append("`measure` 'margin' can be negative, so `draws` must be 'uniform', got 'by_measure'")
            if self.order not in ("easy_to_hard", "hard_to_easy"):
                faults.append(
                    "`measure` 'margin' is measured as training goes on, so `order` must be 'easy_to_hard' or"
                    f" 'hard_to_easy', got {self.order!r}"
                )
        if faults:
            raise ValueError("; ".join(faults))
        return self

    @property
    def cuts_by_rank_gap(self) -> bool:
        """Whether there can be no more stages than rank gaps."""
        return self.measure == "rank_gap" and self.order not in ("none", "best_against_worst")

    @property
    def sentence(self) -> str:
        """What is shown and when, for people."""
        parts = [f"{self.order}, {self.pacing}" + (f" of {self.window}" if self.window else "")]
        if self.order in ("none", "best_against_worst"):
            parts = [self.order]
        parts += [f"{self.measure}, {self.boundaries} boundaries", f"{self.draws} draws"]
        if self.min_score_gap:
            parts.append(f"score gaps above {self.min_score_gap:g}")
        if self.min_gap_in_noise:
            parts.append(f"score gaps above {self.min_gap_in_noise:g} x their noise")
        if self.max_pairs_per_prompt:
            parts.append(f"at most {self.max_pairs_per_prompt} pairs a prompt")
        if self.label_noise:
            parts.append(f"{self.label_noise:.0%} of labels swapped")
        return f"{self.preset}: " + "; ".join(parts)


class LoraSection(Section):
    """The LoRA; it may begin with a smaller rank, or in a part of the net's blocks, and grow stage by stage.

    It grows in the first round alone: later ones begin with what was trained.
    """

    rank: Annotated[int, Field(ge=1)] = 8
    initial_rank: Annotated[int, Field(ge=1)] | None = None
    unfreeze: Literal["at_once", "from_input", "from_output"] = "at_once"
    alpha: Annotated[float, Field(gt=0)] | None = None
    targets: Annotated[tuple[str, ...], Field(min_length=1)] = ("to_q", "to_k", "to_v", "to_out.0")

    @model_validator(mode="after")
    def _grows(self) -> "LoraSection":
        if self.initial_rank is not None and self.initial_rank > self.rank:
            raise ValueError(
                f"`initial_rank` must be at most `rank` = {self.rank}, which it grows to, got {self.initial_rank}"
            )
        return self

    @property
    def growth(self) -> dict[str, Any]:
        """Keyword arguments of `cdpo_ray.curriculum.capacity.stage_capacities`."""
        return {"initial_rank": self.initial_rank, "sequential": self.unfreeze != "at_once"}

    @property
    def grows(self) -> bool:
        return self.initial_rank not in (None, self.rank) or self.unfreeze != "at_once"


class TrainingSection(Section):
    """Staged preference training of a LoRA, or of the whole net (`method` full)."""

    method: Literal["lora", "full"] = "lora"
    loss: Literal["dpo", "ipo", "hinge", "robust", "sft"] = "dpo"
    beta: Annotated[float, Field(gt=0)]
    label_smoothing: Annotated[float, Field(ge=0, lt=0.5)] = 0.0
    sft_weight: Annotated[float, Field(ge=0)] = 0.0
    reference: Literal["base", "last_round"] = "base"
    guidance_range: tuple[Annotated[float, Field(ge=0)], Annotated[float, Field(ge=0)]] | None = None
    learning_rate: Annotated[float, Field(gt=0)]
    weight_decay: Annotated[float, Field(ge=0)] = 1e-4
    adam_beta1: Annotated[float, Field(ge=0, lt=1)] = 0.9
    adam_beta2: Annotated[float, Field(ge=0, lt=1)] = 0.999
    max_grad_norm: Annotated[float, Field(gt=0)] = 1.0
    global_batch_size: Annotated[int, Field(ge=1)]
    batch_size_per_worker: Annotated[int, Field(ge=1)] | None = None
    empty_prompt_fraction: Annotated[float, Field(ge=0, lt=1)] = 0.0
    gradient_checkpointing: bool = False
    lora: LoraSection = LoraSection()
    num_workers: Annotated[int, Field(ge=1)] = 1
    zero_stage: Annotated[int, Field(ge=0, le=3)] = 0
    max_restarts: Annotated[int, Field(ge=0)] = 1

    @model_validator(mode="after")
    def _batch_divides(self) -> "TrainingSection":
        at_once = self.num_workers * (self.batch_size_per_worker or 1)
        if self.global_batch_size % at_once:
            raise ValueError(
                f"`global_batch_size` must be a multiple of `num_workers` x `batch_size_per_worker` = {at_once},"
                f" got {self.global_batch_size}"
            )
        return self

    @model_validator(mode="after")
    def _loss_has_its_options(self) -> "TrainingSection":
        if self.label_smoothing and self.loss != "robust":
            raise ValueError(f"`label_smoothing` belongs to `loss` 'robust', got it with {self.loss!r}")
        if self.loss == "robust" and not self.label_smoothing:
            raise ValueError("`loss` 'robust' needs `label_smoothing`, the share of labels thought wrong, above 0")
        if self.sft_weight and self.loss == "sft":
            raise ValueError("`sft_weight` mixes the chosen's error into another `loss`; 'sft' is that error alone")
        if self.method == "full" and "lora" in self.model_fields_set:
            raise ValueError("`lora` must not be given with `method` 'full', which trains the whole net")
        if self.guidance_range and self.guidance_range[0] > self.guidance_range[1]:
            raise ValueError(f"`guidance_range` must be [low, high], got {list(self.guidance_range)}")
        return self

    @property
    def pairs_per_launch(self) -> int:
        """Pairs that one worker sends through the net at once."""
        return self.batch_size_per_worker or self.global_batch_size // self.num_workers


class EvaluationSection(Section):
    """Base against fine-tuned on held-out prompts; the rewards of the run judge too, named in ``judges`` or not."""

    images_per_prompt: Annotated[int, Field(ge=1)] = 4
    judges: Annotated[tuple[RewardName, ...], Field(min_length=1)]
    num_margin_draws: Annotated[int, Field(ge=0)] = 4
    num_bootstrap_resamples: Annotated[int, Field(ge=100)] = 10_000
    grid_prompts: Annotated[int, Field(ge=0)] = 12


class Pool(Section):
    """Actors of one role and what each needs; a GPU may be shared by giving a fraction."""

    num_actors: Annotated[int, Field(ge=1)] = 1
    cpus_per_actor: Annotated[float, Field(gt=0)] = 1
    gpus_per_actor: Annotated[float, Field(ge=0)] = 0


class TrainerResources(Section):
    cpus_per_worker: Annotated[float, Field(gt=0)] = 1
    gpus_per_worker: Annotated[float, Field(ge=0)] = 0


class ResourcesSection(Section):
    generators: Pool = Pool()
    scorers: Pool = Pool()
    trainers: TrainerResources = TrainerResources()


class Config(Section):
    run: RunSection
    rounds: Annotated[int, Field(ge=1)] = 1
    prompts: PromptsSection
    preferences: PreferencesSection | None = None
    model: ModelSection
    generation: GenerationSection
    rewards: RewardsSection
    curriculum: CurriculumSection
    training: TrainingSection
    evaluation: EvaluationSection
    resources: ResourcesSection = ResourcesSection()

    @model_validator(mode="before")
    @classmethod
    def _released_code_drops_near_ties_by_reward(cls, given: Any) -> Any:
        match given:
            case {"curriculum": {"preset": "released-code"} as curriculum, "rewards": {"rank_by": str(reward)}}:
                pass
            case {"curriculum": {"preset": "released-code"} as curriculum, "rewards": {"names": [reward, *_]}}:
                pass
            case _:
                return given
        if reward in COMBINATIONS:  # which that code does not have
            return given
        min_score_gap = RELEASED_MIN_SCORE_GAPS.get(str(reward), RELEASED_MIN_SCORE_GAP)
        return given | {"curriculum": {"min_score_gap": min_score_gap} | curriculum}

    @model_validator(mode="after")
    def _samples_come_from_somewhere(self) -> "Config":
        generated, named = "images_per_prompt" in self.generation.model_fields_set, PREFERENCE in self.rewards.names
        if not self.preferences:
            faults = ["`prompts.train` is missing"] if not self.prompts.train else []
            faults += ["`generation.images_per_prompt` is missing"] if not generated else []
            faults += ["`rewards.names` 'preference' needs a section `preferences`"] if named else []
        else:
            given = {
                "prompts.train": bool(self.prompts.train),
                "rewards.names 'perturbation'": PERTURBATION in self.rewards.names,
                "rounds": self.rounds > 1,
                "run.samples_from": self.run.samples_from is not None,
            }
            faults = [f"`{key}` must not be given with `preferences`" for key, wrong in given.items() if wrong]
            if self.preferences.format == "ranked_folders":
                if self.rewards.ranking_reward != PREFERENCE:
                    faults.append(
                        "`rewards.rank_by` must be 'preference' for ranked folders: their ranks are the labels"
                    )
            elif self.curriculum.cuts_by_rank_gap and self.curriculum.num_stages > 1:
                faults.append(
                    "`curriculum.measure` must not be 'rank_gap' for pairs, which have a rank gap of 1 alone; choose"
                    " 'score_gap_quantile', 'score_gap' or 'margin', or `order` 'none'"
                )
        if faults:
            raise ValueError("; ".join(faults))
        return self

    @model_validator(mode="after")
    def _rewards_have_what_they_need(self) -> "Config":
        used, faults = {*self.rewards.names, *self.evaluation.judges}, []
        if "aesthetic" in used and self.rewards.aesthetic.head is None:
            faults.append(
                "`rewards.aesthetic.head` is missing: the path of sac+logos+ava1-l14-linearMSE.pth, a file of"
                " github.com/christophschuhmann/improved-aesthetic-predictor"
            )
        if "imagereward" in used and self.rewards.imagereward.sha256 is None:
            faults.append(
                "`rewards.imagereward.sha256` must be that of ImageReward.pt: the hub shows it on the file's page, and"
                " `sha256sum` tells it of a file"
            )
        if "vlm_alignment" in used and not (
            self.rewards.vlm_alignment.captioner or self.rewards.vlm_alignment.endpoint
        ):
            faults.append("`rewards.vlm_alignment` must have a `captioner` (a folder or a hub id), or an `endpoint`")
        if faults:
            raise ValueError("; ".join(faults))
        return self

    @model_validator(mode="after")
    def _noise_is_measured(self) -> "Config":
        if self.curriculum.min_gap_in_noise and not self.rewards.noise_prompts:
            raise ValueError("`curriculum.min_gap_in_noise` needs `rewards.noise_prompts`, prompts to score twice")
        return self

    @model_validator(mode="after")
    def _samples_are_taken_once(self) -> "Config":
        if self.run.samples_from and self.rounds > 1:
            raise ValueError(
                f"`run.samples_from` gives the images of one round, but `rounds` is {self.rounds}; leave one out"
            )
        return self

    @model_validator(mode="after")
    def _stages_fit_the_ranks(self) -> "Config":
        if self.preferences:
            return self  # known when the files have been read
        num_gaps = self.generation.images_per_prompt - 1
        if self.curriculum.cuts_by_rank_gap and self.curriculum.num_stages > num_gaps:
            raise ValueError(
                f"`curriculum.num_stages` is {self.curriculum.num_stages}, but {num_gaps + 1} images per prompt have"
                f" only {num_gaps} rank gaps; lower it, or raise `generation.images_per_prompt`"
            )
        return self

    @model_validator(mode="after")
    def _denoising_steps_fit_the_model(self) -> "Config":
        steps = self.generation.num_denoising_steps
        if self.model.family == "latent_consistency" and steps > CONSISTENCY_TIMESTEPS:
            raise ValueError(
                f"`generation.num_denoising_steps` is {steps}, but a latent consistency model knows only"
                f" {CONSISTENCY_TIMESTEPS} timesteps; lower it: 1 to 8 are usual"
            )
        return self

    @model_validator(mode="after")
    def _image_is_whole_patches(self) -> "Config":
        for side in ("height", "width"):
            size = getattr(self.generation, side)
            if self.model.family in PATCHED and size is not None and size % 16:
                raise ValueError(
                    f"`generation.{side}` must be a multiple of 16 for the family {self.model.family!r}, got {size}"
                )
        return self

    @model_validator(mode="after")
    def _training_fits_the_model(self) -> "Config":
        if self.training.guidance_range and self.model.family not in GUIDANCE_EMBEDDED:
            raise ValueError(
                f"`training.guidance_range` is for families whose net is told of the guidance"
                f" ({', '.join(GUIDANCE_EMBEDDED)}), got it with {self.model.family!r}"
            )
        if self.training.reference == "last_round" and self.rounds == 1:
            raise ValueError("`training.reference` 'last_round' needs `rounds` > 1")
        if self.training.lora.grows and self.curriculum.num_stages == 1:
            raise ValueError(
                "`training.lora` grows from stage to stage, but `curriculum.num_stages` is 1; raise it, or leave out"
                " `initial_rank` and `unfreeze`"
            )
        return self

    @property
    def evaluation_judges(self) -> dict[str, dict[str, Any]]:
        """All that judge held-out images, the run's own rewards first, with the keyword arguments of each's class."""
        return self.rewards.judges | {name: self.rewards.options(name) for name in self.evaluation.judges}

    def plain(self) -> dict[str, Any]:
        """The whole configuration, defaults included, as plain YAML-able values."""
        return self.model_dump(mode="json")


class _Loader(yaml.SafeLoader):
    """Safe YAML in which a repeated key is a fault and 1e-5 is a float."""


def _mapping_without_repeats(loader: _Loader, node: yaml.MappingNode) -> dict[Any, Any]:
    keys = [loader.construct_object(key, deep=True) for key, _ in node.value]  # type: ignore[no-untyped-call]
    for (key_node, _), key in zip(node.value, keys, strict=True):
        if keys.count(key) > 1:
            raise yaml.constructor.ConstructorError(None, None, f"key `{key}` is given twice", key_node.start_mark)
    return yaml.SafeLoader.construct_mapping(loader, node, deep=True)


_Loader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _mapping_without_repeats)
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d[\d_]*\.?[\d_]*|\.\d[\d_]*)([eE][-+]?\d+)$"),
    list("-+0123456789."),
)


def parse_yaml(text: str, *, where: str) -> Any:
    """Safe YAML; raises ConfigError with file, line and column."""
    try:
        return yaml.load(text, Loader=_Loader)  # noqa: S506 - a SafeLoader
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f"{where}:{mark.line + 1}:{mark.column + 1}" if mark else where
        raise ConfigError(f"{place}: not valid YAML: {getattr(error, 'problem', None) or error}") from None


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Read a config file and apply `section.key=value` overrides.

    Raises:
        ConfigError: the file cannot be read, or with all faults of the configuration at once.
    """
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read: {error}; give the path of a YAML file") from None
    values = parse_yaml(text, where=str(path))
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: must be a mapping of sections, got {type(values).__name__}")
    for override in overrides:
        _apply(values, override)
    return validate(values, where=str(path))


def validate(values: Mapping[str, Any], *, where: str) -> Config:
    try:
        return Config.model_validate(values)
    except ValidationError as error:
        found = error.errors()
        inside = {fault["loc"][:-1] for fault in found}  # a faulty item also makes its list too short: told once
        faults = [
            line
            for fault in found
            if fault["type"] != "too_short" or fault["loc"] not in inside
            for line in _speak(fault)
        ]
        counted = "1 fault" if len(faults) == 1 else f"{len(faults)} faults"
        raise ConfigError("\n".join([f"{where}: {counted}", *(f"  {line}" for line in faults)])) from None


def _apply(values: dict[str, Any], override: str) -> None:
    key, separator, text = override.partition("=")
    if not separator or not key:
        raise ConfigError(f"override {override!r}: must be `section.key=value`, for example `training.beta=2000`")
    value = parse_yaml(text, where=f"override {override!r}")
    if key == "rewards" and isinstance(value, list):  # the short form people type: rewards=[clip,jpeg_size]
        key = "rewards.names"
    *parents, last = key.split(".")
    place = values
    for parent in parents:
        child = place.setdefault(parent, {})
        if not isinstance(child, dict):
            raise ConfigError(f"override {override!r}: `{parent}` is a value, not a section")
        place = child
    place[last] = value


def _speak(fault: Any) -> Iterable[str]:
    """One pydantic fault as a sentence with the key as the user wrote it."""
    where = ".".join(str(part) for part in fault["loc"])
    kind, got = fault["type"], fault["input"]
    context = {name: int(x) if x == 0.0 or x == 1.0 else x for name, x in fault.get("ctx", {}).items()}  # 0, not 0.0
    if kind == "extra_forbidden":
        near = difflib.get_close_matches(str(fault["loc"][-1]), _keys_beside(fault["loc"]), n=1)
        parent = ".".join(str(part) for part in fault["loc"][:-1])
        suggestion = f"{parent}.{near[0]}".lstrip(".") if near else ""
        yield f"unknown key `{where}`" + (f"; did you mean `{suggestion}`?" if near else "")
    elif kind == "missing":
        yield f"`{where}` is missing"
    elif kind == "value_error":
        message = str(context.get("error", fault["msg"]))
        if isinstance(got, dict):
            yield f"{where}: {message}" if where else message
        else:
            what, separator, hint = message.partition("; ")
            yield f"`{where}` {what}, got {got!r}{separator}{hint}"
    elif kind == "too_short":
        yield f"`{where}` must not be empty"
    else:
        limit = {
            "greater_than": "be > {gt}",
            "greater_than_equal": "be >= {ge}",
            "less_than": "be < {lt}",
            "less_than_equal": "be <= {le}",
            "multiple_of": "be a multiple of {multiple_of}",
            "literal_error": "be {expected}",
            "string_pattern_mismatch": "match {pattern}",
        }.get(kind)
        wish = limit.format(**context) if limit else fault["msg"].removeprefix("Input should ")
        yield f"`{where}` must {wish}, got {got!r}"


def _keys_beside(location: tuple[int | str, ...]) -> list[str]:
    model: type[BaseModel] = Config
    for part in location[:-1]:
        annotation = model.model_fields[str(part)].annotation
        if not (isinstance(annotation, type) and issubclass(annotation, BaseModel)):
            return []
        model = annotation
    return list(model.model_fields)
