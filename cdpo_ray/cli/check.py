"""`cdpo check`: what a run will compute and cost, and the errors in its config."""

import argparse

from cdpo_ray.cli.arguments import add_config, config_of
from cdpo_ray.cli.terminal import print_lines
from cdpo_ray.config import Config
from cdpo_ray.cost.estimate import estimate
from cdpo_ray.cost.gpus import DEFAULT_GPU, GPUS, visible_gpu
from cdpo_ray.cost.sentences import cost_lines
from cdpo_ray.errors import ModelError
from cdpo_ray.plan import make_plan
from cdpo_ray.preflight import missing_weights, refuse_problems, refuse_unwritable, try_rewards
from cdpo_ray.prompts.sources import PromptSplit
from cdpo_ray.run import (
    check_model_of,
    read_prompts,
    refuse_changes,
    round_folders,
    run_dir_of,
    scan_preferences,
    unfinished,
)
from cdpo_ray.steps import steps_of
from cdpo_ray.steps.cost import workload_of
from cdpo_ray.store import is_local

HELP = "print what a run will compute and cost, or the errors in its config; needs no GPU and no Ray"
EXAMPLE = "cdpo check sd15 --gpu l4"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_config(parser)
    parser.add_argument(
        "--gpu",
        choices=GPUS,
        help=f"GPU for the estimates of hours and memory (default: this machine's, if listed, else {DEFAULT_GPU.name})",
    )


def run(arguments: argparse.Namespace) -> int:
    config = config_of(arguments)
    run_dir = run_dir_of(config)
    if is_local(run_dir):
        refuse_unwritable(run_dir, "run.dir")
    check_model_of(config)
    scanned = scan_preferences(config, with_images=True) if config.preferences else None
    prompts = read_prompts(config, scanned)
    refuse_problems(config, prompts, unfinished(steps_of(config), round_folders(config)))
    refuse_changes(config)
    tried = try_rewards(config, prompts)
    found = [f"  tried        {line}" for line in tried] + _downloads(config)
    print_lines(make_plan(config, prompts, [*found, *_cost(config, prompts, arguments.gpu)], scanned))
    return 0


def _downloads(config: Config) -> list[str]:
    missing = missing_weights(config)
    return [f"  downloads    not on this machine: {', '.join(missing)}"] if missing else []


def _cost(config: Config, prompts: PromptSplit, gpu: str | None) -> list[str]:
    try:
        load, known = workload_of(config, prompts, GPUS[gpu] if gpu else visible_gpu() or DEFAULT_GPU)
    except ModelError as error:
        return [f"  cost         not estimated: {error}"]
    return cost_lines(estimate(load), known.source)
