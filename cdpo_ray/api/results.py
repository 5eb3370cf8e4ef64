"""`open_run`: a run's folder -> its configuration, tables, images and trained model."""

import re
from collections.abc import Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd
import pyarrow as pa
from PIL.Image import Image

from cdpo_ray.api.grid import before_after_grid
from cdpo_ray.config import Config, validate
from cdpo_ray.dataflow.images import NO_IMAGES, open_png
from cdpo_ray.errors import StoreError
from cdpo_ray.evaluation.report import (
    check_columns,
    check_comparison,
    checked_schema,
    first_rows,
    in_order,
    place_of,
    read_config,
    read_metrics,
    read_table,
    read_updates,
)
from cdpo_ray.progress.status import READ_UP_TO, STATUS, run_status
from cdpo_ray.records import ARMS, EVALUATION, SAMPLES, SCORES, STAGES, STEP_FOLDERS, TRAINING, score_column
from cdpo_ray.steps import IMPORT, STEPS
from cdpo_ray.store import CONFIG, RunFolder, exists, path_within, storage_path
from cdpo_ray.store.failures import storage_errors

if TYPE_CHECKING:
    import datasets
    import torch
    from diffusers import DiffusionPipeline

ROUND = re.compile(r"round-(\d{1,4})")
PLACE = ["prompt_index", "prompt_id", "sample_index"]
"""Columns that identify a sample."""
PROMPT_COLUMNS = ("prompt_index", "prompt_id", "prompt", "num_tokens_cut", "num_images_cut")
PAIR_COLUMNS = ("stage", "draw", "prompt_index", "chosen", "rejected", "rank_gap", "score_gap", "within_noise")
TABLES = ("samples", "scores", "pairs", "comparison")


