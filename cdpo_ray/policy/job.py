"""The LoRA that a training worker makes the policy of: plain values, importable without torch."""

from dataclasses import dataclass

from cdpo_ray.curriculum.capacity import Capacity


@dataclass(frozen=True)
class LoraJob:
    """The LoRA to train; see `LoraSection` of the config for the bounds.

    Attributes:
        capacities: how much of it learns in each stage; none: all of it in every stage.
        from_output: blocks begin to learn in the order from output to input.
    """

    rank: int
    alpha: float
    targets: tuple[str, ...]
    capacities: tuple[Capacity, ...] = ()
    from_output: bool = False
