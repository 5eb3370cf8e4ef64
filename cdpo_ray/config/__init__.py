"""YAML -> Config: every key once, one section per step; imports neither torch nor ray."""

from cdpo_ray.config.data import PreferenceFormat, PromptSource
from cdpo_ray.config.model import Family
from cdpo_ray.config.reading import load_config, parse_yaml, validate
from cdpo_ray.config.rewards import (
    COMBINATIONS,
    JUDGE_NO_IMAGE,
    REWARDS,
    RewardsSection,
    VlmAlignmentOptions,
    VlmJudgeOptions,
    VqaOptions,
    missing_packages,
    options_without_choices,
    ranking_weights,
)
from cdpo_ray.config.search import SearchSection
from cdpo_ray.config.section import HUB_ID, nearest
from cdpo_ray.config.shipped import purpose_of, shipped_config, shipped_configs
from cdpo_ray.config.training import TrainingSection
from cdpo_ray.config.whole import Config, Pool

__all__ = [
    "COMBINATIONS",
    "HUB_ID",
    "JUDGE_NO_IMAGE",
    "REWARDS",
    "Config",
    "Family",
    "Pool",
    "PreferenceFormat",
    "PromptSource",
    "RewardsSection",
    "SearchSection",
    "TrainingSection",
    "VlmAlignmentOptions",
    "VlmJudgeOptions",
    "VqaOptions",
    "load_config",
    "missing_packages",
    "nearest",
    "options_without_choices",
    "parse_yaml",
    "purpose_of",
    "ranking_weights",
    "shipped_config",
    "shipped_configs",
    "validate",
]
