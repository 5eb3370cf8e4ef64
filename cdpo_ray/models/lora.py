"""Denoiser -> denoiser with a LoRA: attach, switch, grow, save where diffusers loads it."""

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import ModelMixin
from peft import LoraConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import get_peft_model_state_dict
from safetensors.torch import load_file
from torch import Tensor, nn

LORA_DIR = "lora"
LORA_WEIGHTS = "pytorch_lora_weights.safetensors"
"""File name that ``pipe.load_lora_weights(folder)`` looks for."""

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
            LoraConfig(r=rank, lora_alpha=alpha, target_modules=list(targets), init_lora_weights="gaussian")  # type: ignore[arg-type]
        )
    trainable = [parameter for parameter in denoiser.parameters() if parameter.requires_grad]
    for parameter in trainable:
        parameter.data = parameter.data.float()
    return trainable


@torch.no_grad()
def continue_from(denoiser: ModelMixin, lora_dir: Path) -> None:
    """Put the factors that `save_lora` wrote into the LoRA that is attached; types and rank must be alike.

    Raises:
        ValueError: the file's LoRA has other layers or another rank.
    """
    saved = load_file(lora_dir / LORA_WEIGHTS)
    attached = get_peft_model_state_dict(denoiser)
    prefix = next(iter(saved)).split(".")[0]
    if {f"{prefix}.{name}": value.shape for name, value in attached.items()} != {
        name: value.shape for name, value in saved.items()
    }:
        raise ValueError(
            f"{lora_dir}: its LoRA has other layers or another rank than the one to train;"
            " keep `training.lora` as it was"
        )
    for name, value in attached.items():
        value.copy_(saved[f"{prefix}.{name}"])


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
