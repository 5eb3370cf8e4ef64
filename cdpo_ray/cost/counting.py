"""Model folder -> footprint: FLOPs and bytes, counted on meta tensors, which allocate no memory."""

import functools
import json
import re
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from diffusers import (
    AutoencoderDC,
    AutoencoderKL,
    AutoencoderKLFlux2,
    AutoencoderKLQwenImage,
    Flux2Transformer2DModel,
    FluxTransformer2DModel,
    ModelMixin,
    QwenImageTransformer2DModel,
    SanaTransformer2DModel,
    SD3Transformer2DModel,
    UNet2DConditionModel,
    ZImageTransformer2DModel,
)
from torch import Tensor, nn
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from torch.utils.flop_counter import flop_registry

from cdpo_ray.cost.footprint import ATTENTION_TARGETS, BYTES_16_BIT, Footprint, LoraLayers, Method, Polynomial
from cdpo_ray.models.flow_matching import MAX_CHAT_TOKENS
from cdpo_ray.models.flux import max_t5_tokens
from cdpo_ray.models.lora import Adapters, attach_lora

SIDES = (32, 64, 96)
"""Heights and widths of the counted latents; three, because attention's FLOPs are quadratic in positions."""
NUM_SAMPLES = 2
CLIP_TOKENS, SD3_T5_TOKENS, QWEN_IMAGE_TOKENS, SANA_TOKENS = 77, 256, 512, 300
ENCODED_TOKENS = {"Qwen2_5_VLForConditionalGeneration": 34 + QWEN_IMAGE_TOKENS, "Gemma2Model": 200 + SANA_TOKENS}
"""Architecture of a text encoder -> tokens per prompt, including those of a template, where the limit of the model is
higher."""
COUNTED_RANK = 8
NUMBERED_BLOCK = re.compile(r"^.*(?:blocks|attentions|resnets|layers|refiner)\.\d+\.")

Inputs = Callable[[int, int], dict[str, Any]]
"""Number of samples and side of the latents -> keyword arguments of the denoiser, on the meta device."""


@contextmanager
def fused_attention() -> Iterator[None]:
    """Context manager that makes attention a fused operator, which does not materialize the matrix of scores.

    PyTorch would decompose it on meta tensors. The function is replaced, because a dispatch mode is not active in the
    backward pass, where checkpointed blocks are recomputed.
    """
    before = functional.scaled_dot_product_attention

    def fused(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, *_: Any, **__: Any) -> Tensor:
        needs_grad = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (query, key, value))
        return torch.ops.aten._scaled_dot_product_efficient_attention(query, key, value, attn_mask, needs_grad)[0]

    functional.scaled_dot_product_attention = fused
    try:
        yield
    finally:
        functional.scaled_dot_product_attention = before


class Meter(TorchDispatchMode):
    """Counts FLOPs of the operators (2 per multiply-add) and bytes of the live storages that they allocate.

    `FlopCounterMode` keeps tensors alive, so only its table of operators is used.

    Args:
        known: module whose parameters and buffers are not counted.
    """

    def __init__(self, known: nn.Module) -> None:
        super().__init__()
        self._sizes: dict[int, int] = {}
        self._known = {tensor.untyped_storage()._cdata for tensor in (*known.parameters(), *known.buffers())}
        self.flops = self.bytes = self.peak_bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        outputs = func(*args, **(kwargs or {}))
        if func is torch.ops.aten.convolution_backward.default:
            self.flops += _convolution_backward_flops(*args)
        elif count := flop_registry.get(func._overloadpacket):
            self.flops += count(*args, **(kwargs or {}), out_val=outputs)
        for value in tree_iter(outputs):
            if isinstance(value, Tensor):
                self._track(value.untyped_storage())
        return outputs

    def _track(self, storage: torch.UntypedStorage) -> None:
        address = storage._cdata
        if address in self._known or address in self._sizes:
            return
        self._sizes[address] = storage.nbytes()
        self.bytes += storage.nbytes()
        self.peak_bytes = max(self.peak_bytes, self.bytes)
        weakref.finalize(storage, self._forget, address)

    def _forget(self, address: int) -> None:
        self.bytes -= self._sizes.pop(address)


