"""Records of updates -> alarm when the policy's error on chosen images rises above the reference's."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from cdpo_ray.config.training import HealthSection


@dataclass(frozen=True)
class Alarm:
    """A comparison that exceeded the bound.

    Attributes:
        update: last of the compared updates.
        error_rise: see `error_rise`.
    """

    update: int
    error_rise: float


def error_rise(records: Sequence[Mapping[str, float]], *, last: int, window: int) -> float | None:
    """Rise of the error on chosen images from the reference to the policy, as a share of the reference's.

    ``mean(policy_error_w - reference_error_w) / mean(reference_error_w)`` over the ``window`` updates up to ``last``. A
    ratio of means, because the size of an error depends on its timestep. ``None``: all of them were skipped.
    """
    recent = [record for record in records if last - window < record["update"] <= last]
    reference = sum(record["reference_error_w"] for record in recent)
    change = sum(record["policy_error_w"] - record["reference_error_w"] for record in recent)
    return change / reference if reference else None


def highest_error_rise(records: Sequence[Mapping[str, float]], *, num_updates: int, window: int) -> float | None:
    """Highest `error_rise` of all comparisons: every ``window`` updates and at the end."""
    ends = {*range(window, num_updates, window), num_updates}
    rises = [error_rise(records, last=end, window=window) for end in ends]
    return max((rise for rise in rises if rise is not None), default=None)


def alarm_sentence(alarms: Sequence[Alarm], health: HealthSection) -> str:
    """The alarms of a training in words, with what to do."""
    first, worst = alarms[0], max(alarm.error_rise for alarm in alarms)
    return (
        f"the error on chosen images exceeded the reference's by {100 * worst:.3g} %, first at update {first.update};"
        f" `training.health.max_error_rise` is {health.max_error_rise:g}; lower `training.learning_rate`, raise"
        " `training.beta` or set `training.safeguard`"
    )
