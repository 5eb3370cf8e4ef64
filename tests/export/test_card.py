"""Model card: metadata for the hub, metrics, settings, and code that runs."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml
from finished_runs import config_of, judged

from cdpo_ray.export.card import RunFacts, escaped, model_card
from cdpo_ray.store.manifests import flat

HUB = {"path": "somebody/some-model", "revision": "0123456789abcdef0123456789abcdef01234567"}
METRICS = {
    "judges": {"clip": judged(0.812, 0.845), "oracle": judged(0.812, 0.779)},
    "num_prompts": 4,
    "images_per_prompt": 2,
}


def card_of(
    format_name: str = "diffusers",
    *,
    metrics: dict[str, Any] | None = METRICS,
    denoiser_name: str = "unet",
    round_: int = 1,
    model: dict[str, Any] = HUB,
    examples: Sequence[str] = (),
    **sections: Any,
) -> str:
    config = config_of(Path("runs"), "embedded", model=model, **sections)
    training = {
        "versions": {"cdpo_ray": "1.2.3", "torch": "2.10"},
        "counts": {"updates": 15, "pairs": 30},
        "seed": 3,
        "created": "2026-01-01T00:00:00+00:00",
        "settings": {"training.start_from.sha256": "0123abcd"},
    }
    facts = RunFacts(
        "tuned",
        config.plain(),
        round_,
        6,
        4,
        config.rewards.ranking_sentence,
        config.curriculum.sentence,
        training,
        metrics,
        examples,
    )
    return model_card(facts, format_name, denoiser_name)


def front_matter_of(card: str) -> dict[str, Any]:
    _, text, _ = card.split("---\n", 2)
    found: dict[str, Any] = yaml.safe_load(text)
    return found


def rows_of(card: str) -> dict[str, list[str]]:
    """First cell of each table row -> the other cells, without Markdown's escapes."""
    rows = [line.strip("| \n").split(" | ") for line in card.splitlines() if line.startswith("| ")]
    return {row[0].replace("\\", ""): [cell.replace("\\", "") for cell in row[1:]] for row in rows}


@pytest.mark.parametrize(
    ("format_name", "relation"), [("diffusers", "adapter"), ("kohya", "adapter"), ("merged", "finetune")]
)
def test_front_matter_has_the_base_its_revision_and_the_relation(format_name: str, relation: str) -> None:
    card = card_of(format_name)
    assert card.startswith("---\n")
    assert front_matter_of(card) == {
        "base_model": HUB["path"],
        "base_model_revision": HUB["revision"],
        "base_model_relation": relation,
        "library_name": "diffusers",
        "pipeline_tag": "text-to-image",
        "tags": ["text-to-image", "diffusers", "lora", "dpo", "curriculum-dpo", "cdpo_ray"],
    }


def test_a_base_that_is_not_on_the_hub_is_not_in_the_front_matter(tmp_path: Path) -> None:
    for path in ("embedded", str(tmp_path)):
        assert not any(key.startswith("base_model") for key in front_matter_of(card_of(model={"path": path})))


def test_a_fully_fine_tuned_model_is_not_tagged_as_a_lora() -> None:
    card = card_of("merged", training={"method": "full"})
    assert "lora" not in front_matter_of(card)["tags"]
    assert not any("lora" in setting for setting in rows_of(card))


def test_the_figures_are_those_of_the_metrics_and_signs_of_reward_hacking_are_reported() -> None:
    card = card_of()
    rows = rows_of(card)
    assert rows["clip"] == [
        "trained on", "0.812", "0.845", "+0.033", "[+0.028, +0.038]", "71 %", "[66, 76] %", "1", "improved",
    ]  # fmt: skip
    assert rows["oracle"] == [
        "held out", "0.812", "0.779", "−0.033", "[−0.038, −0.028]", "71 %", "[66, 76] %", "1", "got worse",
    ]  # fmt: skip
    assert "On 4 prompts held out from training, 2 images each" in card
    assert (
        "**Signs of reward hacking**: the reward that was trained on rose significantly, while oracle got worse."
        in card
    )


def test_the_card_of_a_run_with_few_prompts_says_why_it_has_no_interval() -> None:
    few = {"mean": 0.5, "no_interval": "an interval needs at least 10 prompts, got 4"}
    comparison = {"base": few, "tuned": few, "difference": few, "win_rate": few, "num_missing": 0}
    card = card_of(metrics=METRICS | {"judges": {"clip": comparison}})
    assert rows_of(card)["clip"][4:] == ["[no interval]", "50 %", "[no interval]", "0", "no verdict"]
    assert "where the table says so: an interval needs at least 10 prompts, got 4.\n" in card


