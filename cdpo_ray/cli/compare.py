"""`cdpo compare`: metrics of several runs -> compare.html."""

import argparse
from pathlib import Path

from cdpo_ray.cli.arguments import run_dir_given
from cdpo_ray.cli.terminal import print_lines
from cdpo_ray.config import Config, load_config
from cdpo_ray.store import output_path

HELP = "metrics of several runs -> compare.html: compare their models by all their judges"
EXAMPLE = "cdpo compare runs/quickstart runs/second"
DESCRIPTION = """\
Compare the models that several runs trained, on the held-out images that their
evaluations stored. Nothing is generated.

The runs must have the same base model, seed, sampling settings, held-out prompts and
number of images per prompt. A judge that scored only some of the runs now scores the
images of the others. Runs may come from other people: nothing in their folders can
choose an address, environment variable, file, model or code. A judge that needs one of
these is taken from `--judges`, or left out.

compare.html shows
  - one row per run (the reward that ranked its pairs), one column per judge: mean score,
    and its difference to the base model
  - for each judge, how often one run's image is better than another's from the same noise
  - how the appearance of the images changed: diversity, saturation, edges, compressed size
  - how often each run's implicit reward agrees with each judge on held-out images
  - the first images of all runs side by side
compare.json has the numbers. Intervals are at 95 %, over prompts."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "runs",
        nargs="+",
        metavar="RUN",
        help="folders of two or more evaluated runs, such as runs/<name>, or their configs",
    )
    parser.add_argument("--out", metavar="DIR", help="output folder (default: the parent folder of the first run)")
    parser.add_argument(
        "--judges",
        metavar="CONFIG",
        help="your own config, whose judges and their options are used to score images that lack these scores; custom"
        " rewards are imported from the working directory",
    )
    parser.set_defaults(usage_error=parser.error)


def run(arguments: argparse.Namespace) -> int:
    if len(arguments.runs) < 2:
        arguments.usage_error(f"needs two or more runs, got {arguments.runs}")
    config = load_config(arguments.judges) if arguments.judges else None
    output_dir = output_path(arguments.out, "--out") if arguments.out else None
    print_lines(*compared_lines([run_dir_given(run) for run in arguments.runs], output_dir, config))
    return 0


def compared_lines(run_dirs: list[Path], output_dir: Path | None = None, config: Config | None = None) -> list[str]:
    """Compare the models of evaluated runs, on the held-out images that they kept; needs no Ray.

    Args:
        output_dir: folder for `compare.html` and `compare.json`; default: the parent of the first run.
        config: the user's own, whose judges may score the images of runs that lack their scores.

    Returns:
        A table with one row per run, one line per judge that was left out, and the path of the page.

    Raises:
        CdpoError: a run is not evaluated, two cannot be compared, or a judge that one lacks cannot score.
    """
    from cdpo_ray.evaluation import runs  # imports torch

    output_dir = output_path(output_dir or run_dirs[0].parent, "--out")
    found = runs.compare_runs(run_dirs, output_dir, config.evaluation_judges if config else None)
    return [runs.table_of(found), *found["left_out"].values(), str(output_dir / "compare.html")]
