"""Restricted draws of timesteps against their distributions."""

import math

import torch

from cdpo_ray.models.timesteps import TimestepRule
from cdpo_ray.randomness.noise import generator_at

NUM_DRAWS = 4000


def uniform_draws(rule: TimestepRule, timesteps: torch.Tensor) -> list[int]:
    return [int(rule.draw_from(timesteps, generator_at(0, "draw", number))) for number in range(NUM_DRAWS)]


def kolmogorov_distance(rule: TimestepRule, low: float, high: float) -> float:
    """Scaled distance between draws and the truncated logit-normal distribution; 1.95 at 99.9 %."""
    drawn = [float(rule.draw_logit_normal(generator_at(1, "draw", number))) for number in range(NUM_DRAWS)]
    assert low <= min(drawn) and max(drawn) <= high
    normal = torch.distributions.Normal(0.0, 1.0)
    bounds, logits = torch.logit(torch.tensor([low, high]) / 1000), torch.logit(torch.tensor(sorted(drawn)) / 1000)
    below, above = normal.cdf(bounds)
    expected = (normal.cdf(logits) - below) / (above - below)
    empirical = torch.arange(1, NUM_DRAWS + 1) / NUM_DRAWS
    return float((expected - empirical).abs().max()) * math.sqrt(NUM_DRAWS)


def test_a_range_keeps_the_timesteps_within_it_uniform() -> None:
    drawn = uniform_draws(TimestepRule(low=39, high=119), torch.arange(19, 1000, 20))
    counts = torch.bincount(torch.tensor(drawn))
    assert counts.nonzero().flatten().tolist() == [39, 59, 79, 99, 119]
    squares = (counts[counts > 0] - NUM_DRAWS / 5) ** 2 / (NUM_DRAWS / 5)
    assert squares.sum() < 18.5  # chi-squared test of 5 cells, 99.9 %


def test_a_list_replaces_the_familys_timesteps() -> None:
    rule = TimestepRule(listed=(249, 499, 749, 999))
    assert set(uniform_draws(rule, torch.arange(5))) == {249, 499, 749, 999}
    drawn = [rule.draw_logit_normal(generator_at(0, "draw", number)) for number in range(100)]
    assert {float(timestep) for timestep in drawn} == {249.0, 499.0, 749.0, 999.0}
    assert drawn[0].dtype == torch.float32


def test_flow_timesteps_are_logit_normal_over_all_times_and_truncated_in_a_range() -> None:
    assert kolmogorov_distance(TimestepRule(), 0, 1000) < 1.95
    assert kolmogorov_distance(TimestepRule(low=600, high=900), 600, 900) < 1.95
