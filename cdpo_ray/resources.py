"""Check that the actors of a step fit on the nodes of the cluster."""

import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath

from cdpo_ray.errors import ResourceError


@dataclass(frozen=True)
class Node:
    """Free resources of a node.

    Attributes:
        name: address of the node.
        cpus: number of free CPUs.
        gpus: free fraction of each GPU, 0 to 1.
        gpu_name: Ray's name of the GPU model, such as ``H100``; ``None``: unknown.
        labels: Ray's labels of the node.
    """

    name: str
    cpus: float
    gpus: tuple[float, ...] = ()
    gpu_name: str | None = None
    labels: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Demand:
    """Actors of one role and the resources of each.

    Attributes:
        key: key of the configuration that sets the number of actors.
        actor: name of one actor in messages.
        num_actors: desired number of actors.
        num_needed: minimum number of actors; with fewer, the step cannot run.
        cpus: CPUs per actor.
        gpus: GPUs per actor: a fraction below 1, or a whole number.
        node_labels: labels that a node must have.
    """

    key: str
    actor: str
    num_actors: int
    num_needed: int
    cpus: float
    gpus: float
    node_labels: Mapping[str, str] = field(default_factory=dict)


def check_resources(step: str, demands: Sequence[Demand], nodes: Sequence[Node]) -> list[str]:
    """Place the actors of a step, which all run at the same time, on the nodes.

    An actor runs on one node, and a fraction of a GPU is on one GPU.

    Args:
        step: verb of the step, for the message.
        demands: actors of each role.
        nodes: nodes of the cluster.

    Returns:
        One warning per role of which fewer actors fit than desired.

    Raises:
        ResourceError: the minimum number of actors of each role does not fit.
    """
    left = list(nodes)
    for demand in demands:
        found = _place(demand, demand.num_needed, left)
        if found < demand.num_needed:
            raise ResourceError(
                f"`{demand.key}`: {step} needs {_of(demand, demand.num_needed)}, but the cluster"
                f" has room for {found} of them{' beside the others' if len(demands) > 1 else ''}"
                f" ({'; '.join(map(_node_text, nodes)) or 'no nodes'}); lower it, or add nodes"
            )
    warnings = []
    for demand in demands:
        more = demand.num_actors - demand.num_needed
        if (found := _place(demand, more, left)) < more:
            warnings.append(
                f"`{demand.key}`: of {_of(demand, demand.num_actors)} only {demand.num_needed + found} fit the nodes"
                " of the cluster"
            )
    return warnings


def usable_cpus(root: Path = Path("/")) -> int:
    """Number of CPUs that this process may use: its affinity, limited by the quotas of its cgroups, at least 1.

    Args:
        root: folder that holds ``proc`` and ``sys``.
    """
    affinity = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(affinity, max(1, math.ceil(min(_cpu_quotas(root), default=affinity))))


def _cpu_quotas(root: Path) -> Iterator[float]:
    """CPU limits of the cgroups of this process that have one."""
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:  # not Linux
        return
    for line in lines:
        _, controllers, name = line.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        mounts = ["sys/fs/cgroup", "sys/fs/cgroup/unified"] if not controllers else ["sys/fs/cgroup/cpu"]
        mounts += [f"sys/fs/cgroup/{controllers}"] if controllers not in ("", "cpu") else []
        path = PurePosixPath("/", name)
        # Limits of parent groups apply too. In a container, the process's own group may be mounted as the root.
        for mount in mounts:
            for group in (path, *path.parents):
                yield from _quota_of(root / mount / group.relative_to("/"))


def _quota_of(group: Path) -> Iterator[float]:
    """CPU limit of one cgroup, of version 2 or 1; nothing if it has none or cannot be read."""
    for names in (("cpu.max",), ("cpu.cfs_quota_us", "cpu.cfs_period_us")):
        try:
            quota, period = " ".join((group / name).read_text() for name in names).split()
            if int(quota) > 0:  # "max" and -1 mean no limit
                yield int(quota) / int(period)
        except (OSError, ValueError, ZeroDivisionError):
            continue


def count_fitting(demands: Sequence[Demand], nodes: Sequence[Node]) -> int:
    """Number of times that the minimum number of actors of all roles fits on the nodes at the same time."""
    left, times = list(nodes), 0
    while all(_place(demand, demand.num_needed, left) == demand.num_needed for demand in demands):
        times += 1
    return times


def _place(demand: Demand, count: int, left: list[Node]) -> int:
    """Place actors where the fewest GPUs stay free, and update ``left``; returns the number of placed actors."""
    for placed in range(count):
        options = [(sum(after.gpus), index, after) for index, node in enumerate(left) if (after := _with(demand, node))]
        if not options:
            return placed
        _, index, after = min(options)
        left[index] = after
    return count


def _with(demand: Demand, node: Node) -> Node | None:
    """Free resources of a node after placing one more actor; ``None``: it does not fit."""
    if demand.cpus > node.cpus or not demand.node_labels.items() <= node.labels.items():
        return None
    if demand.gpus >= 1:
        taken = [index for index, free in enumerate(node.gpus) if free == 1][: round(demand.gpus)]
        fits, part = len(taken) == round(demand.gpus), 1.0
    else:
        roomy = [index for index, free in enumerate(node.gpus) if free >= demand.gpus - 1e-9]
        taken = sorted(roomy, key=lambda index: node.gpus[index])[:1]
        fits, part = bool(taken) or demand.gpus == 0, demand.gpus
    if not fits:
        return None
    gpus = tuple(free - part * (index in taken) for index, free in enumerate(node.gpus))
    return replace(node, cpus=node.cpus - demand.cpus, gpus=gpus)


def _of(demand: Demand, count: int) -> str:
    gpus = f" and {demand.gpus:g} GPUs" if demand.gpus else ""
    labels = ", ".join(f"{key}={value}" for key, value in demand.node_labels.items())
    where = f" on nodes with the label {labels}" if labels else ""
    return f"{count} {demand.actor}{'s' * (count > 1)} of {demand.cpus:g} CPUs{gpus} each{where}"


def _node_text(node: Node) -> str:
    return f"{node.name}: {node.cpus:g} CPUs, {sum(node.gpus):g} GPUs"
