"""Choices between two images -> strengths of the images, and the judge's preference for a position."""

import numpy as np
from numpy.typing import NDArray

SMOOTHING = 0.05
"""Added to the probability of both outcomes of each choice, so that an image that always wins has a finite strength: a
certain choice counts as 21 to 1."""
MAX_STEPS, TOLERANCE = 100, 1e-10


def bradley_terry(preferred: NDArray[np.float64]) -> tuple[NDArray[np.float64], float]:
    """Maximum-likelihood strengths of images that were compared in pairs.

    The log odds that the image shown first is preferred are ``strength[first] - strength[second] + position``. A judge
    that favours a position changes ``position``, not the strengths, if pairs are shown in both orders.

    Args:
        preferred: ``[image, image]``, probability that the row's image, shown first, is preferred to the column's,
            shown second; NaN: not asked, or not answered.

    Returns:
        strengths: ``[image]`` in log odds, their mean is 0; NaN for images that no choices connect with most others.
        position: log odds with which the first of two equal images is preferred; NaN without choices.

    Source: Bradley and Terry, Biometrika 39 (1952); Davidson and Beaver, Biometrics 33 (1977), for the position.
    """
    strengths = np.full(len(preferred), np.nan)
    images = _connected(np.isfinite(preferred) & ~np.eye(len(preferred), dtype=bool))
    if len(images) < 2:
        return strengths, float("nan")
    given = preferred[np.ix_(images, images)]
    first, second = np.nonzero(np.isfinite(given) & ~np.eye(len(images), dtype=bool))
    target = (given[first, second] + SMOOTHING) / (1 + 2 * SMOOTHING)
    design = np.zeros((len(first), len(images) + 1))
    rows = np.arange(len(first))
    design[rows, first], design[rows, second], design[:, -1] = 1, -1, 1

    def loss(at: NDArray[np.float64]) -> float:
        log_odds = design @ at
        return float((np.logaddexp(0, log_odds) - target * log_odds).sum())

    found = np.zeros(len(images) + 1)
    for _ in range(MAX_STEPS):  # Newton's method; the loss is convex
        probability = 1 / (1 + np.exp(-(design @ found)))
        gradient = design.T @ (probability - target)
        curvature = design.T @ (design * (probability * (1 - probability))[:, None])
        # Adding a constant to all strengths changes nothing: the shortest step keeps their mean at 0.
        step = np.linalg.lstsq(curvature, gradient, rcond=1e-12)[0]
        size = 1.0
        while loss(found - size * step) > loss(found) and size > TOLERANCE:
            size /= 2
        found = found - size * step
        if np.abs(step).max() < TOLERANCE:
            break
    strengths[images] = found[:-1] - found[:-1].mean()
    return strengths, float(found[-1])


def _connected(compared: NDArray[np.bool_]) -> NDArray[np.intp]:
    """The largest set of images that are compared with each other, directly or through others."""
    reached = compared | compared.T | np.eye(len(compared), dtype=bool)
    while (further := (reached.astype(np.int64) @ reached) > 0).sum() > reached.sum():
        reached = further
    return np.flatnonzero(reached[reached.sum(axis=1).argmax()])
