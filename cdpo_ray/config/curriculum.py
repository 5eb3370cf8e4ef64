"""The curriculum: which pairs each stage of training draws from."""

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, model_validator

from cdpo_ray.config.section import Section, check_name

PRESETS: dict[str, dict[str, Any]] = {
    "paper": {},
    "released-code": {"measure": "score_gap", "boundaries": "linear", "num_stages": 5},
    "plain-dpo": {"order": "none"},
}
"""Values of each preset that differ from the defaults, which are the paper's settings."""

RELEASED_MIN_SCORE_GAPS = {"hpsv2": 0.02, "vlm_alignment": 0.02, "aesthetic": 0.2}
RELEASED_MIN_SCORE_GAP = 0.1  # any other reward


DRAWN_BY = ("rank_gap", "score_gap", "score_gap_quantile")
"""Measures that are never negative, so that pairs can be drawn in proportion to them."""
MEASURE_NAMES = (*DRAWN_BY, "margin")
"""Built-in measures; `cdpo_ray.curriculum.measures.MEASURES` maps each to its function."""


def _known_measure(name: str) -> str:
    return check_name(name, MEASURE_NAMES)


MeasureName = Annotated[str, AfterValidator(_known_measure), Field(json_schema_extra={"enum": [*MEASURE_NAMES]})]


