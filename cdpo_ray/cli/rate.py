"""`cdpo rate`: people judge a run's images."""

import argparse
import getpass
import secrets
from pathlib import Path

from cdpo_ray.cli.arguments import add_run, run_dir_given
from cdpo_ray.cli.serving import add_port, serve
from cdpo_ray.cli.terminal import print_lines
from cdpo_ray.errors import ConfigError, printable
from cdpo_ray.records import HELDOUT, VOTES
from cdpo_ray.store import RunFolder, output_path, path_within

HELP = "serve a page for blind votes on a run's images: win rate, and preferences to train on"
EXAMPLE = "cdpo rate runs/quickstart --voter ana"
DESCRIPTION = """\
Serve a page on this machine only, and print its address, which contains a secret. The
page shows two images of one held-out prompt from the same noise, one by the base model
and one by the fine-tuned model, in random order, and does not show which is which. Keys:
1 left, 2 right, 3 tie, u undo.

Each vote is saved to votes/ in the run's folder before the next pair is shown. Ctrl-C
ends the session and prints the result; the same command continues it. `cdpo report RUN`
adds the votes of all voters to the report, as the judge `people`.

With `--samples`, the two images are training samples of one prompt. With `--export`, the
votes of all voters are written as preferences to train on, and no page is served.

On a remote machine, forward the port: ssh -L 8000:localhost:8000 HOST cdpo rate RUN --port 8000"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_run(parser)
    parser.add_argument(
        "--voter", metavar="NAME", help="name of the voter, who has a file of votes (default: your login name)"
    )
    parser.add_argument("--samples", action="store_true", help="rate training samples instead of held-out images")
    parser.add_argument("--out", metavar="DIR", help="folder of the votes (default: votes/ in the run's folder)")
    parser.add_argument(
        "--export",
        metavar="FILE",
        help="write the votes and their images to this .parquet file, which `cdpo import` reads with"
        " preferences.format=pickapic",
    )
    add_port(parser)


def run(arguments: argparse.Namespace) -> int:
    from cdpo_ray.api.results import open_run
    from cdpo_ray.evaluation.people import lines_of, people_of
    from cdpo_ray.evaluation.rating import RatingSession
    from cdpo_ray.evaluation.votes import SAMPLED, rated_images, votes_path

    run = RunFolder(open_run(run_dir_given(arguments.run)).path, foreign=True)
    votes_dir = output_path(arguments.out, "--out") if arguments.out else path_within(run.path, VOTES)
    images = rated_images(run, SAMPLED if arguments.samples else HELDOUT)
    if arguments.export:
        from cdpo_ray.export.votes import export_votes

        print_lines(export_votes(images, votes_dir, _parquet_path(arguments.export)))
        return 0
    voter = voter_named(arguments.voter)
    path = votes_path(votes_dir, images.kind, voter)
    session = RatingSession(images, path, voter=voter, run_name=run.path.resolve().name)
    serve(session.answer, arguments.port, accept=session.accept, token=secrets.token_urlsafe(24))
    print_lines(f"{session.line}: {path}")
    if not arguments.samples and (people := people_of(run, votes_dir)):
        print_lines(*lines_of(people))
    return 0


def voter_named(name: str | None) -> str:
    """The name of a voter, which is also that of a file; `None`: the login name.

    Raises:
        ConfigError: it has other characters than letters, digits, `-` and `_`, or there is no login name.
    """
    from cdpo_ray.evaluation.votes import VOTER

    try:
        given = name if name is not None else getpass.getuser()
    except (KeyError, OSError):  # a container without the user
        raise ConfigError("`--voter`: this machine has no login name; give a name") from None
    if not VOTER.fullmatch(given):
        raise ConfigError(
            "`--voter` must be up to 64 letters, digits, - and _, the first a letter or digit, got"
            f" {printable(given)!r}"
        )
    return given


def _parquet_path(text: str) -> Path:
    path = output_path(text, "--export")
    if path.suffix != ".parquet":
        raise ConfigError(f"`--export` must end in .parquet, got {printable(text)}")
    return path