def _convolution_backward_flops(grad_output: Tensor, input: Tensor, weight: Tensor, *others: Any) -> int:
    """FLOPs of the gradients, each as many as the forward pass; `flop_registry` ignores the groups of the weight's."""
    transposed, output_mask = others[4], others[7]
    positions = input.numel() // input.shape[1] if transposed else grad_output.numel() // grad_output.shape[1]
    return 2 * positions * weight.numel() * sum(output_mask[:2])


def count_folder(model_dir: Path) -> Footprint:
    """Footprint of a model folder in diffusers layout, from its configurations; weights are not read.

    Takes half a minute for Stable Diffusion 1.5.
    """
    index = json.loads((model_dir / "model_index.json").read_text())
    name = "unet" if "unet" in index else "transformer"
    config = json.loads((model_dir / name / "config.json").read_text())
    text_configs = [
        transformers.AutoConfig.from_pretrained(model_dir / part, local_files_only=True)
        for part in ("text_encoder", "text_encoder_2", "text_encoder_3")
        if index.get(part, [None])[0]
    ]
    vae = json.loads((model_dir / "vae" / "config.json").read_text())
    return count(config, vae, text_configs)


def count(config: Mapping[str, Any], vae_config: Mapping[str, Any], text_configs: list[Any]) -> Footprint:
    """Footprint of a denoiser, a VAE and text encoders, from the contents of their `config.json`."""
    make, inputs, native_side = denoiser_of(config)
    sides = _sides(config)
    with _half():
        denoiser = make()
        layers = _lora_layers(denoiser, inputs, sides)
        # SD3's positional embeddings are a buffer of a tenth of the parameters' size
        parameters = _num_parameters(denoiser) + sum(buffer.numel() for buffer in denoiser.buffers())
        linear = sum(each.weight.numel() for each in denoiser.modules() if isinstance(each, nn.Linear))
        forward, inference = _inference(denoiser, inputs, sides)
        backward: dict[Method, Polynomial] = {}
        training: dict[Method, Polynomial] = {}
        checkpointed: dict[Method, Polynomial] = {}
        for method in ("full", "lora"):
            if method == "lora":
                add_lora(denoiser, rank=COUNTED_RANK, targets=ATTENTION_TARGETS)
            denoiser.train().disable_gradient_checkpointing()
            flops: dict[int, float] = {}
            plain: dict[int, float] = {}
            for side in sides:
                flops[side**2], plain[side**2] = count_training(denoiser, inputs(NUM_SAMPLES, side))
            backward[method] = _per_sample(flops)
            denoiser.enable_gradient_checkpointing()
            peaks = {side**2: count_training(denoiser, inputs(NUM_SAMPLES, side))[1] for side in sides[1:]}
            checkpointed[method] = _per_sample(peaks)
            plain = {positions: plain[positions] for positions in peaks}
            if method == "lora":  # `Footprint.activation_bytes` adds the part proportional to the rank
                outputs = [each.outputs for name, each in layers.items() if name.endswith(ATTENTION_TARGETS)]
                per_rank = NUM_SAMPLES * BYTES_16_BIT * COUNTED_RANK
                plain = {n: found - per_rank * sum(each(n) for each in outputs) for n, found in plain.items()}
            training[method] = _per_sample(plain)
        vae_parameters, decode_flops, encode_flops, decode_bytes = _vae(vae_config)
        text_parameters, text_flops = _text(text_configs)
    return Footprint(
        parameters=parameters,
        linear_parameters=linear,
        native_positions=native_side**2,
        forward_flops=forward,
        backward_flops=backward,
        training_bytes=training,
        checkpointed_bytes=checkpointed,
        inference_bytes=inference,
        vae_parameters=vae_parameters,
        decode_flops=decode_flops,
        encode_flops=encode_flops,
        decode_bytes=decode_bytes,
        text_parameters=text_parameters,
        text_flops=text_flops,
        lora_layers=layers,
    )


