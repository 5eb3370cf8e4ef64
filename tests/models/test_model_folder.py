"""A model folder that does not match the config is refused before loading, with the differences."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import pytest
from hollow_models import MODELS, build_hollow, change, config_path
from huggingface_hub import constants

from cdpo_ray.config import Family
from cdpo_ray.errors import ModelError
from cdpo_ray.models.folder import check_folder, check_model, weights_variant
from cdpo_ray.models.layouts import LAYOUTS
from cdpo_ray.testbed import PIPELINE_DIR

COMMIT = "0" * 40
SD, SDXL, SD3 = "stable_diffusion", "stable_diffusion_xl", "stable_diffusion_3"
EDM = {"_class_name": "EDMDPMSolverMultistepScheduler", "sigma_data": 0.5, "prediction_type": "epsilon"}
FLOW = {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0}
JSON_OF_OTHER_TYPES = ("[]", '"text"', "3", "null", "true", "{}", "[{}]", "{", "[" * 100_000, "9" * 5_000, "")

Change = Callable[[Path], Any]


def changed(part: str, **values: Any) -> Change:
    return lambda folder: change(folder, part, **values)


def replaced(part: str, kind: str, config: dict[str, Any]) -> Change:
    def replace(folder: Path) -> None:
        change(folder, "model_index", **{part: ["diffusers", kind]})
        config_path(folder, part).write_text(json.dumps(config))

    return replace


@pytest.mark.parametrize("family", get_args(Family))
def test_the_folder_of_a_published_model_fits_its_family_and_no_other(family: str, tmp_path: Path) -> None:
    folder = build_hollow(tmp_path / "model", family)
    check_folder(family, folder)
    for other in LAYOUTS:
        if other != family:
            with pytest.raises(
                ModelError, match=rf"fit `model\.family` {other}.*(?s:.*)it fits `model\.family` {family}$"
            ):
                check_folder(other, folder)


def test_each_family_has_a_layout_and_the_embedded_pipeline_fits_its_own() -> None:
    assert set(LAYOUTS) == set(get_args(Family))
    check_folder("stable_diffusion", PIPELINE_DIR)


@pytest.mark.parametrize(
    ("family", "corrupt", "message"),
    [
        (SD, changed("unet", in_channels=9), r"`in_channels` must be 4 .*inpaint.*got 9"),
        (SD, changed("unet", in_channels="4"), r'`in_channels` must be 4 .*got "4"'),
        (SD, changed("unet", out_channels=8), r"`out_channels` must be 4 .*got 8"),
        (SD, changed("vae", latent_channels=16), r"(?s)`in_channels` must be 16.*`out_channels` must be 16"),
        (SD, changed("unet", cross_attention_dim=1024), r"must be 768 .*text_encoder.*got 1024"),
        (SD, changed("unet", cross_attention_dim=[768, 320]), r"must be 768 .*got \[768, 320\]"),
        (SD, changed("unet", time_cond_proj_dim=256), r"`time_cond_proj_dim` must be null .*got 256"),
        (SD, changed("unet", num_class_embeds=1000), r"`num_class_embeds` must be null"),
        (SD, changed("unet", sample_size=[64, 64]), r"`sample_size` must be a whole number"),
        (SD, changed("vae", latents_mean=[0.1] * 4), r"`latents_mean` must be null"),
        (SD, changed("vae", scaling_factor=0), r"`scaling_factor` must be a positive number, got 0"),
        (SD, changed("vae", block_out_channels=3), r"`block_out_channels` must be 1 to 10 whole numbers"),
        (SD, changed("scheduler", prediction_type="sample"), r'`prediction_type` must be .*got "sample"'),
        (SD, changed("scheduler", beta_schedule="sigmoid"), r'`beta_schedule` must be .*got "sigmoid"'),
        (SD, changed("scheduler", beta_end="high"), r'`beta_end` must be a number in \(0, 1\), got "high"'),
        (SD, changed("scheduler", trained_betas=[0.1]), r"`trained_betas` must be null or 1000 numbers"),
        (SD, changed("scheduler", num_train_timesteps=500), r"`num_train_timesteps` must be 1000, got 500"),
        (SD, changed("scheduler", sigma_data=0.5), r"`sigma_data` 0\.5 samples EDM models"),
        (SD, changed("scheduler", use_flow_sigmas=True), r"samples flow matching models"),
        (SD, changed("scheduler", _class_name=None), r"`_class_name` must be a class of diffusers"),
        (SD, replaced("scheduler", "LCMScheduler", {"_class_name": "LCMScheduler"}), r"consistency models"),
        (SDXL, replaced("scheduler", EDM["_class_name"], EDM), r"samples EDM models"),
        (SD3, replaced("scheduler", "FluxPipeline", FLOW | {"use_flow_sigmas": True}), r"FluxPipeline samples unknown"),
        (SDXL, replaced("scheduler", FLOW["_class_name"], FLOW), r"samples flow matching models"),
        (SDXL, changed("unet", addition_time_embed_dim=128), r"must be 2048 .*got 2816"),
        (SDXL, changed("text_encoder_2", hidden_size=1024), r"must be 1792 .*got 2048"),
        (SD3, replaced("scheduler", "DDIMScheduler", {"_class_name": "DDIMScheduler"}), r"discrete diff"),
        (SD3, changed("text_encoder_3", d_model=1024), r"`joint_attention_dim` must be 1024"),
        ("flux", changed("transformer", in_channels=384), r"`in_channels` must be 64 .*got 384"),
        ("flux", changed("text_encoder", hidden_size=512), r"`pooled_projection_dim` must be 512"),
        ("flux2", changed("transformer", in_channels=256), r"`in_channels` must be 128 .*got 256"),
        ("flux2", changed("transformer", guidance_embeds=True), r"`guidance_embeds` must be false"),
        ("flux2", changed("text_encoder", hidden_size=4096), r"must be 12288 .*3 layers of text_encoder.*got 7680"),
        ("flux2", changed("text_encoder", num_hidden_layers=24), r"`num_hidden_layers` must be at least 27.*got 24"),
        ("flux2", changed("vae", patch_size=[1, 1]), r"`patch_size` must be \[2, 2\]"),
        ("flux2", changed("vae", batch_norm_eps="x"), r"`batch_norm_eps` must be a positive number"),
        ("flux2", changed("model_index", _class_name="Flux2Pipeline"), r'got "Flux2Pipeline"'),
        ("flux2", changed("model_index", text_encoder=["transformers", "MistralModel"]), r"got transformers\.Mistral"),
        ("z_image", changed("transformer", siglip_feat_dim=1152), r"`siglip_feat_dim` must be null"),
        ("z_image", changed("text_encoder", hidden_size=4096), r"`cap_feat_dim` must be 4096 .*got 2560"),
        ("qwen_image", changed("transformer", in_channels=128), r"`in_channels` must be 64 .*got 128"),
        ("qwen_image", changed("transformer", zero_cond_t=True), r"`zero_cond_t` must be false.*editing.*got true"),
        ("qwen_image", changed("text_encoder", hidden_size=2048), r"`joint_attention_dim` must be 2048"),
        ("qwen_image", changed("vae", latents_std=[1.0] * 4), r"`latents_std` must be 16 positive numbers"),
        ("qwen_image", changed("vae", dim_mult=[1, 2]), r"`dim_mult` must be 4 levels"),
        ("sana", changed("transformer", guidance_embeds=True), r"`guidance_embeds` must be false.*distilled.*got true"),
        ("sana", changed("text_encoder", hidden_size=2048), r"`caption_channels` must be 2048"),
        ("sana", changed("vae", encoder_block_out_channels=[64, 64]), r"must be 6 levels"),
        ("sana", changed("scheduler", algorithm_type="sde-dpmsolver++"), r"`algorithm_type` must be dpmsolver\+\+ or"),
        ("sana", changed("scheduler", prediction_type="epsilon"), r'`prediction_type` must be "flow_prediction"'),
        ("latent_consistency", changed("unet", time_cond_proj_dim=None), r"`time_cond_proj_dim` must be the width"),
        (SD, changed("tokenizer", model_max_length=512), r"`model_max_length` must be at most 77"),
        (SD, changed("model_index", _class_name="WanPipeline"), r'_class_name` .*got "WanPipeline"'),
        (SD, changed("model_index", scheduler=[None, None]), r"`scheduler` must be a library and a class"),
        (SD, changed("model_index", vae=["diffusers", "AutoencoderDC"]), r"got diffusers\.AutoencoderDC"),
        (SD, changed("text_encoder", transformers_weights="../../x"), r"must not have `transformers_w"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)  # fmt: skip
def test_fault_37_values_that_do_not_fit_the_family_are_named(
    family: str, corrupt: Change, message: str, tmp_path: Path
) -> None:
    folder = build_hollow(tmp_path / "model", family)
    corrupt(folder)
    with pytest.raises(ModelError, match=message) as caught:
        check_folder(family, folder)
    assert str(caught.value).startswith(f"`model.path` {folder}: does not fit `model.family` {family}: ")


@pytest.mark.parametrize("spacing", ["leading", "linspace", None])
def test_fault_37_a_zero_terminal_snr_schedule_needs_trailing_timesteps(spacing: str | None, tmp_path: Path) -> None:
    folder = build_hollow(tmp_path / "model", "stable_diffusion")
    zero_snr = {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction"}
    change(folder, "scheduler", **zero_snr, timestep_spacing="trailing")
    check_folder("stable_diffusion", folder)
    change(folder, "scheduler", **zero_snr, timestep_spacing=spacing)
    with pytest.raises(ModelError, match=r'`timestep_spacing` must be "trailing" .*zero-terminal-SNR'):
        check_folder("stable_diffusion", folder)


def test_fault_37_all_faults_are_named_at_once(tmp_path: Path) -> None:
    folder = build_hollow(tmp_path / "model", "stable_diffusion")
    change(folder, "unet", in_channels=9)
    change(folder, "scheduler", prediction_type="sample")
    with pytest.raises(ModelError, match=r": 2 faults\n  scheduler/.*\n  unet/.*\n  give another model"):
        check_folder("stable_diffusion", folder)


@pytest.mark.parametrize("content", JSON_OF_OTHER_TYPES, ids=lambda content: content[:8])
@pytest.mark.parametrize("part", ["model_index", "unet", "vae", "text_encoder", "tokenizer", "scheduler"])
def test_fault_37_json_of_any_type_is_reported_and_no_other_error_is_raised(
    part: str, content: str, tmp_path: Path
) -> None:
    folder = build_hollow(tmp_path / "model", "stable_diffusion")
    path = folder / "model_index.json" if part == "model_index" else config_path(folder, part)
    path.write_text(content)
    with pytest.raises(ModelError, match=r"model_index\.json|config\.json"):
        check_folder("stable_diffusion", folder)


def test_fault_37_any_value_of_any_key_is_accepted_or_reported() -> None:
    layout = LAYOUTS[SDXL]
    configs = {part: {**layout.parts[part].defaults, **config} for part, (_, config) in MODELS[SDXL][1].items()}
    assert not list(layout.faults(configs))
    for part, config in configs.items():
        for key in config:
            for value in ({}, [], [[]], "x", -1, 1e400, True, None, "\x1b[31m" * 500):
                for fault in layout.faults(configs | {part: {**config, key: value}}):
                    assert len(fault) < 300 and fault.isprintable()


def test_fault_37_a_missing_file_is_named(tmp_path: Path) -> None:
    for missing in (
        "unet/config.json",
        "scheduler",
        "tokenizer/tokenizer.json",
        "vae/diffusion_pytorch_model.safetensors",
    ):
        folder = build_hollow(tmp_path / missing.replace("/", "-"), "stable_diffusion")
        shutil.rmtree(folder / missing) if (folder / missing).is_dir() else (folder / missing).unlink()
        with pytest.raises(ModelError, match=missing.split("/")[0] + "/"):
            check_folder("stable_diffusion", folder)


def test_fault_37_folders_without_an_index_are_refused_and_a_single_file_in_them_is_named(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"has no model_index\.json; give a folder in diffusers layout"):
        check_folder("stable_diffusion", tmp_path)
    (tmp_path / "v1-5-pruned.safetensors").touch()
    with pytest.raises(ModelError, match=rf"give a file of it: {tmp_path}/v1-5-pruned\.safetensors$"):
        check_folder("stable_diffusion", tmp_path)


def test_fault_37_pickled_weights_are_refused(tmp_path: Path) -> None:
    folder = build_hollow(tmp_path / "model", "stable_diffusion")
    weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
    weights.rename(weights.with_suffix(".bin"))
    with pytest.raises(ModelError, match=r"unet/diffusion_pytorch_model\.safetensors is missing; pickled weights"):
        check_folder("stable_diffusion", folder)


@pytest.mark.parametrize(
    ("weight_map", "message"),
    [
        (
            {"w": "../../../secret.safetensors"},
            r'must name files in the same folder, got "\.\./\.\./\.\./secret\.safetensors"',
        ),
        ({"w": "/etc/passwd"}, r'must name files in the same folder, got "/etc/passwd"'),
        ({"w": ".."}, r"\.\. is missing|in the same folder"),
        ({"w": "gone.safetensors"}, r"unet/gone\.safetensors is missing"),
        ({"w": 3}, r"`weight_map` must be an object of file names"),
        ([], r"`weight_map` must be an object of file names"),
    ],
    ids=str,
)
def test_fault_37_shards_outside_the_folder_or_missing_are_named(weight_map: Any, message: str, tmp_path: Path) -> None:
    folder = build_hollow(tmp_path / "model", "stable_diffusion")
    weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
    weights.with_name(f"{weights.name}.index.json").write_text(json.dumps({"weight_map": weight_map}))
    weights.unlink()
    with pytest.raises(ModelError, match=message):
        check_folder("stable_diffusion", folder)


def test_fault_37_an_index_beside_unsharded_weights_must_not_lead_out_of_the_folder(tmp_path: Path) -> None:
    folder = build_hollow(tmp_path / "model", "stable_diffusion")  # diffusers prefers the index
    index = folder / "unet" / "diffusion_pytorch_model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"w": "../../secret.safetensors"}}))
    with pytest.raises(ModelError, match="must name files in the same folder"):
        check_folder("stable_diffusion", folder)


def test_fault_37_an_adapter_beside_weights_is_refused(tmp_path: Path) -> None:
    folder = build_hollow(tmp_path / "model", "stable_diffusion")
    (folder / "text_encoder" / "adapter_config.json").write_text('{"base_model_name_or_path": "someone/else"}')
    with pytest.raises(ModelError, match="text_encoder/ holds a PEFT adapter; merge it"):
        check_folder("stable_diffusion", folder)


@pytest.mark.skipif(os.name != "posix", reason="named pipes")
def test_fault_37_a_named_pipe_in_place_of_a_file_does_not_block(tmp_path: Path) -> None:
    folder = build_hollow(tmp_path / "model", "stable_diffusion")
    (folder / "unet" / "config.json").unlink()
    os.mkfifo(folder / "unet" / "config.json")
    with pytest.raises(ModelError, match=r"unet/config\.json is missing"):
        check_folder("stable_diffusion", folder)


def test_fault_37_a_teacher_of_another_width_or_kind_is_refused(tmp_path: Path) -> None:
    student = build_hollow(tmp_path / "student", "latent_consistency")
    teacher = build_hollow(tmp_path / "teacher", "stable_diffusion")
    models = {"path": str(student), "teacher": {"path": str(teacher)}}
    check_model("latent_consistency", **models)
    change(teacher, "unet", cross_attention_dim=1024)
    with pytest.raises(ModelError, match=r"`model\.teacher\.path` .*`cross_attention_dim` must be 768"):
        check_model("latent_consistency", **models)
    with pytest.raises(ModelError, match=r"(?s)is not the teacher: 2 faults.*samples consistency models.*time_cond"):
        check_model("latent_consistency", path=str(student), teacher={"path": str(student)})


def test_fault_37_only_the_cached_files_of_a_hub_model_are_compared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    check_model("stable_diffusion", "some/model", revision=COMMIT)
    snapshot = tmp_path / "models--some--model" / "snapshots" / COMMIT
    build_hollow(snapshot, "latent_consistency")
    for part in ("vae", "text_encoder", "tokenizer"):
        shutil.rmtree(snapshot / part)
    check_model("latent_consistency", "some/model", revision=COMMIT)
    with pytest.raises(ModelError, match=r"it fits `model\.family` latent_consistency"):
        check_model("stable_diffusion", "some/model", revision=COMMIT)


@pytest.mark.parametrize(
    ("names", "variant"),
    [
        (["model.safetensors", "model.fp16.safetensors"], None),
        (["model.safetensors.index.json", "model-00001-of-00002.safetensors", "model.fp16.safetensors"], None),
        (["model.fp16.safetensors"], "fp16"),
        (["model.bf16.safetensors", "model.fp16.safetensors"], "fp16"),
        (["model.fp16-00001-of-00002.safetensors", "model.safetensors.index.fp16.json"], "fp16"),
        (["model.fp16.bin", "pytorch_model.bin"], None),
        ([], None),
    ],
)
def test_a_variant_is_found_if_there_are_no_other_weights(
    names: list[str], variant: str | None, tmp_path: Path
) -> None:
    for name in names:
        (tmp_path / name).touch()
    assert weights_variant(tmp_path, "model") == variant
