"""Family -> required contents of its model folders; does not import torch."""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

Config = Mapping[str, Any]
Configs = Mapping[str, Config]
"""Part of a pipeline -> its configuration; ``model_index`` is the pipeline's. Parts that were not read are absent.

Configurations are untrusted: a value may have any JSON type.
"""
Faults = Iterator[str]

INDEX = "model_index"
NUM_TIMESTEPS = 1000
UNET, VAE = "UNet2DConditionModel", "AutoencoderKL"
FLUX2_VAE = "AutoencoderKLFlux2"
CLIP, CLIP_PROJECTED, T5 = "CLIPTextModel", "CLIPTextModelWithProjection", "T5EncoderModel"
QWEN3, QWEN3_LM = "Qwen3Model", "Qwen3ForCausalLM"
QWEN_VAE, QWEN_TEXT = "AutoencoderKLQwenImage", "Qwen2_5_VLForConditionalGeneration"
SANA_VAE, GEMMA = "AutoencoderDC", "Gemma2Model"
FLOW_EULER, DPM_SOLVER = "FlowMatchEulerDiscreteScheduler", "DPMSolverMultistepScheduler"
DISCRETE_SCHEDULERS = (
    *("DDIMScheduler", "DDIMParallelScheduler", "DDPMScheduler", "DDPMParallelScheduler", "PNDMScheduler"),
    *("EulerDiscreteScheduler", "EulerAncestralDiscreteScheduler", "HeunDiscreteScheduler", "LMSDiscreteScheduler"),
    *("KDPM2DiscreteScheduler", "KDPM2AncestralDiscreteScheduler", "DEISMultistepScheduler", "SASolverScheduler"),
    *("DPMSolverMultistepScheduler", "DPMSolverSinglestepScheduler", "DPMSolverSDEScheduler"),
    "UniPCMultistepScheduler",
)
"""Samplers of discrete noise schedules; DDIM samples the same models with the same configuration."""
DEFAULTS: dict[str, Config] = {
    VAE: {"latent_channels": 4, "scaling_factor": 0.18215, "block_out_channels": [64]},
    UNET: {"in_channels": 4, "out_channels": 4, "cross_attention_dim": 1280},
    "SD3Transformer2DModel": {
        **{"in_channels": 16, "out_channels": 16},
        **{"joint_attention_dim": 4096, "pooled_projection_dim": 2048},
    },
    "FluxTransformer2DModel": {"in_channels": 64, "joint_attention_dim": 4096, "pooled_projection_dim": 768},
    "Flux2Transformer2DModel": {"in_channels": 128, "joint_attention_dim": 15360, "guidance_embeds": True},
    "ZImageTransformer2DModel": {"in_channels": 16, "cap_feat_dim": 2560, "siglip_feat_dim": None},
    FLUX2_VAE: {
        **{"latent_channels": 32, "block_out_channels": [128, 256, 512, 512]},
        **{"patch_size": [2, 2], "batch_norm_eps": 1e-4},
    },
    "QwenImageTransformer2DModel": {
        **{"patch_size": 2, "in_channels": 64, "out_channels": 16},
        **{"joint_attention_dim": 3584},
    },
    QWEN_VAE: {
        **{"z_dim": 16, "dim_mult": [1, 2, 4, 4], "temperal_downsample": [False, True, True]},
        **{"latents_mean": [0] * 16, "latents_std": [1] * 16},  # diffusers has other numbers, as many
    },
    QWEN_TEXT: {"hidden_size": 8192},
    "SanaTransformer2DModel": {"in_channels": 32, "out_channels": 32, "caption_channels": 2304, "sample_size": 32},
    SANA_VAE: {"latent_channels": 32, "encoder_block_out_channels": [128, 256, 512, 512, 1024, 1024]},
    GEMMA: {"hidden_size": 2304},
    CLIP: {"hidden_size": 512, "projection_dim": 512, "max_position_embeddings": 77},
    CLIP_PROJECTED: {"hidden_size": 512, "projection_dim": 512, "max_position_embeddings": 77},
    T5: {"d_model": 512},
    QWEN3: {"hidden_size": 4096, "num_hidden_layers": 32},
    QWEN3_LM: {"hidden_size": 4096, "num_hidden_layers": 32},
}
"""Class -> defaults of diffusers and transformers for keys that a configuration lacks."""