def add_lora(denoiser: ModelMixin, *, rank: int, targets: Sequence[str], use_dora: bool = False) -> None:
    """Attach a 16-bit LoRA on the meta device."""
    with torch.device("meta"):
        for parameter in attach_lora(denoiser, rank=rank, alpha=rank, targets=targets, seed=0, use_dora=use_dora):
            parameter.data = parameter.data.to(torch.bfloat16)
    if use_dora:
        Adapters(denoiser)


def denoiser_of(config: Mapping[str, Any]) -> tuple[Callable[[], ModelMixin], Inputs, int]:
    """Constructor of the denoiser on the meta device, its inputs, and the native height and width of its latents."""
    (kind,) = (each for each in DENOISERS if each.__name__ == config["_class_name"])

    def make() -> ModelMixin:
        with torch.device("meta"):
            return kind.from_config(dict(config))

    known = make().config
    native_side = 64 if kind is Flux2Transformer2DModel else known.get("sample_size") or 128
    return make, lambda num, side: DENOISERS[kind](known, num, side), native_side


def count_training(denoiser: ModelMixin, inputs: Mapping[str, Any]) -> tuple[int, int]:
    """FLOPs of the backward pass, and peak activation bytes over forward and backward, of a whole batch.

    Gradients are dropped as soon as they are computed, because `cost.memory` counts them separately.
    """

    def drop(parameter: Tensor) -> None:
        parameter.grad = None

    hooks = [each.register_post_accumulate_grad_hook(drop) for each in denoiser.parameters() if each.requires_grad]
    meter = Meter(denoiser)
    with fused_attention(), meter:
        prediction = denoiser(**inputs, return_dict=False)[0]
        if isinstance(prediction, list):  # one per sample
            prediction = torch.stack(prediction)
        forward_flops = meter.flops
        prediction.float().pow(2).mean().backward()
    for hook in hooks:
        hook.remove()
    return meter.flops - forward_flops, meter.peak_bytes


def _inference(denoiser: ModelMixin, inputs: Inputs, sides: Sequence[int]) -> tuple[Polynomial, Polynomial]:
    """FLOPs and peak activation bytes per sample of a forward pass without gradient."""
    flops, peaks = {}, {}
    for side in sides:
        meter = Meter(denoiser)
        with fused_attention(), meter, torch.no_grad():
            denoiser.eval()(**inputs(NUM_SAMPLES, side), return_dict=False)
        flops[side**2], peaks[side**2] = meter.flops, meter.peak_bytes
    return _per_sample(flops), _per_sample({side**2: peaks[side**2] for side in sides[1:]})


def _lora_layers(denoiser: ModelMixin, inputs: Inputs, sides: Sequence[int]) -> dict[str, LoraLayers]:
    """All layers that can have a LoRA, grouped by the suffix of their names."""
    layers = {name: each for name, each in denoiser.named_modules() if isinstance(each, nn.Linear | nn.Conv2d)}
    outputs = {side**2: _outputs_per_channel(denoiser, layers, inputs(NUM_SAMPLES, side)) for side in sides[:2]}
    by_suffix: dict[str, list[str]] = {}
    for name in layers:
        by_suffix.setdefault(NUMBERED_BLOCK.sub("", name), []).append(name)
    return {
        suffix: LoraLayers(
            sum(layers[name].weight.shape[0] + layers[name].weight[0].numel() for name in names),
            Polynomial.through(
                {positions: sum(found.get(name, 0.0) for name in names) for positions, found in outputs.items()}
            ),
        )
        for suffix, names in by_suffix.items()
    }


def _outputs_per_channel(
    denoiser: ModelMixin, layers: Mapping[str, nn.Linear | nn.Conv2d], inputs: Mapping[str, Any]
) -> dict[str, float]:
    """Number of output values of each layer per output channel, for one sample."""
    outputs: dict[str, float] = {}

    def record(name: str, layer: nn.Linear | nn.Conv2d, inputs: Any, output: Tensor) -> None:
        outputs[name] = output.numel() / layer.weight.shape[0] / NUM_SAMPLES

    hooks = [each.register_forward_hook(functools.partial(record, name)) for name, each in layers.items()]
    with fused_attention(), torch.no_grad():
        denoiser.eval()(**inputs, return_dict=False)
    for hook in hooks:
        hook.remove()
    return outputs


