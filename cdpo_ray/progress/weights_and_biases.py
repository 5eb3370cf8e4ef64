"""Points -> a run of Weights & Biases, kept in ``<run>/wandb`` (``./wandb``, if that is in an object store)."""

import secrets
from collections.abc import Mapping, Sequence
from typing import Any

import wandb

from cdpo_ray.progress.trackers import Metrics, TrackedRun
from cdpo_ray.store import is_local

EXIT_CODES = {"ended": 0, "failed": 1, "stopped": 255}
"""What W&B's own exit hook gives, and its server shows as finished, failed and killed."""


class WeightsAndBiases:
    """Steps have an axis each: W&B's own counts through all of them.

    Args:
        options: `project`, `entity`, `mode`. The key is WANDB_API_KEY of the environment, which W&B reads.
    """

    def __init__(self, run: TrackedRun, options: Mapping[str, Any], run_id: str | None) -> None:
        self.run_id = run_id or secrets.token_hex(8)
        self._run = wandb.init(
            project=options["project"],
            entity=options.get("entity"),
            mode=options["mode"],
            name=run.name,
            id=self.run_id,
            resume="allow",
            dir=str(run.dir) if is_local(run.dir) else None,
            config=dict(run.settings),
            # neither the command line, nor the host's environment, nor what is printed
            settings=wandb.Settings(console="off", silent=True, x_disable_meta=True, disable_git=True, save_code=False),
        )
        self._places: set[str] = set()

    def begin(self, place: str, at: int) -> None:
        self._run.define_metric(f"{place}/at", hidden=True)
        self._run.define_metric(f"{place}/*", step_metric=f"{place}/at")
        self._places.add(place)

    def log(self, points: Sequence[Metrics]) -> None:
        for point in points:
            if point.place not in self._places:
                self.begin(point.place, point.at)
            values = {f"{point.place}/{name}": value for name, value in point.values.items()}
            self._run.log({**values, f"{point.place}/at": point.at})

    def close(self, state: str) -> None:
        self._run.finish(exit_code=EXIT_CODES[state])
