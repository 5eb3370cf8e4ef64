"""An estimate in words, as `cdpo check` prints it."""

from cdpo_ray.cost.estimate import Estimate, RoleMemory, StepCost
from cdpo_ray.cost.gpus import GIB
from cdpo_ray.progress.pace import duration


def cost_lines(estimate: Estimate, source: str) -> list[str]:
    """Hours per step, peak memory per role and a verdict, a line each.

    Args:
        source: where the model's footprint is from.
    """
    gpu = estimate.gpu
    where = "" if estimate.on_gpu else "; `resources` asks for no GPU, so this is what it would take on one"
    lines = [f"  cost         estimated, not measured, for {gpu.name} ({gpu.memory_gib:g} GiB), {source}{where}"]
    lines += [f"    {step.verb:<11}{_step(step)}" for step in estimate.steps]
    lines.append(f"    {'all':<11}{estimate.gpu_hours:.3g} GPU-hours")
    if estimate.search_gpu_hours is not None:
        lines.append(f"    {'search':<11}{estimate.search_gpu_hours:.3g} GPU-hours at most, trials and confirmation")
    for role in estimate.memory:
        lines += _role(role, estimate)
    lines += [f"    note       {note}" for note in estimate.notes]
    verdict = "fits" if estimate.fits else "does not fit"
    return [*lines, f"  verdict      {verdict} {gpu.name}"]


def memory_faults(estimate: Estimate) -> list[str]:
    """What does not fit the GPU, a line each."""
    return [
        f"{role.role}: estimated peak {_gib(role.peak.total)} of {_available(role)} of {estimate.gpu.name};"
        f" {_advice(role)}"
        for role in estimate.memory
        if not role.fits
    ]


def _step(step: StepCost) -> str:
    gpus = (
        f"{step.num_processes} x {step.gpus_per_process:g}" if step.num_processes > 1 else f"{step.gpus_per_process:g}"
    )
    how = "compiled" if step.compiled else "eager"
    return (
        f"{step.gpu_hours:.3g} GPU-hours, {duration(step.wall_seconds)} on {gpus} GPU, {how}"
        f" (compiling takes {duration(step.compile_seconds)}, saves {duration(step.saved_seconds)})"
    )


def _role(role: RoleMemory, estimate: Estimate) -> list[str]:
    verdict = "fits" if role.fits else "DOES NOT FIT"
    checkpointed = ", gradient checkpointing" if role.role == "trainer" and estimate.checkpointing else ""
    line = f"    {role.role:<11}peak {_gib(role.peak.total)} of {_available(role)}: {verdict}{checkpointed}"
    return [line] if role.fits else [line, f"    {'':<11}{_advice(role)}"]


def _advice(role: RoleMemory) -> str:
    if not role.advice:
        return "no change of the batch, checkpointing, ZeRO, quantization or offload fits; take a larger GPU"
    return f"would fit: {'; or '.join(role.advice)}"


def _available(role: RoleMemory) -> str:
    share = f" ({role.share:g} of a GPU)" if role.share < 1 else ""
    return f"{_gib(role.available_bytes)}{share}"


def _gib(number: float) -> str:
    return f"{number / GIB:.1f} GiB"
