"""LoRA file of another program -> factors that training starts from, or a LoRA as `save_lora` writes it."""

import inspect
import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import DiffusionPipeline, ModelMixin
from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY
from peft import LoraConfig
from peft.tuners.lora import LoraLayer
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from cdpo_ray.config.training import LoraSection
from cdpo_ray.errors import ModelError, StoreError, printable
from cdpo_ray.models import model_class
from cdpo_ray.models.folder import folder_of
from cdpo_ray.models.loading import fetch_config
from cdpo_ray.models.lora import FIRST, LORA_WEIGHTS, POLICY, SECOND, alpha_and_targets, row_norms, write_lora
from cdpo_ray.store.untrusted import read_untrusted_bytes

KEY = "`training.start_from`"
ADAPTER = "start"
FIRST_FACTORS = re.compile(r"[._]lora(_A|\.down)\.weight$")
"""Names of first factors in the formats that diffusers converts files to."""
FACTORS = (
    ("lora_down.weight", "lora_up.weight"),
    ("lora_A.weight", "lora_B.weight"),
    ("lora.down.weight", "lora.up.weight"),
)
"""Ends of the names of both factors, in the formats that have alphas."""
SHOWN_TARGETS = 12
PEFT_PREFIX, PEFT_CONFIG = "base_model.model.", "adapter_config.json"
"""Beginning of the names in a file of peft, and the file beside it that has the scale."""
SCALE_KEYS = ("lora_alpha", "use_rslora", "alpha_pattern", "rank_pattern")

GivenLora = dict[str, tuple[Tensor, Tensor]]
"""Layer of the denoiser -> first and second factor, fp32; the weight change is their product."""


def check_start(path: str, family: str, model: Mapping[str, Any], lora: LoraSection) -> None:
    """Read a LoRA as training will, if the model's folder is on this machine.

    Raises:
        ModelError: training cannot start from it.
    """
    kind = model_class(family)
    folder = folder_of(model["path"], model.get("revision")) if model["path"] != "embedded" else kind.embedded_dir
    config = folder / kind.denoiser_name / "config.json" if folder else None
    if config and config.is_file():
        values = json.loads(config.read_text())
        denoiser_class = getattr(diffusers, values["_class_name"])
        read_start(path, kind.pipeline_class, kind.denoiser_name, denoiser_class, values, lora)


def convert_lora(path: str, family: str, model: str, revision: str | None, folder: Path, *, key: str) -> int:
    """Write the LoRA of a file as `save_lora` does, so that `TextToImageModel.load_tuned` loads it.

    Args:
        path: as in `read_start`; of one rank, and any layers.
        model, revision: ``embedded``, a folder, or a hub id, which holds the denoiser's configuration.
        folder: folder to write to.
        key: config key of ``path``, for errors.

    Returns:
        Number of layers.

    Raises:
        ModelError: the file cannot be read, or does not belong to the model.
    """
    kind = model_class(family)
    model_dir = kind.embedded_dir if model == "embedded" else fetch_config(model, revision)
    assert model_dir is not None, "the model was checked"
    values = json.loads((model_dir / kind.denoiser_name / "config.json").read_text())
    denoiser_class = getattr(diffusers, values["_class_name"])
    given = read_start(path, kind.pipeline_class, kind.denoiser_name, denoiser_class, values, None, key=key)
    rank = len(next(iter(given.values()))[0])
    factors = {
        f"{name}.{end}": factor
        for name, pair in given.items()
        for end, factor in zip((FIRST, SECOND), pair, strict=True)
    }
    config = LoraConfig(r=rank, lora_alpha=rank, target_modules=[*given])
    write_lora(kind.pipeline_class, kind.denoiser_name, factors, config, folder)
    return len(given)


def read_start(
    path: str,
    pipeline_class: type[DiffusionPipeline],
    denoiser_name: str,
    denoiser_class: Any,
    denoiser_config: Mapping[str, Any],
    lora: LoraSection | None,
    *,
    key: str = KEY,
) -> GivenLora:
    """Read a LoRA in any format that diffusers reads, by its own loader, into a denoiser without weights.

    Args:
        path: file, or folder with one LoRA; untrusted, safetensors only. Of a folder of peft, the scale is read too.
        denoiser_name: ``unet`` or ``transformer``.
        lora: LoRA to train, which must have the same rank and layers; `None`: one rank, any layers.
        key: config key of ``path``, for errors.

    Raises:
        ModelError: the file cannot be read, is a DoRA, belongs to another model or to text encoders, or has another
            rank or other layers than ``lora``.
    """
    try:
        return _read(path, pipeline_class, denoiser_name, denoiser_class, denoiser_config, lora)
    except ModelError as error:
        raise ModelError(f"{key} {error}") from None


