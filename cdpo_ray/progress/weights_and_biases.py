"""Metrics, images and reports -> a run of Weights & Biases, with files in ``<run>/wandb`` (``./wandb`` for a store)."""

import io
import secrets
from collections.abc import Mapping, Sequence
from typing import Any

import wandb
from PIL import Image

from cdpo_ray.progress.trackers import Images, Metrics, TrackedRun
from cdpo_ray.store import is_local

EXIT_CODES = {"ended": 0, "failed": 1, "stopped": 255}
"""Exit codes of W&B's own exit hook, which its server shows as finished, failed and killed."""


class WeightsAndBiases:
    """Each step has its own x-axis, because W&B's own step counts across all of them.

    Args:
        options: `project`, `entity` and `mode`. W&B reads WANDB_API_KEY from the environment.
        run_id: id of the W&B run to resume, if any.
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
            # upload neither the command line, nor the host's environment, nor the output
            settings=wandb.Settings(console="off", silent=True, x_disable_meta=True, disable_git=True, save_code=False),
        )
        self._steps: set[str] = set()

    def begin(self, step: str, index: int) -> None:
        self._run.define_metric(f"{step}/at", hidden=True)
        self._run.define_metric(f"{step}/*", step_metric=f"{step}/at")
        self._steps.add(step)

    def log(self, metrics: Sequence[Metrics]) -> None:
        for entry in metrics:
            self._log(entry, entry.values)

    def log_images(self, images: Images) -> None:
        shown = [wandb.Image(Image.open(io.BytesIO(png)), caption=prompt) for prompt, png in images.pngs.items()]
        self._log(images, {"preview": shown})

    def log_page(self, name: str, page: bytes) -> None:
        shown = wandb.Html(page.decode(), inject=False, data_is_not_path=True)
        self._run.log({name.removesuffix(".html"): shown})

    def close(self, state: str) -> None:
        self._run.finish(exit_code=EXIT_CODES[state])

    def _log(self, entry: Metrics | Images, values: Mapping[str, Any]) -> None:
        if entry.step not in self._steps:
            self.begin(entry.step, entry.index)
        named = {f"{entry.step}/{name}": value for name, value in values.items()}
        self._run.log({**named, f"{entry.step}/at": entry.index})
