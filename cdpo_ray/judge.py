"""`cdpo judge`: candidates -> images of the held-out prompts -> scores of all judges -> one comparison."""

import functools
import logging
from contextlib import ExitStack
from typing import Any

from cdpo_ray.config import COMBINATIONS, Config
from cdpo_ray.cost.gpus import DEFAULT_GPU, Gpu
from cdpo_ray.errors import CdpoError, ConfigError
from cdpo_ray.preflight import problems_of, raise_all, refuse_unavailable_weights
from cdpo_ray.progress import Progress
from cdpo_ray.progress.trackers import TrackedRun
from cdpo_ray.prompts.sources import PromptSplit
from cdpo_ray.records import CANDIDATES, EVALUATION, SAMPLES, SCORES
from cdpo_ray.run import check_cluster, cluster_gpu, perform_step, read_prompts, run_dir_of
from cdpo_ray.session import cluster_address, cluster_nodes, ray_session
from cdpo_ray.steps import Context
from cdpo_ray.steps.candidates import Candidate, candidates_of
from cdpo_ray.store import RunFolder, make_folder, storage_errors_within

log = logging.getLogger(__name__)


def judge_candidates(
    config: Config, *, address: str | None = None, verbose: bool = False, command: str | None = None
) -> list[str]:
    """Generate and score what is missing of each candidate, and compare all of them; resumes where it was interrupted.

    Writes `judge.json` and `judge.html` into the run's folder.

    Args:
        address, verbose, command: see `run.run_steps`.

    Returns:
        Results as a table for the terminal, signs of reward hacking, and the path of the page.

    Raises:
        CdpoError: of any kind; finished images and scores are kept.
    """
    if config.judge is None:
        raise ConfigError("`judge` is missing, but `cdpo judge` needs it; add it, for example as in configs/judge.yaml")
    run_dir, prompts = run_dir_of(config), read_prompts(config)
    candidates = candidates_of(config, run_dir)
    refuse_candidates(config, candidates, prompts)
    with ExitStack() as stack:
        stack.enter_context(storage_errors_within(run_dir))
        stack.enter_context(RunFolder(run_dir).locked())
        tracked = TrackedRun(config.run.name, run_dir, config.plain())
        progress = stack.enter_context(Progress(tracked, tracking=config.tracking.options, command=command))

        @functools.cache
        def start_ray() -> Gpu:
            if cluster_address(address) is None:
                for candidate in candidates:
                    refuse_unavailable_weights(candidate.config, candidate.steps)
            stack.enter_context(ray_session(address=address, verbose=verbose))
            steps = {step.folder: step for step in candidates[0].steps}
            for line in check_cluster(candidates[0].config, steps.values()):
                log.warning(line)
            return cluster_gpu(cluster_nodes()[0])

        def perform(candidate: Candidate, *, with_ray: bool) -> None:
            make_folder(candidate.folder.path)
            place = f"{CANDIDATES}/{candidate.name}/"
            context = Context(
                candidate.config, prompts, candidate.folder, previous=candidate.trained, progress=progress, place=place
            )
            for step in candidate.steps:
                needs_ray = step.folder == SCORES or (step.folder == SAMPLES and not candidate.images)
                if needs_ray == with_ray:
                    perform_step(step, context, start_ray=start_ray if needs_ray else lambda: DEFAULT_GPU)

        for with_ray in (False, True):  # a faulty file is reported before Ray starts
            for candidate in candidates:
                perform(candidate, with_ray=with_ray)
        from cdpo_ray.evaluation.candidates import compare_candidates
        from cdpo_ray.evaluation.runs import table_of

        found = compare_candidates(
            [_tried(candidate) for candidate in candidates],
            config.judge.reference,
            run_dir,
            judges=[*config.evaluation_judges],
            categories=prompts.categories,
            num_resamples=config.evaluation.num_bootstrap_resamples,
            seed=config.run.seed,
        )
        page = run_dir / "judge.html"
        progress.log_page(page)
    signs = [
        f"{name}: signs of reward hacking: {', '.join(each)}" for name, each in found["signs_of_reward_hacking"].items()
    ]
    return [table_of(found), *signs, str(page)]


def refuse_candidates(config: Config, candidates: list[Candidate], prompts: PromptSplit) -> None:
    """Raise for everything that would stop the judging and that can be known before models are loaded.

    Raises:
        CdpoError: of the first problem's kind; several problems are one `ConfigError`.
    """
    problems = [*problems_of(config, prompts, {EVALUATION})]
    for candidate in candidates:
        try:
            candidate.refuse_unusable(prompts)
        except CdpoError as error:
            problems.append(error)
    raise_all(problems)


def _tried(candidate: Candidate) -> Any:
    from cdpo_ray.evaluation.candidates import Tried
    from cdpo_ray.evaluation.report import read_config, trained_on

    section, run = candidate.section, candidate.own_run
    facts: dict[str, Any] = {}
    if section is None:
        facts = {"rewards": {"names": (), "rank_by": COMBINATIONS[0]}}  # so that nothing that rose is suspected
    elif run:
        config = read_config(run)
        facts = {"trained_on": trained_on(config), "rewards": config["rewards"]}
    elif section.trained_on:
        names = section.trained_on
        rank_by = COMBINATIONS[0] if len(names) > 1 else None
        facts = {"trained_on": ", ".join(names), "rewards": {"names": names, "rank_by": rank_by}}
    return Tried(candidate.name, candidate.folder, is_paired=candidate.images is None, **facts)
