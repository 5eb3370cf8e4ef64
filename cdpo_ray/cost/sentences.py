"""Estimate -> text of `cdpo check`."""

from cdpo_ray.cost.estimate import Estimate, RoleMemory, StepCost
from cdpo_ray.cost.gpus import GIB
from cdpo_ray.cost.memory import USABLE_SHARE
from cdpo_ray.progress.pace import duration


def cost_lines(estimate: Estimate, source: str) -> list[str]:
    """Hours per step, peak memory per role and a verdict, one per line.

    Args:
        source: source of the model's footprint.
    """
    gpu = estimate.gpu
    where = "" if estimate.on_gpu else "; `resources` requests no GPU, the figures are for one per process"
    lines = [f"  cost         estimated, not measured, for {gpu.name} ({gpu.memory_gib:g} GiB), {source}{where}"]
    lines += [f"    {step.verb:<11}{_step(step)}" for step in estimate.steps]
    rounds = f" in {estimate.rounds} rounds" if estimate.rounds > 1 else ""
    lines.append(f"    {'all':<11}{_hours(estimate.gpu_hours)}{rounds}")
    if estimate.search_gpu_hours is not None:
        lines.append(f"    {'search':<11}about {_hours(estimate.search_gpu_hours)} if no trial stops early")
    for role in estimate.memory:
        lines += _role(role, estimate)
    lines += [f"    note       {note}" for note in estimate.notes]
    verdict = "fits" if estimate.fits else "does not fit"
    return [*lines, f"  verdict      {verdict} {gpu.name}"]


def memory_faults(estimate: Estimate) -> list[str]:
    """Roles that do not fit the GPU, one per line."""
    return [
        f"{role.role}: estimated peak {_gib(role.peak.total)} does not fit {_available(role)} of {estimate.gpu.name},"
        f" of which {USABLE_SHARE:.0%} is usable; {_advice(role)}"
        for role in estimate.memory
        if not role.fits
    ]


def _step(step: StepCost) -> str:
    gpus = (
        f"{step.num_processes} x {step.gpus_per_process:g}" if step.num_processes > 1 else f"{step.gpus_per_process:g}"
    )
    takes, saved = duration(step.compile_seconds), duration(step.saved_seconds)
    if step.compiled:
        how = f"compiled (compiling takes {takes}, saves {saved})"
    else:
        how = f"eager (compiling would take {takes}, save {saved})"
    return f"{_hours(step.gpu_hours)}, {duration(step.wall_seconds)} on {gpus} GPU, {how}"


def _role(role: RoleMemory, estimate: Estimate) -> list[str]:
    verdict = "fits" if role.fits else f"DOES NOT FIT ({USABLE_SHARE:.0%} is usable)"
    checkpointed = ", gradient checkpointing" if role.role == "trainer" and estimate.checkpointing else ""
    line = f"    {role.role:<11}peak {_gib(role.peak.total)} of {_available(role)}: {verdict}{checkpointed}"
    return [line] if role.fits else [line, f"    {'':<11}{_advice(role)}"]


def _advice(role: RoleMemory) -> str:
    if not role.advice:
        return "no batch size, checkpointing, ZeRO, quantization or offload suffices; use a GPU with more memory"
    return f"would fit: {'; or '.join(role.advice)}"


def _available(role: RoleMemory) -> str:
    share = f" ({role.share:g} of a GPU)" if role.share < 1 else ""
    return f"{_gib(role.available_bytes)}{share}"


def _hours(gpu_hours: float) -> str:
    return f"{gpu_hours:,.0f} GPU-hours" if gpu_hours >= 100 else f"{gpu_hours:.3g} GPU-hours"


def _gib(number: float) -> str:
    return f"{number / GIB:.1f} GiB"
