"""`cdpo export`: a finished run -> a folder with its card, atomically and without Ray."""

import contextlib
import io
import json
import os
import re
import signal
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from finished_runs import change, config_of, judged, policy_of, save_policy, write_run
from original_names import original_weights, write_single_file
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file

from cdpo_ray.cli import main
from cdpo_ray.config import Config
from cdpo_ray.export import FORMATS
from cdpo_ray.models import load_model
from cdpo_ray.models.family import TextToImageModel
from cdpo_ray.models.lora import LORA_WEIGHTS
from cdpo_ray.randomness.noise import noise_at
from cdpo_ray.records import ARMS

FILES = {
    "diffusers": {"README.md", "pytorch_lora_weights.safetensors"},
    "kohya": {"README.md", "tuned.safetensors"},
    "peft": {"README.md", "adapter_config.json", "adapter_model.safetensors"},
    "merged": {
        "README.md", "model_index.json", "scheduler", "text_encoder", "tokenizer", "unet", "vae",
    },
}  # fmt: skip


def finished(
    tmp_path: Path, model_dir: Path | str, *, evaluated: bool = True, rounds: int = 1, **sections: Any
) -> tuple[str, list[TextToImageModel]]:
    """A run whose rounds have different adapters and CLIP means (0.6, ...); returns the config path and policies."""
    training = {"lora": {"rank": 4, "alpha": 8}}
    config = config_of(tmp_path / "runs", model_dir, training=training, rounds=rounds, **sections)
    policies = [policy_of(config, seed=number) for number in range(1, rounds + 1)]
    write_run(
        config,
        lambda number, folder: save_policy(policies[number - 1], folder),
        (lambda number: {"judges": {"clip": judged(0.5, 0.5 + number / 10)}, "num_prompts": 4, "images_per_prompt": 2})
        if evaluated
        else None,
        write_comparison,
    )
    return written(config, tmp_path), policies


def write_comparison(step: str, folder: Path) -> None:
    """Images of two held-out prompts, in one color each; and a pair of each stage with its images."""
    if step == "1-samples":
        table = {"prompt_index": [0], "prompt": ["a fox"], "images": [[png("base", 0), png("tuned", 0)]]}
        pq.write_table(pa.table(table), folder / "samples.parquet")
    if step == "3-stages":
        for stage in (1, 2, 3):
            (folder / f"stage-{stage}").mkdir()
            pair = {"prompt_index": [0], "chosen": [1], "rejected": [0], "rank_gap": [1], "score_gap": [0.5]}
            pq.write_table(pa.table(pair), folder / f"stage-{stage}" / "pairs.parquet")
    if step != "5-evaluation":
        return
    rows = {"prompt_index": [0, 0, 1], "sample_index": [0, 1, 0], "prompt": ["a fox", "a fox", "a hen"]}
    images = {f"{arm}_image": [png(arm, row) for row in range(3)] for arm in ("base", "tuned")}
    pq.write_table(pa.table(rows | images), folder / "comparison.parquet")


def png(arm: str, row: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (4, 4), (row, len(arm), 0)).save(buffer, "PNG")
    return buffer.getvalue()


def written(config: Config, folder: Path) -> str:
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(config.model_dump(mode="json", exclude_unset=True)))
    return str(path)


