"""Stage -> admitted levels of difficulty -> their rank gaps."""

ORDERED = ("easy_to_hard", "hard_to_easy")
"""Orders whose stages depend on the measured difficulty of pairs."""


def admitted_levels(
    stage: int, num_stages: int, *, order: str = "easy_to_hard", pacing: str = "cumulative", window: int | None = None
) -> tuple[int, int]:
    """First and last level of a stage, both inclusive; there are as many levels as stages, level 1 is the easiest.

    Args:
        stage: number of the stage, 1 to ``num_stages``.
        num_stages: number of stages and levels.
        order: ``hard_to_easy`` mirrors ``easy_to_hard``; ``random`` has the levels of ``easy_to_hard``; in any other
            order every stage has all levels.
        pacing: ``cumulative`` adds one level per stage, ``one_stage`` uses one, ``sliding_window`` the last ``window``.
        window: number of levels, >= 1; only with ``sliding_window``.

    Raises:
        ValueError: if the stage does not exist, or a sliding window has no width.

    Source: arXiv:2405.13637 (easy to hard, cumulative).
    """
    if not 1 <= stage <= num_stages:
        raise ValueError(f"`stage` must be in 1..{num_stages}, got {stage}")
    if order not in (*ORDERED, "random"):
        return 1, num_stages
    width = {"cumulative": stage, "one_stage": 1, "sliding_window": window}[pacing]
    if width is None:
        raise ValueError("`window` must be given for a sliding window, got None")
    first, last = max(1, stage - width + 1), stage
    return (num_stages + 1 - last, num_stages + 1 - first) if order == "hard_to_easy" else (first, last)


def new_level(stage: int, num_stages: int, *, order: str = "easy_to_hard") -> int | None:
    """Level that a stage is the first to admit; `None`: every stage has all levels.

    Args:
        stage: number of the stage, 1 to ``num_stages``.
        num_stages: number of stages and levels.
        order: as in `admitted_levels`.
    """
    if order not in (*ORDERED, "random"):
        return None
    return num_stages + 1 - stage if order == "hard_to_easy" else stage


def admitted_gaps(
    num_ranks: int, num_levels: int, first_level: int, last_level: int, *, min_gap: int = 1
) -> tuple[int, int]:
    """Smallest and largest rank gap of a range of levels, both inclusive.

    Level ``k`` of ``B`` holds the gaps in ``(L_k, R_k]``, ``L_k = (M-1)(B-k)/B``, ``R_k = (M-1)(B-k+1)/B``, for ``M``
    ranks: large gaps, the easy pairs, first. Every gap from 1 to ``M-1`` belongs to exactly one level; no level is
    empty. If gaps below ``min_gap`` are left out, the levels divide the others: ``L_k = (M-min_gap)(B-k)/B +
    min_gap - 1``.

    Args:
        num_ranks: number of ranked images per prompt, ``M``.
        num_levels: number of levels, ``B``, 1 to ``M - min_gap``; 5 in the paper.
        first_level, last_level: range of levels, ``1 <= first_level <= last_level <= B``.
        min_gap: smallest rank gap that forms a pair, >= 1.

    Raises:
        ValueError: if there are more levels than rank gaps, or the levels do not exist.

    Source: arXiv:2405.13637.
    """
    if num_levels < 1:
        raise ValueError(f"`num_levels` must be >= 1, got {num_levels}")
    if num_levels > num_ranks - min_gap:
        raise ValueError(
            f"`num_stages` is {num_levels}, but {num_ranks} images per prompt have only {max(num_ranks - min_gap, 0)}"
            f" rank gaps of at least {min_gap}; lower it, or raise the images per prompt"
        )
    if not 1 <= first_level <= last_level <= num_levels:
        raise ValueError(f"levels must be in 1..{num_levels}, first to last, got {first_level}..{last_level}")
    smallest, above = (
        smallest_gap(num_ranks, num_levels, level, min_gap=min_gap) for level in (last_level, first_level - 1)
    )
    return smallest, above - 1


def smallest_gap(num_ranks: int, num_levels: int, level: int, *, min_gap: int = 1) -> int:
    """Smallest rank gap of levels 1 to ``level``, ``floor(L_k) + 1``; for level 0 ``num_ranks``, one past the largest.

    Arguments are not checked: with more levels than gaps, as for a prompt with unranked images, each gap still belongs
    to one level, and some levels are empty.
    """
    return max(num_ranks - min_gap, 0) * (num_levels - level) // num_levels + min_gap


def count_pairs(num_ranks: int, min_gap: int, max_gap: int) -> int:
    """Number of pairs of ``M`` ranks with a rank gap in ``min_gap .. max_gap``; ``M - g`` pairs have the gap ``g``."""
    first, last = max(min_gap, 1), min(max_gap, num_ranks - 1)
    return max(last - first + 1, 0) * (2 * num_ranks - first - last) // 2
