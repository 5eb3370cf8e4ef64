"""LoRA of a denoiser: attach, switch on and off, save in the format of diffusers, load."""

import contextlib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
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
"""File name that ``pipe.load_lora_weights(folder)`` expects."""

FIRST, SECOND = "lora_A.weight", "lora_B.weight"
"""Suffixes of the names of a layer's factors."""

POLICY, REFERENCE = "default", "reference"
"""Names of the trained adapter and of the earlier round's, if that round is the reference."""


class _InputDtypeLinear(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return F.linear(input, self.weight.to(input.dtype))


class _InputDtypeConv2d(nn.Conv2d):
    def forward(self, input: Tensor) -> Tensor:
        weight = self.weight.to(input.dtype)
        return F.conv2d(input, weight, None, self.stride, self.padding, self.dilation, self.groups)


_INPUT_DTYPE = {nn.Linear: _InputDtypeLinear, nn.Conv2d: _InputDtypeConv2d}


class Adapters:
    """LoRA layers of a denoiser, listed once, so that switching sets one flag per layer and nothing else.

    PEFT and diffusers would visit every module of the denoiser and every parameter of its layers at each switch.

    The factors compute in the dtype of their input. Their weights and gradients stay fp32, so a 16-bit denoiser needs
    neither autocast nor a second copy of the weights.
    """

    def __init__(self, denoiser: nn.Module) -> None:
        self.layers = [module for module in denoiser.modules() if isinstance(module, BaseTunerLayer)]
        for layer in self.layers:
            layer.cast_input_dtype_enabled = False
            for factor in (*layer.lora_A.values(), *layer.lora_B.values()):
                factor.__class__ = _INPUT_DTYPE.get(type(factor), type(factor))

    def enable(self, on: bool) -> None:
        """Add the output of the active adapter, or not."""
        for layer in self.layers:
            layer._disable_adapters = not on

    def activate(self, name: str) -> None:
        """Select the adapter whose output is added; ``requires_grad`` does not change."""
        for layer in self.layers:
            layer._active_adapter = [name]

    @contextlib.contextmanager
    def off(self) -> Iterator[None]:
        """Context manager in which the denoiser is the base model: the reference, without a second copy."""
        self.enable(False)
        try:
            yield
        finally:
            self.enable(True)

    @contextlib.contextmanager
    def reference_on(self) -> Iterator[None]:
        """Context manager in which the denoiser uses the adapter of `freeze_as_reference`."""
        self.activate(REFERENCE)
        try:
            yield
        finally:
            self.activate(POLICY)


def attach_lora(
    denoiser: ModelMixin, *, rank: int, alpha: float, targets: Sequence[str], seed: int
) -> list[nn.Parameter]:
    """Freeze the denoiser and add a LoRA with zero initial output.

    Args:
        rank: inner dimension.
        alpha: scale of the update, which is ``alpha / rank``.
        targets: names, or suffixes of names, of the linear and convolution layers to adapt.
        seed: of the first factor; the second starts at zero.

    Returns:
        Trainable parameters, always fp32.

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
    """A validated LoRA of `save_lora`: two finite factors per layer, all of one rank.

    Attributes:
        path: of the file.
        factors: layer of the denoiser -> first ``[rank, input, ...]`` and second factor ``[output, rank, ...]``.
        alpha: the update is scaled by ``alpha / rank``.
        targets: names, or suffixes of names, of the adapted layers.
    """

    path: Path
    factors: dict[str, tuple[Tensor, Tensor]]
    alpha: float
    targets: tuple[str, ...]

    @property
    def rank(self) -> int:
        """Inner dimension."""
        return len(next(iter(self.factors.values()))[0])

    def tensors(self) -> dict[str, Tensor]:
        """Factors as ``<layer>.lora_A.weight`` and ``<layer>.lora_B.weight``."""
        return {
            f"{layer}.{end}": factor
            for layer, pair in self.factors.items()
            for end, factor in zip((FIRST, SECOND), pair, strict=True)
        }

    def check_fits(self, denoiser: nn.Module) -> None:
        """Compare the factors with the layers of a denoiser that has no LoRA.

        Raises:
            ModelError: if a target layer has no factors or factors of another shape, or factors belong to a layer that
                does not exist.
        """
        ends = tuple(f".{target}" for target in self.targets)
        layers = {
            name: layer
            for name, layer in denoiser.named_modules()
            if isinstance(layer, nn.Linear | nn.Conv2d) and f".{name}".endswith(ends)
        }
        if unmatched := [*(layers.keys() - self.factors), *(self.factors.keys() - layers)]:
            raise _damaged(
                self.path,
                f"{len(unmatched)} layers are in either the LoRA or the model but not both, the first {min(unmatched)}",
            )
        for name, (first, second) in self.factors.items():
            inner, outer = _sizes(layers[name])
            if first.shape[1:] != inner or (second.shape[0], *second.shape[2:]) != outer:
                raise _damaged(self.path, f"factors of {name} have shapes that do not fit the layer")


def _sizes(layer: nn.Linear | nn.Conv2d) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Shapes of a layer's first and second factor without the rank."""
    if isinstance(layer, nn.Linear):
        return (layer.in_features,), (layer.out_features,)
    return (layer.in_channels // layer.groups, *layer.kernel_size), (layer.out_channels, 1, 1)


def read_lora(lora_dir: Path, denoiser_name: str) -> SavedLora:
    """Read and validate a LoRA; `SavedLora.check_fits` compares it with a denoiser.

    Args:
        lora_dir: folder that `save_lora` wrote; untrusted.
        denoiser_name: ``unet`` or ``transformer``, the prefix of every tensor's name.

    Raises:
        ModelError: if the file is missing or damaged, or holds anything but pairs of factors, non-finite values or no
            alpha.
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
        raise _damaged(path, f"holds {printable(min(other))}, which does not belong to the {denoiser_name}")
    if bad := [name for name, value in tensors.items() if not value.is_floating_point() or not value.isfinite().all()]:
        raise _damaged(path, f"{len(bad)} tensors must be finite floats, the first {printable(min(bad))}")
    factors = {
        name.removeprefix(f"{denoiser_name}."): (tensors[f"{name}.{FIRST}"], tensors[f"{name}.{SECOND}"])
        for name in sorted(names)
    }
    ranks = {(first.shape[:1], second.shape[1:2]) for first, second in factors.values()}
    if len(ranks) != 1 or len({*next(iter(ranks))}) != 1:
        raise _damaged(path, "factors must have one rank, got several")
    return SavedLora(path, factors, alpha, targets)


def _alpha_and_targets(metadata: dict[str, Any], denoiser_name: str) -> tuple[float, tuple[str, ...]]:
    key = f"{denoiser_name}.lora_alpha"
    alpha, targets = metadata.get(key), metadata.get(f"{denoiser_name}.target_modules", [])
    if not isinstance(alpha, int | float) or not math.isfinite(alpha) or alpha <= 0:
        raise ValueError(f"metadata `{key}` must be a number > 0, got {printable(alpha)}")
    if not isinstance(targets, list) or not all(isinstance(target, str) for target in targets):
        raise ValueError(f"metadata `{denoiser_name}.target_modules` must be a list of names")
    return float(alpha), tuple(targets)


def _damaged(path: Path, what: str) -> ModelError:
    return ModelError(f"{path}: {what}; the LoRA is damaged: train again, or do not use it")


@torch.no_grad()
def continue_from(denoiser: ModelMixin, denoiser_name: str, lora_dir: Path) -> None:
    """Copy saved factors into the attached LoRA.

    Args:
        denoiser_name: as in `read_lora`.
        lora_dir: folder that `save_lora` wrote.

    Raises:
        ModelError: if the saved LoRA is damaged, or has other layers or another rank.
    """
    saved = read_lora(lora_dir, denoiser_name).tensors()
    attached = get_peft_model_state_dict(denoiser)
    if {name: value.shape for name, value in attached.items()} != {name: value.shape for name, value in saved.items()}:
        raise ModelError(
            f"{lora_dir}: layers or rank of the LoRA differ from those to train;"
            " restore `training.lora` of the earlier round"
        )
    for name, value in attached.items():
        value.copy_(saved[name])


def freeze_as_reference(denoiser: ModelMixin) -> None:
    """Copy the LoRA's current factors to a frozen adapter named `REFERENCE`."""
    denoiser.add_adapter(denoiser.peft_config[POLICY], adapter_name=REFERENCE)
    parameters = dict(denoiser.named_parameters())
    for name, parameter in parameters.items():
        if f".{REFERENCE}." in name:
            parameter.data = parameters[name.replace(f".{REFERENCE}.", f".{POLICY}.")].detach().clone()
    denoiser.set_adapter(POLICY)


def save_lora(pipeline_class: type, denoiser_name: str, denoiser: ModelMixin, folder: Path) -> None:
    """Write the LoRA, including alpha, to a file that ``pipe.load_lora_weights(folder)`` loads."""
    factors = {name: value.contiguous().cpu() for name, value in get_peft_model_state_dict(denoiser).items()}
    write_lora(pipeline_class, denoiser_name, factors, denoiser.peft_config[POLICY], folder)


def write_lora(
    pipeline_class: type, denoiser_name: str, factors: Mapping[str, Tensor], config: LoraConfig, folder: Path
) -> None:
    """Write factors in the format of diffusers.

    Args:
        factors: ``<layer>.lora_A.weight`` and ``<layer>.lora_B.weight`` of each layer.
        config: its rank, alpha and targets are written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    metadata = {key: sorted(value) if isinstance(value, set) else value for key, value in config.to_dict().items()}
    pipeline_class.save_lora_weights(  # type: ignore[attr-defined]
        folder, **{f"{denoiser_name}_lora_layers": factors, f"{denoiser_name}_lora_adapter_metadata": metadata}
    )
    (folder / LORA_WEIGHTS).chmod(0o644)  # safetensors writes 0600, unreadable to others on a shared disk
