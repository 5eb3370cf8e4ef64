"""Rewards: which judges score training images, what each needs, and which of them rank."""

import difflib
import os
import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal, get_origin

from pydantic import AfterValidator, Field, ValidationError, model_validator

from cdpo_ray.config.section import LocalPath, Section, Sha256, check_pinned, looked_for
from cdpo_ray.errors import printable
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

NEEDS_A_CHOICE = {
    "aesthetic": "`rewards.aesthetic.head`",
    "imagereward": "`rewards.imagereward.sha256`",
    "vlm_alignment": "`rewards.vlm_alignment.captioner` or `rewards.vlm_alignment.endpoint`",
}
"""Built-in rewards whose default options do not suffice, and what they lack."""

OWN_REWARD = re.compile(r"^[A-Za-z_][\w.]*:[A-Za-z_]\w*$")


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


class ClipOptions(Section):
    """An open_clip model: `embedded`, or an architecture with a checkpoint (a file, or a hub id with its revision)."""

    architecture: str = "embedded"
    checkpoint: LocalPath | None = None
    revision: str | None = None
    scale: Literal["cosine", "logit"] = "cosine"

    @model_validator(mode="after")
    def _checkpoint_goes_with_architecture(self) -> "ClipOptions":
        if self.architecture == "embedded":
            return self
        if self.checkpoint is None:
            raise ValueError("`checkpoint` must be a file or a hub id when `architecture` is not 'embedded'")
        check_pinned(self.checkpoint, self.revision, key="checkpoint", revision_key="revision", kind="file")
        return self


class HpsV2Options(Section):
    """HPS v2.1: the released file or its hub id."""

    architecture: str = "ViT-H-14"
    checkpoint: LocalPath = "xswu/HPSv2"
    revision: str | None = "697403c78157020a1ae59d23f111aa58ced35b0a"
    sha256: Sha256 = "c57a38fb4a2f7e7c15bf00da2ea377cdf165448b4dd1052a484c215a998c9837"

    @model_validator(mode="after")
    def _is_pinned(self) -> "HpsV2Options":
        check_pinned(self.checkpoint, self.revision, key="checkpoint", revision_key="revision", kind="file")
        return self


class PickScoreOptions(Section):
    """PickScore: its model, and whose tokenizer and image settings it goes with; folders or hub ids."""

    checkpoint: LocalPath = "yuvalkirstain/PickScore_v1"
    revision: str | None = "a4e4367c6dfa7288a00c550414478f865b875800"
    processor: LocalPath = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"
    processor_revision: str | None = "1c2b8495b28150b8a4922ee1c8edee224c284c0c"

    @model_validator(mode="after")
    def _is_pinned(self) -> "PickScoreOptions":
        check_pinned(self.checkpoint, self.revision, key="checkpoint", revision_key="revision", kind="folder")
        check_pinned(
            self.processor, self.processor_revision, key="processor", revision_key="processor_revision", kind="folder"
        )
        return self


class AestheticOptions(Section):
    """LAION's aesthetic predictor: the head, a file that no hub has under a name of its authors, on CLIP."""

    head: LocalPath | None = None
    head_sha256: Sha256 = "21dd590f3ccdc646f0d53120778b296013b096a035a2718c9cb0d511bff0f1e0"
    checkpoint: LocalPath = "openai/clip-vit-large-patch14"
    revision: str | None = "32bd64288804d66eefd0ccbe215aa642df71cc41"

    @model_validator(mode="after")
    def _is_pinned(self) -> "AestheticOptions":
        if self.head is not None and not os.path.isfile(self.head):
            raise ValueError(f"`head` must be an existing file, got {self.head!r}: no file {looked_for(self.head)}")
        check_pinned(self.checkpoint, self.revision, key="checkpoint", revision_key="revision", kind="folder")
        return self


class ImageRewardOptions(Section):
    """The released checkpoint and BERT's vocabulary, each a file or its hub id."""

    checkpoint: LocalPath = "zai-org/ImageReward"
    revision: str | None = "5736be03b2652728fb87788c9797b0570450ab72"
    sha256: Sha256 | None = None
    vocabulary: LocalPath = "google-bert/bert-base-uncased"
    vocabulary_revision: str | None = "86b5e0934494bd15c9632b12f734a8a67f723594"

    @model_validator(mode="after")
    def _is_pinned(self) -> "ImageRewardOptions":
        check_pinned(self.checkpoint, self.revision, key="checkpoint", revision_key="revision", kind="file")
        check_pinned(
            self.vocabulary, self.vocabulary_revision, key="vocabulary", revision_key="vocabulary_revision", kind="file"
        )
        return self