@dataclass(frozen=True)
class Component:
    """Requirements on a part of the pipeline.

    Attributes:
        library: ``diffusers`` or ``transformers``, which loads it.
        classes: classes that may load it; empty: not compared here.
        weights: prefix of the names of its weight files; `None`: it has no weights.
        vocabularies: alternative sets of a tokenizer's files, of which one must be complete.
        optional: whether a model may lack it.
    """

    library: str
    classes: tuple[str, ...] = ()
    weights: str | None = None
    vocabularies: tuple[tuple[str, ...], ...] = ()
    optional: bool = False

    @property
    def defaults(self) -> Config:
        return DEFAULTS.get(self.classes[0], {}) if self.classes else {}


@dataclass(frozen=True)
class Layout:
    """Required contents of a family's model folders.

    Attributes:
        pipelines: allowed classes of the pipeline.
        parts: name in the pipeline -> requirements.
        formulations: allowed kinds of model that the scheduler samples, see `_formulation`.
        denoiser_faults: compares the denoiser with the other parts.
    """

    pipelines: tuple[str, ...]
    parts: Mapping[str, Component]
    formulations: tuple[str, ...]
    denoiser_faults: Callable[[Configs], Faults]

    def faults(self, configs: Configs) -> Faults:
        """Configuration values that do not fit the family or each other."""
        yield from _scheduler_faults(configs, self.formulations)
        if self.parts["vae"].classes == (VAE,):
            yield from _vae_faults(configs)
        yield from _tokenizer_faults(configs, self.parts)
        yield from self.denoiser_faults(configs)


def config_path(part: str) -> str:
    """Path of a part's configuration in a model folder."""
    if part == INDEX:
        return f"{INDEX}.json"
    kind = part.partition("_")[0]
    return f"{part}/{kind}_config.json" if kind in ("scheduler", "tokenizer") else f"{part}/config.json"


def shown(value: Any) -> str:
    """JSON of an untrusted value for a message: control characters escaped, at most 80 characters."""
    text = json.dumps(value)
    return text if len(text) <= 80 else f"{text[:74]} ...{text[-1]}"


def unquoted(text: str) -> str:
    """`shown` of an untrusted name, without quotes."""
    return shown(text)[1:-1]


def one_of(names: Sequence[str]) -> str:
    return " or ".join(names)


def _expect(configs: Configs, part: str, key: str, expected: Any, why: str) -> Faults:
    """Fault if a part that was read has another value than ``expected``."""
    if part in configs and (found := configs[part].get(key)) != expected:
        yield f"{config_path(part)}: `{key}` must be {shown(expected)} ({why}), got {shown(found)}"


def _expect_kind(configs: Configs, part: str, key: str, kind: tuple[str, Callable[[Any], bool]]) -> Faults:
    """Fault if a part that was read has a value of another kind."""
    what, is_right = kind
    if part in configs and not is_right(found := configs[part].get(key)):
        yield f"{config_path(part)}: `{key}` must be {what}, got {shown(found)}"


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**31


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 2**31


def _is_list(value: Any, lengths: range, is_right: Callable[[Any], bool]) -> bool:
    return isinstance(value, list) and len(value) in lengths and all(map(is_right, value))


_WHOLE = ("a whole number", _is_whole)
_BETA = ("a number in (0, 1)", lambda value: _is_number(value) and 0 < value < 1)
_BETA_SCHEDULES = ("linear", "scaled_linear", "squaredcos_cap_v2")
_SCHEDULER_KINDS: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "prediction_type": (
        "epsilon or v_prediction",
        lambda value: value in (None, "epsilon", "v_prediction"),
    ),
    "timestep_spacing": (
        "leading, linspace or trailing",
        lambda value: value in (None, "leading", "linspace", "trailing"),
    ),
    # no default: those of diffusers are for pixel models
    "beta_schedule": (one_of(_BETA_SCHEDULES), lambda value: value in _BETA_SCHEDULES),
    "beta_start": _BETA,
    "beta_end": _BETA,
    "trained_betas": (
        f"null or {NUM_TIMESTEPS} numbers",
        lambda value: value is None or _is_list(value, range(NUM_TIMESTEPS, NUM_TIMESTEPS + 1), _is_number),
    ),
    "steps_offset": ("a whole number", lambda value: value is None or _is_whole(value)),
}
_VAE_KINDS = {
    "scaling_factor": ("a positive number", lambda value: _is_number(value) and value > 0),
    "shift_factor": ("a number or null", lambda value: value is None or _is_number(value)),
    "latent_channels": _WHOLE,
    "block_out_channels": ("1 to 10 whole numbers", lambda value: _is_list(value, range(1, 11), _is_whole)),
}


