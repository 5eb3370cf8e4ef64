"""Candidates of `cdpo judge`: config -> each one's own steps, whose samples are images of the held-out prompts."""

import functools
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cdpo_ray.config import Config
from cdpo_ray.config.judge import BASE, CandidateSection
from cdpo_ray.errors import ModelError, StoreError, printable
from cdpo_ray.models.folder import check_model
from cdpo_ray.prompts.sources import PromptSplit
from cdpo_ray.records import CANDIDATES, SAMPLES, SCORES, TRAINING
from cdpo_ray.steps.arguments import (
    model_arguments,
    model_sha256,
    prompts_sha256,
    sampling_of,
    sections_of,
    seed_setting,
    warn_of_quarantine,
    weights_sha256,
)
from cdpo_ray.steps.scores import score, score_settings
from cdpo_ray.steps.step import Context, Step
from cdpo_ray.store import RunFolder, StepOutput, count_rows, path_within, storage_path, write_tables

SAMPLES_FILE = "samples-000000000000.parquet"


@dataclass(frozen=True)
class Candidate:
    """A candidate, and its steps' input.

    Attributes:
        section: `None`: the base model.
        given: the configuration.
        config: the same, changed so that the candidate is a run: of its model, with the judges as rewards.
        folder: holds `1-samples` and `2-scores`, and `4-training` of an adapter.
    """

    name: str
    section: CandidateSection | None
    given: Config
    config: Config
    folder: RunFolder

    @property
    def key(self) -> str:
        """Config key of what it is, for errors."""
        return f"judge.candidates.{self.name}.{self.section.kind}" if self.section else "model.path"

    @property
    def images(self) -> Path | None:
        """Folder of images that were made elsewhere."""
        return Path(self.section.images) if self.section and self.section.images else None

    @property
    def adapter(self) -> str | None:
        """File or folder of an adapter."""
        return self.section.adapter if self.section else None

    @property
    def own_run(self) -> RunFolder | None:
        """Folder of the run that trained it."""
        return RunFolder(storage_path(self.section.run), foreign=True) if self.section and self.section.run else None

    @property
    def trained(self) -> RunFolder | None:
        """Folder with the `4-training` that is sampled; `None`: the model itself is."""
        return self.folder if self.adapter else self.own_run

    @property
    def steps(self) -> tuple[Step, ...]:
        """Its steps; all but the last two need no Ray."""
        settings = functools.partial(image_settings, candidate=self)
        samples = Step(f"generate {self.name}", SAMPLES, settings, (), generate_images, resumable=True)
        if self.images:
            perform = functools.partial(import_images, candidate=self)
            samples = Step(f"import {self.name}", SAMPLES, settings, (), perform)
        scores = Step(f"score {self.name}", SCORES, score_settings, (SAMPLES,), score, grows=True)
        if not self.adapter:
            return samples, scores
        convert = functools.partial(convert_adapter, candidate=self)
        adapter = functools.partial(adapter_settings, candidate=self)
        return Step(f"read {self.name}", TRAINING, adapter, (), convert), samples, scores

    def refuse_unusable(self, prompts: PromptSplit) -> None:
        """Refuse what can be known to be unusable without loading a model.

        Raises:
            CdpoError: a file is missing or damaged, a model is of another family, a run is not trained or has another
                base model, or images of a prompt are missing.
        """
        model = self.config.model
        if self.images:
            from cdpo_ray.evaluation.image_folder import find_images

            size_of(self.config)
            find_images(self.images, prompts.heldout, self.config.generation.images_per_prompt, key=self.key)
            return
        if self.section is None or self.section.model:
            check_model(model.family, **model_arguments(self.config))
        if self.adapter and not os.path.exists(self.adapter):
            raise ModelError(f"`{self.key}` {self.adapter}: no such file or folder; give a LoRA in safetensors")
        if not (run := self.own_run):
            return
        where = f"`{self.key}` {run.path}"
        if not run.has(TRAINING):
            raise StoreError(f"{where}: has no finished {TRAINING}; give the folder of a trained run, or of a round")
        run.refuse_damage(TRAINING)
        made = run.manifest(TRAINING)["settings"]
        theirs: dict[str, Any] = made.get("model", {})
        files = model_sha256(self.config).get("model.sha256", model.path)
        same_files = made.get("model.sha256", theirs.get("path")) == files
        if not same_files or (theirs.get("family"), theirs.get("revision")) != (model.family, model.revision):
            raise ModelError(
                f"{where}: was trained on {printable(theirs.get('path'))}, of the family"
                f" {printable(theirs.get('family'))}, unlike `model`; judge its merged model, which `cdpo export"
                " --format merged` writes, as `model`"
            )


def candidates_of(config: Config, run_dir: Path) -> list[Candidate]:
    """The base model and the candidates of a configuration.

    Args:
        run_dir: folder of the configuration's run.
    """
    assert config.judge is not None, "called for a config with candidates only"
    sections: dict[str, CandidateSection | None] = {BASE: None, **config.judge.candidates}
    return [
        Candidate(
            name,
            section,
            config,
            _as_run(config, name),
            RunFolder(path_within(run_dir, f"{CANDIDATES}/{name}")),
        )
        for name, section in sections.items()
    ]


