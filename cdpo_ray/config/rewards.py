"""Rewards: judges that score training images, their options, and how their scores rank images."""

import importlib.util
import os
import re
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal, get_origin

from pydantic import AfterValidator, Field, ValidationError, model_validator

from cdpo_ray.config.section import LocalPath, Section, Sha256, check_name, check_pinned, looked_for
from cdpo_ray.errors import printable
from cdpo_ray.records import PERTURBATION, PREFERENCE

REWARDS = {
    "clip": "cdpo_ray.rewards.clip:ClipReward",
    "hpsv2": "cdpo_ray.rewards.hpsv2:HpsV2Reward",
    "hpsv3": "cdpo_ray.rewards.hpsv3:HpsV3Reward",
    "imagereward": "cdpo_ray.rewards.imagereward:ImageReward",
    "pickscore": "cdpo_ray.rewards.pickscore:PickScoreReward",
    "unifiedreward": "cdpo_ray.rewards.unifiedreward:UnifiedReward",
    "aesthetic": "cdpo_ray.rewards.aesthetic:AestheticReward",
    "ocr": "cdpo_ray.rewards.ocr:OcrReward",
    "vlm_alignment": "cdpo_ray.rewards.vlm_alignment:VlmAlignmentReward",
    "vlm_judge": "cdpo_ray.rewards.vlm_judge:VlmJudgeReward",
    "vqa": "cdpo_ray.rewards.vqa:VqaReward",
    "jpeg_size": "cdpo_ray.rewards.jpeg_size:JpegSizeReward",
    "oracle": "cdpo_ray.rewards.oracle:OracleReward",
    "oracle_strict": "cdpo_ray.rewards.oracle:StrictOracleReward",
}
"""Built-in reward -> its class, imported on first use; its options, if any, are the field of that name in
`RewardsSection`, and the keyword arguments of the class."""

PACKAGES = {"ocr": ("rapidocr", "onnxruntime")}
"""Reward -> packages of the extra of that name."""

JUDGE_NO_IMAGE = (PERTURBATION, PREFERENCE)
"""Scores that need no image: by how it was made, or by human labels."""

PAIRWISE = "pairwise"
"""`mode` of a judge whose scores compare the images of one prompt with each other, so that it does not evaluate."""

COMBINATIONS = ("weighted_sum", "mean_rank", "pareto")
"""Rules to rank by several rewards; `cdpo_ray.curriculum.combination` maps each to its function."""


def missing_packages(reward: str) -> str:
    """What a reward needs that is not installed, and how to install it; empty: nothing."""
    missing = [name for name in PACKAGES.get(reward, ()) if importlib.util.find_spec(name) is None]
    return f'needs {" and ".join(missing)}: pip install "cdpo_ray[{reward}]"' if missing else ""


def _known_reward(name: str, *others: str) -> str:
    return check_name(name, (*REWARDS, *others))


def _known_score(name: str) -> str:
    return name if name in JUDGE_NO_IMAGE else _known_reward(name)


def _known_ranking(name: str) -> str:
    return _known_reward(name, *JUDGE_NO_IMAGE, *COMBINATIONS)


RewardName = Annotated[str, AfterValidator(_known_reward)]
ScoreName = Annotated[str, AfterValidator(_known_score)]
"""A score of training images: a judge, or one of `JUDGE_NO_IMAGE`."""
RankingName = Annotated[str, AfterValidator(_known_ranking)]


def ranking_weights(rewards: Mapping[str, Any]) -> dict[str, float]:
    """The rewards that rank training images, each with its weight (1 except for ``weighted_sum``).

    Args:
        rewards: `RewardsSection` as plain values.
    """
    names, rank_by, weights = rewards["names"], rewards["rank_by"], rewards.get("weights", {})
    if rank_by not in COMBINATIONS:
        return {rank_by or names[0]: 1.0}
    return {name: weights.get(name, 1.0) for name in names if weights.get(name, 1.0)}