@pytest.mark.parametrize("format_name", list(FILES))
def test_export_prints_its_folder_and_the_cards_code_generates_the_policys_images(
    tiny_sd15: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    format_name: str,
) -> None:
    config, (policy,) = finished(tmp_path, tiny_sd15)
    assert main(["export", config, "--format", format_name]) == 0
    folder = tmp_path / "runs" / "tuned" / "export" / format_name
    assert capsys.readouterr().out == f"{folder}\n"
    assert {path.name for path in folder.iterdir()} == FILES[format_name] | {"images"}
    pictures = {
        (number, arm): (folder / f"images/{number}-{arm}.png").read_bytes() for number in (0, 1) for arm in ARMS
    }
    assert pictures == {(number, arm): png(arm, 2 * number) for number, arm in pictures}, (
        "of the first image per prompt"
    )
    assert [path.name for path in folder.parent.iterdir()] == [format_name], "nothing is left beside"
    assert {stat.S_IMODE(path.stat().st_mode) for path in folder.rglob("*.safetensors")} == {0o644}

    card = (folder / "README.md").read_text(encoding="utf-8")
    assert "| a hen | ![base](images/1-base.png) | ![tuned](images/1-tuned.png) |" in card
    found = executed(card, folder, tiny_sd15)
    assert found["image"].size == (64, 64)
    pipeline = found["pipe"]
    pipeline.scheduler = policy.pipeline.scheduler
    noise = noise_at((1, 4, 8, 8), 0, "noise")
    sampler = {"num_inference_steps": 3, "guidance_scale": 1.0, "output_type": "latent"}
    made = pipeline("a cat", latents=noise, **sampler).images
    torch.testing.assert_close(made, sampled(policy, noise), rtol=1e-4, atol=1e-4)
    policy.denoiser.disable_adapters()
    assert (sampled(policy, noise) - made).abs().max() > 0.02, "training must have changed the model"


def executed(card: str, folder: Path, *local: Path) -> dict[str, Any]:
    """Names that the card's code defines in the folder of the export, with the paths of local models put in."""
    (code,) = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    for path in local:
        code = code.replace(f"path/to/{path.name}", str(path))
    found: dict[str, Any] = {}
    with contextlib.chdir(folder):
        exec(code, found)
    return found


def files_with(path: Path, folder: Path) -> list[str]:
    """Names of the files in a folder that hold a path of this machine."""
    return [found.name for found in folder.rglob("*") if found.is_file() and str(path).encode() in found.read_bytes()]


def sampled(policy: TextToImageModel, noise: torch.Tensor) -> torch.Tensor:
    conditioning, _ = policy.encode_prompts(["a cat"])
    return policy.sample(conditioning, noise, num_denoising_steps=3, guidance_scale=1.0)


@pytest.mark.parametrize("format_name", FORMATS)
def test_an_export_holds_no_path_of_this_machine(tiny_sd15: Path, tmp_path: Path, format_name: str) -> None:
    (tmp_path / "own prompts.txt").write_text("".join(f"{number} foxes\n" for number in range(20)))
    (tmp_path / "clip").mkdir()
    source = {"source": str(tmp_path / "own prompts.txt"), "count": None}
    clip = {"architecture": "ViT-B-32", "checkpoint": str(tmp_path / "clip")}
    config, _ = finished(
        tmp_path, tiny_sd15, prompts={"train": source, "heldout": {"fraction": 0.5}},
        rewards={"names": ["clip"], "clip": clip}, evaluation={"judges": ["clip"]},
    )  # fmt: skip
    assert main(["export", config, "--format", format_name]) == 0
    folder = tmp_path / "runs" / "tuned" / "export" / format_name
    assert not files_with(tiny_sd15.parent, folder)
    card = (folder / "README.md").read_text()
    base = tiny_sd15.name.replace("_", "\\_")
    assert f" {base}" in card and "prompts of own prompts.txt" in card
    assert "| rewards.clip.checkpoint | clip |" in card
    if format_name == "merged":
        for config in ("model_index.json", "unet/config.json", "vae/config.json"):
            assert json.loads((folder / config).read_text())["_name_or_path"] == tiny_sd15.name


def test_the_cards_code_loads_the_embedded_model(tmp_path: Path, embedded: Path) -> None:
    config, _ = finished(tmp_path, "embedded", evaluated=False)
    assert main(["export", config]) == 0
    folder = tmp_path / "runs" / "tuned" / "export" / "diffusers"
    found = executed((folder / "README.md").read_text(), folder)
    assert found["image"].size == (32, 32)
    assert found["pipe"].get_list_adapters() == {"unet": ["default_0"]}


