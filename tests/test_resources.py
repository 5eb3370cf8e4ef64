"""Placement of actors on hand-made nodes, and messages about those that do not fit."""

import os
from pathlib import Path

import pytest
from finished_runs import config_of

from cdpo_ray.errors import ConfigError, ResourceError
from cdpo_ray.resources import Demand, Node, check_resources, count_fitting, usable_cpus
from cdpo_ray.steps import STEPS, demands_of

CPU_HEAD, ONE_GPU, TWO_GPUS = Node("head", 8), Node("a", 8, (1.0,)), Node("b", 8, (1.0, 1.0))


def trainers(count: int, *, cpus: float = 1, gpus: float = 1) -> Demand:
    return Demand("training.num_workers", "worker", count, count, cpus, gpus)


def pool(count: int, *, cpus: float = 1, gpus: float = 0, key: str = "resources.generators") -> Demand:
    return Demand(key, "actor", count, 1, cpus, gpus)


def test_trainers_must_all_fit_and_the_error_lists_the_nodes() -> None:
    message = (
        r"^`training.num_workers`: train needs 2 workers of 1 CPUs and 1 GPUs each, but the cluster has room for 1 of"
        r" them \(head: 8 CPUs, 0 GPUs; a: 8 CPUs, 1 GPUs\); lower it, or add nodes$"
    )
    with pytest.raises(ResourceError, match=message):
        check_resources("train", [trainers(2)], [CPU_HEAD, ONE_GPU])
    assert check_resources("train", [trainers(3)], [CPU_HEAD, ONE_GPU, TWO_GPUS]) == []


def test_an_actor_is_not_spread_over_nodes() -> None:
    with pytest.raises(ResourceError, match="room for 0 of them"):
        check_resources("train", [trainers(1, gpus=2)], [ONE_GPU, ONE_GPU])
    with pytest.raises(ResourceError, match="room for 0 of them"):
        check_resources("train", [trainers(1, cpus=9, gpus=0)], [CPU_HEAD, CPU_HEAD])
    assert check_resources("train", [trainers(1, gpus=2)], [TWO_GPUS]) == []


@pytest.mark.parametrize(("gpus", "room"), [(0.25, 8), (0.3, 6), (0.5, 4), (0.6, 2), (1, 2), (2, 1)])
def test_a_fraction_of_a_gpu_is_on_one_gpu(gpus: float, room: int) -> None:
    assert check_resources("train", [trainers(room, gpus=gpus)], [TWO_GPUS]) == []
    with pytest.raises(ResourceError, match=f"room for {room} of them"):
        check_resources("train", [trainers(room + 1, gpus=gpus)], [TWO_GPUS])


def test_a_pool_needs_one_actor_and_missing_ones_are_a_warning() -> None:
    assert check_resources("generate", [pool(4, gpus=1)], [ONE_GPU, TWO_GPUS]) == [
        "`resources.generators`: of 4 actors of 1 CPUs and 1 GPUs each only 3 fit the nodes of the cluster"
    ]


def test_a_second_pool_must_fit_beside_the_first() -> None:
    pools = [pool(1, gpus=1), pool(1, gpus=0.5, key="resources.scorers")]
    with pytest.raises(ResourceError, match=r"^`resources.scorers`: .* room for 0 of them beside the others"):
        check_resources("generate", pools, [ONE_GPU])
    assert check_resources("generate", pools, [TWO_GPUS]) == []


def test_actors_without_a_gpu_leave_the_gpu_nodes_to_others() -> None:
    assert check_resources("generate", [pool(1, cpus=8), pool(1, cpus=8, gpus=1)], [ONE_GPU, CPU_HEAD]) == []


def test_a_cluster_without_nodes_is_refused() -> None:
    with pytest.raises(ResourceError, match=r"\(no nodes\)"):
        check_resources("generate", [pool(1)], [])


def test_each_step_requires_the_actors_that_it_starts() -> None:
    config = config_of(
        "runs",
        "embedded",
        rewards={"names": ["clip"], "placement": "pool"},
        training={"num_workers": 3, "global_batch_size": 3},
        resources={
            "generators": {"num_actors": 4, "gpus_per_actor": 0.5},
            "scorers": {"cpus_per_actor": 2},
            "trainers": {"gpus_per_worker": 1},
        },
    )
    generators = Demand("resources.generators", "actor", 4, 1, 1, 0.5)
    scorers = Demand("resources.scorers", "actor", 1, 1, 2, 0)

    def data_task(pool: str) -> Demand:
        return Demand(f"resources.{pool}.cpus_per_actor", "task of Ray Data", 1, 1, 1, 0)

    assert {step.verb: demands_of(step, config) for step in STEPS} == {
        "generate": [generators, scorers, data_task("generators")],
        "score": [scorers, data_task("scorers")],
        "pairs": [],
        "train": [trainers(3)],
        "evaluate": [generators, data_task("generators")],
    }