class RewardOptions(Section):
    """Options of one reward."""

    NEEDS: ClassVar[str] = ""
    """Keys that the reward cannot be used without and that have no default, for a message; empty: there are none."""

    @property
    def fault(self) -> str:
        """Why the reward cannot be used with these options; empty: it can."""
        return ""

    @property
    def whole_prompts(self) -> bool:
        """Whether a score compares an image with the others of its prompt, and so not the images of two models."""
        return False


class ClipOptions(RewardOptions):
    """Reward `clip`: cosine similarity of image and prompt by any open_clip model."""

    architecture: str = "embedded"
    """`embedded` (the tiny model of the package), or a name of `open_clip.list_models()`: that of the checkpoint,
    including QuickGELU (`ViT-B-32-quickgelu`)."""

    checkpoint: LocalPath | None = None
    """Folder in open_clip layout (`open_clip_model.safetensors`, and `open_clip_config.json` with the model's settings
    and preprocessing), or a hub id; required unless `architecture` is `embedded`."""

    revision: str | None = None
    """Full commit (40 hex digits) of a hub id."""

    scale: Literal["cosine", "logit"] = "cosine"
    """Unit of the score. `logit`: the cosine times the model's learned logit scale (up to 100); the ranking is the
    same."""

    @model_validator(mode="after")
    def _checkpoint_is_given(self) -> "ClipOptions":
        if self.architecture == "embedded":
            return self
        if self.checkpoint is None:
            raise ValueError("`checkpoint` must be a folder or a hub id when `architecture` is not 'embedded'")
        check_pinned(self.checkpoint, self.revision, key="checkpoint", revision_key="revision", kind="folder")
        return self


class HpsV2Options(RewardOptions):
    """Reward `hpsv2`: HPS v2.1. The defaults are the released weights."""

    architecture: str = "ViT-H-14"
    """open_clip architecture of the weights."""

    checkpoint: LocalPath = "xswu/HPSv2"
    """File of weights, or a hub id."""

    revision: str | None = "697403c78157020a1ae59d23f111aa58ced35b0a"
    """Full commit (40 hex digits) of a hub id."""

    sha256: Sha256 = "c57a38fb4a2f7e7c15bf00da2ea377cdf165448b4dd1052a484c215a998c9837"
    """SHA-256 of the file of weights, verified before it is read."""

    @model_validator(mode="after")
    def _is_pinned(self) -> "HpsV2Options":
        check_pinned(self.checkpoint, self.revision, key="checkpoint", revision_key="revision", kind="file")
        return self


class HpsV3Options(RewardOptions):
    """Reward `hpsv3`: HPSv3, Qwen2-VL-7B with a head that scores. The defaults are the released weights."""

    checkpoint: LocalPath = "MizzenAI/HPSv3"
    """File of weights, HPSv3.safetensors, or a hub id."""

    revision: str | None = "4f81e3e09edd82fe3c5f636444c721b592a735ca"
    """Full commit (40 hex digits) of a hub id."""

    processor: LocalPath = "Qwen/Qwen2-VL-7B-Instruct"
    """Folder or hub id of the model's configuration, tokenizer and image settings; weights are not read from it."""

    processor_revision: str | None = "eed13092ef92e448dd6875b2a00151bd3f7db0ac"
    """Full commit (40 hex digits) of the processor's hub id."""

    @model_validator(mode="after")
    def _is_pinned(self) -> "HpsV3Options":
        check_pinned(self.checkpoint, self.revision, key="checkpoint", revision_key="revision", kind="file")
        check_pinned(
            self.processor, self.processor_revision, key="processor", revision_key="processor_revision", kind="folder"
        )
        return self


