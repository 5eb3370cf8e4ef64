"""Human preferences on held-out prompts: selection of rows, implicit values and accuracy."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
from finished_runs import change

from cdpo_ray.dataflow.columns import list_column, tensor_column
from cdpo_ray.evaluation.labelled import ImplicitValueModel, label_accuracy, only_held_out
from cdpo_ray.models import load_model
from cdpo_ray.models.lora import LORA_DIR, attach_lora, save_lora
from cdpo_ray.policy.implicit_rewards import implicit_values
from cdpo_ray.prompts.sources import is_held_out

PROMPTS = [f"a red circle number {number}" for number in range(60)]


def test_only_rows_of_held_out_prompts_are_selected() -> None:
    kept = only_held_out(pa.table({"prompt": PROMPTS}), fraction=0.3)["prompt"].to_pylist()
    assert kept == [prompt for prompt in PROMPTS if is_held_out(prompt, 0.3)]
    assert 5 < len(kept) < 35


def test_accuracy_is_the_share_of_pairs_in_the_order_of_the_labels_without_missing_images() -> None:
    nan = np.nan
    rows = pa.table(
        {
            "prompt": PROMPTS[:4],
            "score_label": [[1.0, 0.0, nan], [0.0, 1.0, nan], [1.0, 0.0, nan], [0.0, -1.0, -2.0]],
            "implicit_value": [[0.5, 0.1, 9.0], [0.5, 0.1, -9.0], [2.0, 1.0, 0.0], [3.0, 2.0, 2.5]],
            "score_clip": [[0.2, 0.2, nan], [0.1, 0.3, nan], [nan, 0.1, nan], [0.1, 0.2, 0.3]],
        }
    )
    found = label_accuracy(rows, ("clip", "not_scored"), num_resamples=100, seed=0)
    assert list(found) == ["policy", "clip"]
    assert found["policy"]["mean"] == np.mean([1, 0, 1, 2 / 3])
    assert (found["clip"]["mean"], found["clip"]["num_prompts"]) == (np.mean([0.5, 1, 0]), 3)


def test_rows_of_one_prompt_count_as_one() -> None:
    agreeing = {PROMPTS[0]: [1, 1, 0, 1], PROMPTS[1]: [0], PROMPTS[2]: [1, 0]}
    rows = [(prompt, [float(agrees), 0.5]) for prompt, each in agreeing.items() for agrees in each]
    shuffled = [rows[index] for index in (3, 6, 0, 4, 2, 5, 1)]
    columns = {"prompt": [prompt for prompt, _ in shuffled], "implicit_value": [value for _, value in shuffled]}
    table = pa.table({**columns, "score_label": [[1.0, 0.0]] * len(rows)})
    found = label_accuracy(pa.concat_tables([table[:3], table[3:]]), (), num_resamples=100, seed=0)["policy"]
    assert found is not None
    assert (found["mean"], found["num_prompts"]) == (np.mean([0.75, 0, 0.5]), 3)


def test_values_equal_those_of_each_prompt_alone(tiny_sd15: Path, tmp_path: Path) -> None:
    model = load_model("stable_diffusion", path=str(tiny_sd15))
    attach_lora(model.denoiser, rank=2, alpha=2, targets=("to_q",), seed=0)
    change([parameter for parameter in model.denoiser.parameters() if parameter.requires_grad])
    save_lora(type(model.pipeline), model.denoiser_name, model.denoiser, tmp_path / LORA_DIR)
    latents = torch.randn(3, 2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    conditioning, _ = model.encode_prompts(PROMPTS[:3])
    rows = pa.table(
        {
            "prompt": PROMPTS[:3],
            "latents": tensor_column(latents.numpy()),
            "prompt_embedding": tensor_column(conditioning["prompt_embedding"].numpy()),
            "score_label": list_column(np.tile([1.0, 0.0], 3), 2, pa.float64()),
        }
    )
    model_of_rows = ImplicitValueModel(
        "stable_diffusion",
        {"path": str(tiny_sd15)},
        training_dir=tmp_path,
        num_margin_draws=2,
        samples_per_launch=4,
        seed=5,
    )
    found = np.array(model_of_rows(rows)["implicit_value"].to_pylist())
    for row, prompt in enumerate(PROMPTS[:3]):
        alone = implicit_values(
            model_of_rows.model,
            latents[row],
            {name: value[[row, row]] for name, value in conditioning.items()},
            [prompt] * 2,
            num_draws=2,
            samples_per_launch=2,
            seed=5,
        )
        np.testing.assert_allclose(found[row], alone, atol=1e-5)  # differences of errors near 1, in fp32
    assert np.ptp(found) > 1e-4
