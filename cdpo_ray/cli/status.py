"""`cdpo status`: the state of a run, from its folder."""

import argparse
import sys
from pathlib import Path

from cdpo_ray.cli.arguments import add_run, run_dir_given
from cdpo_ray.cli.terminal import EXIT_PROBLEM, print_lines
from cdpo_ray.errors import ConfigError, StoreError, printable
from cdpo_ray.progress.status import RunStatus, StepStatus, read_status, run_rounds, run_status
from cdpo_ray.records import EVALUATION, REPORT
from cdpo_ray.store import exists

HELP = "print the state of a run: finished steps, progress, time left, errors"
EXAMPLE = "cdpo status runs/quickstart"
DESCRIPTION = """\
Print the state of a run: finished steps, progress and time left of the current step,
errors, and the command that resumes the run. It reads only the run's folder, so it
works on any machine that can read the folder, during the run and afterwards. On a
terminal the output is a table with progress bars, otherwise plain text.

exit code:
  0  the run is finished, or a process is working on it
  1  the run is unfinished, and no process is working on it
  2  there is no run in this folder"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_run(parser)


def run(arguments: argparse.Namespace) -> int:
    run_dir = run_dir_given(arguments.run)
    status = run_status(run_dir)
    outcome = outcome_lines(run_dir) if status.is_done else []
    print_lines(view(status, outcome) if sys.stdout.isatty() else "\n".join([status.text, *outcome]))
    return EXIT_PROBLEM if status.is_interrupted else 0


def outcome_lines(run_dir: Path) -> list[str]:
    """Path of the report of each round of a finished run, and one line per judge: base and fine-tuned model."""
    lines = []
    for run in run_rounds(run_dir, read_status(run_dir)):
        if exists(report := run.path / REPORT):
            lines.append(f"report: {printable(report, 1000)}")
        if exists(run.path / EVALUATION / "metrics.json"):
            from cdpo_ray.evaluation.report import APPEARANCE, measure_results, read_config, read_metrics

            try:
                results = measure_results(read_metrics(run.path), read_config(run)["rewards"])
            except (StoreError, ConfigError) as error:
                lines.append(printable(error, 1000))
                continue
            judged = [result for result in results if result.role != APPEARANCE]
            lines += [f"  {printable(result.sentence, 1000)} ({result.role})" for result in judged]
    return lines


def view(status: RunStatus, outcome: list[str], *, width: int | None = None) -> str:
    """The status as a table for a terminal, with colours and progress bars.

    Args:
        outcome: see `outcome_lines`.
        width: number of columns; `None`: the terminal's.
    """
    from rich.console import Console, Group, RenderableType
    from rich.progress_bar import ProgressBar
    from rich.table import Table
    from rich.text import Text  # unlike a plain string, it is not parsed for markup

    styles = {"done": "green", "running": "bold cyan", "failed": "bold red", "stopped": "yellow", "started": "yellow"}

    def details(step: StepStatus) -> Group:
        words: list[RenderableType] = [Text(", ".join(step.words))] if step.words else []
        if step.reached and step.state == "running":
            done, total = step.reached
            words.append(ProgressBar(total=total, completed=done, width=30))
        return Group(
            *words, *(Text(note, style="yellow" if note.startswith("warning") else "dim") for note in step.notes)
        )

    parts: list[RenderableType] = [Text(status.name, style="bold")]
    for number, steps in enumerate(status.steps, start=1):
        table = Table("step", "state", "progress", box=None, header_style="dim", padding=(0, 2, 0, 0))
        for step in steps:
            table.add_row(Text(step.folder), Text(step.state, style=styles.get(step.state, "dim")), details(step))
        parts += [Text(f"round {number}/{len(status.steps)}")] if len(status.steps) > 1 else []
        parts.append(table)
    parts += map(Text, status.trials)
    parts += [Text(""), *(Text(line, style="red") for line in status.damage)]
    for line in status.end:
        style = {"failed": "bold red", "done": "bold green", "next": "bold"}.get(line.partition(":")[0], "")
        parts.append(Text(line, style=style, overflow="ignore", no_wrap=True))  # commands and paths are copied
    parts += [Text(line, overflow="ignore", no_wrap=True) for line in outcome]
    console = Console(force_terminal=True, width=width)
    with console.capture() as captured:
        console.print(Group(*parts), crop=False)
    return captured.get().rstrip("\n")