@pytest.mark.parametrize("format_name", ["diffusers", "merged"])
def test_the_cards_code_of_a_run_on_a_single_file_samples_as_the_file_states(
    format_name: str, tiny_sd15: Path, tmp_path: Path
) -> None:
    weights = original_weights(tiny_sd15, "sd1") | {"v_pred": torch.empty(0), "ztsnr": torch.empty(0)}
    path = write_single_file(weights, tmp_path / "v-model.safetensors")
    config, (policy,) = finished(tmp_path, path, evaluated=False, model={"config": {"path": str(tiny_sd15)}})
    assert main(["export", config, "--format", format_name]) == 0
    folder = tmp_path / "runs" / "tuned" / "export" / format_name
    card = (folder / "README.md").read_text(encoding="utf-8")
    found = executed(card, folder, path, tiny_sd15)
    assert not files_with(tiny_sd15.parent, folder)
    noise = noise_at((1, 4, 8, 8), 0, "noise")
    sampler = {"num_inference_steps": 3, "guidance_scale": 1.0, "output_type": "latent"}
    made = found["pipe"]("a cat", latents=noise, **sampler).images
    torch.testing.assert_close(made, sampled(policy, noise), rtol=1e-4, atol=1e-4)
    assert "base_model:" not in card, "the hub knows no file of this machine"


def test_the_kohya_export_of_a_run_on_a_single_file_names_it_and_its_prediction(
    tiny_sd15: Path, tmp_path: Path
) -> None:
    weights = original_weights(tiny_sd15, "sd1") | {"v_pred": torch.empty(0)}
    path = write_single_file(weights, tmp_path / "v-model.safetensors")
    config, _ = finished(tmp_path, path, evaluated=False, model={"config": {"path": str(tiny_sd15)}})
    assert main(["export", config, "--format", "kohya"]) == 0
    with safe_open(tmp_path / "runs" / "tuned" / "export" / "kohya" / "tuned.safetensors", framework="pt") as file:
        metadata = file.metadata()
    assert (metadata["ss_sd_model_name"], metadata["modelspec.prediction_type"]) == ("v-model.safetensors", "v")


def test_the_last_round_is_exported_with_its_own_metrics(tiny_sd15: Path, tmp_path: Path) -> None:
    config, _ = finished(tmp_path, tiny_sd15, rounds=2)
    assert main(["export", config, "--out", str(tmp_path / "out")]) == 0
    first, second = (
        load_file(tmp_path / f"runs/tuned/round-{number}/4-training/lora" / LORA_WEIGHTS) for number in (1, 2)
    )
    found = load_file(tmp_path / "out" / LORA_WEIGHTS)
    layer = next(name for name in found if name.endswith("lora_B.weight"))
    assert torch.equal(found[layer], 8 / 4 * second[layer]) and not torch.equal(first[layer], second[layer])
    card = (tmp_path / "out" / "README.md").read_text()
    assert "Round 2 of 2;" in card
    assert "| clip | trained on | 0.50 | 0.70 | +0.20 |" in card