class Run:
    """A run's folder, read-only; made by `open_run` and `run_pipeline`.

    The folder may be somebody else's: it is read as untrusted input, and no code in it is executed. Properties read
    the folder at each access, so they follow a run in progress; keep a table in a variable to use it often. Files of
    at most 1 MiB are compared with the manifest of their step before the first one of the step is read, of larger
    files only the size is.

    Reading a step that is not finished raises `StoreError`, which names the command that finishes it.

    Attributes:
        path: folder of the steps: the run's folder; of several rounds, the folder of one round.
    """

    def __init__(self, folder: RunFolder, run_dir: Path) -> None:
        """Wrap a folder.

        Args:
            folder: folder of the steps.
            run_dir: folder of the whole run.
        """
        self.path = folder.path
        self._folder = folder
        self._run_dir = run_dir
        self._compared: set[str] = set()

    def __repr__(self) -> str:
        return f"Run({str(self.path)!r})"

    @property
    def config(self) -> Config:
        """The configuration, with all defaults; each section is an attribute: ``run.config.training.beta``.

        Raises:
            StoreError: there is no `config.yaml` yet, or it contradicts a finished step.
            ConfigError: this version cannot use it.
        """
        return validate(read_config(self._folder), where=str(self.path / CONFIG))

    @property
    def status(self) -> str:
        """Status of the whole run, as `cdpo status` prints it: ``print(run.status)``."""
        return run_status(self._run_dir).text

    @property
    def samples(self) -> pd.DataFrame:
        """Prompts whose images were generated or imported, one row per prompt, in prompt order.

        Columns: ``prompt_index``, ``prompt_id``, ``prompt``, ``num_tokens_cut`` (tokens beyond the text encoder's
        limit) and, for imported images, ``num_images_cut``. See `images` for the images and `scores` for the scores.
        """
        return self._samples(())

    @property
    def scores(self) -> pd.DataFrame:
        """Scores, one row per sample, in prompt and sample order.

        Columns: ``prompt_index``, ``prompt_id``, ``sample_index``, and one column per reward with its name, such as
        ``clip``; higher is better, NaN means no score. ``label``: the labels of imported images.
        """
        step = self._step(SCORES)
        columns = []
        for path in self._tables(SCORES, "*.parquet"):
            if path.parent != step:  # `second/` holds repeated scores
                continue
            reward = path.name.removesuffix(".parquet")
            column = score_column(reward)
            check_columns(path, checked_schema(path), integers=PLACE[::2], text=PLACE[1:2], numbers=(column,))
            scores = _frame(read_table(path, [*PLACE, column])).set_index(PLACE)[column].rename(reward)
            if scores.index.has_duplicates:
                raise StoreError(f"{path}: has a sample twice; delete {step} to regenerate it")
            columns.append(scores)
        return pd.concat(columns, axis=1).sort_index().reset_index()

    @property
    def pairs(self) -> pd.DataFrame:
        """Training pairs of all stages as they were drawn before training, in training order.

        Columns: ``stage`` (1-based), ``draw`` (position in the stage), ``prompt_index``, ``chosen`` and ``rejected``
        (sample indices), ``rank_gap`` (large is easy), ``score_gap``, and ``within_noise``, which is missing where the
        rewards' noise was not measured. With ``curriculum.measure: margin``, training draws the pairs of each stage
        again.
        """
        frames = []
        for path in self._tables(STAGES, "stage-*/*.parquet"):
            integers = [name for name in PAIR_COLUMNS if name not in ("score_gap", "within_noise")]
            check_columns(
                path, checked_schema(path), integers=integers, numbers=("score_gap",), booleans=("within_noise",)
            )
            frames.append(_frame(read_table(path, PAIR_COLUMNS)))
        return pd.concat(frames).sort_values(["stage", "draw"], ignore_index=True)

    @property
    def updates(self) -> pd.DataFrame:
        """Training records, one row per update that was not skipped.

        Columns include ``update`` (1-based), ``stage``, ``loss``, ``margin``, ``implicit_accuracy``, the errors of
        policy and reference for chosen (``_w``) and rejected (``_l``) images, ``learning_rate`` and ``grad_norm``.
        """
        return pd.DataFrame(read_updates(self._step(TRAINING) / "updates.jsonl"))

    @property
    def comparison(self) -> pd.DataFrame:
        """Base and fine-tuned model on the held-out prompts, one row per pair of images from the same noise.

        Columns: ``prompt_index``, ``prompt_id``, ``prompt``, ``sample_index``; ``base_score_<judge>`` and
        ``tuned_score_<judge>`` of each judge; ``base_<measure>`` and ``tuned_<measure>`` of each measure of appearance;
        and ``implicit_value`` if it was measured. See `before_after` for the images.
        """
        path = self._comparison_path()
        names = [name for name in checked_schema(path).names if not name.endswith("_image")]
        return _frame(in_order(read_table(path, names)))

    @property
    def metrics(self) -> dict[str, Any]:
        """Content of `metrics.json`: estimates per judge with mean and 95 % interval, see `cdpo_ray.records`."""
        self._step(EVALUATION)
        return read_metrics(self.path)

    def images(self, prompt_index: int) -> list[Image]:
        """Images of a training prompt, in sample order.

        They are of the base model; in later rounds of the model of the round before, and of imported preferences the
        imported images.

        Args:
            prompt_index: as in `samples`.

        Raises:
            StoreError: the images were not kept.
            ValueError: there is no such prompt.
        """
        if not self._keeps_images():
            raise StoreError(f"{self.path / SAMPLES}: {NO_IMAGES}")
        for shard in self._tables(SAMPLES, "*.parquet"):
            for pngs in read_table(shard, ["images"], [("prompt_index", "=", prompt_index)])["images"].to_pylist():
                where = [f"{shard}: image {number} of prompt {prompt_index}" for number in range(len(pngs))]
                return list(map(open_png, pngs, where))
        raise ValueError(f"`prompt_index` {prompt_index}: {self.path / SAMPLES} has no such prompt; see `samples`")

    def before_after(self, prompt_index: int) -> list[tuple[Image, Image]]:
        """Images of a held-out prompt by the base and by the fine-tuned model, a pair per noise, in sample order.

        Args:
            prompt_index: as in `comparison`.

        Raises:
            ValueError: there is no such prompt.
        """
        path = self._comparison_path()
        columns = ["prompt_index", "sample_index", *(f"{arm}_image" for arm in ARMS)]
        rows = in_order(read_table(path, columns, [("prompt_index", "=", prompt_index)])).to_pylist()
        if not rows:
            raise ValueError(f"`prompt_index` {prompt_index}: {path} has no such prompt; see `comparison`")
        return [_both(path, row) for row in rows]

    def grid(self, num_prompts: int = 4) -> Image:
        """One image of the first held-out prompts: a row of the base model's images above one of the fine-tuned model.

        Images in one column are from the same noise. At most 6 images per prompt and model are shown; those of more
        than 256 pixels are shrunk, as in the report.

        Args:
            num_prompts: maximum number of prompts.

        Raises:
            ValueError: ``num_prompts`` is less than 1.
        """
        if num_prompts < 1:
            raise ValueError(f"`num_prompts` must be >= 1, got {num_prompts}")
        path = self._comparison_path()
        prompts: dict[int, tuple[str, list[tuple[Image, Image]]]] = {}
        for row in first_rows(path, [], num_prompts):
            prompts.setdefault(row["prompt_index"], (row["prompt"], []))[1].append(_both(path, row))
        return before_after_grid(list(prompts.values()))

    def pipeline(self, device: str | None = None, dtype: "str | torch.dtype | None" = None) -> "DiffusionPipeline":
        """A diffusers pipeline with the trained LoRA or the fully fine-tuned weights, and the sampler of the run.

        Call it with the run's settings, ``pipe(prompt, num_inference_steps=..., guidance_scale=...)``, see
        ``run.config.generation``. A LoRA is switched off by ``pipe.disable_lora()`` and on again by
        ``pipe.enable_lora()``. The base model is the one that `config` names: a folder on this machine, or a hub id
        that is downloaded at its revision. Only safetensors are read. A safety checker is not loaded.

        Args:
            device: ``cuda`` if available, else ``cpu``, by default.
            dtype: torch dtype or its name; the run's by default.

        Raises:
            StoreError: training is not finished, or a file of it is damaged.
            ModelError: the base model cannot be loaded, or the trained weights do not fit it.
            ValueError: ``dtype`` is not a dtype.
        """
        import torch

        from cdpo_ray.models import load_model

        self._step(TRAINING)
        self._folder.refuse_damage(TRAINING)
        settings = self.config.model
        name = str(dtype or settings.dtype).removeprefix("torch.")
        if not isinstance(getattr(torch, name, None), torch.dtype):
            raise ValueError(f"`dtype` must be a torch dtype or its name, as 'bfloat16', got {dtype!r}")
        model = load_model(
            settings.family,
            **settings.model_dump(include={"path", "revision", "config", "quantization"}),
            dtype=name,
            device=device,
        )
        model.load_tuned(self._folder.step(TRAINING))
        model.use_tuned(True)
        model.pipeline.set_progress_bar_config()  # the bar that loading disabled
        return model.pipeline

    def dataset(self, table: str) -> "datasets.Dataset":
        """A table as a `datasets.Dataset`, with its images as `datasets.Image`; needs ``cdpo_ray[datasets]``.

        The whole table is read into memory.

        Args:
            table: ``samples`` (with ``images``, if they were kept), ``scores``, ``pairs``, or ``comparison`` (with
                ``base_image`` and ``tuned_image``).

        Raises:
            ValueError: there is no such table.
            StoreError: the step is not finished, or the package is not installed.
        """
        from cdpo_ray.api.hf_datasets import as_dataset

        if table not in TABLES:
            raise ValueError(f"`table` must be one of {', '.join(map(repr, TABLES))}, got {table!r}")
        images: tuple[str, ...] = ()
        if table == "comparison":
            path, images = self._comparison_path(), tuple(f"{arm}_image" for arm in ARMS)
            frame = _frame(in_order(read_table(path, checked_schema(path).names)))
        elif table == "samples":
            images = ("images",) if self._keeps_images() else ()
            frame = self._samples(images)
        else:
            frame = self.scores if table == "scores" else self.pairs
        return as_dataset(frame, images, where=f"{self.path}: {table}")

    def _step(self, folder: str) -> Path:
        """Folder of a finished step; its files are compared with its manifest at the first access.

        Raises:
            StoreError: the step is not finished, or a file is missing, altered or added.
        """
        if not self._folder.has(folder):
            verbs = [step.verb for step in (*STEPS, IMPORT) if step.folder == folder]
            commands = " or ".join(f"`cdpo {verb} CONFIG`" for verb in verbs)
            raise StoreError(f"{self.path / folder}: the step `{verbs[0]}` is not finished; {commands} finishes it")
        if folder not in self._compared:
            self._folder.refuse_damage(folder, read_up_to=READ_UP_TO)
            self._compared.add(folder)
        return self._folder.step(folder)

    def _tables(self, folder: str, pattern: str) -> list[Path]:
        """Tables of a finished step, in the order of its manifest.

        Raises:
            StoreError: as `_step`; or there is none.
        """
        step = self._step(folder)
        names = [name for name in self._folder.manifest(folder)["files"] if fnmatchcase(name, pattern)]
        if not names:
            raise StoreError(f"{step}: has no table {pattern}; delete the folder to regenerate it")
        return [path_within(step, name) for name in names]

    def _samples(self, columns: Sequence[str]) -> pd.DataFrame:
        frames = []
        for shard in self._tables(SAMPLES, "*.parquet"):
            schema = checked_schema(shard)
            check_columns(shard, schema, integers=("prompt_index",), text=("prompt_id", "prompt"))
            frames.append(
                _frame(read_table(shard, [*(name for name in PROMPT_COLUMNS if name in schema.names), *columns]))
            )
        return pd.concat(frames).sort_values("prompt_index", ignore_index=True)

    def _keeps_images(self) -> bool:
        schemas = {shard: checked_schema(shard) for shard in self._tables(SAMPLES, "*.parquet")}
        if not all("images" in schema.names for schema in schemas.values()):
            return False
        for shard, schema in schemas.items():
            check_columns(shard, schema, lists=("images",))
        return True

    def _comparison_path(self) -> Path:
        path = self._step(EVALUATION) / "comparison.parquet"
        check_comparison(path, [])
        return path


