"""Arithmetic of the model of a cluster: cases with a closed form, and failures against a simulation."""

import dataclasses
import random

import pytest
from scale import Cluster, generation, generation_limits, generation_seconds, scales_to, stretch, training, update_parts

IDEAL = Cluster(
    images_per_call=16, call_seconds=2.0, generator_compile_seconds=0.0,
    update_seconds={4: 0.25, 16: 0.5}, trainer_compile_seconds=0.0,
    png_core_seconds=0.0, png_bytes=0.0,
    driver_seconds=0.0, gap_seconds=0.0, write_core_seconds=0.0, hash_bytes_per_second=1.0,
    board_calls_per_second=1.0, actor_start_seconds=0.0, checkpoint_seconds=0.0,
    hours_per_failure=0.0, request_seconds=0.0, reduce_latency_seconds=0.0, adapter_bytes=0.0,
    write_requests_per_second=float("inf"), model_load_seconds=0.0, replacement_seconds=0.0,
    pairs_per_update=64,
)  # fmt: skip
"""Nothing costs anything but the GPUs."""


def with_costs(**costs: float) -> Cluster:
    return dataclasses.replace(IDEAL, **costs)  # type: ignore[arg-type]


@pytest.mark.parametrize("gpus", [1, 8, 1024])
def test_without_overhead_the_rate_of_generation_is_that_of_one_gpu_times_their_number(gpus: int) -> None:
    assert generation(IDEAL, gpus) == (8.0 * gpus, "GPUs", 0.0)


def test_without_overhead_one_gpu_trains_at_its_best_rate() -> None:
    assert training(IDEAL, 1) == (32.0, "GPUs", 0.0)


def test_a_step_takes_its_start_and_whole_waves_of_calls() -> None:
    slow_to_start = with_costs(model_load_seconds=30.0, generator_compile_seconds=60.0)
    assert generation_seconds(slow_to_start, 4, 5 * 16) == pytest.approx(90 + 2 * 2.0)


@pytest.mark.parametrize(
    ("costs", "limit", "calls_per_second"),
    [
        ({"driver_seconds": 0.02}, "driver", 50.0),
        ({"write_requests_per_second": 100.0}, "storage requests", 50.0),
        ({"png_core_seconds": 2.0}, "PNG encoding", 64 * 8 / 32.0),
    ],
)
def test_the_scarcest_resource_limits_the_rate(costs: dict[str, float], limit: str, calls_per_second: float) -> None:
    cluster = with_costs(**costs)
    assert generation_limits(cluster, 64)[limit] == pytest.approx(calls_per_second)
    assert generation(cluster, 1024 if limit != "PNG encoding" else 64)[:2] == (
        pytest.approx(16 * calls_per_second),
        limit,
    )


def test_generation_scales_until_the_driver_is_busy() -> None:
    cluster = with_costs(driver_seconds=1 / 64)  # 64 calls per second are made by 128 GPUs
    assert scales_to(lambda gpus: generation(cluster, gpus).per_second) == 128


def test_a_fixed_number_of_pairs_per_update_stops_scaling_at_the_fastest_launch() -> None:
    assert [training(IDEAL, gpus).per_second for gpus in (4, 16, 64)] == [128.0, 256.0, 256.0]
    assert training(IDEAL, 64).limit == "too few pairs per GPU"
    assert training(IDEAL, 128) == (0.0, "fewer pairs than GPUs", 0.0)


def test_an_all_reduce_in_a_ring_sends_almost_twice_the_gradients() -> None:
    cluster = with_costs(adapter_bytes=100.0, reduce_bytes_per_second=10.0)
    assert update_parts(cluster, 1)["all-reduce"] == 0
    assert update_parts(cluster, 4)["all-reduce"] == pytest.approx(2 * 3 / 4 * 100 / 10)


def test_failures_stretch_work_as_a_simulation_of_them_does() -> None:
    generator, every, work, restart = random.Random(0), 50.0, 30.0, 10.0
    times = []
    for _ in range(20_000):
        at = 0.0
        while (until := generator.expovariate(1 / every)) < work:
            at += until + restart
            while (again := generator.expovariate(1 / every)) < restart:  # a failure during the restart
                at += again
        times.append(at + work)
    assert sum(times) / len(times) == pytest.approx(stretch(work, 1 / every, restart) * work, rel=0.03)


def test_rare_failures_repeat_half_of_the_work_between_checkpoints() -> None:
    work, every = 10.0, 1e7
    assert stretch(work, 1 / every, 0.0) - 1 == pytest.approx(work / 2 / every, rel=1e-3)
    assert stretch(work, 1 / every, 40.0) - 1 == pytest.approx((work / 2 + 40) / every, rel=1e-3)
    assert stretch(work, 0.0, 40.0) == 1.0


def test_a_failure_stops_all_trainers_but_only_one_node_of_generators() -> None:
    cluster = with_costs(hours_per_failure=1000.0, replacement_seconds=300.0)
    lost = {gpus: (generation(cluster, gpus).lost, training(cluster, gpus).lost) for gpus in (8, 64)}
    assert lost[64][0] == lost[8][0]
    assert lost[64][1] == pytest.approx(8 * lost[8][1], rel=0.1)
