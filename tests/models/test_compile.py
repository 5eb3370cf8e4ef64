"""Number of compilations while images are generated, counted with a backend that compiles nothing."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel
from finished_runs import change
from tiny_policies import TinyModels, load
from torch import nn
from torch._dynamo.utils import counters

from cdpo_ray.generation.generator import Sampling, sample_batches
from cdpo_ray.models.family import TextToImageModel, use_channels_last
from cdpo_ray.models.lora import LORA_DIR, attach_lora, save_lora

PROMPTS = ["a red circle", "a blue square", "a green cross"]
SAMPLING = {"num_denoising_steps": 2, "height": 64, "width": 64}
DENOISER_AND_DECODER = 2
UNETS = ["stable_diffusion", "stable_diffusion_xl"]


@pytest.fixture
def compiles(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], int]]:
    """Number of graphs since the last call; fails on graph breaks. Modules use the backend `eager`."""
    compile_module = nn.Module.compile
    monkeypatch.setattr(
        nn.Module, "compile", lambda self, **options: compile_module(self, **options | {"backend": "eager"})
    )
    torch._dynamo.reset()

    def graphs() -> int:
        assert not counters["graph_break"], dict(counters["graph_break"])
        made: int = counters["stats"]["unique_graphs"]
        counters.clear()
        return made

    counters.clear()
    yield graphs
    torch._dynamo.reset()
    counters.clear()


def make(model: TextToImageModel, guidance_scale: float = 1.0, *, images_per_batch: int = 4) -> torch.Tensor:
    """Images of a call in batches of 4 whose last batch has 3, then of a smaller call."""
    sampling = Sampling(
        seed=3, images_per_prompt=2, guidance_scale=guidance_scale, images_per_batch=images_per_batch, **SAMPLING
    )
    conditioning, _ = model.encode_prompts(PROMPTS)
    whole = sample_batches(model, PROMPTS, conditioning, sampling)
    last = sample_batches(model, PROMPTS[:1], {name: value[:1] for name, value in conditioning.items()}, sampling)
    images = torch.cat([batch.images for batch in (*whole, *last)])
    assert len(images) == 2 * len(PROMPTS) + 2
    return images


def write_tuned(model: TextToImageModel, folder: Path, *, lora: bool) -> None:
    if lora:
        change(attach_lora(model.denoiser, rank=2, alpha=2, targets=["to_q"], seed=0))
        save_lora(model.pipeline_class, model.denoiser_name, model.denoiser, folder / LORA_DIR)
    else:
        change(list(model.denoiser.parameters()), size=0.01)
        model.denoiser.save_pretrained(folder / model.denoiser_name)


@pytest.mark.nightly  # Dynamo takes a minute per UNet
@pytest.mark.parametrize("lora", [True, False])
@pytest.mark.parametrize("family", [*UNETS, "stable_diffusion_3", "flux", "flux2"])
def test_base_and_tuned_model_are_compiled_once_each_whatever_the_last_batch(
    family: str, lora: bool, tiny_models: TinyModels, compiles: Callable[[], int], tmp_path: Path
) -> None:
    write_tuned(load(tiny_models(family), family), tmp_path, lora=lora)
    model = load(tiny_models(family), family, compile=True)
    model.load_tuned(tmp_path)
    made = {}
    for on in (False, True):
        model.use_tuned(on)
        made[on] = make(model)
        assert compiles() == (DENOISER_AND_DECODER if not on else 1)
    assert not torch.equal(made[False], made[True])
    for on in (False, True):
        model.use_tuned(on)
        assert (make(model).int() - made[on].int()).abs().max() <= 1
        assert compiles() == 0


@pytest.mark.nightly
@pytest.mark.parametrize("family", [*UNETS, "stable_diffusion_3"])
def test_guidance_needs_one_graph_and_a_compiled_model_makes_the_same_images(
    family: str, tiny_models: TinyModels, compiles: Callable[[], int]
) -> None:
    compiled = make(load(tiny_models(family), family, compile=True), 4.0)
    assert compiles() == DENOISER_AND_DECODER
    eager = make(load(tiny_models(family), family), 4.0)
    assert compiles() == 0
    assert (compiled.int() - eager.int()).abs().max() <= 1


def test_launches_of_a_compiled_model_have_one_size_with_the_least_padding() -> None:
    sampling = Sampling(3, 500, 2, 1.0, None, None, images_per_batch=32)
    assert [sampling.images_per_launch(limit) for limit in (32, 16, 1)] == [32, 16, 1]
    forty = Sampling(3, 40, 2, 1.0, None, None, images_per_batch=32)
    assert forty.images_per_launch(32) == 20, "two launches of 20, not two of 32"
    several = Sampling(3, 6, 2, 1.0, None, None, images_per_batch=32)
    assert (several.rows_per_call, several.images_per_launch(32)) == (5, 30)


def test_convolutions_are_channels_last_on_cuda_only(tiny_sd15: Path) -> None:
    for device, expected in (("cpu", False), ("cuda", True), ("cuda:1", True)):
        net = UNet2DConditionModel.from_pretrained(tiny_sd15, subfolder="unet")
        use_channels_last(net, device)
        assert net.conv_in.weight.is_contiguous(memory_format=torch.channels_last) is expected
        assert net.conv_in.weight.device.type == "cpu", "the device does not change"


@pytest.mark.usefixtures("compiles")
@pytest.mark.parametrize("compiled", [False, True])
def test_only_a_compiled_denoiser_is_channels_last(compiled: bool, tiny_sd15: Path) -> None:
    model = load(tiny_sd15, "stable_diffusion")
    model.device, model.compiled = "cuda", compiled
    model.prepare(model.denoiser)
    assert model.denoiser.conv_in.weight.is_contiguous(memory_format=torch.channels_last) is compiled
