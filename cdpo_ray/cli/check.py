"""`cdpo check`: what a run will make and cost, and the errors in its config."""

import argparse

from cdpo_ray.cli.arguments import add_config
from cdpo_ray.cli.terminal import print_lines
from cdpo_ray.config import Config, load_config
from cdpo_ray.cost.estimate import estimate
from cdpo_ray.cost.gpus import DEFAULT_GPU, GPUS, visible_gpu
from cdpo_ray.cost.sentences import cost_lines
from cdpo_ray.errors import ModelError
from cdpo_ray.plan import make_plan
from cdpo_ray.prompts.sources import PromptSplit
from cdpo_ray.run import check_model_of, read_prompts, run_dir_of, scan_preferences
from cdpo_ray.steps.cost import workload_of

HELP = "print what a run will make and cost, or the errors in its config; needs no GPU and no Ray"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_config(parser)
    parser.add_argument(
        "--gpu",
        choices=GPUS,
        help=f"GPU to estimate hours and memory for (default: this machine's, if listed, else {DEFAULT_GPU.name})",
    )


def run(arguments: argparse.Namespace) -> int:
    config = load_config(arguments.config, arguments.overrides)
    run_dir_of(config)  # raises if Ray would delete it
    check_model_of(config)
    scanned = scan_preferences(config, with_images=True) if config.preferences else None
    prompts = read_prompts(config, scanned)
    print_lines(make_plan(config, prompts, _cost(config, prompts, arguments.gpu), scanned))
    return 0


def _cost(config: Config, prompts: PromptSplit, gpu: str | None) -> list[str]:
    try:
        load, known = workload_of(config, prompts, GPUS[gpu] if gpu else visible_gpu() or DEFAULT_GPU)
    except ModelError as error:
        return [f"  cost         not estimated: {error}"]
    return cost_lines(estimate(load), known.source)
