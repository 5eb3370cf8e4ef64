"""Host time of a training update around its launches: ours against the functions of PEFT and diffusers.

- Switching a LoRA off and on around the reference's launch. With 16-bit weights, PEFT's cast of each layer's input to
  fp32 had to be switched off and on as well. Published architectures on the meta device: no arithmetic is timed.
- Operators that check gradients for finite values: a hook per parameter, as under ZeRO, beside one norm of all.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from alone import form_group_alone
from architectures import build_sd15, build_sdxl
from diffusers import UNet2DConditionModel
from peft.helpers import disable_input_dtype_casting
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from training_step import TARGETS

from cdpo_ray.models.lora import Adapters, attach_lora
from cdpo_ray.training.loop import Guard

MODELS = {"sd15": lambda: build_sd15(320, 512).unet, "sdxl": lambda: build_sdxl(320, 1024).unet}


def milliseconds(work: Callable[[], None], repeats: int) -> float:
    """Median host time of one call."""
    took = []
    for _ in range(repeats):
        start = time.perf_counter()
        work()
        took.append(time.perf_counter() - start)
    return 1e3 * statistics.median(took)


def switching_times(net: UNet2DConditionModel, repeats: int) -> tuple[float, float, float]:
    """Milliseconds to switch adapters off and on by `Adapters` and by diffusers, and to switch PEFT's casting."""
    adapters = Adapters(net)

    def ours() -> None:
        with adapters.off():
            pass

    def stock() -> None:
        net.disable_adapters()
        net.enable_adapters()

    def casting() -> None:
        with disable_input_dtype_casting(net):
            pass

    mine, theirs, cast = (milliseconds(work, repeats) for work in (ours, stock, casting))
    return mine, theirs, cast


class Operators(TorchDispatchMode):
    """Counts executed operators."""

    count = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        return function(*args, **(kwargs or {}))


def operators_of_check(shapes: list[torch.Size], *, sharded: bool) -> int:
    """Operators that `Guard` adds to an update of one launch."""
    parameters = [nn.Parameter(torch.ones(shape)) for shape in shapes]
    loss = sum((parameter.sum() for parameter in parameters), torch.zeros(()))
    with Operators() as plain:
        loss.backward(retain_graph=True)
    for parameter in parameters:
        parameter.grad = None
    guard = Guard(parameters, torch.device("cpu"), sharded=sharded)
    with Operators() as guarded:
        loss.backward()
        guard.verdict(stops=False)
    return guarded.count - plain.count


def main() -> None:
    """Print one row per architecture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=15)
    options = parser.parse_args()
    form_group_alone("cpu")
    columns = ("switch, ms", "diffusers'", "+ PEFT's cast", "check, operators", "by hooks")
    print(f"{'model':6} {'layers':>6}", *(f"{column:>{len(column) + 1}}" for column in columns))
    for name, build in MODELS.items():
        with torch.device("meta"):
            net = build()
        shapes = [one.shape for one in attach_lora(net, rank=8, alpha=8, targets=TARGETS, seed=0)]
        ours, stock, cast = switching_times(net, options.repeats)
        norm, hooks = (operators_of_check(shapes, sharded=sharded) for sharded in (False, True))
        values = (f"{ours:.2f}", f"{stock:.1f}", f"{stock + cast:.1f}", norm, hooks)
        row = (f"{value:>{len(column) + 1}}" for value, column in zip(values, columns, strict=True))
        print(f"{name:6} {len(shapes) // 2:6}", *row, flush=True)


if __name__ == "__main__":
    main()
