"""GPUs by name: memory and published peak rates."""

import re
import shutil
import subprocess
from dataclasses import dataclass

GIB = 2**30


@dataclass(frozen=True)
class Gpu:
    """A kind of GPU.

    Attributes:
        name: key in `GPUS`.
        memory_gib: memory reported by PyTorch, less than the nominal size.
        bf16_teraflops: dense 16-bit matrix rate with fp32 accumulation, without sparsity.
        fp32_teraflops: fp32 rate without TensorFloat-32.
        has_bf16: whether the 16-bit rate holds for bfloat16; otherwise for float16 only.
    """

    name: str
    memory_gib: float
    bf16_teraflops: float
    fp32_teraflops: float
    has_bf16: bool = True

    @property
    def memory_bytes(self) -> float:
        return self.memory_gib * GIB


GPUS = {
    gpu.name: gpu
    for gpu in (
        # Rates: NVIDIA's data sheets, and for GeForce the architecture white papers (Ada, Ampere, Blackwell), where the
        # rate with fp32 accumulation is half the one with fp16. Memory: `torch.cuda.get_device_properties`.
        Gpu("b200", 178, 2250, 75),
        Gpu("h200", 139, 989, 67),
        Gpu("h100", 79, 989, 67),
        Gpu("a100", 79, 312, 19.5),
        Gpu("a100-40gb", 39, 312, 19.5),
        Gpu("l40s", 44, 362, 91.6),
        Gpu("a6000", 47, 155, 38.7),
        Gpu("a10g", 22, 70, 35),
        Gpu("l4", 22, 121, 30.3),
        Gpu("v100", 15.7, 125, 15.7, has_bf16=False),
        Gpu("t4", 14.6, 65, 8.1, has_bf16=False),
        Gpu("5090", 31, 209, 104.8),
        Gpu("4090", 23.5, 165, 82.6),
        Gpu("3090", 23.5, 71, 35.6),
    )
}
DEFAULT_GPU = GPUS["h100"]


def gpu_of_device(device_name: str, memory_gib: float | None = None) -> Gpu | None:
    """GPU in the table by the device name of a driver or Ray; `None`: not listed.

    Args:
        device_name: such as ``NVIDIA H100 80GB HBM3`` or ``A100-40G``.
        memory_gib: memory of the device, which distinguishes variants of the same name; `None`: not known.
    """
    words = re.split(r"[^a-z0-9]+", device_name.lower())
    found = next((gpu for gpu in GPUS.values() if gpu.name in words and "laptop" not in words), None)
    if found and found.name == "a100" and ((memory_gib or 80) < 60 or any(word.startswith("40g") for word in words)):
        return GPUS["a100-40gb"]
    return found


def visible_gpu() -> Gpu | None:
    """First GPU of this machine according to its driver; `None`: there is none, or it is not listed."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return None
    query = [program, "--query-gpu=name,memory.total", "--format=csv,noheader,nounits"]
    try:
        lines = subprocess.run(query, capture_output=True, text=True, timeout=10, check=True).stdout.splitlines()
    except (OSError, subprocess.SubprocessError):
        return None
    name, _, mebibytes = lines[0].rpartition(",") if lines else ("", "", "")
    memory_gib = float(mebibytes) / 1024 if mebibytes.strip().isdecimal() else None  # "[N/A]" for unified memory
    return gpu_of_device(name, memory_gib)
