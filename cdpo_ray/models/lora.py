"""Denoiser -> denoiser with a LoRA: attach, switch, grow, save where diffusers loads it."""

import contextlib
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import ModelMixin
from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY
from peft import LoraConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import get_peft_model_state_dict
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from cdpo_ray.errors import ModelError, printable
from cdpo_ray.store import path_within

LORA_DIR = "lora"
LORA_WEIGHTS = "pytorch_lora_weights.safetensors"
"""File name that ``pipe.load_lora_weights(folder)`` looks for."""

FIRST, SECOND = "lora_A.weight", "lora_B.weight"
"""Ends of the names of a layer's factors."""

POLICY, REFERENCE = "default", "reference"
"""Names of the adapter that is trained and, where an earlier round is the reference, of that round's."""


class _InputDtypeLinear(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return F.linear(input, self.weight.to(input.dtype))


class _InputDtypeConv2d(nn.Conv2d):
    def forward(self, input: Tensor) -> Tensor:
        weight = self.weight.to(input.dtype)
        return F.conv2d(input, weight, None, self.stride, self.padding, self.dilation, self.groups)


_INPUT_DTYPE = {nn.Linear: _InputDtypeLinear, nn.Conv2d: _InputDtypeConv2d}


class Adapters:
    """The LoRA layers of a denoiser, listed once: switching them sets one flag per layer and nothing else.

    PEFT and diffusers would walk all modules of the net and all parameters of its layers at each switch.

    The factors compute in the dtype of their input. Their weights and gradients stay fp32, so a 16-bit net needs
    neither autocast nor a second set of weights.
    """

    def __init__(self, denoiser: nn.Module) -> None:
        self.layers = [module for module in denoiser.modules() if isinstance(module, BaseTunerLayer)]
        for layer in self.layers:
            layer.cast_input_dtype_enabled = False
            for factor in (*layer.lora_A.values(), *layer.lora_B.values()):
                factor.__class__ = _INPUT_DTYPE.get(type(factor), type(factor))

    def enable(self, on: bool) -> None:
        """Whether the layers add the output of the active adapter."""
        for layer in self.layers:
            layer._disable_adapters = not on

    def activate(self, name: str) -> None:
        """Choose the adapter whose output is added; the trainable parameters stay the same."""
        for layer in self.layers:
            layer._active_adapter = [name]

    @contextlib.contextmanager
    def off(self) -> Iterator[None]:
        """Within the block the denoiser is the base model: the reference, without a second copy."""
        self.enable(False)
        try:
            yield
        finally:
            self.enable(True)

    @contextlib.contextmanager
    def reference_on(self) -> Iterator[None]:
        """Within the block the denoiser has the adapter that `freeze_as_reference` kept."""
        self.activate(REFERENCE)
        try:
            yield
        finally:
            self.activate(POLICY)


def attach_lora(
    denoiser: ModelMixin, *, rank: int, alpha: float, targets: Sequence[str], seed: int
) -> list[nn.Parameter]:
    """Freeze the denoiser and add a LoRA whose output is zero at first.

    Args:
        rank: inner dimension.
        alpha: the update is scaled by ``alpha / rank``.
        targets: names (or ends of names) of the linear and convolution layers that get one.
        seed: of the first factor; the second starts at zero.

    Returns:
        The trainable parameters, fp32 whatever the denoiser's type.

    Source: arXiv:2106.09685.
    """
    denoiser.requires_grad_(False)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        denoiser.add_adapter(
            LoraConfig(r=rank, lora_alpha=alpha, target_modules=list(targets), init_lora_weights="gaussian")
        )
    trainable = [parameter for parameter in denoiser.parameters() if parameter.requires_grad]
    for parameter in trainable:
        parameter.data = parameter.data.float()
    return trainable


@dataclass(frozen=True)
class SavedLora:
    """A LoRA that `save_lora` wrote, whole: two finite factors per layer, of one rank.

    Attributes:
        factors: by layer of the denoiser, the first ``[rank, input, ...]`` and the second ``[output, rank, ...]``.
        targets: names, or ends of names, of the layers that have one.
    """

    path: Path
    factors: dict[str, tuple[Tensor, Tensor]]
    alpha: float
    targets: tuple[str, ...]

    def refuse_misfit(self, denoiser: nn.Module) -> None:
        """Compare the factors with the layers of a denoiser that has no LoRA.

        Raises:
            ModelError: a layer that is a target has no factors, or factors of another shape, or there are factors of a
                layer that is not there.
        """
        ends = tuple(f".{target}" for target in self.targets)
        layers = {
            name: layer
            for name, layer in denoiser.named_modules()
            if isinstance(layer, nn.Linear | nn.Conv2d) and f".{name}".endswith(ends)
        }
        if missing := [*(layers.keys() - self.factors), *(self.factors.keys() - layers)]:
            raise _damaged(
                self.path, f"{len(missing)} layers are in the LoRA or in the net, but not in both: {min(missing)}"
            )
        for name, (first, second) in self.factors.items():
            inner, outer = _sizes(layers[name])
            if first.shape[1:] != inner or (second.shape[0], *second.shape[2:]) != outer:
                raise _damaged(self.path, f"its factors of {name} have shapes that do not fit the layer")


def _sizes(layer: nn.Linear | nn.Conv2d) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Shapes of a layer's factors without the rank: of the first, of the second."""
    if isinstance(layer, nn.Linear):
        return (layer.in_features,), (layer.out_features,)
    return (layer.in_channels // layer.groups, *layer.kernel_size), (layer.out_channels, 1, 1)


def read_lora(lora_dir: Path, denoiser_name: str) -> SavedLora:
    """Read a LoRA and check that it is whole; whether it fits a net, `SavedLora.refuse_misfit` tells.

    Args:
        lora_dir: written by `save_lora`; it may be somebody else's.
        denoiser_name: `unet` or `transformer`, which the file puts before every name.

    Raises:
        ModelError: the file is missing or damaged, holds no tensors or others than pairs of factors, a value that is
            not finite, or no alpha.
    """
    path = path_within(lora_dir.parent, f"{lora_dir.name}/{LORA_WEIGHTS}")
    if not path.is_file():
        raise _damaged(path, "is missing")
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
            metadata = json.loads((file.metadata() or {}).get(LORA_ADAPTER_METADATA_KEY, "{}"))
        alpha, targets = _alpha_and_targets(metadata, denoiser_name)
    except (SafetensorError, OSError, ValueError, RecursionError, AttributeError) as error:
        raise _damaged(path, f"cannot be read: {printable(error)}") from None
    names = {name.removesuffix(f".{FIRST}").removesuffix(f".{SECOND}") for name in tensors}
    if not tensors or {f"{name}.{end}" for name in names for end in (FIRST, SECOND)} != {*tensors}:
        raise _damaged(path, f"must hold two factors per layer and nothing else, got {len(tensors)} tensors")
    if other := [name for name in names if not name.startswith(f"{denoiser_name}.")]:
        raise _damaged(path, f"holds {printable(min(other))}, which is not of the {denoiser_name}")
    if bad := [name for name, value in tensors.items() if not value.is_floating_point() or not value.isfinite().all()]:
        raise _damaged(path, f"{len(bad)} tensors are not finite numbers: {printable(min(bad))}")
    factors = {
        name.removeprefix(f"{denoiser_name}."): (tensors[f"{name}.{FIRST}"], tensors[f"{name}.{SECOND}"])
        for name in sorted(names)
    }
    ranks = {(first.shape[:1], second.shape[1:2]) for first, second in factors.values()}
    if len(ranks) != 1 or len({*next(iter(ranks))}) != 1:
        raise _damaged(path, "its factors have different ranks")
    return SavedLora(path, factors, alpha, targets)


def _alpha_and_targets(metadata: dict[str, Any], denoiser_name: str) -> tuple[float, tuple[str, ...]]:
    key = f"{denoiser_name}.lora_alpha"
    alpha, targets = metadata.get(key), metadata.get(f"{denoiser_name}.target_modules", [])
    if not isinstance(alpha, int | float) or not math.isfinite(alpha) or alpha <= 0:
        raise ValueError(f"its metadata must have `{key}`, a number > 0, got {printable(alpha)}")
    if not isinstance(targets, list) or not all(isinstance(target, str) for target in targets):
        raise ValueError(f"its metadata must have `{denoiser_name}.target_modules`, a list of names")
    return float(alpha), tuple(targets)


def _damaged(path: Path, what: str) -> ModelError:
    return ModelError(f"{path}: {what}; it is not the LoRA that a training wrote: train again, or do not use it")


@torch.no_grad()
def continue_from(denoiser: ModelMixin, denoiser_name: str, lora_dir: Path) -> None:
    """Put the factors that `save_lora` wrote into the LoRA that is attached; types and rank must be alike.

    Raises:
        ModelError: the file's LoRA is damaged, or has other layers or another rank.
    """
    saved = {
        f"{layer}.{end}": value
        for layer, pair in read_lora(lora_dir, denoiser_name).factors.items()
        for end, value in zip((FIRST, SECOND), pair, strict=True)
    }
    attached = get_peft_model_state_dict(denoiser)
    if {name: value.shape for name, value in attached.items()} != {name: value.shape for name, value in saved.items()}:
        raise ModelError(
            f"{lora_dir}: its LoRA has other layers or another rank than the one to train;"
            " keep `training.lora` as it was"
        )
    for name, value in attached.items():
        value.copy_(saved[name])


def freeze_as_reference(denoiser: ModelMixin) -> None:
    """Keep the LoRA as it is now under the name `REFERENCE`, beside the one that is trained."""
    denoiser.add_adapter(denoiser.peft_config[POLICY], adapter_name=REFERENCE)
    parameters = dict(denoiser.named_parameters())
    for name, parameter in parameters.items():
        if f".{REFERENCE}." in name:
            parameter.data = parameters[name.replace(f".{REFERENCE}.", f".{POLICY}.")].detach().clone()
    denoiser.set_adapter(POLICY)


def save_lora(pipeline_class: type, denoiser_name: str, denoiser: ModelMixin, folder: Path) -> None:
    """Write the LoRA, alpha included, as the file that ``pipe.load_lora_weights(folder)`` loads."""
    folder.mkdir(parents=True, exist_ok=True)
    factors = {name: value.contiguous().cpu() for name, value in get_peft_model_state_dict(denoiser).items()}
    pipeline_class.save_lora_weights(  # type: ignore[attr-defined]
        folder,
        **{
            f"{denoiser_name}_lora_layers": factors,
            f"{denoiser_name}_lora_adapter_metadata": denoiser.peft_config[POLICY].to_dict(),
        },
    )
    (folder / LORA_WEIGHTS).chmod(0o644)  # safetensors writes 0600, which shared disks cannot use