_OFF = ("false: other models have it, such as distilled and editing ones", lambda value: not value)
_NOISELESS = (
    "dpmsolver++ or dpmsolver, which add no noise",
    lambda value: value in (None, "dpmsolver++", "dpmsolver"),
)


def _levels(count: int, factor: int) -> tuple[str, Callable[[Any], bool]]:
    """Kind of a list with one entry per level of a VAE that has ``factor`` pixels per latent value."""
    what = f"{count} levels, for {factor} pixels per latent value"
    return what, lambda value: isinstance(value, list) and len(value) == count


def _formulation(name: str, scheduler: Config) -> str:
    """Kind of model that a scheduler samples, by its class and configuration."""
    if name.startswith("FlowMatch") and name.endswith("Scheduler"):
        return "flow matching"
    if name in ("LCMScheduler", "TCDScheduler"):
        return "consistency"
    if name in DISCRETE_SCHEDULERS:
        if scheduler.get("use_flow_sigmas") is True or scheduler.get("prediction_type") == "flow_prediction":
            return "flow matching"
        is_discrete = scheduler.get("sigma_data") is None and scheduler.get("timestep_type") != "continuous"
        return "discrete diffusion" if is_discrete else "EDM"
    return "EDM" if "EDM" in name else "unknown"


def _scheduler_faults(configs: Configs, formulations: tuple[str, ...]) -> Faults:
    if "scheduler" not in configs:
        return
    scheduler = configs["scheduler"]
    class_name = scheduler.get("_class_name")
    if not isinstance(class_name, str):
        yield f"{config_path('scheduler')}: `_class_name` must be a class of diffusers, got {shown(class_name)}"
        return
    for name in dict.fromkeys((class_name, configs[INDEX]["scheduler"][1] if INDEX in configs else class_name)):
        if (kind := _formulation(name, scheduler)) not in formulations:
            data = f" with `sigma_data` {shown(scheduler['sigma_data'])}" if "sigma_data" in scheduler else ""
            yield (
                f"{config_path('scheduler')}: {unquoted(name)}{data} samples {kind} models, but this family has"
                f" {one_of(formulations)} models"
            )
            return
    yield from _expect_kind(
        configs,
        "scheduler",
        "num_train_timesteps",
        (f"{NUM_TIMESTEPS}", lambda value: value is None or value == NUM_TIMESTEPS),
    )
    if "flow matching" in formulations:
        return
    for key, kinds in _SCHEDULER_KINDS.items():
        yield from _expect_kind(configs, "scheduler", key, kinds)
    if scheduler.get("rescale_betas_zero_snr") and formulations == ("discrete diffusion",):
        why = "a zero-terminal-SNR schedule starts from pure noise"
        yield from _expect(configs, "scheduler", "timestep_spacing", "trailing", why)
        yield from _expect(configs, "scheduler", "prediction_type", "v_prediction", why)


def _vae_faults(configs: Configs) -> Faults:
    for key in ("latents_mean", "latents_std"):
        yield from _expect(configs, "vae", key, None, "latents are scaled by `scaling_factor` only")
    for key, kind in _VAE_KINDS.items():
        yield from _expect_kind(configs, "vae", key, kind)


def _flux2_vae_faults(configs: Configs) -> Faults:
    for key in ("latent_channels", "block_out_channels"):
        yield from _expect_kind(configs, "vae", key, _VAE_KINDS[key])
    yield from _expect(configs, "vae", "patch_size", [2, 2], "latents are stored as 2x2 patches")
    yield from _expect_kind(configs, "vae", "batch_norm_eps", _VAE_KINDS["scaling_factor"])


def _tokenizer_faults(configs: Configs, parts: Mapping[str, Component]) -> Faults:
    for tokenizer, encoder in (("tokenizer", "text_encoder"), ("tokenizer_2", "text_encoder_2")):
        if encoder not in parts or parts[encoder].classes[0] not in (CLIP, CLIP_PROJECTED):
            continue  # without learned positions; the pipeline cuts prompts at its own limit
        if isinstance(limit := configs.get(encoder, {}).get("max_position_embeddings"), int):
            kind = (
                f"at most {limit}, the limit of {encoder}",
                lambda value, limit=limit: _is_whole(value) and value <= limit,
            )
            yield from _expect_kind(configs, tokenizer, "model_max_length", kind)


