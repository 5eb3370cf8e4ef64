"""Behaviour specific to CUDA, checked on a CPU: memory formats, DeepSpeed's autocast check, synchronisations."""

import sys
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import deepspeed
import pytest
import torch
from tiny_models import build_tiny_lcm, build_tiny_sd15, build_tiny_sdxl, shallow_sdxl_unet, shallow_unet
from tiny_policies import TARGETS, TinyModels, make_pairs, training_section
from torch import Tensor
from torch.overrides import TorchFunctionMode

from cdpo_ray.config.training import LoraSection
from cdpo_ray.models import load_model
from cdpo_ray.models.family import TextToImageModel
from cdpo_ray.policy.policy import Policy, make_policy
from cdpo_ray.training.batches import PairBatch
from cdpo_ray.training.engine import start_engine
from cdpo_ray.training.loop import Guard, step_and_measure
from cdpo_ray.training.losses import preference_loss
from cdpo_ray.training.update import METRICS, loss_of_pairs

LN2 = torch.tensor(2.0).log().item()
LORA = LoraSection(rank=4, alpha=8, targets=TARGETS)
CONVOLUTIONS = LoraSection(rank=4, alpha=8, targets=("to_q", "conv1", "proj_in"))
FAMILIES = (
    "stable_diffusion",
    "v_prediction",
    "stable_diffusion_xl",
    "latent_consistency",
    "stable_diffusion_3",
    "flux",
)
LEARNING_RATES = {"lora": 1e-3, "full": 1e-4}
"""Far above the rounding of bf16 weights, which keep 8 bits."""


@pytest.fixture(scope="module", autouse=True)
def answers_of_cuda(one_worker: None) -> Iterator[None]:
    """DeepSpeed's check for autocast concerns the device in use, as on CUDA.

    Without an argument `torch.is_autocast_enabled` means CUDA, so DeepSpeed would never detect autocast on a CPU.
    """
    real = torch.is_autocast_enabled
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "is_autocast_enabled", lambda device_type="cpu": real(device_type))
        yield


@pytest.fixture(scope="module")
def models(tiny_models: TinyModels, tmp_path_factory: pytest.TempPathFactory) -> TinyModels:
    shallow = tmp_path_factory.mktemp("shallow")
    built = {
        "stable_diffusion": build_tiny_sd15(shallow / "sd", build_unet=shallow_unet),
        "v_prediction": build_tiny_sd15(shallow / "v", prediction_type="v_prediction", build_unet=shallow_unet),
        "stable_diffusion_xl": build_tiny_sdxl(shallow / "sdxl", build_unet=shallow_sdxl_unet),
        "latent_consistency": build_tiny_lcm(shallow / "lcm", build_unet=shallow_unet),
    }
    return lambda family: built.get(family) or tiny_models(family)


class Training:
    """One worker's model, policy, engine and guard, laid out as on CUDA."""

    def __init__(
        self,
        folder: Path,
        family: str,
        lora: LoraSection | None,
        *,
        teacher_dir: Path | None = None,
        dtype: str = "float32",
        zero_stage: int = 0,
        safeguard: float | None = None,
    ) -> None:
        self.safeguard = safeguard
        family = "stable_diffusion" if family == "v_prediction" else family
        teacher = {"teacher": {"path": str(teacher_dir)}} if family == "latent_consistency" else {}
        self.model: TextToImageModel = load_model(
            family, path=str(folder), device="cpu", dtype=dtype, for_training=True, **teacher
        )
        if self.model.denoiser_name == "unet":
            self.model.denoiser.to(memory_format=torch.channels_last)
        self.batch: PairBatch = make_pairs(self.model, 2)
        self.policy: Policy = make_policy(self.model, lora)
        self.model.denoiser.train()
        learning_rate = LEARNING_RATES["lora" if lora else "full"]
        section = training_section(learning_rate=learning_rate, global_batch_size=2, zero_stage=zero_stage)
        self.engine: Any = start_engine(self.model.denoiser, self.policy.trainable, section, num_workers=1)
        self.policy = replace(self.policy, net=self.engine)
        self.guard = Guard(self.policy.trainable, self.engine.device, sharded=self.engine.zero_optimization())

    def launch(self) -> tuple[Tensor, Tensor]:
        loss = partial(preference_loss, beta=400.0)
        return loss_of_pairs(self.policy, self.batch, preference_loss=loss, safeguard=self.safeguard)

    def update(self) -> Tensor:
        """One update as `train_stages` makes it; returns its metrics."""
        loss, metrics = self.launch()
        self.guard.see(loss)
        self.engine.backward(loss)
        self.engine.basic_optimizer.skips, _ = self.guard.verdict(stops=False)
        sharded = self.engine.zero_optimization_partition_weights()
        norms = step_and_measure(self.engine, self.guard, [] if sharded else self.policy.trainable, 1.0)
        assert norms.shape == (1 if sharded else 2,)
        return metrics

    def weights(self) -> list[Tensor]:
        """Of what is trained, whole whatever the ZeRO stage."""
        sharded = self.engine.zero_optimization_partition_weights()
        with deepspeed.zero.GatheredParameters(self.policy.trainable, enabled=sharded):
            return [parameter.detach().clone() for parameter in self.policy.trainable]