class PickScoreOptions(RewardOptions):
    """Reward `pickscore`: PickScore v1. The defaults are the released weights."""

    checkpoint: LocalPath = "yuvalkirstain/PickScore_v1"
    """Folder in transformers layout, or a hub id."""

    revision: str | None = "a4e4367c6dfa7288a00c550414478f865b875800"
    """Full commit (40 hex digits) of a hub id."""

    processor: LocalPath = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"
    """Folder or hub id of the tokenizer and the image settings; the released scorer takes them from this repository."""

    processor_revision: str | None = "1c2b8495b28150b8a4922ee1c8edee224c284c0c"
    """Full commit (40 hex digits) of the processor's hub id."""

    @model_validator(mode="after")
    def _is_pinned(self) -> "PickScoreOptions":
        check_pinned(self.checkpoint, self.revision, key="checkpoint", revision_key="revision", kind="folder")
        check_pinned(
            self.processor, self.processor_revision, key="processor", revision_key="processor_revision", kind="folder"
        )
        return self


class UnifiedRewardOptions(RewardOptions):
    """Reward `unifiedreward`: UnifiedReward 2.0, a vision-language model that writes ratings from 1 to 5."""

    checkpoint: LocalPath = "CodeGoat24/UnifiedReward-2.0-qwen3vl-8b"
    """Folder in transformers layout, or a hub id."""

    revision: str | None = "4175e6b78d62f639282797d05ccea35d3be823cf"
    """Full commit (40 hex digits) of a hub id."""

    axis: Literal["mean", "alignment", "coherence", "style"] = "mean"
    """Rating that is used as the score: one of three, or their mean."""

    @model_validator(mode="after")
    def _is_pinned(self) -> "UnifiedRewardOptions":
        check_pinned(self.checkpoint, self.revision, key="checkpoint", revision_key="revision", kind="folder")
        return self


class AestheticOptions(RewardOptions):
    """Reward `aesthetic`: LAION's aesthetic predictor, a head on CLIP ViT-L/14."""

    NEEDS: ClassVar[str] = "`rewards.aesthetic.head`"

    head: LocalPath | None = None
    """Path of the released file sac+logos+ava1-l14-linearMSE.pth; required if the reward is used. Its authors do not
    publish it on the hub."""

    head_sha256: Sha256 = "21dd590f3ccdc646f0d53120778b296013b096a035a2718c9cb0d511bff0f1e0"
    """SHA-256 of the head's file, verified before it is read; the default is the released file's."""

    checkpoint: LocalPath = "openai/clip-vit-large-patch14"
    """CLIP model that the head was trained on: a folder in transformers layout, or a hub id."""

    revision: str | None = "32bd64288804d66eefd0ccbe215aa642df71cc41"
    """Full commit (40 hex digits) of a hub id."""

    @property
    def fault(self) -> str:
        return (
            ""
            if self.head
            else "`rewards.aesthetic.head` is missing: the path of sac+logos+ava1-l14-linearMSE.pth, a file of"
            " github.com/christophschuhmann/improved-aesthetic-predictor"
        )

    @model_validator(mode="after")
    def _is_pinned(self) -> "AestheticOptions":
        if self.head is not None and not os.path.isfile(self.head):
            raise ValueError(f"`head` must be an existing file, got {self.head!r}: no file {looked_for(self.head)}")
        check_pinned(self.checkpoint, self.revision, key="checkpoint", revision_key="revision", kind="folder")
        return self


