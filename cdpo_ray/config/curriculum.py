"""The curriculum: what training is shown and when."""

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from cdpo_ray.config.section import Section

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