def test_a_fully_fine_tuned_model_is_exported_merged_and_otherwise_refused(
    tiny_sd15: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = config_of(tmp_path / "runs", tiny_sd15, training={"method": "full"})
    policy = load_model("stable_diffusion", path=str(tiny_sd15), device="cpu")
    change(list(policy.denoiser.parameters()), size=0.02)
    write_run(config, lambda number, folder: policy.denoiser.save_pretrained(folder / "unet"))
    path = written(config, tmp_path)
    assert main(["export", path, "--format", "kohya"]) == 2
    assert "ExportError: `--format` kohya: " in capsys.readouterr().err
    assert not list((tmp_path / "runs" / "tuned" / "export").iterdir()), "nothing is left of the attempt"
    assert main(["export", path, "--format", "merged"]) == 0
    folder = tmp_path / "runs" / "tuned" / "export" / "merged"
    assert "its denoiser fully fine-tuned" in (folder / "README.md").read_text()
    assert not files_with(tiny_sd15.parent, folder)


def test_overrides_after_an_option_apply_and_values_that_differ_from_the_runs_are_refused(
    tmp_path: Path, embedded: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config, _ = finished(tmp_path, "embedded")
    assert main(["export", config, "--format", "kohya", "training.beta=7"]) == 2
    assert re.search(
        r"StoreError: .*4-training was made with `training.beta` = 500.0, config says 7", capsys.readouterr().err
    )
    assert main(["export", config, "curriculum.label_noise=0.5"]) == 2
    assert re.search(r"3-stages was made with `curriculum.label_noise` = 0.0, config", capsys.readouterr().err)
    with pytest.raises(SystemExit, match=r"^2$"):
        main(["export", config, "--format", "kohya", "--fromat", "merged"])
    with pytest.raises(SystemExit, match=r"^2$"):
        main(["export", config, "--format", "onnx"])


def test_the_error_for_an_untrained_run_says_what_to_do(
    tmp_path: Path, embedded: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = written(config_of(tmp_path / "runs", "embedded"), tmp_path)
    assert main(["export", config]) == 2
    stderr = capsys.readouterr().err
    assert re.search(r"StoreError: .*: is missing or not finished; run the step that makes it first", stderr)
    assert not (tmp_path / "runs").exists()


def test_an_existing_folder_is_not_changed(tmp_path: Path, embedded: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config, _ = finished(tmp_path, "embedded")
    mine = tmp_path / "mine"
    mine.mkdir()
    assert main(["export", config, "--out", str(mine)]) == 2
    assert f"ExportError: {mine}: exists already; delete it, or choose another folder with `--out`\n" in (
        capsys.readouterr().err
    )
    assert not list(mine.iterdir())
    (tmp_path / "file").touch()
    assert main(["export", config, "--out", str(tmp_path / "file" / "out")]) == 2
    assert re.search(r"StoreError: .*/file: cannot be written: File exists; check", capsys.readouterr().err)


def test_a_name_to_push_to_that_the_hub_cannot_have_is_refused_before_anything_is_written(
    tmp_path: Path, embedded: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config, _ = finished(tmp_path, "embedded")
    assert main(["export", config, "--push", "no name\x1b"]) == 2
    assert "ExportError: `--push` no name\\x1b: must be ORG/NAME" in capsys.readouterr().err
    assert not (tmp_path / "runs" / "tuned" / "export").exists()


def test_a_lora_that_was_altered_after_training_is_not_exported(
    tmp_path: Path, embedded: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config, _ = finished(tmp_path, "embedded")
    (file,) = (tmp_path / "runs/tuned/4-training").rglob("*.safetensors")
    file.write_bytes(file.read_bytes()[:-1] + b"\x01")
    assert main(["export", config]) == 2
    assert "was altered (its SHA-256 differs)" in capsys.readouterr().err


def test_fault_02_the_next_export_deletes_the_remains_of_one_killed_at_its_final_rename(
    tmp_path: Path, embedded: Path
) -> None:
    config, _ = finished(tmp_path, "embedded", evaluated=False)
    child = os.fork()
    if child == 0:

        def die(event: str, arguments: tuple) -> None:
            if event == "os.rename" and str(arguments[0]).startswith(str(tmp_path)):
                os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(die)
        try:
            main(["export", config])
        finally:
            os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    beside = tmp_path / "runs" / "tuned" / "export"
    assert [path.name for path in beside.iterdir()] == [".diffusers.partial"]
    assert main(["export", config]) == 0
    assert [path.name for path in beside.iterdir()] == ["diffusers"]


@pytest.mark.slow
def test_ray_is_not_needed(tmp_path: Path, embedded: Path) -> None:
    config, _ = finished(tmp_path, "embedded", evaluated=False)
    code = (
        "import sys; sys.modules['ray'] = None\n"  # an import of it fails
        "from cdpo_ray.cli import main; sys.exit(main(sys.argv[1:]))"
    )
    found = subprocess.run(
        [sys.executable, "-c", code, "export", config, "--format", "kohya"], capture_output=True, text=True
    )
    assert found.returncode == 0, found.stderr
    assert "export: not evaluated; the model card will say so" in found.stderr