class ImageRewardOptions(RewardOptions):
    """Reward `imagereward`: ImageReward v1.0."""

    NEEDS: ClassVar[str] = "`rewards.imagereward.sha256`"

    checkpoint: LocalPath = "zai-org/ImageReward"
    """File of weights, or a hub id; the default is the released one."""

    revision: str | None = "5736be03b2652728fb87788c9797b0570450ab72"
    """Full commit (40 hex digits) of a hub id."""

    sha256: Sha256 | None = None
    """SHA-256 of ImageReward.pt; required if the reward is used. It has no default, because we found no source for it;
    the hub shows it on the file's page."""

    vocabulary: LocalPath = "google-bert/bert-base-uncased"
    """BERT's uncased vocab.txt, or a hub id that has it."""

    vocabulary_revision: str | None = "86b5e0934494bd15c9632b12f734a8a67f723594"
    """Full commit (40 hex digits) of the vocabulary's hub id."""

    @property
    def fault(self) -> str:
        return (
            ""
            if self.sha256
            else "`rewards.imagereward.sha256` must be the SHA-256 of ImageReward.pt: the hub shows it on the file's"
            " page, and `sha256sum` prints that of a file"
        )

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
            "must be an http or https URL without user, password, query or fragment; put the token in an environment"
            " variable and name it in `token_variable`"
        )
    return url


class EndpointSection(Section):
    """OpenAI-compatible server that answers questions about images, in place of a local model. Answers are kept in
    `$HF_HOME/cdpo_ray/answers`, so that the same question about the same image is not paid for twice."""

    url: Annotated[str, AfterValidator(_plain_url)]
    """Base URL up to and including `/v1`, without credentials."""

    model: Annotated[str, Field(min_length=1)]
    """Name of the model on the server."""

    token_variable: Annotated[str, Field(pattern=r"^[A-Za-z_]\w*$")] | None = None
    """Environment variable that holds the server's token, so that no configuration or run folder contains it; `null`:
    no token."""

    timeout_seconds: Annotated[float, Field(gt=0)] = 60
    """Maximum duration of one attempt, from the request to the end of the answer."""

    max_retries: Annotated[int, Field(ge=0, le=20)] = 4
    """Maximum number of retries per question, with exponential backoff, after a timeout or a transient error (429, 500,
    502, 503, 504). An image without an answer has no score."""

    num_concurrent_requests: Annotated[int, Field(ge=1, le=64)] = 4
    """Number of requests that one scorer has open at the same time."""


class VlmAlignmentOptions(RewardOptions):
    """Reward `vlm_alignment`, the paper's text alignment: sentence similarity of the prompt and of a caption written by
    a vision-language model. It needs `captioner` or `endpoint`."""

    NEEDS: ClassVar[str] = "`rewards.vlm_alignment.captioner` or `rewards.vlm_alignment.endpoint`"

    captioner: LocalPath | None = None
    """Folder or hub id of a vision-language model that runs in the scorer. It has no default, because the version used
    in the paper is not known."""

    captioner_revision: str | None = None
    """Full commit (40 hex digits) of the captioner's hub id."""

    endpoint: EndpointSection | None = None

    instruction: Annotated[str, Field(min_length=1)] = "Describe this image in one sentence."
    """Question that a chat model answers with the caption."""

    max_caption_tokens: Annotated[int, Field(ge=1, le=1000)] = 64
    """Maximum length of a caption in tokens; longer ones are cut."""

    sentence_encoder: LocalPath = "sentence-transformers/all-MiniLM-L6-v2"
    """Folder or hub id of the model that embeds prompt and caption; it must use mean pooling over tokens."""

    sentence_encoder_revision: str | None = "c9745ed1d9f207416be6d2e6f8de32d1f16199bf"
    """Full commit (40 hex digits) of the sentence encoder's hub id."""

    @property
    def fault(self) -> str:
        return (
            ""
            if self.captioner or self.endpoint
            else "`rewards.vlm_alignment` must have a `captioner` (a folder or a hub id), or an `endpoint`"
        )

    @model_validator(mode="after")
    def _is_pinned(self) -> "VlmAlignmentOptions":
        if self.captioner and self.endpoint:
            raise ValueError("`captioner` and `endpoint` must not be given together; leave out one")
        models = {"sentence_encoder": (self.sentence_encoder, self.sentence_encoder_revision)}
        if self.captioner:
            models["captioner"] = (self.captioner, self.captioner_revision)
        for key, (place, revision) in models.items():
            check_pinned(place, revision, key=key, revision_key=f"{key}_revision", kind="folder")
        return self


