"""LoRA of a denoiser: attach, switch on and off, save in the format of diffusers, load."""

import contextlib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from diffusers import ModelMixin
from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY
from peft import LoraConfig
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.dora import DoraLinearLayer
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

MAGNITUDE = "lora_magnitude_vector"
"""Suffix of the name of a layer's magnitudes (DoRA)."""

POLICY, REFERENCE = "default", "reference"
"""Names of the trained adapter and of the earlier round's, if that round is the reference."""


class _InputDtypeLinear(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return F.linear(input, self.weight.to(input.dtype))


class _InputDtypeConv2d(nn.Conv2d):
    def forward(self, input: Tensor) -> Tensor:
        weight = self.weight.to(input.dtype)
        return F.conv2d(input, weight, None, self.stride, self.padding, self.dilation, self.groups)


class _Magnitudes(DoraLinearLayer):  # type: ignore[misc]
    """DoRA of a linear or convolution layer that computes the norms of its rows in fp32, and keeps no matrix.

    PEFT computes them in the dtype of the base weights. In 16 bits their rounding changes the scale of each row by up
    to 1/512, more than training does, and PEFT's norms need a matrix of the size of the weight.
    """

    def forward(
        self,
        x: Tensor,
        *,
        lora_A: nn.Module,
        lora_B: nn.Module,
        scaling: float,
        base_layer: nn.Module,
        base_result: Tensor,
        adapter_name: str = "",
    ) -> Tensor:
        weight: Any = base_layer.weight
        shape = (-1,) + (1,) * (weight.ndim - 2)
        with torch.no_grad():
            norms = row_norms(weight, lora_A.weight, lora_B.weight, scaling)  # type: ignore[arg-type]
        growth = (self.weight.flatten() / norms - 1).to(x.dtype).reshape(shape)  # 0 at first
        change = lora_B(lora_A(x)) * scaling
        bias: Any = base_layer.bias
        unbiased = base_result if bias is None else base_result - bias.reshape(shape)
        result: Tensor = growth * (unbiased + change) + change
        return result


def row_norms(weight: Tensor, first: Tensor, second: Tensor, scale: float) -> Tensor:
    """Norms of the rows of ``weight + scale * second @ first``, without that matrix: ``[output]``, at least fp32.

    Args:
        weight: ``[output, input, ...]``.
        first, second: factors, ``[rank, input, ...]`` and ``[output, rank, ...]``.
        scale: of the product.
    """
    dtype = torch.promote_types(weight.dtype, torch.float32)
    weight, first, second = weight.flatten(1), first.to(dtype).flatten(1), second.to(dtype).flatten(1)
    own = torch.linalg.vector_norm(weight, dim=1, dtype=dtype).square()
    crossed = ((weight @ first.T.to(weight.dtype)) * second).sum(dim=1)
    change = ((second @ (first @ first.T)) * second).sum(dim=1)
    return (own + 2 * scale * crossed + scale**2 * change).clamp(min=torch.finfo(dtype).tiny).sqrt()


_INPUT_DTYPE = {nn.Linear: _InputDtypeLinear, nn.Conv2d: _InputDtypeConv2d}


class Adapters:
    """LoRA layers of a denoiser, listed once, so that switching sets one flag per layer and nothing else.

    PEFT and diffusers would visit every module of the denoiser and every parameter of its layers at each switch.

    The factors compute in the dtype of their input. Their weights and gradients stay fp32, so a 16-bit denoiser needs
    neither autocast nor a second copy of the weights. Magnitudes of a DoRA do too.
    """

    def __init__(self, denoiser: nn.Module) -> None:
        self.layers = [module for module in denoiser.modules() if isinstance(module, BaseTunerLayer)]
        for layer in self.layers:
            layer.cast_input_dtype_enabled = False
            for factor in (*layer.lora_A.values(), *layer.lora_B.values()):
                factor.__class__ = _INPUT_DTYPE.get(type(factor), type(factor))
            for magnitudes in layer.lora_magnitude_vector.values():
                magnitudes.__class__ = _Magnitudes

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
    denoiser: ModelMixin,
    *,
    rank: int,
    alpha: float,
    targets: Sequence[str],
    seed: int,
    use_rslora: bool = False,
    use_dora: bool = False,
) -> list[nn.Parameter]:
    """Freeze the denoiser and add a LoRA with zero initial output.

    Args:
        rank: inner dimension.
        alpha: scale of the update, which is ``alpha / rank``.
        targets: names, or suffixes of names, of the linear and convolution layers to adapt.
        seed: of the first factor; the second starts at zero.
        use_rslora: the scale is ``alpha / sqrt(rank)``.
        use_dora: also learn the norm of each row of the weight.

    Returns:
        Trainable parameters, always fp32.

    Source: arXiv:2106.09685; rsLoRA: arXiv:2312.03732; DoRA: arXiv:2402.09353.
    """
    denoiser.requires_grad_(False)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        denoiser.add_adapter(
            LoraConfig(
                r=rank,
                lora_alpha=alpha,
                target_modules=list(targets),
                init_lora_weights="gaussian",
                use_rslora=use_rslora,
                use_dora=use_dora,
            )
        )
    trainable = [parameter for parameter in denoiser.parameters() if parameter.requires_grad]
    for parameter in trainable:
        parameter.data = parameter.data.float()
    for layer in denoiser.modules():
        if use_dora and isinstance(layer, BaseTunerLayer):
            magnitudes = layer.lora_magnitude_vector[POLICY].weight
            # PEFT's are rounded to the dtype of the base weights
            norms = row_norms(layer.weight, layer.lora_A[POLICY].weight, layer.lora_B[POLICY].weight, 0.0)
            magnitudes.data = norms.detach().reshape(magnitudes.shape)
    return trainable


