"""The notebooks in `examples/` run from top to bottom, on one run that they share."""

import json
import os
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient

from cdpo_ray import open_run

EXAMPLES = Path(__file__).parents[1] / "examples"
LOOK, ALIGN = "look_into_a_run.ipynb", "align_with_your_own_reward.ipynb"


@pytest.fixture(scope="module")
def executed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """Working folder of the notebooks, and each notebook with its outputs."""
    temporary = tmp_path_factory.mktemp("notebooks")
    found = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TMPDIR", str(temporary))
        patch.setenv("PYTHONPATH", str(EXAMPLES.parent), prepend=os.pathsep)
        for name in (LOOK, ALIGN):
            notebook = nbformat.read(EXAMPLES / name, as_version=4)
            NotebookClient(
                notebook, timeout=1200, startup_timeout=600, resources={"metadata": {"path": str(temporary)}}
            ).execute()
            found[name] = notebook
    return temporary / "cdpo_ray_examples", found


def shown(notebook: Any) -> tuple[str, int]:
    """Text of all outputs, and number of images."""
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    texts = [output.get("text", "") + output.get("data", {}).get("text/plain", "") for output in outputs]
    return "\n".join(texts), sum("image/png" in output.get("data", {}) for output in outputs)


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.ipynb")), ids=lambda path: path.stem)
def test_a_notebook_is_stored_without_outputs(path: Path) -> None:
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell for cell in code if cell.outputs or cell.execution_count] == []


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(2400)
def test_every_notebook_runs_and_shows_the_run_that_it_made(executed: tuple[Path, dict[str, Any]]) -> None:
    folder, notebooks = executed
    assert {path.name for path in EXAMPLES.glob("*.ipynb")} == {*notebooks}
    run = open_run(folder / "runs" / "clip")
    text, num_images = shown(notebooks[LOOK])
    assert run.status.partition("\n")[2] in text, "the folder's name is relative in the notebook"
    assert "evaluate: 100%" in text, "progress bars are drawn"
    assert num_images == 4, "best and worst image, grid, image of the pipeline"
    assert f"{run.metrics['judges']['clip']['base']['mean']:.6f}" in text


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(2400)
def test_a_reward_of_a_notebook_ranks_the_images_of_another_run(executed: tuple[Path, dict[str, Any]]) -> None:
    folder, notebooks = executed
    by_clip, by_redness = (open_run(folder / "runs" / name) for name in ("clip", "redness"))
    assert by_redness.samples.equals(by_clip.samples)
    assert json.loads((by_redness.path / "1-samples" / "manifest.json").read_text())["details"]["taken_from"]
    for _, row in by_redness.scores.iterrows():
        red, green, blue = by_redness.images(row["prompt_index"])[row["sample_index"]].split()
        means = [sum(band.getdata()) / (band.width * band.height) for band in (red, green, blue)]
        assert row["my_reward:redness"] == pytest.approx(means[0] - (means[1] + means[2]) / 2, abs=1e-3)
    text, num_images = shown(notebooks[ALIGN])
    assert "generate: done already" in text, "the run of the other notebook is used"
    assert num_images == 3
    assert f"{by_redness.metrics['judges']['my_reward:redness']['difference']['mean']:.6f}" in text
