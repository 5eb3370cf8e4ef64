"""`run_pipeline`: the whole pipeline, or some of its steps, from Python."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cdpo_ray.api.results import Run
from cdpo_ray.config import Config, load_config
from cdpo_ray.errors import ConfigError
from cdpo_ray.progress import Progress
from cdpo_ray.run import run_dir_of, run_steps, write_reports
from cdpo_ray.steps import steps_of


def run_pipeline(
    config: Config | str | Path | Mapping[str, Any],
    *,
    steps: Sequence[str] | None = None,
    address: str | None = None,
    verbose: bool = False,
) -> Run:
    """Run the pipeline of a configuration, from prompts to report, as `cdpo run` does.

    Finished steps are skipped, so the same call resumes an interrupted run. Ray is started, and stopped at the end,
    unless this process is connected to one, or ``address`` or ``RAY_ADDRESS`` names a cluster. Progress bars are drawn
    on a terminal and in a notebook. Log messages go to the logger ``cdpo_ray``; `logging.basicConfig(level="INFO")`
    shows them.

    Args:
        config: configuration, or what `load_config` reads it from.
        steps: names of the steps to run, ``["generate", "score"]``: ``generate`` (with preferences ``import``),
            ``score``, ``pairs``, ``train`` and ``evaluate``. ``None``: all steps and the report.
        address: ``host:port`` of a Ray cluster's head.
        verbose: print the output of Ray and its workers.

    Returns:
        The run; of several rounds, the last one that was started.

    Raises:
        CdpoError: of any kind; steps that finished before it are kept.
    """
    loaded = config if isinstance(config, Config) else load_config(config)
    known = steps_of(loaded)
    names = [step.verb for step in known]
    if steps is not None and (unknown := [name for name in steps if name not in names]):
        raise ConfigError(f"`steps` must be names of {', '.join(map(repr, names))}, got {unknown[0]!r}")
    chosen = [step for step in known if steps is None or step.verb in steps]

    def report(progress: Progress) -> None:
        if steps is None:
            write_reports(loaded, on_written=progress.log_page)

    folder = run_steps(loaded, chosen, address=address, verbose=verbose, on_end=report)
    return Run(folder, run_dir_of(loaded))