@dataclass(frozen=True)
class SavedLora:
    """A validated LoRA of `save_lora`: two finite factors per layer, all of one rank.

    Attributes:
        path: of the file.
        factors: layer of the denoiser -> first ``[rank, input, ...]`` and second factor ``[output, rank, ...]``.
        alpha: the update is scaled by ``alpha / rank``, with rsLoRA by ``alpha / sqrt(rank)``.
        targets: names, or suffixes of names, of the adapted layers.
        use_rslora: see ``alpha``.
        magnitudes: layer -> norms of the rows of its weight, ``[output]``, of a convolution ``[1, output, 1, 1]``;
            empty: not a DoRA.
    """

    path: Path
    factors: dict[str, tuple[Tensor, Tensor]]
    alpha: float
    targets: tuple[str, ...]
    use_rslora: bool = False
    magnitudes: dict[str, Tensor] = field(default_factory=dict)

    @property
    def rank(self) -> int:
        """Inner dimension."""
        return len(next(iter(self.factors.values()))[0])

    @property
    def scale(self) -> float:
        """Scale of the update."""
        return self.alpha / (math.sqrt(self.rank) if self.use_rslora else self.rank)

    def tensors(self) -> dict[str, Tensor]:
        """All tensors as `read_lora` reads them, without the denoiser's name."""
        factors = {
            f"{layer}.{end}": factor
            for layer, pair in self.factors.items()
            for end, factor in zip((FIRST, SECOND), pair, strict=True)
        }
        return factors | {f"{layer}.{MAGNITUDE}": values for layer, values in self.magnitudes.items()}

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
            norms = (1, *outer) if len(outer) > 1 else outer
            fits = name not in self.magnitudes or tuple(self.magnitudes[name].shape) == norms
            if first.shape[1:] != inner or (second.shape[0], *second.shape[2:]) != outer or not fits:
                raise _damaged(self.path, f"factors of {name} have shapes that do not fit the layer")

    def restore_magnitudes(self, denoiser: nn.Module) -> None:
        """Set the magnitudes in fp32 in a denoiser that loaded this LoRA; diffusers rounds them to its dtype."""
        for name, values in self.magnitudes.items():
            for loaded in cast(LoraLayer, denoiser.get_submodule(name)).lora_magnitude_vector.values():
                loaded.weight.data = values.to(loaded.weight.device, torch.float32)


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
        ModelError: if the file is missing or damaged, or holds anything but pairs of factors (and the magnitudes of a
            DoRA), non-finite values or no alpha.
    """
    path = path_within(lora_dir.parent, f"{lora_dir.name}/{LORA_WEIGHTS}")
    if not path.is_file():
        raise _damaged(path, "is missing")
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
            metadata = json.loads((file.metadata() or {}).get(LORA_ADAPTER_METADATA_KEY, "{}"))
        alpha, targets = alpha_and_targets(metadata, denoiser_name)
        use_rslora, use_dora = (metadata.get(f"{denoiser_name}.{key}", False) for key in ("use_rslora", "use_dora"))
        if not isinstance(use_rslora, bool) or not isinstance(use_dora, bool):
            raise ValueError(f"metadata `{denoiser_name}.use_rslora` and `use_dora` must be true or false")
    except (SafetensorError, OSError, ValueError, RecursionError, AttributeError) as error:
        raise _damaged(path, f"cannot be read: {printable(error)}") from None
    ends = (FIRST, SECOND, MAGNITUDE) if use_dora else (FIRST, SECOND)
    names = {name.removesuffix(f".{end}") for name in tensors for end in ends if name.endswith(f".{end}")}
    if not tensors or {f"{name}.{end}" for name in names for end in ends} != {*tensors}:
        parts = "two factors and magnitudes" if use_dora else "two factors"
        raise _damaged(path, f"must hold {parts} per layer and nothing else, got {len(tensors)} tensors")
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
    magnitudes = {layer: tensors[f"{denoiser_name}.{layer}.{MAGNITUDE}"] for layer in factors if use_dora}
    return SavedLora(path, factors, alpha, targets, use_rslora, magnitudes)


def alpha_and_targets(metadata: Mapping[str, Any], denoiser_name: str) -> tuple[float, tuple[str, ...]]:
    """Alpha and targets in the untrusted metadata of diffusers' format.

    Raises:
        ValueError: alpha is missing or not a number > 0, or targets are not a list of names.
    """
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
        factors: ``<layer>.lora_A.weight`` and ``<layer>.lora_B.weight`` of each layer; of a DoRA also
            ``<layer>.lora_magnitude_vector``.
        config: its rank, alpha, targets and variant are written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    metadata = {key: sorted(value) if isinstance(value, set) else value for key, value in config.to_dict().items()}
    pipeline_class.save_lora_weights(  # type: ignore[attr-defined]
        folder, **{f"{denoiser_name}_lora_layers": factors, f"{denoiser_name}_lora_adapter_metadata": metadata}
    )
    (folder / LORA_WEIGHTS).chmod(0o644)  # safetensors writes 0600, unreadable to others on a shared disk
