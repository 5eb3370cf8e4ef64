"""Progress of a run: each step reports it once; it goes to the bar, `status.json`, the log and the trackers."""

from cdpo_ray.progress.progress import Progress

__all__ = ["Progress"]
