"""What a step is, and what every one of them is given."""

import functools
import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cdpo_ray.config import Config
from cdpo_ray.cost.estimate import VERBS, Verb, Workload, estimate, pays_to_compile
from cdpo_ray.cost.gpus import DEFAULT_GPU, Gpu
from cdpo_ray.cost.published import known_footprint
from cdpo_ray.errors import ModelError
from cdpo_ray.progress import Progress
from cdpo_ray.prompts.sources import PromptSplit
from cdpo_ray.records import SCORES, TRAINING
from cdpo_ray.steps.arguments import ranking_files
from cdpo_ray.steps.cost import workload_of
from cdpo_ray.store import RunFolder, StepOutput
from cdpo_ray.training.job import ValidationJob

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Context:
    """What every step is given.

    Attributes:
        round: 1-based.
        run: the round's folder.
        previous: folder of the round before.
        progress: told how far the step is.
        validation: how the policy is measured at each stage's end.
        on_stage: called with the summary of each stage that has ended.
        gpu: to estimate costs for.
    """

    config: Config
    prompts: PromptSplit
    run: RunFolder
    round: int = 1
    previous: RunFolder | None = None
    progress: Progress = field(default_factory=Progress)
    validation: ValidationJob | None = None
    on_stage: Callable[[dict[str, Any]], Any] = lambda summary: None
    gpu: Gpu = DEFAULT_GPU

    @functools.cached_property
    def workload(self) -> Workload | None:
        """Input of the estimates; ``None``: the model's footprint is unknown, or assumed from another model.

        A folder with an architecture of its own is counted, once per process.
        """
        try:
            load, known = workload_of(self.config, self.prompts, self.gpu)
        except ModelError as error:
            log.warning("cost not estimated: %s", error)
            return None
        return None if known.is_assumed else load

    def compiles(self, verb: Verb) -> bool:
        """What ``model.compile`` 'auto' means for a step: whether it compiles the denoiser."""
        if self.config.model.compile != "auto" or not self._runs_on_gpu(verb) or self.workload is None:
            return False
        return pays_to_compile(self.workload, verb)

    def predicted(self, verb: str) -> dict[str, Any] | None:
        """Estimate of a step that runs on GPUs, see `records.PREDICTED`; no model is counted for it."""
        model = self.config.model
        if verb not in VERBS or not self._runs_on_gpu(verb) or not known_footprint(model.family, model.path):
            return None
        found = self.workload and estimate(self.workload).step(verb)
        return {"gpu": self.gpu.name, "seconds": round(found.wall_seconds)} if found else None

    def _runs_on_gpu(self, verb: str) -> bool:
        resources = self.config.resources
        return bool(resources.trainers.gpus_per_worker if verb == "train" else resources.generators.gpus_per_actor)

    @property
    def seed(self) -> int:
        """What generation draws from; each round has its own."""
        return self._in_round(self.config.run.seed)

    @property
    def training_seed(self) -> int:
        """What pairs and training draw from; each round has its own."""
        given = self.config.training.seed
        return self._in_round(self.config.run.seed if given is None else given)

    def _in_round(self, seed: int) -> int:
        from cdpo_ray.randomness.numbers import seed_of

        return seed if self.round == 1 else seed_of(seed, "round", self.round)

    @property
    def start_dir(self) -> str | None:
        """What the round before trained."""
        return str(self.previous.step(TRAINING).resolve()) if self.previous else None


@dataclass(frozen=True)
class Step:
    """A part of the way: what it depends on decides whether it has been done already.

    Attributes:
        settings: the configuration's values that its outcome depends on.
        inputs: folders of earlier steps that it reads.
        resumable: goes on with what an interrupted attempt left.
        continues: reads what the round before trained.
        grows: each setting is a part of its own, which can be added when others are done.
        scratch: folders in its own that it is resumed from; deleted once it is in place.
    """

    verb: str
    folder: str
    settings: Callable[[Config], dict[str, Any]]
    inputs: tuple[str, ...]
    perform: Callable[[Context, Path, StepOutput], None]
    resumable: bool = False
    continues: bool = False
    grows: bool = False
    scratch: tuple[str, ...] = ()

    def fingerprints(self, config: Config, run: RunFolder, previous: RunFolder | None = None) -> dict[str, str]:
        """What tells the files that it reads from others; of the scores it reads only those that rank.

        Raises:
            StoreError: a step before is not done, or has not scored what ranks.
        """
        read = {SCORES: ranking_files(config)}
        found = {folder: run.fingerprint(folder, read.get(folder)) for folder in self.inputs}
        if previous and self.continues:
            found["the round before"] = previous.fingerprint(TRAINING)
        return found

    def refuse_damaged_inputs(self, config: Config, run: RunFolder, previous: RunFolder | None = None) -> None:
        """Read the files that `fingerprints` tells, but for those that this process has written or verified.

        Raises:
            StoreError: a file is missing, altered or added.
        """
        for folder in self.inputs:
            run.refuse_damage(folder, ranking_files(config) if folder == SCORES else None, once=True)
        if previous and self.continues:
            previous.refuse_damage(TRAINING, once=True)
