"""`cdpo pairs`: scores -> stages."""

import argparse

from cdpo_ray.cli import steps
from cdpo_ray.cli.terminal import print_lines
from cdpo_ray.config import Config
from cdpo_ray.records import STAGES
from cdpo_ray.run import round_folders
from cdpo_ray.store import read_untrusted

HELP = "scores -> stages: rank images, sort pairs by difficulty, draw the pairs of each stage"
EXAMPLE = "cdpo pairs quickstart --explain"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    steps.add_arguments(parser)
    parser.add_argument("--explain", action="store_true", help="print a table of the stages, and draw it in stages.png")


def run(arguments: argparse.Namespace) -> int:
    config, step = steps.load_step(arguments)
    steps.run_step(config, step, arguments)
    if arguments.explain:
        print_lines(*explain_stages(config))
    return 0


def explain_stages(config: Config) -> list[str]:
    """Draw `stages.png` of each round that has stages; returns a table of them and the path, for each."""
    from cdpo_ray.curriculum.explanation import DESCRIBED_STAGES, stages_table
    from cdpo_ray.curriculum.figures import draw_stages

    lines = []
    for run in round_folders(config):
        if run.has(STAGES):
            path = run.step(STAGES) / "stages.json"
            stages = read_untrusted(path, DESCRIBED_STAGES, remedy=f"delete {path.parent} to regenerate it")
            path = run.path / "stages.png"
            draw_stages(stages, path, title=f"{config.run.name}\n{config.curriculum.sentence}")
            lines += [stages_table(stages), str(path)]
    if config.curriculum.measure == "margin":
        lines.append(
            "the margins are those before the first update; training measures them again at the start of each stage"
        )
    return lines