def _channel_faults(configs: Configs, denoiser: str, *, per_channel: int = 1) -> Faults:
    """Compare the denoiser's channels with the VAE's.

    Args:
        per_channel: number of the denoiser's channels per VAE channel.
    """
    channels = configs.get("vae", {}).get("latent_channels")
    if not isinstance(channels, int) or denoiser not in configs:
        return
    why = f"the VAE has {channels} channels"
    more = "; inpainting, editing and upscaling models have more"
    yield from _expect(configs, denoiser, "in_channels", channels * per_channel, why + more)
    if configs[denoiser].get("out_channels") is not None:
        yield from _expect(configs, denoiser, "out_channels", channels * per_channel, why)


def _width_faults(
    configs: Configs, denoiser: str, key: str, widths: Mapping[str, str], *, times: int = 1, plus: int = 0
) -> Faults:
    """Compare the width of one of the denoiser's inputs with the text encoders' widths.

    Args:
        key: key of the input's width in the denoiser's configuration.
        widths: text encoder -> key of its width.
        times: number of layers of the text encoders whose outputs are the input.
        plus: other features of the input.
    """
    found: list[Any] = [configs.get(part, {}).get(each) for part, each in widths.items()]
    if denoiser in configs and all(map(_is_whole, found)):
        width, per_block = times * sum(found) + plus, configs[denoiser].get(key)
        if not (isinstance(per_block, list) and per_block and all(each == width for each in per_block)):
            layers = f"{times} layers of " if times > 1 else ""
            yield from _expect(configs, denoiser, key, width, f"the width of {layers}{' + '.join(widths)}")


def _size_faults(configs: Configs, denoiser: str) -> Faults:
    if "sample_size" in configs.get(denoiser, {}):
        yield from _expect_kind(configs, denoiser, "sample_size", _WHOLE)


def _unet_faults(configs: Configs, widths: Mapping[str, str], *, guided: bool = False, sized: bool = False) -> Faults:
    """Compare a UNet with the other parts.

    Args:
        widths: text encoder -> key of its width.
        guided, sized: whether the model is conditioned on the guidance, on the image size.
    """
    unet = configs.get("unet", {})
    yield from _channel_faults(configs, "unet")
    yield from _size_faults(configs, "unet")
    width_key = "cross_attention_dim" if unet.get("encoder_hid_dim_type") is None else "encoder_hid_dim"
    yield from _width_faults(configs, "unet", width_key, widths)
    why = "the image size is an input" if sized else "the prompt is the only input"
    yield from _expect(configs, "unet", "addition_embed_type", "text_time" if sized else None, why)
    for key in ("num_class_embeds", "class_embed_type"):
        yield from _expect(configs, "unet", key, None, "a text-to-image model has no class input")
    if guided:
        yield from _expect_kind(configs, "unet", "time_cond_proj_dim", ("the width of a guidance embedding", _is_whole))
    else:
        why = "only latent consistency models are guidance-conditioned"
        yield from _expect(configs, "unet", "time_cond_proj_dim", None, why)


def _sd_faults(configs: Configs) -> Faults:
    return _unet_faults(configs, {"text_encoder": "hidden_size"})


def _lcm_faults(configs: Configs) -> Faults:
    return _unet_faults(configs, {"text_encoder": "hidden_size"}, guided=True)


def _sdxl_faults(configs: Configs) -> Faults:
    yield from _unet_faults(configs, {"text_encoder": "hidden_size", "text_encoder_2": "hidden_size"}, sized=True)
    size = configs.get("unet", {}).get("addition_time_embed_dim")
    if isinstance(size, int):
        key, width = "projection_class_embeddings_input_dim", {"text_encoder_2": "projection_dim"}
        yield from _width_faults(configs, "unet", key, width, plus=6 * size)


def _sd3_faults(configs: Configs) -> Faults:
    yield from _channel_faults(configs, "transformer")
    yield from _size_faults(configs, "transformer")
    yield from _width_faults(configs, "transformer", "joint_attention_dim", {"text_encoder_3": "d_model"})
    pooled = {"text_encoder": "projection_dim", "text_encoder_2": "projection_dim"}
    yield from _width_faults(configs, "transformer", "pooled_projection_dim", pooled)


def _flux_faults(configs: Configs) -> Faults:
    yield from _channel_faults(configs, "transformer", per_channel=4)
    yield from _width_faults(configs, "transformer", "joint_attention_dim", {"text_encoder_2": "d_model"})
    yield from _width_faults(configs, "transformer", "pooled_projection_dim", {"text_encoder": "hidden_size"})


