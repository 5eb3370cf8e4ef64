"""`cdpo import`: preferences -> samples."""

import argparse

from cdpo_ray.cli import steps
from cdpo_ray.cli.terminal import print_lines
from cdpo_ray.config import Config
from cdpo_ray.errors import PreferenceError
from cdpo_ray.preferences.files import Scan, scan
from cdpo_ray.run import check_model_of
from cdpo_ray.session import ray_session
from cdpo_ray.steps import preference_frame, preference_source

HELP = "preferences -> samples: import images with human preferences instead of generating images"
EXAMPLE = "cdpo import pickapic --check"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    steps.add_arguments(parser)
    parser.add_argument("--check", action="store_true", help="print the unusable rows and images, and write nothing")


def run(arguments: argparse.Namespace) -> int:
    config, step = steps.load_step(arguments)
    if not arguments.check:
        steps.run_step(config, step, arguments)
        return 0
    found, faults = find_faults(config, address=arguments.address, verbose=arguments.verbose)
    print_lines(*faults, *found.lines(with_faults=False))
    if faults:
        raise PreferenceError("1 fault" if len(faults) == 1 else f"{len(faults):,} faults")
    print_lines("no faults")
    return 0


def find_faults(config: Config, *, address: str | None = None, verbose: bool = False) -> tuple[Scan, list[str]]:
    """All faults of a set of preferences, by file and row; opens every image, writes nothing.

    Args:
        address, verbose: see `ray_session`.

    Returns:
        The scanned rows, and one line per fault.

    Raises:
        PreferenceError: the files are missing, or lack a column.
        ModelError: the model is of another family.
    """
    check_model_of(config)
    source = preference_source(config)
    found = scan(source)
    with ray_session(address=address, verbose=verbose):
        from cdpo_ray.preferences import pool

        in_images = pool.find_faults(found.chunks, source=source, frame=preference_frame(config))
    return found, list(dict.fromkeys([*map(str, found.faults), *in_images]))