def _read(
    path: str,
    pipeline_class: type[DiffusionPipeline],
    denoiser_name: str,
    denoiser_class: Any,
    denoiser_config: Mapping[str, Any],
    lora: LoraSection | None,
) -> GivenLora:
    file = _file(path)
    tensors, metadata = _content(file, denoiser_name)
    if any("dora_scale" in name or "magnitude" in name for name in tensors):
        what = "continued" if lora else "used here"
        raise _refused(file, f"is a DoRA, which cannot be {what}", "merge it into the base model")
    skeleton = _without_weights(denoiser_class, denoiser_config)
    try:
        converted: Any = pipeline_class.lora_state_dict(
            _with_scale_1(tensors), unet_config=skeleton.config, return_alphas=True
        )
        state, alphas = converted if isinstance(converted, tuple) else (converted, None)
        load = getattr(pipeline_class, f"load_lora_into_{denoiser_name}")
        arguments = {denoiser_name: skeleton, "adapter_name": ADAPTER, "low_cpu_mem_usage": True}
        if "network_alphas" in inspect.signature(load).parameters:
            arguments["network_alphas"] = alphas  # equal to the rank
        own = {name: value for name, value in state.items() if name.startswith(f"{denoiser_name}.")}
        if others := {name.partition(".")[0] for name in state} - {denoiser_name}:
            raise _refused(
                file, f"also changes {printable(min(others))}, which is not trained", "merge it into the base model"
            )
        load(own, **arguments)
        scale = _scale(metadata, denoiser_name)
    except ModelError:
        raise
    except Exception as error:  # an untrusted file can make a converter raise anything
        reason = printable(error, 500) or type(error).__name__
        raise _refused(file, f"cannot be read: {reason}", "give a LoRA of this model in safetensors") from None
    found = {name: layer for name, layer in skeleton.named_modules() if isinstance(layer, LoraLayer)}
    factors = {
        name: (layer.lora_A[ADAPTER].weight.detach(), layer.lora_B[ADAPTER].weight.detach())
        for name, layer in found.items()
    }
    num_given = sum(bool(FIRST_FACTORS.search(name)) for name in own)
    if not factors or num_given != len(factors):
        raise _refused(file, f"{num_given} layers, of which {len(factors)} are the {denoiser_name}'s", "use another")
    if lora:
        _refuse_other_layers(file, factors, skeleton, lora)
    elif len(ranks := {len(first) for first, _ in factors.values()}) > 1:
        raise _refused(file, f"has layers of several ranks, {sorted(ranks)}", "merge it into the base model")
    return {
        name: (first.float(), second.float() * (scale(len(first)) if scale else found[name].scaling[ADAPTER]))
        for name, (first, second) in factors.items()
    }


@torch.no_grad()
def start_at(denoiser: ModelMixin, given: GivenLora) -> None:
    """Copy factors into the attached LoRA, whose output then is the given one's; the magnitudes of a DoRA follow."""
    for name, (first, second) in given.items():
        layer: Any = denoiser.get_submodule(name)
        layer.lora_A[POLICY].weight.copy_(first)
        layer.lora_B[POLICY].weight.copy_(second / layer.scaling[POLICY])
        if POLICY in layer.lora_magnitude_vector:
            magnitudes = layer.lora_magnitude_vector[POLICY].weight
            factors = (layer.lora_A[POLICY].weight, layer.lora_B[POLICY].weight)
            magnitudes.copy_(row_norms(layer.weight, *factors, layer.scaling[POLICY]).reshape(magnitudes.shape))


def _without_weights(denoiser_class: Any, config: Mapping[str, Any]) -> Any:
    """Denoiser whose weights are zeros without memory: loaders move a LoRA to the device of the weights."""
    with torch.device("meta"):
        net = denoiser_class.from_config(dict(config))
    for module in net.modules():
        for name, value in list(module.named_parameters(recurse=False)):
            setattr(module, name, nn.Parameter(torch.zeros(()).expand(value.shape), requires_grad=False))
    return net


