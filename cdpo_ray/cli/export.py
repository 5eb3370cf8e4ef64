"""`cdpo export`: adapter, model or pairs -> files of other tools."""

import argparse
import logging
from pathlib import Path

from cdpo_ray.cli.arguments import add_config, config_of
from cdpo_ray.cli.terminal import print_lines
from cdpo_ray.config import HUB_ID, Config
from cdpo_ray.errors import ExportError, printable
from cdpo_ray.export import FORMATS, readers_of
from cdpo_ray.records import EVALUATION
from cdpo_ray.run import read_prompts, round_folders, run_dir_of, warn_of_edited_config
from cdpo_ray.steps import Context, export, steps_of
from cdpo_ray.store import is_local, output_path, path_within

log = logging.getLogger(__name__)
HELP = "run -> files that other tools load: export the trained weights or the pairs, with a model card"
EXAMPLE = "cdpo export runs/quickstart --format kohya"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_config(parser)
    parser.add_argument(
        "--format",
        choices=FORMATS,
        default="diffusers",
        help="diffusers (default): LoRA for load_lora_weights; kohya: LoRA for ComfyUI, Forge and others; peft: LoRA"
        " with adapter_config.json; merged: folder of a whole pipeline, the only format for training.method=full;"
        " pairs: the drawn pairs with their images",
    )
    parser.add_argument("--out", metavar="DIR", help="output folder (default: export/FORMAT in the run's folder)")
    parser.add_argument(
        "--push",
        metavar="ORG/NAME",
        help="also upload the folder to this repository of the Hugging Face hub; a new repository is private; the token"
        " is that of HF_TOKEN or `hf auth login`",
    )


def run(arguments: argparse.Namespace) -> int:
    config = config_of(arguments)
    output_dir = output_path(arguments.out, "--out") if arguments.out else None
    if hub_id := arguments.push:
        if not HUB_ID.match(hub_id):
            raise ExportError(f"`--push` {printable(hub_id)}: must be ORG/NAME")
        if not is_local(output_dir or run_dir_of(config)):
            raise ExportError("`--push` needs a folder on this machine; choose one with `--out`")
    folder = export_run(config, arguments.format, output_dir)
    print_lines(folder)
    if hub_id:
        from cdpo_ray.export.push import push

        print_lines(push(folder, hub_id, dataset=FORMATS[arguments.format].dataset))
    return 0


def export_run(config: Config, format_name: str, output_dir: Path | None = None) -> Path:
    """Write what the last round trained, or its pairs, in a format of other tools, with a card; needs no Ray.

    Args:
        format_name: key of `cdpo_ray.export.FORMATS`.
        output_dir: default: `export/<format>` in the run's folder.

    Returns:
        The output folder.

    Raises:
        StoreError: a step that is read, or one before it, is unfinished, was made with another configuration or is
            damaged, or the folder cannot be written.
        ExportError: the format cannot hold these weights, or the folder exists.
        ModelError: the base model is needed and cannot be loaded.
    """
    folders = round_folders(config)
    run, previous = folders[-1], folders[-2] if len(folders) > 1 else None
    context = Context(config, read_prompts(config), run, len(folders), previous)
    read = FORMATS[format_name].steps
    for step in steps_of(config):
        if step.folder == EVALUATION and not run.has(EVALUATION):
            log.warning("export: not evaluated; the model card will say so")
            continue
        run.refuse_difference(
            step.folder, step.settings(config), step.fingerprints(config, run, previous), grows=step.grows
        )
        if step.folder in read:  # the others may be very large
            run.refuse_damage(step.folder)
        if step.folder == read[-1]:
            break
    warn_of_edited_config(config, run)
    output_dir = output_dir or path_within(run_dir_of(config), f"export/{format_name}")
    export(context, format_name, output_dir)
    log.info("export: read by %s", readers_of(format_name, config.model.family))
    return output_dir