def open_run(path: str | Path, round: int | None = None) -> Run:
    """Open the folder of a run, finished or in progress.

    Args:
        path: folder ``runs/<name>``, or its URI in an object store; it may be somebody else's.
        round: number of the round, 1-based, of a run with several rounds; ``None``: the last round that was started.

    Raises:
        StoreError: the folder is not a run's, there is no such round, or the store cannot be read.
    """
    run_dir = storage_path(path)
    with storage_errors(run_dir, "read"):
        names = [each.name for each in run_dir.glob("round-*")] if exists(run_dir) else []
    rounds = sorted(int(found[1]) for name in names if (found := ROUND.fullmatch(name)))
    if round is not None and round not in (rounds or [1]):
        raise StoreError(f"{run_dir}: has no round {round}; its rounds are {', '.join(map(str, rounds or [1]))}")
    steps_dir = path_within(run_dir, f"round-{round or rounds[-1]}") if rounds else run_dir
    folder = RunFolder(steps_dir, foreign=True)
    if not exists(run_dir / STATUS) and not any(map(folder.has, STEP_FOLDERS)):
        raise StoreError(f"{run_dir}: is not a run's folder; give one, such as runs/<name>")
    whole = run_dir.parent if ROUND.fullmatch(run_dir.name) and exists(run_dir.parent / STATUS) else run_dir
    return Run(folder, whole)


def _frame(table: pa.Table) -> pd.DataFrame:
    """Rows as a DataFrame; metadata for pandas in the file are untrusted and ignored."""
    return table.to_pandas(ignore_metadata=True, types_mapper={pa.bool_(): pd.BooleanDtype()}.get)


def _both(path: Path, row: dict[str, Any]) -> tuple[Image, Image]:
    base, tuned = (open_png(row[f"{arm}_image"], place_of(path, row)) for arm in ARMS)
    return base, tuned
