"""The front door: `cdpo run CONFIG`, and one verb per step of the way, in its order."""

import argparse
import logging
import sys
from collections.abc import Sequence

from cdpo_ray import __version__
from cdpo_ray.config import load_config
from cdpo_ray.errors import CdpoError
from cdpo_ray.plan import make_plan
from cdpo_ray.run import explain_stages, read_prompts, run_steps, write_reports
from cdpo_ray.steps import STEPS

VERBS = {
    "check": "say what a run will make, or what is wrong with the config; needs no GPU, torch or ray",
    "run": "walk the whole way: all of the below, each skipped if it is done already",
    "generate": "prompts -> samples: many images of each prompt, by the base model",
    "score": "samples -> scores: judge each image",
    "pairs": "scores -> stages: rank, pair by difficulty, draw what each stage trains on",
    "train": "stages -> adapter: staged DPO of a LoRA",
    "evaluate": "adapter -> metrics: base against fine-tuned on held-out prompts",
    "report": "metrics -> report.html",
}
EXIT_FAULT = 2
EXIT_INTERRUPTED = 130


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="cdpo",
        description="Align a text-to-image model by Curriculum DPO:"
        " prompts -> samples -> scores -> stages -> adapter -> metrics -> report.",
        epilog="Any value of the config can be given on the command line:"
        " cdpo run configs/quickstart.yaml training.beta=100",
    )
    parser.add_argument("--version", action="version", version=f"cdpo_ray {__version__}")
    parser.add_argument("-v", "--verbose", action="store_true", help="show what Ray and its workers print")
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    for verb, what in VERBS.items():
        command = verbs.add_parser(verb, help=what, description=what)
        command.add_argument("config", metavar="CONFIG", help="a YAML file, see configs/")
        command.add_argument("overrides", nargs="*", metavar="key=value", help="such as training.beta=100")
        if verb == "pairs":
            command.add_argument("--explain", action="store_true", help="print and draw what each stage holds")
    parser.set_defaults(explain=False)
    asked = parser.parse_args(arguments)
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(message)s", datefmt="%H:%M:%S", stream=sys.stderr)
    logging.getLogger("cdpo_ray").setLevel(logging.INFO)
    try:
        _do(asked.verb, asked.config, asked.overrides, verbose=asked.verbose, explain=asked.explain)
        return 0
    except CdpoError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return EXIT_FAULT
    except KeyboardInterrupt:
        print("interrupted; the same command goes on where it stopped", file=sys.stderr)
        return EXIT_INTERRUPTED


def _do(verb: str, config_path: str, overrides: Sequence[str], *, verbose: bool, explain: bool) -> None:
    config = load_config(config_path, overrides)
    if verb == "check":
        print(make_plan(config, read_prompts(config)))
    elif verb == "report":
        print(*write_reports(config, anew=True), sep="\n")
    elif verb == "run":
        run_steps(config, STEPS, verbose=verbose)
        print(*write_reports(config), sep="\n")
    else:
        run_steps(config, [step for step in STEPS if step.verb == verb], verbose=verbose)
        if explain:
            print(explain_stages(config))


if __name__ == "__main__":
    sys.exit(main())