def test_the_card_of_a_run_without_evaluation_says_so() -> None:
    card = card_of(metrics=None)
    assert "\nNot evaluated: " in card
    assert "win rate" not in card


def test_a_ranking_by_several_rewards_is_described_with_its_weights() -> None:
    rewards = {"names": ["clip", "jpeg_size"], "rank_by": "weighted_sum", "weights": {"jpeg_size": -0.2}}
    card = card_of(rewards=rewards)
    assert "ranked by weighted\\_sum of 1 clip, -0.2 jpeg\\_size." in card
    assert rows_of(card)["rewards.weights.jpeg_size"] == ["-0.2"]
    assert "rewards.weights" not in rows_of(card_of())


def test_settings_are_resolved_and_kappa_is_half_of_beta() -> None:
    card = card_of(
        training={"beta": 500, "lora": {"rank": 16}},
        curriculum={"num_stages": 2, "min_score_gap": 0.25},
        rewards={"names": ["clip", "jpeg_size"], "rank_by": "jpeg_size", "jpeg_size": {"quality": 55}},
    )
    rows = rows_of(card)
    assert rows["training.lora.rank"] == rows["training.lora.alpha"] == ["16"]
    assert rows["curriculum.min_score_gap"] == ["0.25"]
    assert rows["curriculum.num_stages"] == ["2"]
    assert rows["curriculum.label_noise"] == ["0"], "defaults too"
    assert rows["rewards.jpeg_size.quality"] == ["55"]
    assert "beta 500, kappa = beta/2 = 250" in card
    assert "15 updates on 30 pairs" in card
    assert "\npaper: easy\\_to\\_hard, cumulative; rank\\_gap, linear boundaries; uniform draws" in card
    assert "6 prompts of scenes, 4 images per prompt generated and scored; 4 prompts of scenes were held out." in card
    assert "Scored by clip, jpeg\\_size; ranked by jpeg\\_size." in card
    assert "rewards.jpeg_size.quality" not in rows_of(card_of()), "a reward that was not used has no settings"


def test_every_setting_of_the_curriculum_and_of_training_is_listed() -> None:
    plain = config_of(Path("runs"), "embedded").plain()
    settings = flat({section: plain[section] for section in ("curriculum", "training")})
    assert set(settings) <= set(rows_of(card_of()))


def test_the_card_names_the_round() -> None:
    assert "Round 2 of 2;" in card_of(rounds=2, round_=2)
    assert "Round" not in card_of()


def test_seed_and_versions_are_listed() -> None:
    assert card_of().endswith("Seed 3, 2026-01-01T00:00:00+00:00.\ncdpo\\_ray 1.2.3, torch 2.10.\n")


@pytest.mark.parametrize(
    ("text", "safe"),
    [
        ("<script>alert(1)</script>", "&lt;script&gt;alert(1)&lt;/script&gt;"),
        ("[here](https://example.org)", "\\[here\\](https://example.org)"),
        ("a|b`c`*d*_e_~f~$g$", "a\\|b\\`c\\`\\*d\\*\\_e\\_\\~f\\~\\$g\\$"),
        ("two\n\n# lines\r\n---", "two # lines ---"),
        ("C:\\x", "C:\\\\x"),
        (None, "–"),
        (5000.0, "5000"),
        (1e-5, "1e-05"),
        (["a_b", 2], "a\\_b, 2"),
    ],
)
def test_untrusted_text_is_escaped(text: Any, safe: str) -> None:
    assert escaped(text) == safe


def test_a_prompt_file_named_like_markup_is_escaped() -> None:
    source = "x\n# owned <img src=1 onerror=alert(1)> | [a](b).txt"
    card = card_of(prompts={"train": {"source": source}})
    assert "6 prompts of x # owned &lt;img src=1 onerror=alert(1)&gt; \\| \\[a\\](b).txt, 4 images" in card
    assert "<img" not in card


def test_code_of_a_card_is_python_and_pins_the_revision() -> None:
    for format_name in ("diffusers", "kohya", "peft", "merged"):
        (code,) = re.findall(r"```python\n(.*?)```", card_of(format_name, model=HUB | {"dtype": "bfloat16"}), re.DOTALL)
        compile(code, "card", "exec")
        assert "dtype=torch.bfloat16" in code
        assert "num_inference_steps=3, guidance_scale=3.0" in code
        assert (f"from_pretrained({HUB['path']!r}, revision={HUB['revision']!r}" in code) == (format_name != "merged")