class CurriculumSection(Section):
    """Which pairs are used in training, and in which order. The defaults are the paper's (arXiv:2405.13637)."""

    preset: Literal["paper", "released-code", "plain-dpo"] = "paper"
    """Defaults of the other keys; a key that is given overrides them. `paper`: as listed here. `released-code`: the
    authors' code (`measure: score_gap`, and a `min_score_gap` that depends on the reward). `plain-dpo`: no curriculum
    (`order: none`)."""

    measure: MeasureName = "rank_gap"
    """Difficulty of a pair; a large value is easy. `rank_gap`: difference of the two ranks within the prompt.
    `score_gap`: difference of the scores. `score_gap_quantile`: its quantile among all pairs. `margin`: DPO margin
    under the current policy, measured at the start of each stage. `module:function`: your own function, which takes
    pairs (`cdpo_ray.curriculum.pairs.PairArrays`) and returns one number per pair. Imported pairs all have the same
    rank gap, so they need another measure."""

    boundaries: Literal["linear", "equal_count"] = "linear"
    """How the measure is cut into levels. `linear`: equal widths (the paper); for score gaps, between the smallest and
    the largest that form a pair (the authors' code). `equal_count`: equal numbers of pairs; use it when linear levels
    are nearly empty. `measure: margin` requires it."""

    pacing: Literal["cumulative", "one_stage", "sliding_window"] = "cumulative"
    """Levels that a stage draws from. `cumulative`: levels 1 to k in stage k (the paper). `one_stage`: level k alone.
    `sliding_window`: the last `window` levels."""

    window: Annotated[int, Field(ge=1)] | None = None
    """Number of levels per stage with `pacing: sliding_window`, where it defaults to 2; not allowed otherwise."""

    order: Literal["easy_to_hard", "hard_to_easy", "random", "shuffled", "none", "best_against_worst"] = "easy_to_hard"
    """Order of the levels. `easy_to_hard`: as in the paper. All others are controls. `hard_to_easy`: the reverse.
    `random`: levels of the same sizes, filled without regard to difficulty. `shuffled`: the draws of `easy_to_hard` in
    random order. `none`: every stage draws from all pairs. `best_against_worst`: every stage draws from one pair per
    prompt, first rank against last."""

    draws: Literal["uniform", "by_measure"] = "uniform"
    """Probability of a pair within a stage. `uniform`: the same for all pairs (the paper). `by_measure`: proportional
    to the measure, so that easy pairs are drawn more often. Draws are with replacement."""

    num_margin_draws: Annotated[int, Field(ge=1)] | None = None
    """Number of (timestep, noise) draws that a margin is averaged over with `measure: margin`, where it defaults to 16;
    not allowed otherwise. More draws take time, but order pairs more reliably and average out the rounding of a 16-bit
    model. Each stage reports the reliability of its order, the expected rank correlation between two measurements. If
    it is below 0.8, a warning states the number of draws that would be enough."""

    num_stages: Annotated[int, Field(ge=1)] = 5
    """Number of stages and of levels. In the paper, 5 was the best of 3, 5 and 7. At most
    `generation.images_per_prompt` - 1 with `measure: rank_gap`."""

    updates_per_stage: Annotated[int, Field(ge=1)]
    """Number of optimizer updates per stage, each of `training.global_batch_size` pairs. Configurations of published
    models use 400."""

    min_rank_gap: Annotated[int, Field(ge=1)] = 1
    """Smallest rank gap of a pair; the levels divide the gaps from here on. Raise it to leave out close pairs, whose
    preference is unreliable. The paper's value is 1."""

    min_score_gap: Annotated[float, Field(ge=0)] = 0.0
    """Pairs must have a score gap above this value, in the unit of the ranking reward. With 0, only equal scores form
    no pair. Raise it to drop near ties; `preset: released-code` sets 0.02 (hpsv2, vlm_alignment), 0.2 (aesthetic) or
    0.1 (others)."""

    min_gap_in_noise: Annotated[float, Field(gt=0)] | None = None
    """Pairs must have a score gap above this multiple of the measured noise of score gaps, for example 2; needs
    `rewards.noise_prompts`. `null`: noise is ignored."""

    max_pairs_per_prompt: Annotated[int, Field(ge=1)] | None = None
    """Maximum number of candidate pairs per prompt in a stage, chosen at random; `null`: no limit. Set it if a few
    prompts have most of the pairs."""

    label_noise: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Probability that chosen and rejected of a drawn pair are swapped, for control experiments; 0.5 makes labels
    random."""

    @model_validator(mode="before")
    @classmethod
    def _apply_preset(cls, given: Any) -> Any:
        if not isinstance(given, dict):
            return given
        filled = PRESETS.get(str(given.get("preset")), {}) | given
        own = {"window": 2} if filled.get("pacing") == "sliding_window" else {}
        own |= {"num_margin_draws": 16} if filled.get("measure") == "margin" else {}
        return own | filled

    @model_validator(mode="after")
    def _check_combinations(self) -> "CurriculumSection":
        faults = []
        if self.window is not None and self.pacing != "sliding_window":
            faults.append(f"`window` belongs to `pacing` 'sliding_window', got {self.pacing!r}")
        if self.num_margin_draws is not None and self.measure != "margin":
            faults.append(f"`num_margin_draws` belongs to `measure` 'margin', got {self.measure!r}")
        if self.measure == "margin":
            if self.boundaries != "equal_count":
                faults.append(f"`measure` 'margin' needs `boundaries` 'equal_count', got {self.boundaries!r}")
            if self.order not in ("easy_to_hard", "hard_to_easy"):
                faults.append(
                    "`measure` 'margin' is measured during training, so `order` must be 'easy_to_hard' or"
                    f" 'hard_to_easy', got {self.order!r}"
                )
        if self.draws == "by_measure" and self.measure not in DRAWN_BY:
            faults.append(f"`measure` {self.measure!r} can be negative, so `draws` must be 'uniform', got 'by_measure'")
        if faults:
            raise ValueError("; ".join(faults))
        return self

    @property
    def cuts_by_rank_gap(self) -> bool:
        """Whether the number of rank gaps limits the number of stages."""
        return self.measure == "rank_gap" and self.order not in ("none", "best_against_worst")

    @property
    def sentence(self) -> str:
        """Summary of the section in one line."""
        parts = [f"{self.order}, {self.pacing}" + (f" of {self.window}" if self.window else "")]
        if self.order in ("none", "best_against_worst"):
            parts = [self.order]
        parts += [f"{self.measure}, {self.boundaries} boundaries", f"{self.draws} draws"]
        if self.min_rank_gap > 1:
            parts.append(f"rank gaps from {self.min_rank_gap}")
        if self.min_score_gap:
            parts.append(f"score gaps above {self.min_score_gap:g}")
        if self.min_gap_in_noise:
            parts.append(f"score gaps above {self.min_gap_in_noise:g} x their noise")
        if self.max_pairs_per_prompt:
            parts.append(f"at most {self.max_pairs_per_prompt} pairs per prompt")
        if self.label_noise:
            parts.append(f"{self.label_noise:.0%} of labels swapped")
        return f"{self.preset}: " + "; ".join(parts)
