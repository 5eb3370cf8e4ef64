"""How far a run is: told once by each step, then to all that watch."""

from cdpo_ray.progress.progress import Progress

__all__ = ["Progress"]