def test_an_actor_that_leaves_no_cpu_for_ray_data_is_refused() -> None:
    def checked(**pool: float) -> list[str]:
        config = config_of("runs", "embedded", resources={"generators": pool})
        return check_resources("generate", demands_of(STEPS[0], config), [Node("a", 4.0)])

    with pytest.raises(
        ResourceError, match=r"^`resources.generators.cpus_per_actor`: generate needs 1 task of Ray Data"
    ):
        checked(cpus_per_actor=4)
    assert checked(cpus_per_actor=3) == []
    assert checked(num_actors=3) == []
    assert "only 3 fit" in checked(num_actors=4)[0]


@pytest.mark.parametrize(
    ("workers", "cpus", "gpus", "times"),
    [
        (1, 1, 0.5, 6),
        (1, 1, 0.25, 12),
        (1, 1, 1, 3),
        (2, 1, 1, 1),
        (4, 1, 1, 0),
        (1, 8, 1, 2),  # drivers are placed where no GPU is
        (1, 4, 0, 5),  # the node of the drivers has fewer than 4 CPUs left for a second worker
    ],
)
def test_concurrent_trials_are_counted_including_their_drivers(
    workers: int, cpus: float, gpus: float, times: int
) -> None:
    driver = Demand("search", "driver of a trial", 1, 1, 0.01, 0)
    nodes = [Node("a", 8.0, (1.0,)), Node("b", 8.0, (1.0, 1.0)), Node("c", 8.0)]
    assert count_fitting([driver, trainers(workers, cpus=cpus, gpus=gpus)], nodes) == times


@pytest.mark.parametrize(
    ("files", "cpus"),
    [
        ({}, 3),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "max 100000\n"}, 3),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "200000 100000\n"}, 2),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "150000 100000\n"}, 2),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "10000 100000\n"}, 1),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "4800000 100000\n"}, 3),
        ({"proc/self/cgroup": "0::/a/b\n", "sys/fs/cgroup/a/cpu.max": "100000 100000\n"}, 1),
        ({"proc/self/cgroup": "0::/a\n", "sys/fs/cgroup/a/cpu.max": "max 1\n", "sys/fs/cgroup/cpu.max": "2 1\n"}, 2),
        (
            {
                "proc/self/cgroup": "5:memory:/m\n4:cpu,cpuacct:/docker/x\n0::/\n",
                "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_quota_us": "200000\n",
                "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_period_us": "100000\n",
            },
            2,
        ),
        (
            {
                "proc/self/cgroup": "1:cpu:/\n",
                "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1\n",
                "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n",
            },
            3,
        ),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "damaged\n"}, 3),
    ],
)
def test_fault_41_usable_cpus_are_limited_by_affinity_and_by_cgroups_of_both_versions(
    files: dict[str, str], cpus: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1, 2})
    monkeypatch.setattr(os, "cpu_count", lambda: 48)
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    assert usable_cpus(tmp_path) == cpus


def test_workers_are_placed_on_nodes_with_their_labels_only() -> None:
    spot, on_demand = ({"market": kind, "ray.io/node-group": "a"} for kind in ("spot", "on-demand"))
    workers = Demand("training.num_workers", "worker", 2, 2, 1, 1, {"market": "on-demand"})
    assert not check_resources("train", [workers], [Node("a", 8, (1.0, 1.0), labels=on_demand)])
    with pytest.raises(ResourceError, match=r"2 workers of 1 CPUs and 1 GPUs each on nodes with the label"
                       r" market=on-demand, but the cluster has room for 1 of them"):  # fmt: skip
        check_resources("train", [workers], [Node("a", 8, (1.0,), labels=on_demand), Node("b", 8, (1.0,), labels=spot)])


@pytest.mark.parametrize("labels", [{"market": "spot!"}, {"": "spot"}, {"market type": "spot"}, {"a/b/c": "spot"}])
def test_a_label_that_no_node_can_have_is_refused(labels: dict[str, str], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"resources\.trainers\.node_labels"):
        config_of(tmp_path, "embedded", resources={"trainers": {"node_labels": labels}})
