"""`cdpo export`: adapter -> files of other tools."""

import argparse
import logging
from pathlib import Path

from cdpo_ray.cli.arguments import add_config, config_of
from cdpo_ray.cli.terminal import print_lines
from cdpo_ray.config import Config
from cdpo_ray.export import FORMATS
from cdpo_ray.records import EVALUATION, TRAINING
from cdpo_ray.run import read_prompts, round_folders, run_dir_of, warn_of_edited_config
from cdpo_ray.steps import Context, export, steps_of
from cdpo_ray.store import output_path, path_within

log = logging.getLogger(__name__)
HELP = "adapter -> files that other tools load: export the trained weights, with a model card"
EXAMPLE = "cdpo export runs/quickstart --format kohya"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_config(parser)
    parser.add_argument(
        "--format",
        choices=FORMATS,
        default="diffusers",
        help="diffusers (default): LoRA for load_lora_weights; kohya: LoRA for ComfyUI, Forge and others; peft: LoRA"
        " with adapter_config.json; merged: folder of a whole pipeline, the only format for training.method=full",
    )
    parser.add_argument("--out", metavar="DIR", help="output folder (default: export/FORMAT in the run's folder)")


def run(arguments: argparse.Namespace) -> int:
    config = config_of(arguments)
    output_dir = output_path(arguments.out, "--out") if arguments.out else None
    print_lines(export_trained(config, arguments.format, output_dir))
    return 0


def export_trained(config: Config, format_name: str, output_dir: Path | None = None) -> Path:
    """Write the weights that the last round trained in a format of other tools, with a model card; needs no Ray.

    Args:
        format_name: key of `cdpo_ray.export.FORMATS`.
        output_dir: default: `export/<format>` in the run's folder.

    Returns:
        The output folder.

    Raises:
        StoreError: a step up to training is unfinished, was made with another configuration or is damaged, or the
            folder cannot be written.
        ExportError: the format cannot hold these weights, or the folder exists.
        ModelError: the base model is needed and cannot be loaded.
    """
    folders = round_folders(config)
    run, previous = folders[-1], folders[-2] if len(folders) > 1 else None
    context = Context(config, read_prompts(config), run, len(folders), previous)
    for step in steps_of(config):
        if step.folder == EVALUATION and not run.has(EVALUATION):
            log.warning("export: not evaluated; the model card will say so")
            continue
        run.refuse_difference(
            step.folder, step.settings(config), step.fingerprints(config, run, previous), grows=step.grows
        )
        if step.folder in (TRAINING, EVALUATION):  # the others are not read, and may be very large
            run.refuse_damage(step.folder)
    warn_of_edited_config(config, run)
    output_dir = output_dir or path_within(run_dir_of(config), f"export/{format_name}")
    export(context, format_name, output_dir)
    log.info("export: read by %s", FORMATS[format_name].readers)
    return output_dir