def test_code_of_a_card_has_a_placeholder_for_the_folder_of_a_local_base(tmp_path: Path) -> None:
    (tmp_path / "sd15").mkdir()
    card = card_of(model={"path": str(tmp_path / "sd15")})
    assert (
        "\n# Replace path/to by the folder on your machine that holds the model.\n"
        "pipe = DiffusionPipeline.from_pretrained('path/to/sd15', dtype=torch.float32)\n"
    ) in card
    assert "\nA LoRA for sd15, a text-to-image model," in card
    assert str(tmp_path) not in card and "path/to" not in card_of()


@pytest.mark.parametrize(("family", "is_read"), [("flux", True), ("z_image", True), ("stable_diffusion_3", False)])
def test_a_card_of_a_kohya_file_names_its_readers(family: str, is_read: bool) -> None:
    card = card_of("kohya", denoiser_name="transformer", model={"family": family})
    readers = "diffusers" if family == "z_image" else "ComfyUI, Forge, AUTOMATIC1111 (UNets), InvokeAI, sd-scripts"
    assert f"`tuned.safetensors` is read by {readers}: it goes" in card
    assert ("```python" in card) == is_read == ("Diffusers does not read these keys" not in card)


def test_the_call_in_a_card_has_the_guidance_as_the_pipeline_counts_it() -> None:
    for family, expected in (("stable_diffusion", 3.0), ("z_image", 2.0)):
        assert f"guidance_scale={expected})" in card_of(denoiser_name="transformer", model={"family": family})


def test_a_card_of_qwen_image_names_the_readers_of_its_kohya_file_and_its_own_arguments() -> None:
    card = card_of("kohya", denoiser_name="transformer", model={"family": "qwen_image"})
    assert "`tuned.safetensors` is read by ComfyUI, musubi-tuner, diffusers: it goes" in card
    assert "true_cfg_scale=3.0, negative_prompt=' '" in card and " guidance_scale" not in card
    sana = card_of(denoiser_name="transformer", model={"family": "sana"})
    assert "guidance_scale=3.0, use_resolution_binning=False" in sana


def test_examples_are_shown_before_and_after_and_in_the_widget_of_the_hub() -> None:
    card = card_of(examples=["a cat", "a | b"])
    assert front_matter_of(card)["widget"] == [
        {"text": "a cat", "output": {"url": "images/0-tuned.png"}},
        {"text": "a | b", "output": {"url": "images/1-tuned.png"}},
    ]
    assert "| a cat | ![base](images/0-base.png) | ![tuned](images/0-tuned.png) |" in card
    assert "| a \\| b | ![base](images/1-base.png) | ![tuned](images/1-tuned.png) |" in card
    assert "widget" not in card_of() and "from the same noise:" not in card_of()


def test_a_card_of_imported_preferences_names_their_source() -> None:
    card = card_of(
        prompts={"train": None, "heldout": {"fraction": 0.2}},
        preferences={"path": "data/judged.parquet", "format": "pickapic"},
        curriculum={"measure": "score_gap_quantile"},
    )
    source = "Labelled images of 6 prompts (data/judged.parquet, pickapic), none generated for training"
    assert f"{source}; 4 prompts were held out." in card


def test_a_card_has_the_names_of_local_files_without_their_folders(tmp_path: Path) -> None:
    for name in ("judged.parquet", "teacher", "clip"):
        (tmp_path / name).mkdir()
    card = card_of(
        prompts={"train": None, "heldout": {"source": str(tmp_path / "held out.txt")}},
        preferences={"path": str(tmp_path / "judged.parquet"), "format": "pairs"},
        curriculum={"measure": "score_gap_quantile"},
        model={"family": "latent_consistency", "path": "embedded", "teacher": {"path": str(tmp_path / "teacher")}},
        training={"consistency_target": "teacher"},
        rewards={
            "names": ["clip", "judges:own"],
            "rank_by": "clip",
            "clip": {"architecture": "ViT-B-32", "checkpoint": str(tmp_path / "clip")},
            "arguments": {"judges:own": {"files": [str(tmp_path / "head.pt")], "scale": 2}},
        },
    )
    assert "(judged.parquet, pairs), none generated for training; 4 prompts of held out.txt were held out." in card
    assert "Teacher model in training: teacher." in card
    rows = rows_of(card)
    assert rows["rewards.clip.checkpoint"] == ["clip"]
    assert rows["rewards.arguments.judges:own.files"] == ["head.pt"]
    assert str(tmp_path) not in card


def test_the_lora_that_training_started_from_is_named_without_its_folder(tmp_path: Path) -> None:
    (tmp_path / "style.safetensors").write_bytes(b"")
    card = card_of(training={"start_from": str(tmp_path / "style.safetensors")})
    assert "Training started from the LoRA style.safetensors, SHA-256 0123abcd." in card
    assert str(tmp_path) not in card and "started from the LoRA" not in card_of()