def _as_run(config: Config, name: str) -> Config:
    """A configuration of a run whose samples are the candidate's images, and whose rewards are the judges."""
    num_images = config.evaluation.images_per_prompt
    rewards = {"names": tuple(config.evaluation_judges), "rank_by": None, "noise_prompts": 0, "placement": "fused"}
    return config.model_copy(
        update={
            "run": config.run.model_copy(update={"samples_from": None}),
            "preferences": None,
            "model": config.model_of(name),
            "generation": config.generation.model_copy(update={"images_per_prompt": num_images, "keep_images": True}),
            "rewards": config.rewards.model_copy(update=rewards),
        }
    )


def adapter_settings(config: Config, *, candidate: Candidate) -> dict[str, Any]:
    found = weights_sha256(candidate.adapter, key=candidate.key)
    return sections_of(config, "model") | model_sha256(config) | {"adapter.sha256": found}


def image_settings(config: Config, *, candidate: Candidate) -> dict[str, Any]:
    """Settings of a candidate's images."""
    prompts = candidate.given.prompts
    others = {"validation"} if prompts.heldout.fraction else {"validation", "train"}
    settings: dict[str, Any] = {"prompts": prompts.model_dump(mode="json", exclude=others)}
    settings |= seed_setting(config) | prompts_sha256(candidate.given, "heldout")
    if candidate.images:
        height, width = size_of(config)
        return settings | {
            "images.sha256": weights_sha256(str(candidate.images), key=candidate.key, endings=None),
            "generation": {"images_per_prompt": config.generation.images_per_prompt, "height": height, "width": width},
        }
    settings |= sections_of(config, "model") | model_sha256(config) | {"generation": config.generation.outcome}
    if candidate.trained:
        settings["candidate.weights"] = candidate.trained.fingerprint(TRAINING)
    return settings


def size_of(config: Config) -> tuple[int, int]:
    """Height and width of the images, in pixels.

    Raises:
        ModelError: they are not given, and a hub model's are unknown.
    """
    from cdpo_ray.models.sizes import sizes_of

    generation = config.generation
    sizes = sizes_of(config.model.family, config.model.layout.path, generation.height, generation.width)
    if sizes is None:
        raise ModelError("`generation.height` and `generation.width` must be given to judge images beside a hub model")
    return sizes.height, sizes.width


def convert_adapter(context: Context, output_dir: Path, output: StepOutput, *, candidate: Candidate) -> None:
    from cdpo_ray.models.lora import LORA_DIR
    from cdpo_ray.models.lora_start import convert_lora

    model = context.config.model
    output.counts["layers"] = convert_lora(
        candidate.adapter or "",
        model.family,
        model.layout.path,
        model.layout.revision,
        output_dir / LORA_DIR,
        key=f"`{candidate.key}`",
    )


def import_images(context: Context, output_dir: Path, output: StepOutput, *, candidate: Candidate) -> None:
    from cdpo_ray.dataflow.images import encode_pixels
    from cdpo_ray.evaluation.appearance_columns import add_appearance
    from cdpo_ray.evaluation.image_folder import find_images, rows_of_images

    config, num_images = context.config, context.config.generation.images_per_prompt
    assert candidate.images is not None, "called for images that were made elsewhere"
    found = find_images(candidate.images, context.prompts.heldout, num_images, key=candidate.key)
    context.progress.begin("import", total=len(found.prompts), unit="prompt", makes=(num_images, "images"))

    def rows() -> Any:
        for row in rows_of_images(found, *size_of(config), key=candidate.key):
            yield encode_pixels(add_appearance(row))
            context.progress.advance()

    write_tables(rows(), output_dir / SAMPLES_FILE)
    output.counts |= {"prompts": len(found.prompts), "images": len(found.prompts) * num_images}
    if found.num_others:
        output.warnings.append(f"{found.num_others:,} images are of prompts that are not held out, and are not used")


def generate_images(context: Context, output_dir: Path, output: StepOutput) -> None:
    from cdpo_ray.evaluation.appearance_columns import add_diversity
    from cdpo_ray.evaluation.pool import with_appearance
    from cdpo_ray.generation.pool import generate_samples

    config, prompts = context.config, context.prompts.heldout
    num_images = config.generation.images_per_prompt
    generate_samples(
        prompts,
        output_dir,
        family=config.model.family,
        model=model_arguments(config, compiles=context.compiles("evaluate")),
        sampling=sampling_of(config, num_images, config.run.seed),
        tuned_dir=context.start_dir,
        keep_images=True,
        generators=config.resources.generators,
        make_scores=None,
        then=with_appearance,
        complete=add_diversity,
        max_bad_fraction=config.generation.max_bad_fraction,
        progress=context.progress,
    )
    made = count_rows(output_dir)
    output.counts |= {"prompts": made, "images": made * num_images, "prompts_set_aside": len(prompts) - made}
    warn_of_quarantine(output, output_dir)
