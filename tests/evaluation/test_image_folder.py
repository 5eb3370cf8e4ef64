"""Images that were made elsewhere: found by their metadata, decoded safely, of one size; every fault is named."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cdpo_ray.errors import EvaluationError
from cdpo_ray.evaluation.image_folder import find_images, rows_of_images

PROMPTS = ["a red circle", "two blue squares"]
KEY = "judge.candidates.theirs.images"


def write_images(folder: Path, prompts: list[str], *, ending: str = "png", size: tuple[int, int] = (8, 8)) -> list[str]:
    """One image per prompt, grey of its number, and the metadata; returns the names of the files."""
    folder.mkdir(exist_ok=True)
    names = [f"{number}.{ending}" for number in range(len(prompts))]
    for number, name in enumerate(names):
        Image.new("RGB", size, (10 * number + 1,) * 3).save(folder / name)
    rows = [{"file_name": name, "prompt": prompt} for name, prompt in zip(names, prompts, strict=True)]
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return names


def find(folder: Path, images_per_prompt: int = 2) -> list[list[str]]:
    found = find_images(folder, PROMPTS, images_per_prompt, key=KEY)
    return [[path.name for path in paths] for paths in found.paths]


def test_images_belong_to_the_held_out_prompts_in_the_order_of_the_metadata(tmp_path: Path) -> None:
    write_images(tmp_path, [PROMPTS[1], PROMPTS[0], "another", PROMPTS[0], f" {PROMPTS[1]} "])
    assert find(tmp_path) == [["1.png", "3.png"], ["0.png", "4.png"]]
    assert find_images(tmp_path, PROMPTS, 2, key=KEY).num_others == 1


def test_metadata_may_be_a_table(tmp_path: Path) -> None:
    write_images(tmp_path, [PROMPTS[0], PROMPTS[1]])
    (tmp_path / "metadata.jsonl").unlink()
    (tmp_path / "metadata.csv").write_text(f"file_name,prompt\n1.png,{PROMPTS[0]}\n0.png,{PROMPTS[1]}\n")
    assert find(tmp_path, 1) == [["1.png"], ["0.png"]]


@pytest.mark.parametrize("ending", ["png", "jpg", "webp"])
def test_rows_hold_the_pixels_of_the_files(ending: str, tmp_path: Path) -> None:
    write_images(tmp_path, [PROMPTS[1], PROMPTS[0], PROMPTS[0], PROMPTS[1]], ending=ending, size=(16, 8))
    rows = [*rows_of_images(find_images(tmp_path, PROMPTS, 2, key=KEY), 8, 16, key=KEY)]
    assert [row["prompt"][0].as_py() for row in rows] == PROMPTS
    pixels = np.concatenate([row["pixels"].combine_chunks().to_numpy_ndarray() for row in rows])
    assert pixels.shape == (2, 2, 3, 8, 16)
    assert np.abs(pixels[:, :, 0, 0, 0].astype(int) - [[11, 21], [1, 31]]).max() <= 2


def test_images_that_do_not_fit_are_refused_with_what_to_do(tmp_path: Path) -> None:
    folder = tmp_path / "theirs"
    with pytest.raises(EvaluationError, match=rf"^`{KEY}` .*theirs: no such folder; give a folder"):
        find(folder)
    folder.mkdir()
    with pytest.raises(EvaluationError, match=r"has none of metadata\.jsonl, .*write one with one row per image"):
        find(folder)
    write_images(folder, [PROMPTS[0]] * 3)
    message = (
        r"must have 2 images \(`evaluation\.images_per_prompt`\), but 'a red circle' has 3, 'two blue squares' has 0;"
    )
    with pytest.raises(EvaluationError, match=message):
        find(folder)
    write_images(folder, [PROMPTS[0], PROMPTS[1]])
    with pytest.raises(EvaluationError, match=r"0\.png: has 8 x 8 pixels, not 32 x 16; scale it"):
        [*rows_of_images(find_images(folder, PROMPTS, 1, key=KEY), 16, 32, key=KEY)]
    (folder / "1.png").unlink()
    with pytest.raises(EvaluationError, match=r"1 of 2 images do not exist, the first .*1\.png; copy them"):
        find(folder, 1)
    (folder / "metadata.jsonl").write_text(json.dumps({"file_name": "0.png"}))
    with pytest.raises(EvaluationError, match=r"metadata\.jsonl.*`prompt`"):
        find(folder, 1)
    for prompt in PROMPTS:
        row = json.dumps({"file_name": "0.png", "prompt": prompt})
        (folder / "metadata.jsonl").write_text(
            (folder / "metadata.jsonl").read_text() * (prompt != PROMPTS[0]) + row + "\n"
        )
    with pytest.raises(EvaluationError, match=r"metadata\.jsonl names .*0\.png more than once"):
        find(folder, 1)


@pytest.mark.parametrize("name", ["../outside.png", "/etc/hostname", "link.png"])
def test_fault_30_no_file_outside_the_folder_is_read(name: str, tmp_path: Path) -> None:
    folder = tmp_path / "theirs"
    write_images(folder, [PROMPTS[0], PROMPTS[1]])
    Image.new("RGB", (8, 8)).save(tmp_path / "outside.png")
    (folder / "link.png").symlink_to(tmp_path / "outside.png")
    rows = [{"file_name": "0.png", "prompt": PROMPTS[0]}, {"file_name": name, "prompt": PROMPTS[1]}]
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(EvaluationError, match="leads out of"):
        find(folder, 1)


def test_fault_53_a_file_that_is_not_an_image_is_named(tmp_path: Path) -> None:
    names = write_images(tmp_path, [PROMPTS[0], PROMPTS[1]])
    (tmp_path / names[1]).write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n(x) run\n")
    rows = rows_of_images(find_images(tmp_path, PROMPTS, 1, key=KEY), 8, 8, key=KEY)
    next(rows)
    with pytest.raises(EvaluationError, match=r"1\.png: must be one of PNG, JPEG"):
        next(rows)