class Waits(TorchFunctionMode):
    """Calls that would synchronise with a GPU: values read by the host, and tensors created in host memory.

    Not counted: reads of the optimizer's step counters, which are in host memory on every machine, and the
    single-value tensors that DeepSpeed creates to clip gradients, whose copies do not synchronise.
    """

    READS = ("item", "tolist", "__bool__", "__int__", "__float__", "__index__", "numpy", "cpu", "nonzero")
    FILLED = (torch.tensor, torch.as_tensor, torch.from_numpy)
    MADE = (torch.arange, torch.linspace, torch.zeros, torch.ones, torch.full, torch.empty, torch.rand, torch.randn)

    def __init__(self) -> None:
        self.found: list[str] = []

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, caller = getattr(function, "__name__", ""), sys._getframe(1)
        while caller.f_code.co_filename.startswith(str(Path(torch.__file__).parent / "_")):  # torch's own dispatch
            caller = caller.f_back or caller
        where = caller.f_code.co_filename
        on_host = function in self.FILLED or (function in self.MADE and (kwargs or {}).get("device") is None)
        if on_host and "deepspeed" not in where:
            self.found.append(f"torch.{name} in {caller.f_code.co_name}")
        if name in self.READS and f"{torch.optim.__name__.replace('.', '/')}/" not in where:
            self.found.append(f"Tensor.{name} in {caller.f_code.co_name}")
        return function(*args, **(kwargs or {}))


def cases() -> list[tuple[str, str, str, int]]:
    """ZeRO 3 takes seconds per case, so it is tried once per net: v prediction has the net of epsilon prediction."""
    everything = product(FAMILIES, LEARNING_RATES, ("float32", "bfloat16"), (0, 2, 3))
    return [case for case in everything if case[3] < 3 or (case[0] != "v_prediction" and case[2] == "bfloat16")]


@pytest.mark.parametrize(("family", "method", "dtype", "zero_stage"), cases())
def test_two_updates_start_at_margin_zero_lower_the_loss_and_leave_the_reference(
    models: TinyModels, family: str, method: str, dtype: str, zero_stage: int
) -> None:
    lora = LORA if method == "lora" else None
    training = Training(
        models(family), family, lora, teacher_dir=models("stable_diffusion"), dtype=dtype, zero_stage=zero_stage
    )
    before = training.weights()
    first = dict(zip(METRICS, training.update().tolist(), strict=True))
    training.update()
    with torch.no_grad():
        _, metrics = training.launch()
    last = dict(zip(METRICS, metrics.tolist(), strict=True))
    assert (first["margin"], first["loss"]) == (0.0, LN2)
    assert last["loss"] < LN2
    assert [last[name] for name in METRICS if "reference" in name] == [
        first[name] for name in METRICS if "reference" in name
    ]
    assert not all(map(torch.equal, before, training.weights()))
    assert training.engine.basic_optimizer.num_steps == 2
    training.engine.destroy()


@pytest.mark.parametrize("lora", [LORA, CONVOLUTIONS, None], ids=["attention", "convolutions", "full"])
@pytest.mark.parametrize("zero_stage", [0, 2])
def test_frozen_weights_keep_channels_last_and_trained_ones_are_contiguous(
    models: TinyModels, lora: LoraSection | None, zero_stage: int
) -> None:
    training = Training(models("stable_diffusion"), "stable_diffusion", lora, zero_stage=zero_stage)
    every = [value for value in training.model.denoiser.parameters() if value.dim() == 4]
    kernels = [value for value in every if value.shape[-1] > 1]
    assert len(kernels) > 10 and len(every) > len(kernels)
    for kernel in every:  # of 1x1 kernels only the strides differ
        assert kernel.stride(-1) == (1 if kernel.requires_grad else kernel.shape[1])
    for kernel in kernels:
        assert kernel.is_contiguous(memory_format=torch.channels_last) != kernel.requires_grad
        assert kernel.is_contiguous() == kernel.requires_grad
    training.engine.destroy()


@pytest.mark.parametrize("family", ["stable_diffusion", "stable_diffusion_xl", "latent_consistency", "flux", "flux2"])
def test_an_update_waits_for_the_device_once(models: TinyModels, family: str) -> None:
    teacher_dir = models("stable_diffusion")
    training = Training(models(family), family, LORA, teacher_dir=teacher_dir, safeguard=0.9)
    training.update()  # makes the optimizer's state
    with Waits() as waits:
        training.update()
    assert waits.found == ["Tensor.tolist in verdict"]
    training.engine.destroy()