class VisionLanguageOptions(RewardOptions):
    """A vision-language model that answers questions about images: `checkpoint` or `endpoint`."""

    NAME: ClassVar[str]
    """Name of the reward."""

    checkpoint: LocalPath | None = None
    """Folder or hub id of a vision-language chat model of transformers, which runs in the scorer."""

    revision: str | None = None
    """Full commit (40 hex digits) of a hub id."""

    endpoint: EndpointSection | None = None

    @property
    def fault(self) -> str:
        if self.checkpoint or self.endpoint:
            return ""
        return f"`rewards.{self.NAME}` must have a `checkpoint` (a folder or a hub id), or an `endpoint`"

    @model_validator(mode="after")
    def _is_pinned(self) -> "VisionLanguageOptions":
        if self.checkpoint and self.endpoint:
            raise ValueError("`checkpoint` and `endpoint` must not be given together; leave out one")
        if self.checkpoint:
            check_pinned(self.checkpoint, self.revision, key="checkpoint", revision_key="revision", kind="folder")
        return self


class VlmJudgeOptions(VisionLanguageOptions):
    """Reward `vlm_judge`: a vision-language model rates images, or chooses between two. It needs `checkpoint` or
    `endpoint`."""

    NAME: ClassVar[str] = "vlm_judge"
    NEEDS: ClassVar[str] = "`rewards.vlm_judge.checkpoint` or `rewards.vlm_judge.endpoint`"

    mode: Literal["rating", "yes_no", "pairwise"] = "rating"
    """Question to the model. `rating`: a number on `scale`. `yes_no`: whether the image shows the prompt; the score
    is the probability of "yes" (VQAScore, arXiv:2404.01291). `pairwise`: which of two images of a prompt is better, in
    both orders; the scores are Bradley-Terry strengths in logits, whose mean is 0 for each prompt. They rank training
    images; an evaluation cannot use them, because they compare images of one model only."""

    read: Literal["probabilities", "json"] = "probabilities"
    """How an answer is read. `probabilities`: from the probabilities of its first token, as the expected rating or the
    probability of a choice. `json`: from the text of a JSON object, for servers without `logprobs`; scores then take
    few values, and equal scores form no pairs."""

    question: Annotated[str, Field(min_length=1)] | None = None
    """Question to the model, in which `{prompt}` stands for the prompt. `null`: the mode's question; see
    `docs/guides/rewards.md`."""

    scale: tuple[Annotated[int, Field(ge=0, le=9)], Annotated[int, Field(ge=0, le=9)]] = (1, 5)
    """Lowest and highest rating for `mode: rating`. Each must be one digit, because a number with two digits may be two
    tokens."""

    opponents: Annotated[int, Field(ge=2, multiple_of=2)] | None = None
    """Number of other images of the prompt that `mode: pairwise` compares each image with. `null`: all, which takes N
    (N - 1) questions for N images; a number k takes N k questions."""

    @property
    def whole_prompts(self) -> bool:
        return self.mode == PAIRWISE

    @model_validator(mode="after")
    def _options_fit_the_mode(self) -> "VlmJudgeOptions":
        for key, mode in (("scale", "rating"), ("opponents", "pairwise")):
            if self.mode != mode and getattr(self, key) != type(self).model_fields[key].default:
                raise ValueError(f"`{key}` belongs to `mode` {mode!r}, got {self.mode!r}; leave it out")
        if self.scale[0] >= self.scale[1]:
            raise ValueError(f"`scale` must be the lowest and the highest rating, got {list(self.scale)}")
        if self.question is not None and "{prompt}" not in self.question:
            raise ValueError("`question` must contain {prompt}, which stands for the prompt")
        return self


