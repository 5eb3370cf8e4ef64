"""GPUs by the device names of drivers and Ray."""

from pathlib import Path

import pytest

from cdpo_ray.cost.gpus import GPUS, gpu_of_device, visible_gpu


@pytest.mark.parametrize(
    ("device", "memory", "name"),
    [
        ("NVIDIA H100 80GB HBM3", 79.2, "h100"),
        ("NVIDIA A100-SXM4-80GB", 79.3, "a100"),
        ("NVIDIA A100-SXM4-40GB", 39.4, "a100-40gb"),
        ("NVIDIA A100-PCIE-40GB", None, "a100-40gb"),
        ("NVIDIA L4", 22.0, "l4"),
        ("NVIDIA L40S", 44.4, "l40s"),
        ("NVIDIA GeForce RTX 4090", 23.6, "4090"),
        ("Tesla T4", 14.6, "t4"),
        ("Tesla V100-SXM2-16GB", 15.8, "v100"),
        ("H100", None, "h100"),
        ("A100-40G", None, "a100-40gb"),
        ("NVIDIA H20", 95.0, None),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", 15.6, None),
        ("AMD Instinct MI300X", 191.0, None),
    ],
)
def test_a_device_is_identified_by_its_name_and_memory(device: str, memory: float | None, name: str | None) -> None:
    found = gpu_of_device(device, memory)
    assert (found.name if found else None) == name


def test_the_gpu_is_queried_from_the_driver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "nvidia-smi"
    program.write_text("#!/bin/sh\necho 'NVIDIA A100-SXM4-40GB, 40960'\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    assert visible_gpu() == GPUS["a100-40gb"]
    program.write_text("#!/bin/sh\necho 'NVIDIA L4, [N/A]'\n")
    assert visible_gpu() == GPUS["l4"], "the driver reports no size of unified memory"
    program.write_text("#!/bin/sh\nexit 9\n")
    assert visible_gpu() is None
    program.unlink()
    assert visible_gpu() is None


def test_rates_and_memory_are_in_plausible_ranges() -> None:
    for gpu in GPUS.values():
        assert 10 < gpu.memory_gib < 300 and gpu.memory_bytes == gpu.memory_gib * 2**30
        assert 50 < gpu.bf16_teraflops < 3000 and gpu.fp32_teraflops < gpu.bf16_teraflops