def _flux2_faults(configs: Configs) -> Faults:
    yield from _flux2_vae_faults(configs)
    yield from _channel_faults(configs, "transformer", per_channel=4)
    width = {"text_encoder": "hidden_size"}
    yield from _width_faults(configs, "transformer", "joint_attention_dim", width, times=3)
    why = "FLUX.2 klein is not guidance-conditioned"
    yield from _expect(configs, "transformer", "guidance_embeds", False, why)
    kind = (
        "at least 27: the prompt's embedding is taken after layers 9, 18 and 27",
        lambda value: _is_whole(value) and value >= 27,
    )
    yield from _expect_kind(configs, "text_encoder", "num_hidden_layers", kind)


def _z_image_faults(configs: Configs) -> Faults:
    yield from _channel_faults(configs, "transformer")
    yield from _width_faults(configs, "transformer", "cap_feat_dim", {"text_encoder": "hidden_size"})
    yield from _expect(configs, "transformer", "siglip_feat_dim", None, "the prompt is the only input")


def _qwen_image_faults(configs: Configs) -> Faults:
    channels: Any = configs.get("vae", {}).get("z_dim")
    if _is_whole(channels):
        why = f"the VAE has {channels} channels"
        yield from _expect(configs, "transformer", "in_channels", 4 * channels, why)
        yield from _expect(configs, "transformer", "out_channels", channels, why)
        one_each = range(channels, channels + 1)
        numbers = (f"{channels} numbers", lambda value: _is_list(value, one_each, _is_number))
        positive = (
            f"{channels} positive numbers",
            lambda value: _is_list(value, one_each, lambda each: _is_number(each) and each > 0),
        )
        yield from _expect_kind(configs, "vae", "latents_mean", numbers)
        yield from _expect_kind(configs, "vae", "latents_std", positive)
    yield from _expect_kind(configs, "vae", "dim_mult", _levels(4, 8))
    yield from _expect_kind(configs, "vae", "temperal_downsample", _levels(3, 8))
    yield from _expect(configs, "transformer", "patch_size", 2, "latents are packed into patches of 2 x 2")
    yield from _width_faults(configs, "transformer", "joint_attention_dim", {"text_encoder": "hidden_size"})
    for key in ("guidance_embeds", "zero_cond_t", "use_additional_t_cond", "use_layer3d_rope"):
        yield from _expect_kind(configs, "transformer", key, _OFF)


def _sana_faults(configs: Configs) -> Faults:
    yield from _channel_faults(configs, "transformer")
    yield from _size_faults(configs, "transformer")
    yield from _width_faults(configs, "transformer", "caption_channels", {"text_encoder": "hidden_size"})
    yield from _expect_kind(configs, "transformer", "guidance_embeds", _OFF)
    yield from _expect_kind(configs, "vae", "scaling_factor", _VAE_KINDS["scaling_factor"])
    yield from _expect_kind(configs, "vae", "encoder_block_out_channels", _levels(6, 32))
    if configs.get("scheduler", {}).get("_class_name") == DPM_SOLVER:
        yield from _expect(configs, "scheduler", "prediction_type", "flow_prediction", "the model predicts velocities")
        yield from _expect(configs, "scheduler", "use_flow_sigmas", True, "the model is trained by flow matching")
        yield from _expect_kind(configs, "scheduler", "algorithm_type", _NOISELESS)


def _net(kind: str) -> Component:
    return Component("diffusers", (kind,), weights="diffusion_pytorch_model")


def _text_encoder(*kinds: str, optional: bool = False) -> Component:
    return Component("transformers", kinds, weights="model", optional=optional)


def _tokenizer(name: str, *vocabulary: str) -> Component:
    return Component("transformers", (name, f"{name}Fast"), vocabularies=(("tokenizer.json",), vocabulary))


_CLIP_TOKENIZER = _tokenizer("CLIPTokenizer", "vocab.json", "merges.txt")
_T5_TOKENIZER = _tokenizer("T5Tokenizer", "spiece.model")
_QWEN_TOKENIZER = _tokenizer("Qwen2Tokenizer", "vocab.json", "merges.txt")
_GEMMA_TOKENIZER = _tokenizer("GemmaTokenizer", "tokenizer.model")
_SCHEDULER = Component("diffusers")
_SD_PARTS = {
    "unet": _net(UNET),
    "vae": _net(VAE),
    "text_encoder": _text_encoder(CLIP),
    "tokenizer": _CLIP_TOKENIZER,
    "scheduler": _SCHEDULER,
}
_SD_PIPELINES = ("StableDiffusionPipeline", "StableDiffusionImg2ImgPipeline", "StableDiffusionInpaintPipeline")

