"""Cost of a model: FLOPs and bytes per sample, as polynomials in the number of latent positions."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from fractions import Fraction
from typing import Any, Self

Method = str
"""``lora`` or ``full``: which parameters are trained."""
ATTENTION_TARGETS = (
    *("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"),
    "to_qkv_mlp_proj",  # FLUX.2
)
"""LoRA targets of ``lora`` footprints; other targets save more inputs for the backward pass."""
BYTES_16_BIT = 2


@dataclass(frozen=True)
class Polynomial:
    """``sum(coefficients[i] * positions ** i)``."""

    coefficients: tuple[float, ...]

    def __call__(self, positions: float) -> float:
        return sum(coefficient * positions**power for power, coefficient in enumerate(self.coefficients))

    @classmethod
    def through(cls, points: Mapping[int, float]) -> Self:
        """Interpolating polynomial, in exact arithmetic (Newton's form)."""
        nodes = list(points)
        differences = [Fraction(points[node]) for node in nodes]
        for order in range(1, len(nodes)):
            for index in range(len(nodes) - 1, order - 1, -1):
                step = nodes[index] - nodes[index - order]
                differences[index] = (differences[index] - differences[index - 1]) / step
        coefficients: list[Fraction] = [Fraction(0)]
        for index in range(len(nodes) - 1, -1, -1):  # Horner: multiply by (x - node), add the difference
            shifted = [Fraction(0), *coefficients]
            coefficients = [
                high - nodes[index] * low for high, low in zip(shifted, [*coefficients, Fraction(0)], strict=True)
            ]
            coefficients[0] += differences[index]
        return cls(tuple(float(coefficient) for coefficient in coefficients[: len(nodes)]))


@dataclass(frozen=True)
class LoraLayers:
    """Layers of a denoiser whose names have the same suffix.

    Attributes:
        parameters_per_rank: number of parameters per rank of a LoRA on all of them.
        outputs: number of output values per rank of the LoRA's down projections, for one sample.
    """

    parameters_per_rank: int
    outputs: Polynomial


@dataclass(frozen=True)
class Footprint:
    """One model's FLOPs (2 per multiply-add) and bytes (16-bit weights and activations, fused attention).

    Polynomials take the number of latent positions of a sample, ``height * width`` of its latents.

    Attributes:
        parameters, linear_parameters: number of the denoiser's parameters with buffers, and of its linear layers.
        native_positions: number of latent positions at the model's native image size.
        forward_flops: forward pass of the denoiser, per sample.
        backward_flops: backward pass, per sample; by method.
        training_bytes, checkpointed_bytes: peak of activations per sample over forward and backward, without and with
            gradient checkpointing; by method. Weights and gradients of weights are not included.
        inference_bytes: peak of activations per sample in a forward pass without gradient.
        vae_parameters: number of the VAE's parameters.
        decode_flops, encode_flops, decode_bytes: of the VAE, per image.
        text_parameters, text_flops: of all text encoders; FLOPs per prompt.
        lora_layers: layers that can have a LoRA, by the suffix of their names, such as ``attn1.to_q``.
    """

    parameters: int
    linear_parameters: int
    native_positions: int
    forward_flops: Polynomial
    backward_flops: Mapping[Method, Polynomial]
    training_bytes: Mapping[Method, Polynomial]
    checkpointed_bytes: Mapping[Method, Polynomial]
    inference_bytes: Polynomial
    vae_parameters: int
    decode_flops: Polynomial
    encode_flops: Polynomial
    decode_bytes: Polynomial
    text_parameters: int
    text_flops: float
    lora_layers: Mapping[str, LoraLayers]

    def lora_parameters(self, rank: int, targets: Sequence[str]) -> int:
        """Number of parameters of a LoRA.

        Args:
            rank: inner dimension.
            targets: suffixes of the names of adapted layers.
        """
        return rank * sum(layers.parameters_per_rank for layers in self._targeted(targets))

    def activation_bytes(self, positions: int, *, lora: tuple[int, Sequence[str]] | None, checkpointing: bool) -> float:
        """Peak of one sample's activations over forward and backward, in bytes.

        Args:
            positions: number of latent positions.
            lora: rank and targets; `None`: full fine-tuning.
            checkpointing: whether activations are checkpointed.
        """
        if lora is None:
            return (self.checkpointed_bytes if checkpointing else self.training_bytes)["full"](positions)
        rank, targets = lora
        # a LoRA outside attention saves the inputs of its layers for the backward pass, like full fine-tuning
        method = "lora" if all(_matches(target, ATTENTION_TARGETS) for target in targets) else "full"
        if checkpointing:
            return self.checkpointed_bytes[method](positions)
        outputs = sum(layers.outputs(positions) for layers in self._targeted(targets))
        return self.training_bytes[method](positions) + rank * BYTES_16_BIT * outputs

    def _targeted(self, targets: Sequence[str]) -> list[LoraLayers]:
        return [layers for name, layers in self.lora_layers.items() if _matches(name, targets)]

    def plain(self) -> dict[str, Any]:
        """Convert to JSON values; the inverse of `of`."""
        return _plain(asdict(self))

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> Self:
        """Convert from JSON values; the inverse of `plain`."""
        read = {name: _read(value) for name, value in values.items() if name != "lora_layers"}
        layers = {
            name: LoraLayers(value["parameters_per_rank"], Polynomial(tuple(value["outputs"])))
            for name, value in values["lora_layers"].items()
        }
        return cls(**read, lora_layers=layers)


def _matches(name: str, suffixes: Sequence[str]) -> bool:
    return any(name == suffix or name.endswith(f".{suffix}") for suffix in suffixes)


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return list(value["coefficients"]) if {*value} == {"coefficients"} else {k: _plain(v) for k, v in value.items()}
    return value


def _read(value: Any) -> Any:
    if isinstance(value, list):
        return Polynomial(tuple(value))
    return {name: _read(each) for name, each in value.items()} if isinstance(value, dict) else value