class VqaOptions(VisionLanguageOptions):
    """Reward `vqa`: share of questions about an image that a vision-language model answers correctly. It needs
    `questions`, and `checkpoint` or `endpoint`."""

    NAME: ClassVar[str] = "vqa"
    NEEDS: ClassVar[str] = "`rewards.vqa.questions`"

    questions: LocalPath | None = None
    """JSONL file with each prompt's questions and their correct answers; GenEval2's layout is supported too. `cdpo
    questions` lets the endpoint's model write the file."""

    read: Literal["json", "probabilities"] = "json"
    """How an answer is read. `json`: as text, which is compared with the correct answer. `probabilities`: as the
    probability that it begins with the correct answer, so that the score is the expected share (Soft-TIFA,
    arXiv:2512.16853). Correct answers must then be yes, no, a number from 0 to 9, or a word that is one token."""

    @property
    def fault(self) -> str:
        missing = "`rewards.vqa.questions` is missing: a JSONL file of questions; `cdpo questions` writes one"
        return super().fault or ("" if self.questions else missing)


class JpegSizeOptions(RewardOptions):
    """Reward `jpeg_size`: kilobytes of the image as JPEG, beyond those of a blank image. Needs no model and is easy to
    hack, so it serves as a control."""

    quality: Annotated[int, Field(ge=1, le=100)] = 90
    """JPEG quality."""


class PerturbationOptions(Section):
    """Reward `perturbation`: images are generated from increasingly masked prompts, and less masking is better. It
    ranks without a judge (arXiv:2602.13055)."""

    max_masked_fraction: Annotated[float, Field(gt=0, le=1)] = 0.9
    """Share of prompt tokens that are masked for the last image of a prompt. The prompt of the first image is unmasked;
    the shares of the others are evenly spaced in between."""


def options_without_choices(name: str, recorded: Any) -> dict[str, Any]:
    """Options of a judge as recorded by an untrusted run, if they select no address, variable, file, model or code.

    Numbers and choices may have any value that the section allows; every other option must have its default, and the
    judge must not have a required option.

    Raises:
        ValueError: an option selects something, or is invalid; the reason completes "reward `name` ...".
    """
    if name not in REWARDS:
        raise ValueError("is a user-defined function")
    field = RewardsSection.model_fields.get(name)
    kind: Any = field.annotation if field else RewardOptions
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
    if kind.NEEDS:
        raise ValueError(f"needs {kind.NEEDS}, which another run may not choose")
    return options.model_dump()