LAYOUTS = {
    "stable_diffusion": Layout(_SD_PIPELINES, _SD_PARTS, ("discrete diffusion",), _sd_faults),
    "stable_diffusion_xl": Layout(
        ("StableDiffusionXLPipeline", "StableDiffusionXLImg2ImgPipeline", "StableDiffusionXLInpaintPipeline"),
        {
            **_SD_PARTS,
            "text_encoder_2": _text_encoder(CLIP_PROJECTED),
            "tokenizer_2": _CLIP_TOKENIZER,
        },
        ("discrete diffusion",),
        _sdxl_faults,
    ),
    "latent_consistency": Layout(
        ("LatentConsistencyModelPipeline", "LatentConsistencyModelImg2ImgPipeline", *_SD_PIPELINES),
        _SD_PARTS,
        ("consistency", "discrete diffusion"),
        _lcm_faults,
    ),
    "stable_diffusion_3": Layout(
        ("StableDiffusion3Pipeline", "StableDiffusion3Img2ImgPipeline", "StableDiffusion3InpaintPipeline"),
        {
            "transformer": _net("SD3Transformer2DModel"),
            "vae": _net(VAE),
            "text_encoder": _text_encoder(CLIP_PROJECTED),
            "text_encoder_2": _text_encoder(CLIP_PROJECTED),
            "text_encoder_3": _text_encoder(T5, optional=True),
            "tokenizer": _CLIP_TOKENIZER,
            "tokenizer_2": _CLIP_TOKENIZER,
            "tokenizer_3": replace(_T5_TOKENIZER, optional=True),
            "scheduler": _SCHEDULER,
        },
        ("flow matching",),
        _sd3_faults,
    ),
    "flux": Layout(
        ("FluxPipeline", "FluxImg2ImgPipeline", "FluxInpaintPipeline", "FluxKontextPipeline"),
        {
            "transformer": _net("FluxTransformer2DModel"),
            "vae": _net(VAE),
            "text_encoder": _text_encoder(CLIP),
            "text_encoder_2": _text_encoder(T5),
            "tokenizer": _CLIP_TOKENIZER,
            "tokenizer_2": _T5_TOKENIZER,
            "scheduler": _SCHEDULER,
        },
        ("flow matching",),
        _flux_faults,
    ),
    "flux2": Layout(
        ("Flux2KleinPipeline", "Flux2KleinInpaintPipeline"),
        {
            "transformer": _net("Flux2Transformer2DModel"),
            "vae": _net(FLUX2_VAE),
            "text_encoder": _text_encoder(QWEN3_LM),
            "tokenizer": _QWEN_TOKENIZER,
            "scheduler": _SCHEDULER,
        },
        ("flow matching",),
        _flux2_faults,
    ),
    "z_image": Layout(
        ("ZImagePipeline", "ZImageImg2ImgPipeline", "ZImageInpaintPipeline"),
        {
            "transformer": _net("ZImageTransformer2DModel"),
            "vae": _net(VAE),
            "text_encoder": _text_encoder(QWEN3, QWEN3_LM),
            "tokenizer": _QWEN_TOKENIZER,
            "scheduler": _SCHEDULER,
        },
        ("flow matching",),
        _z_image_faults,
    ),
    "qwen_image": Layout(
        ("QwenImagePipeline", "QwenImageImg2ImgPipeline", "QwenImageInpaintPipeline"),
        {
            "transformer": _net("QwenImageTransformer2DModel"),
            "vae": _net(QWEN_VAE),
            "text_encoder": _text_encoder(QWEN_TEXT),
            "tokenizer": _QWEN_TOKENIZER,
            "scheduler": Component("diffusers", (FLOW_EULER,)),
        },
        ("flow matching",),
        _qwen_image_faults,
    ),
    "sana": Layout(
        ("SanaPipeline", "SanaPAGPipeline"),
        {
            "transformer": _net("SanaTransformer2DModel"),
            "vae": _net(SANA_VAE),
            "text_encoder": _text_encoder(GEMMA),
            "tokenizer": _GEMMA_TOKENIZER,
            "scheduler": Component("diffusers", (DPM_SOLVER, FLOW_EULER)),
        },
        ("flow matching",),
        _sana_faults,
    ),
}
"""Family in the config -> its layout."""