def _vae(config: Mapping[str, Any]) -> tuple[int, Polynomial, Polynomial, Polynomial]:
    """Parameters, FLOPs to decode and to encode an image, and peak activation bytes of decoding one."""
    kind = {each.__name__: each for each in VAES}[config.get("_class_name", "AutoencoderKL")]
    with torch.device("meta"):
        vae = kind.from_config(dict(config)).eval()
    channels_key, levels_key = VAES[kind]
    factor = 2 ** (len(vae.config[levels_key]) - 1)
    frames = (1,) if kind is AutoencoderKLQwenImage else ()
    patch = 2 if kind is AutoencoderKLFlux2 else 1  # VAE latents per latent position along each side
    decode, encode, peaks = {}, {}, {}
    for side in SIDES:
        size = patch * side
        latents = torch.empty(NUM_SAMPLES, vae.config[channels_key], *frames, size, size, device="meta")
        pixels = torch.empty(NUM_SAMPLES, 3, *frames, factor * size, factor * size, device="meta")
        meter = Meter(vae)
        with fused_attention(), meter, torch.no_grad():
            image = vae.decode(latents).sample
            ((image.float() / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8)
        decode[side**2], peaks[side**2] = meter.flops, meter.peak_bytes
        meter = Meter(vae)
        with fused_attention(), meter, torch.no_grad():
            vae.encode(pixels)
        encode[side**2] = meter.flops
    decode_peaks = {side**2: peaks[side**2] for side in SIDES[1:]}
    return _num_parameters(vae), _per_sample(decode), _per_sample(encode), _per_sample(decode_peaks)


def _text(configs: list[Any]) -> tuple[int, float]:
    """Parameters of all text encoders, and FLOPs to encode one prompt."""
    parameters, flops = 0, 0.0
    for config in configs:
        name = (config.architectures or ["CLIPTextModel"])[0]
        limit: int = min(getattr(config, "max_position_embeddings", SD3_T5_TOKENS), MAX_CHAT_TOKENS)
        with torch.device("meta"):
            encoder = getattr(transformers, name)(config).eval()
            ids = torch.zeros(1, ENCODED_TOKENS.get(name, limit), dtype=torch.long)
        parameters += _num_parameters(encoder)
        meter = Meter(encoder)
        with meter, torch.no_grad():
            encoder(ids)
        flops += meter.flops
    return parameters, flops


def _sides(config: Mapping[str, Any]) -> tuple[int, ...]:
    """`SIDES`, or smaller ones for a transformer with too few positional embeddings."""
    largest = 2 * (config.get("pos_embed_max_size") or SIDES[-1])
    return SIDES if largest >= SIDES[-1] else tuple(largest * side // SIDES[-1] for side in SIDES)


def _unet_inputs(config: Any, num: int, side: int) -> dict[str, Any]:
    with torch.device("meta"):
        inputs: dict[str, Any] = {
            "sample": torch.empty(num, config.in_channels, side, side),
            "timestep": torch.zeros(num, dtype=torch.long),
            "encoder_hidden_states": torch.empty(num, CLIP_TOKENS, config.cross_attention_dim),
        }
        if config.time_cond_proj_dim:
            inputs["timestep_cond"] = torch.empty(num, config.time_cond_proj_dim)
        if config.addition_embed_type == "text_time":
            pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
            inputs["added_cond_kwargs"] = {"text_embeds": torch.empty(num, pooled), "time_ids": torch.empty(num, 6)}
    return inputs


def _sd3_inputs(config: Any, num: int, side: int) -> dict[str, Any]:
    with torch.device("meta"):
        return {
            "hidden_states": torch.empty(num, config.in_channels, side, side),
            "timestep": torch.empty(num),
            "encoder_hidden_states": torch.empty(num, CLIP_TOKENS + SD3_T5_TOKENS, config.joint_attention_dim),
            "pooled_projections": torch.empty(num, config.pooled_projection_dim),
        }


def _flux_inputs(config: Any, num: int, side: int) -> dict[str, Any]:
    with torch.device("meta"):
        return {
            "hidden_states": torch.empty(num, side * side // 4, config.in_channels),
            "timestep": torch.empty(num),
            "guidance": torch.empty(num) if config.guidance_embeds else None,
            "encoder_hidden_states": torch.empty(num, max_t5_tokens(config), config.joint_attention_dim),
            "pooled_projections": torch.empty(num, config.pooled_projection_dim),
            "txt_ids": torch.empty(max_t5_tokens(config), 3),
            "img_ids": torch.empty(side * side // 4, 3),
        }


def _flux2_inputs(config: Any, num: int, side: int) -> dict[str, Any]:
    with torch.device("meta"):
        return {
            "hidden_states": torch.empty(num, side * side, config.in_channels),
            "timestep": torch.empty(num),
            "encoder_hidden_states": torch.empty(num, MAX_CHAT_TOKENS, config.joint_attention_dim),
            "txt_ids": torch.empty(MAX_CHAT_TOKENS, 4),
            "img_ids": torch.empty(side * side, 4),
        }


def _z_image_inputs(config: Any, num: int, side: int) -> dict[str, Any]:
    """With prompts of the largest length; most are shorter."""
    with torch.device("meta"):
        return {
            "x": [torch.empty(config.in_channels, 1, side, side) for _ in range(num)],
            "t": torch.empty(num),
            "cap_feats": [torch.empty(MAX_CHAT_TOKENS, config.cap_feat_dim) for _ in range(num)],
        }


def _qwen_image_inputs(config: Any, num: int, side: int) -> dict[str, Any]:
    with torch.device("meta"):
        return {
            "hidden_states": torch.empty(num, side * side // 4, config.in_channels),
            "timestep": torch.empty(num),
            "encoder_hidden_states": torch.empty(num, QWEN_IMAGE_TOKENS, config.joint_attention_dim),
            "encoder_hidden_states_mask": torch.empty(num, QWEN_IMAGE_TOKENS, dtype=torch.bool),
            "img_shapes": [[(1, side // 2, side // 2)]] * num,
        }


def _sana_inputs(config: Any, num: int, side: int) -> dict[str, Any]:
    with torch.device("meta"):
        return {
            "hidden_states": torch.empty(num, config.in_channels, side, side),
            "timestep": torch.empty(num),
            "encoder_hidden_states": torch.empty(num, SANA_TOKENS, config.caption_channels),
            "encoder_attention_mask": torch.empty(num, SANA_TOKENS, dtype=torch.bool),
        }


DENOISERS: dict[type[ModelMixin], Callable[[Any, int, int], dict[str, Any]]] = {
    UNet2DConditionModel: _unet_inputs,
    SD3Transformer2DModel: _sd3_inputs,
    FluxTransformer2DModel: _flux_inputs,
    Flux2Transformer2DModel: _flux2_inputs,
    ZImageTransformer2DModel: _z_image_inputs,
    QwenImageTransformer2DModel: _qwen_image_inputs,
    SanaTransformer2DModel: _sana_inputs,
}
"""Class of a denoiser -> its inputs by configuration, number of samples and side of the latents."""
VAES: dict[type[ModelMixin], tuple[str, str]] = {
    AutoencoderKL: ("latent_channels", "block_out_channels"),
    AutoencoderKLFlux2: ("latent_channels", "block_out_channels"),
    AutoencoderKLQwenImage: ("z_dim", "dim_mult"),
    AutoencoderDC: ("latent_channels", "encoder_block_out_channels"),
}
"""Class of a VAE -> keys of its number of latent channels and of its levels."""


def _per_sample(of_batch: Mapping[int, float]) -> Polynomial:
    return Polynomial.through({positions: found / NUM_SAMPLES for positions, found in of_batch.items()})


def _num_parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


@contextmanager
def _half() -> Iterator[None]:
    """Create 16-bit tensors by default."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