def _plain_url(url: str) -> str:
    if not re.fullmatch(r"https?://[^@\s?#]+", url):
        raise ValueError(
            "must be an http or https URL without user, password, query or fragment; name the variable that holds the"
            " token in `token_variable`"
        )
    return url


class EndpointSection(Section):
    """An OpenAI-compatible server; `token_variable` names the environment variable that holds its token."""

    url: Annotated[str, AfterValidator(_plain_url)]
    model: Annotated[str, Field(min_length=1)]
    token_variable: Annotated[str, Field(pattern=r"^[A-Za-z_]\w*$")] | None = None
    timeout_seconds: Annotated[float, Field(gt=0)] = 60
    max_retries: Annotated[int, Field(ge=0, le=20)] = 4
    num_concurrent_requests: Annotated[int, Field(ge=1, le=64)] = 4


class VlmAlignmentOptions(Section):
    """Who captions (`captioner`: a folder or hub id run here; or `endpoint`), and who compares caption and prompt."""

    captioner: LocalPath | None = None
    captioner_revision: str | None = None
    endpoint: EndpointSection | None = None
    instruction: Annotated[str, Field(min_length=1)] = "Describe this image in one sentence."
    max_caption_tokens: Annotated[int, Field(ge=1, le=1000)] = 64
    sentence_encoder: LocalPath = "sentence-transformers/all-MiniLM-L6-v2"
    sentence_encoder_revision: str | None = "c9745ed1d9f207416be6d2e6f8de32d1f16199bf"

    @model_validator(mode="after")
    def _is_pinned(self) -> "VlmAlignmentOptions":
        if self.captioner and self.endpoint:
            raise ValueError("`captioner` and `endpoint` are two ways to the same: one of them must be left out")
        models = {"sentence_encoder": (self.sentence_encoder, self.sentence_encoder_revision)}
        if self.captioner:
            models["captioner"] = (self.captioner, self.captioner_revision)
        for key, (place, revision) in models.items():
            check_pinned(place, revision, key=key, revision_key=f"{key}_revision", kind="folder")
        return self


class JpegSizeOptions(Section):
    quality: Annotated[int, Field(ge=1, le=100)] = 90


class PerturbationOptions(Section):
    """Images of ever more masked prompts, of which the less masked is the better: a ranking without a judge."""

    max_masked_fraction: Annotated[float, Field(gt=0, le=1)] = 0.9


def options_without_choices(name: str, recorded: Any) -> dict[str, Any]:
    """Options of a judge as somebody else recorded them, if they choose no address, variable, file, model or code.

    Numbers and words of a closed list may be anything that the section allows; every other option must have the
    package's own default, and the defaults must suffice.

    Raises:
        ValueError: they do choose, or are none; the reason completes "reward `name` ...".
    """
    if name not in REWARD_NAMES:
        raise ValueError("is somebody's own function")
    field = RewardsSection.model_fields.get(name)
    kind: Any = field.annotation if field else Section
    if not isinstance(recorded, dict):
        raise ValueError("has no options recorded")
    for key, value in recorded.items():
        option = kind.model_fields.get(key)
        if option is None:
            raise ValueError(f"has no option {printable(repr(key))}")
        is_harmless = get_origin(option.annotation) is Literal or option.annotation in (int, float, bool)
        if not is_harmless and value != option.default:
            raise ValueError(f"needs `rewards.{name}.{key}`, which another run may not choose")
    try:
        options = kind.model_validate(recorded, strict=True)
    except ValidationError as error:
        raise ValueError(f"has options that cannot be used ({printable(error.errors()[0]['msg'])})") from None
    if missing := NEEDS_A_CHOICE.get(name):
        raise ValueError(f"needs {missing}, which another run may not choose")
    return options.model_dump()


class RewardsSection(Section):
    """The judges that score training images; `rank_by` decides the ranking: the first, another, or a combination."""

    names: Annotated[tuple[ScoreName, ...], Field(min_length=1)]
    rank_by: RankingName | None = None
    weights: Annotated[dict[str, float], Field(default_factory=dict)]
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
