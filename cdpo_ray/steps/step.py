"""A step of the pipeline, and the input of every step."""

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
    """Input of every step.

    Attributes:
        round: 1-based.
        run: the round's folder.
        previous: folder of the previous round; ``None``: this is the first.
        progress: receives the step's progress.
        validation: how to measure the policy at the end of each stage; ``None``: not measured.
        on_stage: called with the summary of each stage that has ended.
        gpu: GPU that costs are estimated for.
        place: path of the round's folder within that of the command, as text with a slash; empty: they are the same, or
            the progress counts rounds.
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
    place: str = ""

    @functools.cached_property
    def workload(self) -> Workload | None:
        """Input of cost estimates; ``None``: the model's footprint is unknown, or assumed from another model.

        The footprint of a folder with an unknown architecture is counted, once per process.
        """
        try:
            load, known = workload_of(self.config, self.prompts, self.gpu)
        except ModelError as error:
            log.warning("cost not estimated: %s", error)
            return None
        return None if known.is_assumed else load

    def compiles(self, verb: Verb) -> bool:
        """Value that ``model.compile`` 'auto' resolves to for a step."""
        if self.config.model.compile != "auto" or not self._runs_on_gpu(verb) or self.workload is None:
            return False
        return pays_to_compile(self.workload, verb)

    def predicted(self, verb: str) -> dict[str, Any] | None:
        """Estimate, see `records.PREDICTED`; ``None``: the step runs on CPUs, or the model's footprint is unknown."""
        model = self.config.model
        if verb not in VERBS or not self._runs_on_gpu(verb) or not known_footprint(model.family, model.layout.path):
            return None
        found = self.workload and estimate(self.workload).step(verb)
        return {"gpu": self.gpu.name, "seconds": round(found.wall_seconds)} if found else None

    def _runs_on_gpu(self, verb: str) -> bool:
        resources = self.config.resources
        return bool(resources.trainers.gpus_per_worker if verb == "train" else resources.generators.gpus_per_actor)

    @property
    def seed(self) -> int:
        """Seed of generation; each round has its own."""
        return self._in_round(self.config.run.seed)

    @property
    def training_seed(self) -> int:
        """Seed of pairs and training; each round has its own."""
        given = self.config.training.seed
        return self._in_round(self.config.run.seed if given is None else given)

    def _in_round(self, seed: int) -> int:
        from cdpo_ray.randomness.numbers import seed_of

        return seed if self.round == 1 else seed_of(seed, "round", self.round)

    @property
    def start_dir(self) -> str | None:
        """Path of the previous round's `4-training`."""
        return str(self.previous.step(TRAINING).resolve()) if self.previous else None


@dataclass(frozen=True)
class Step:
    """A step of the pipeline; it is skipped if a manifest with the same settings and inputs exists.

    Attributes:
        settings: config values that its outcome depends on.
        inputs: folders of earlier steps that it reads.
        resumable: reuses the finished parts of an interrupted attempt.
        continues: reads the previous round's `4-training`.
        grows: each setting is an independent part, which can be added later.
        scratch: subfolders that it resumes from; deleted once the step's folder is in place.
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
        """Fingerprints of the files that it reads, by folder; of the scores, only those that rank.

        Raises:
            StoreError: an earlier step is not finished, or lacks the scores that rank.
        """
        read = {SCORES: ranking_files(config)}
        found = {folder: run.fingerprint(folder, read.get(folder)) for folder in self.inputs}
        if previous and self.continues:
            found["the round before"] = previous.fingerprint(TRAINING)
        return found

    def refuse_damaged_inputs(self, config: Config, run: RunFolder, previous: RunFolder | None = None) -> None:
        """Verify the files of `fingerprints`, except those that this process has written or verified already.

        Raises:
            StoreError: a file is missing, altered or added.
        """
        for folder in self.inputs:
            run.refuse_damage(folder, ranking_files(config) if folder == SCORES else None, once=True)
        if previous and self.continues:
            previous.refuse_damage(TRAINING, once=True)