def _with_scale_1(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors with alpha equal to the rank, where there is one, and the second factor scaled instead.

    diffusers 0.42 ignores the alpha of attention layers where layers have different ones.
    """
    scaled = dict(tensors)
    for name, alpha in tensors.items():
        layer = name.removesuffix(".alpha")
        for down, up in FACTORS:
            if layer != name and f"{layer}.{down}" in tensors and f"{layer}.{up}" in tensors:
                rank = len(tensors[f"{layer}.{down}"])
                scaled[f"{layer}.{up}"] = tensors[f"{layer}.{up}"].float() * float(alpha) / rank
                scaled[f"{layer}.{down}"] = tensors[f"{layer}.{down}"].float()
                scaled[name] = torch.tensor(float(rank))
    return scaled


def _file(path: str) -> Path:
    place = Path(path)
    if not place.is_dir():
        return place
    found = [place / LORA_WEIGHTS] if (place / LORA_WEIGHTS).is_file() else sorted(place.glob("*.safetensors"))
    if len(found) != 1:
        raise _refused(place, f"is a folder with {len(found)} safetensors files", "name the file")
    return found[0]


def _content(file: Path, denoiser_name: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and metadata of a file, both as diffusers would write them if peft did."""
    try:
        with safe_open(file, framework="pt") as opened:
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 - not a mapping
            metadata = json.loads((opened.metadata() or {}).get(LORA_ADAPTER_METADATA_KEY, "{}"))
        if all(name.startswith(PEFT_PREFIX) for name in tensors):
            tensors = {f"{denoiser_name}.{name.removeprefix(PEFT_PREFIX)}": value for name, value in tensors.items()}
            if (beside := file.with_name(PEFT_CONFIG)).is_file():
                values = json.loads(read_untrusted_bytes(beside, remedy="write it again"))
                metadata = {f"{denoiser_name}.{name}": values.get(name) for name in SCALE_KEYS}
    except (SafetensorError, OSError, ValueError, RecursionError, AttributeError, StoreError) as error:
        raise _refused(file, f"cannot be read: {printable(error)}", "give a LoRA in safetensors") from None
    if bad := [name for name, value in tensors.items() if not value.is_floating_point() or not value.isfinite().all()]:
        raise _refused(
            file, f"{len(bad)} tensors are not finite floats, the first {printable(min(bad))}", "use another"
        )
    return tensors, metadata if isinstance(metadata, dict) else {}


def _scale(metadata: Mapping[str, Any], denoiser_name: str) -> Callable[[int], float] | None:
    """Scale of a rank by the metadata of diffusers' format; `None`: the file has none, or one per layer."""
    if f"{denoiser_name}.lora_alpha" not in metadata:
        return None
    if any(metadata.get(f"{denoiser_name}.{key}") for key in ("alpha_pattern", "rank_pattern")):
        raise ValueError("layers of several scales or ranks are not supported")
    alpha, _ = alpha_and_targets(metadata, denoiser_name)
    use_rslora = metadata.get(f"{denoiser_name}.use_rslora") is True
    return lambda rank: alpha / (math.sqrt(rank) if use_rslora else rank)


def _refuse_other_layers(
    file: Path, factors: Mapping[str, tuple[Tensor, Tensor]], skeleton: nn.Module, lora: LoraSection
) -> None:
    layers = [
        name.removesuffix(".base_layer")
        for name, layer in skeleton.named_modules()
        if isinstance(layer, nn.Linear | nn.Conv2d) and ".lora_" not in name
    ]
    ranks = sorted({len(first) for first, _ in factors.values()})
    if len(ranks) > 1:
        raise _refused(file, f"has layers of several ranks, {ranks}", "no `training.lora` fits; use another")
    if {*factors} == {name for name in layers if f".{name}".endswith(_ends(lora.targets))} and ranks == [lora.rank]:
        return
    targets = sorted({_target(name, layers, factors) for name in factors})
    shown = ", ".join(targets[:SHOWN_TARGETS]) + ", ..." * (len(targets) > SHOWN_TARGETS)
    raise _refused(
        file,
        f"has rank {ranks[0]} on {len(factors)} layers, unlike `training.lora`",
        f"set `training.lora.rank` to {ranks[0]} and `training.lora.targets` to [{shown}]",
    )


def _target(name: str, layers: Sequence[str], given: Mapping[str, Any]) -> str:
    """Shortest end of a layer's name, not a number, that no layer without a LoRA has."""
    parts = name.split(".")
    ends = (".".join(parts[start:]) for start in reversed(range(len(parts))) if not parts[start].isdigit())
    is_own = (end for end in ends if all(layer in given for layer in layers if f".{layer}".endswith(f".{end}")))
    return next(is_own, name)


def _ends(targets: Sequence[str]) -> tuple[str, ...]:
    return tuple(f".{target}" for target in targets)


def _refused(path: Path, what: str, advice: str) -> ModelError:
    return ModelError(f"{path}: {what}; {advice}")