class RewardsSection(Section):
    """Judges that score training images, and how their scores rank the images of a prompt."""

    names: Annotated[tuple[ScoreName, ...], Field(min_length=1)]
    """Rewards to compute: built-in (`clip`, `hpsv2`, `hpsv3`, `imagereward`, `pickscore`, `unifiedreward`, `aesthetic`,
    `ocr`, `vlm_alignment`, `vlm_judge`, `vqa`, `jpeg_size`, `oracle`, `oracle_strict`), your own `module:function`,
    `perturbation`, or `preference` (labels of imported data). More can be added to a finished run."""

    rank_by: RankingName | None = None
    """How images are ranked: by one of `names`, or by a combination. `weighted_sum`: weighted sum of scores that are
    standardised within the prompt. `mean_rank`: mean of the ranks. `pareto`: non-dominated fronts. `null`: the first of
    `names`."""

    weights: Annotated[dict[str, float], Field(default_factory=dict)]
    """Weight of each reward for `rank_by: weighted_sum`; 1 if not given. 0 excludes a reward; a negative weight prefers
    low scores."""

    arguments: Annotated[dict[str, dict[str, Any]], Field(default_factory=dict)]
    """Keyword arguments of your own rewards, by `module:function`. A class is instantiated with them; a function gets
    them in each call. Files that they name are not compared when a run is resumed."""

    noise_prompts: Annotated[int, Field(ge=0)] = 0
    """Number of prompts whose images are scored twice, the second time in different batches, to measure the noise of
    the rewards; for example 32. Required for `curriculum.min_gap_in_noise`."""

    placement: Literal["fused", "pool"] = "fused"
    """Where new images are scored. `fused`: in the generating actors, so that images are not moved. `pool`: in separate
    actors (`resources.scorers`), for judges that do not fit into GPU memory beside the model."""

    max_bad_fraction: Annotated[float, Field(ge=0, le=1)] = 0.01
    """Maximum share of scores that are not finite; above it, the step `pairs` fails. Images with such scores form no
    pairs."""

    clip: ClipOptions = ClipOptions()
    hpsv2: HpsV2Options = HpsV2Options()
    hpsv3: HpsV3Options = HpsV3Options()
    imagereward: ImageRewardOptions = ImageRewardOptions()
    pickscore: PickScoreOptions = PickScoreOptions()
    unifiedreward: UnifiedRewardOptions = UnifiedRewardOptions()
    aesthetic: AestheticOptions = AestheticOptions()
    vlm_alignment: VlmAlignmentOptions = VlmAlignmentOptions()
    vlm_judge: VlmJudgeOptions = VlmJudgeOptions()
    vqa: VqaOptions = VqaOptions()
    jpeg_size: JpegSizeOptions = JpegSizeOptions()
    perturbation: PerturbationOptions = PerturbationOptions()

    @model_validator(mode="before")
    @classmethod
    def _may_be_names_alone(cls, given: Any) -> Any:
        return {"names": given} if isinstance(given, list | tuple) else given

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
                f"`rank_by` {self.rank_by!r} needs at least two rewards with a weight, got"
                f" {list(self.ranking_weights)}; add more to `names`"
            )
        return self

    @property
    def ranking_reward(self) -> str:
        """Name of the reward or combination that ranks."""
        return self.rank_by or self.names[0]

    @property
    def ranking_weights(self) -> dict[str, float]:
        return ranking_weights(dict(self))

    @property
    def ranking_sentence(self) -> str:
        """Ranking rule in one line."""
        if self.rank_by not in COMBINATIONS:
            return self.ranking_reward
        weighted = self.rank_by == "weighted_sum"
        parts = [f"{weight:g} {name}" if weighted else name for name, weight in self.ranking_weights.items()]
        return f"{self.rank_by} of {', '.join(parts)}"

    @property
    def max_masked_fraction(self) -> float | None:
        """Option of `perturbation`; `None`: it is not among `names`, and prompts are not masked."""
        return self.perturbation.max_masked_fraction if PERTURBATION in self.names else None

    @property
    def judges(self) -> dict[str, dict[str, Any]]:
        """Rewards that look at images, each with the keyword arguments of its class."""
        return {name: self.options(name) for name in self.names if name not in JUDGE_NO_IMAGE}

    @property
    def judges_of_one_image(self) -> dict[str, dict[str, Any]]:
        """`judges` whose score of an image does not depend on the other images of its prompt."""
        return {name: options for name, options in self.judges.items() if not self.needs_whole_prompts(name)}

    def needs_whole_prompts(self, name: str) -> bool:
        """See `RewardOptions.whole_prompts`."""
        section = self._section(name)
        return isinstance(section, RewardOptions) and section.whole_prompts

    def options(self, name: str, *, again: bool = False) -> dict[str, Any]:
        """Keyword arguments of one reward's class.

        Args:
            again: for a second scoring, which measures noise: kept answers of an endpoint must not be used.
        """
        section = self._section(name)
        found = section.model_dump(mode="json") if section else dict(self.arguments.get(name, {}))
        if again and section and found.get("endpoint"):
            found["endpoint"] |= {"reuse": False}
        return found

    def fault(self, name: str) -> str:
        """Why a reward cannot be used with its options; empty: it can."""
        section = self._section(name)
        return section.fault if isinstance(section, RewardOptions) else ""

    def _section(self, name: str) -> Section | None:
        return getattr(self, name, None) if name in (*REWARDS, PERTURBATION) else None
