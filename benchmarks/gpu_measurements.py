"""Measurements on a GPU: each function runs code of the package once and returns its results."""

import functools
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pyarrow as pa
import torch
from alone import form_group_alone
from diffusers import DiffusionPipeline
from gpu_models import Models
from PIL import Image
from rates import seconds_of
from torch._dynamo.utils import counters
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from training_step import LORA_RANK, TARGETS, ImagePairs, Stock

from cdpo_ray.config.training import LoraSection, TrainingSection
from cdpo_ray.dataflow.images import encode_png
from cdpo_ray.generation.generator import Generator, Sampling
from cdpo_ray.models.family import TextToImageModel
from cdpo_ray.models.lora import LORA_DIR, save_lora
from cdpo_ray.policy.errors import sample_errors
from cdpo_ray.policy.policy import Policy, make_policy
from cdpo_ray.randomness.noise import generator_at
from cdpo_ray.testbed.scenes import scene_prompts
from cdpo_ray.training.bank import SampleBank
from cdpo_ray.training.batches import StagePairs, make_batch
from cdpo_ray.training.engine import start_engine
from cdpo_ray.training.loop import Callbacks, Feed, TrainingState, train_stages
from cdpo_ray.training.losses import preference_loss
from cdpo_ray.training.update import loss_of_pairs

Found = dict[str, Any]
NUM_PROMPTS, IMAGES_PER_PROMPT, BETA = 4, 8, 5000.0
LOSS = functools.partial(preference_loss, beta=BETA)
TERA, GIB = 1e12, 2**30


def timed(work: Callable[[], object], models: Models, *, repeats: int, warm: int = 2) -> Found:
    """Median seconds of ``repeats`` calls after ``warm`` calls, seconds of the first call, and peak memory."""
    first = seconds_of(work, models.device, "wall")
    for _ in range(0 if models.tiny else warm - 1):
        work()
    reset_peak(models)
    seconds = [seconds_of(work, models.device, "wall") for _ in range(1 if models.tiny else repeats)]
    return {"seconds": statistics.median(seconds), "first_seconds": first, "peak_gib": peak_gib(models)}


def reset_peak(models: Models) -> None:
    if models.device == "cuda":
        torch.cuda.reset_peak_memory_stats()


def peak_gib(models: Models) -> float | None:
    """Peak memory of tensors since `reset_peak`, including weights; `None` without a GPU."""
    return torch.cuda.max_memory_allocated() / GIB if models.device == "cuda" else None


def matmul(models: Models, dtype: torch.dtype) -> Found:
    """Rate of one large matrix product in TFLOP/s, the practical limit to which other rates are compared."""
    side = 256 if models.tiny else 8192
    left, right = (torch.randn(side, side, device=models.device, dtype=dtype) for _ in range(2))
    seconds = timed(lambda: left @ right, models, repeats=20)["seconds"]
    return {"teraflops": 2 * side**3 / seconds / TERA}


# Training


def bank_of(model: TextToImageModel) -> SampleBank:
    """Random latents and as many prompt embeddings, as a run stores them."""
    conditioning, _ = model.encode_prompts(scene_prompts("train", NUM_PROMPTS, seed=0))
    latents = torch.randn(NUM_PROMPTS, IMAGES_PER_PROMPT, *model.latent_shape(None, None)).half()
    kept = {name: value.cpu().half() for name, value in conditioning.items()}
    return SampleBank(latents, kept, np.arange(NUM_PROMPTS))


def some_pairs(number: int) -> StagePairs:
    draws = np.arange(number)
    return StagePairs(1, draws % NUM_PROMPTS, draws % IMAGES_PER_PROMPT, (draws + 1) % IMAGES_PER_PROMPT)


def feed_of(model: TextToImageModel, pairs: int) -> Feed:
    """Training data of a worker; encodes prompts, so the text encoders can be deleted after it."""
    empty = {name: value.cpu() for name, value in model.empty_conditioning.items()}
    section = TrainingSection(beta=BETA, learning_rate=1e-4, global_batch_size=pairs)
    feed = Feed(bank_of(model), model.draw_times, empty, section, seed=0)
    model.drop_text_encoders()
    return feed


def lora_policy(model: TextToImageModel, targets: Sequence[str] = TARGETS) -> Policy:
    return make_policy(model, LoraSection(rank=LORA_RANK, targets=tuple(targets)))


def flops_of_pair(models: Models, family: str, *, dtype: str) -> Found:
    """FLOPs of forward, backward and reference passes of one pair, counted at run time, without recomputation."""
    model = models.load(family, dtype=dtype, training=True)
    feed = feed_of(model, 1)
    policy = lora_policy(model)
    batch = next(feed.launches(some_pairs(1))).to(model.device, model.dtype)
    with FlopCounterMode(display=False) as counter:
        loss, _ = loss_of_pairs(policy, batch, preference_loss=LOSS)
        loss.backward()
    return {"teraflops": counter.get_total_flops() / TERA}


def train(
    models: Models,
    family: str,
    pairs: int,
    *,
    dtype: str,
    compiled: bool = False,
    compiled_blocks: bool = False,
    channels_last: bool = False,
    checkpointing: bool = False,
    profiled: bool = False,
) -> Found:
    """Updates of the package's training loop, as in a worker, including the drawing of batches.

    Args:
        compiled_blocks: compile each kind of transformer block once, instead of the whole network.
        profiled: add `summary_of` a profile of two more updates.
    """
    counters.clear()
    model = models.load(family, dtype=dtype, compiled=compiled, channels_last=channels_last, training=True)
    feed = feed_of(model, pairs)
    policy = lora_policy(model, TARGETS[:1] if models.tiny else TARGETS)  # fewer layers to trace
    if checkpointing:
        model.denoiser.enable_gradient_checkpointing()
    if compiled_blocks:
        model.denoiser.compile_repeated_blocks(**({"backend": "eager"} if models.tiny else {}))
    model.denoiser.train()
    if not torch.distributed.is_initialized():
        form_group_alone(models.device)
    engine = start_engine(model.denoiser, policy.trainable, feed.training, num_workers=1)
    num_updates, num_warm = (2, 1) if models.tiny else (8, 3)
    profiler = torch.profiler.profile(activities=ACTIVITIES)
    ends, found = [time.perf_counter()], Found()

    def note(state: TrainingState) -> None:
        ends.append(time.perf_counter())  # the loop has waited for the update's backward here
        if len(ends) == num_warm + 1:
            reset_peak(models)
        if profiled and len(ends) == num_updates + 1:
            found["peak_gib"] = peak_gib(models)
            profiler.start()

    stage = some_pairs((num_updates + 2 * profiled) * pairs)
    callbacks = Callbacks(lambda state: stage, on_update=note)
    state = train_stages(engine, policy, feed, TrainingState(), callbacks, num_stages=1, preference_loss=LOSS)
    seconds = np.diff(ends)[:num_updates]
    found |= {
        "seconds": float(np.median(seconds[num_warm:])),
        "first_seconds": float(seconds[0]),
        "pairs_per_second": pairs / float(np.median(seconds[num_warm:])),
        "skipped_updates": len(state.skipped),
        "losses": [record["loss"] for record in state.records],
    }
    if profiled:
        profiler.stop()
        found["profile"] = summary_of(profiler)
    else:
        found["peak_gib"] = peak_gib(models)
    engine.destroy()
    return found | (graphs() if compiled or compiled_blocks else {})


def first_updates(models: Models, family: str, *, dtype: str) -> Found:
    """The first updates, with the memory layout of a run.

    Raises:
        ArithmeticError: an update was not finite.
    """
    found = train(models, family, 2, dtype=dtype, checkpointing=family == "stable_diffusion_xl")  # else 80 GB in fp32
    if found["skipped_updates"]:
        raise ArithmeticError(f"{family} in {dtype}: {found['skipped_updates']} updates were not finite")
    return found


def train_stock(models: Models, pairs: int, *, dtype: str) -> Found:
    """Diffusers' documented loop for Stable Diffusion: all four networks in each update, with a frozen copy."""
    pixels = models.family("stable_diffusion").pixels
    drawn = ImagePairs.draw(pairs, pixels, (4, pixels // 8, pixels // 8))
    stock = Stock(models.folder("stable_diffusion"), drawn, models.device, getattr(torch, dtype))
    found = timed(stock.update, models, repeats=5)
    return found | {"pairs_per_second": pairs / found["seconds"]}


def graphs() -> Found:
    return {
        "graphs": counters["stats"].get("unique_graphs", 0),
        "graph_breaks": sum(counters["graph_break"].values()),
    }


def toggled_reference(models: Models, *, dtype: str) -> Found:
    """Graphs and breaks of a compiled model after each switch of its adapters, in training and in evaluation.

    The count is cumulative: if it does not grow, nothing was recompiled. It is the same for every backend and size, so
    the model is shallow and no code is generated.
    """
    counters.clear()
    shallow = replace(models, scratch=models.scratch / "shallow", tiny=True)
    model = shallow.load("stable_diffusion", dtype=dtype, training=True)
    feed = feed_of(model, 4)
    small = replace(feed, training=feed.training.model_copy(update={"global_batch_size": 2}))
    policy = lora_policy(model, TARGETS[:1])
    model.denoiser.compile(backend="eager")
    found, sources = {}, {"training": feed, "again": feed, "smaller batch": small}
    for name, source in list(sources.items())[: 2 if models.tiny else None]:
        batch = next(source.launches(some_pairs(4))).to(model.device, model.dtype)
        sample_errors(policy, batch.latents_w, batch.conditioning, batch.times, batch.noise)
        found[name] = graphs()
    torch._dynamo.reset()
    counters.clear()
    untrained = shallow.load("stable_diffusion", dtype=dtype)
    evaluated = _toggled_in_evaluation(untrained, model, ((4,) if models.tiny else (4, 3)))
    return found | {f"evaluation: {name}": value for name, value in evaluated.items()}


def _toggled_in_evaluation(model: TextToImageModel, trained: TextToImageModel, batch_sizes: Sequence[int]) -> Found:
    """Like `toggled_reference`, for a LoRA that is loaded into a compiled model."""
    conditioning, _ = model.encode_prompts(["a red circle"] * 4)
    noise = torch.randn(4, *model.latent_shape(None, None))
    model.denoiser.compile(backend="eager")

    def sample(number: int) -> None:
        rows = {name: value[:number] for name, value in conditioning.items()}
        model.sample(rows, noise[:number], num_denoising_steps=2, guidance_scale=1.0)

    found = {}
    with tempfile.TemporaryDirectory() as folder:
        save_lora(model.pipeline_class, model.denoiser_name, trained.denoiser, Path(folder) / LORA_DIR)
        sample(4)
        found["base"] = graphs()
        model.load_tuned(Path(folder))
    for number in batch_sizes:
        for name, on in (("tuned", True), ("off", False), ("on again", True)):
            model.use_tuned(on)
            sample(number)
            found[f"{name}, {number} images"] = graphs()
    return found


# Generation


def generate(
    models: Models, family: str, images: int, *, dtype: str, compiled: bool = False, channels_last: bool = False
) -> Found:
    """The generator of a run's actors: one call with one prompt, until the pixels are in host memory.

    A run encodes PNGs in other tasks, see `host_png`.
    """
    counters.clear()
    usual = models.family(family)
    sampling = Sampling(0, images, usual.num_denoising_steps, usual.guidance_scale, None, None, images)
    arguments = models.arguments(family, dtype=dtype, compiled=compiled)
    generator = Generator(family, arguments, sampling)
    models.prepared(generator.model, compiled=compiled, channels_last=channels_last)
    rows = pa.table({"prompt": ["a red circle"]})
    found = timed(lambda: generator(rows), models, repeats=3, warm=1)
    found["images_per_second"] = images / found["seconds"]
    latents = torch.randn(images, *generator.model.latent_shape(None, None))
    found["decode_seconds"] = timed(lambda: generator.model.decode(latents), models, repeats=3)["seconds"]
    return found | (graphs() if compiled else {})


def generate_stock(models: Models, family: str, images: int, *, dtype: str) -> Found:
    """The stock pipeline, until the images are in host memory."""
    usual = models.family(family)
    pipeline = DiffusionPipeline.from_pretrained(models.folder(family), dtype=getattr(torch, dtype))
    pipeline.to(models.device).set_progress_bar_config(disable=True)

    work = functools.partial(
        pipeline,
        "a red circle",
        num_images_per_prompt=images,
        num_inference_steps=usual.num_denoising_steps,
        guidance_scale=usual.guidance_scale,
    )
    found = timed(work, models, repeats=3, warm=1)
    return found | {"images_per_second": images / found["seconds"]}


def flops_of_image(models: Models, family: str, *, dtype: str) -> Found:
    """FLOPs of one image of `generate`: those of a denoising step times the number of steps, and of the decoder."""
    usual = models.family(family)
    model = models.load(family, dtype=dtype)
    conditioning, _ = model.encode_prompts(["a red circle"])
    noise = torch.randn(1, *model.latent_shape(None, None))
    flops = []
    for steps in (1, 2):
        with FlopCounterMode(display=False) as counter:
            model.sample(conditioning, noise, num_denoising_steps=steps, guidance_scale=usual.guidance_scale)
        flops.append(counter.get_total_flops())
    with FlopCounterMode(display=False) as counter:
        model.decode(noise)
    first, second = flops
    whole = first + (usual.num_denoising_steps - 1) * (second - first) + counter.get_total_flops()
    return {"teraflops": whole / TERA}


# Profiles

NUM_NAMES = 20


def profile_generation(models: Models, family: str, images: int, *, dtype: str) -> Found:
    """Kernels and host operations of one call of the generator, with fewer denoising steps than a run has."""
    usual = models.family(family)
    sampling = Sampling(0, images, min(4, usual.num_denoising_steps), usual.guidance_scale, None, None, images)
    generator = Generator(family, models.arguments(family, dtype=dtype), sampling)
    rows = pa.table({"prompt": ["a red circle"]})
    generator(rows)
    with torch.profiler.profile(activities=ACTIVITIES) as profiler:
        generator(rows)
    return summary_of(profiler)


ACTIVITIES = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]


def summary_of(profiler: torch.profiler.profile) -> Found:
    """Share of the time during which the GPU executed a kernel, the longest kernels, and the longest host operations.

    Profiling slows the host down, so the share is a lower bound.
    """
    events = profiler.events()
    kernels = sorted(
        (event.time_range.start, event.time_range.end)
        for event in events
        if event.device_type == torch.autograd.DeviceType.CUDA and not event.is_user_annotation
    )
    averages = profiler.key_averages()
    found: Found = {"num_kernels": len(kernels), "kernels_ms_total": sum(end - start for start, end in kernels) / 1000}
    if kernels:
        busy, end = 0.0, kernels[0][0]
        for start, stop in kernels:
            busy, end = busy + max(0.0, stop - max(start, end)), max(end, stop)
        span = end - kernels[0][0]
        found |= {"gpu_busy": busy / span, "milliseconds": span / 1000}
    for name, key in (("kernels_ms", "self_device_time_total"), ("host_ms", "self_cpu_time_total")):
        longest = sorted(averages, key=lambda each, key=key: -getattr(each, key))[:NUM_NAMES]
        found[name] = {each.key[:90]: [getattr(each, key) / 1000, each.count] for each in longest}
    return found


# Judges and the host


def judges(models: Models) -> Found:
    """Images per second through the image tower of ViT-H/14 (random weights) in fp32, TF32 and bfloat16 autocast."""
    with torch.device(models.device):
        clip = open_clip.CLIP(**open_clip.get_model_config("ViT-S-32" if models.tiny else "ViT-H-14")).eval()
    pixels = torch.randn(1 if models.tiny else 32, 3, 224, 224, device=models.device)

    @torch.no_grad()
    def rate(precision: str, dtype: torch.dtype | None = None) -> Found:
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision(precision)
        try:
            with torch.autocast(models.device, dtype=dtype, enabled=dtype is not None):
                found = timed(lambda: clip.encode_image(pixels), models, repeats=5)
        finally:
            torch.set_float32_matmul_precision(before)
        return found | {"images_per_second": len(pixels) / found["seconds"]}

    return {"fp32": rate("highest"), "tf32": rate("high"), "bf16": rate("highest", torch.bfloat16)}


ATTENTION = {
    "self, 4096 tokens": (8, 4096, 4096, 40),
    "self, 1024 tokens": (8, 1024, 1024, 80),
    "text, 4096 tokens": (8, 4096, 77, 40),
}
"""Heads, queries, keys and channels per head of Stable Diffusion 1.5 at 512 px."""


def attention(models: Models, images: int) -> Found:
    """Milliseconds of forward and backward of the largest attentions, by PyTorch's implementation."""
    found: Found = {}
    for name, (heads, queries, keys, channels) in ATTENTION.items():
        inputs = [
            torch.randn(images, heads, tokens, channels, device=models.device, dtype=getattr(torch, models.usual_dtype))
            for tokens in (queries, keys, keys)
        ]
        for tensor in inputs:
            tensor.requires_grad_()
        for backend in (SDPBackend.MATH,) if models.tiny else FUSED:

            def work(inputs: list[torch.Tensor] = inputs, backend: SDPBackend = backend) -> None:
                with sdpa_kernel(backend):
                    torch.nn.functional.scaled_dot_product_attention(*inputs).sum().backward()

            found[f"{name}, {backend.name}"] = 1e3 * timed(work, models, repeats=5)["seconds"]
    return found


FUSED = (SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION)


def host_noise(models: Models) -> Found:
    """Milliseconds of host time for one batch: drawing its noise, building it, moving it to the device."""
    found = {}
    for name, shape, pairs in (("512 px", (4, 64, 64), 16), ("1024 px", (4, 128, 128), 8)):
        prompts = {"prompt_embedding": torch.randn(NUM_PROMPTS, 77, 768).half()}
        latents = torch.randn(NUM_PROMPTS, IMAGES_PER_PROMPT, *shape).half()
        make = functools.partial(
            make_batch,
            SampleBank(latents, prompts, np.arange(NUM_PROMPTS)),
            some_pairs(pairs),
            range(pairs),
            seed=0,
            draw_times=lambda generator: {"timestep": torch.randint(1000, (), generator=generator)},
            empty_prompt_fraction=0.25,
            empty_conditioning={"prompt_embedding": prompts["prompt_embedding"][:1]},
        )
        batch = make()

        def draw(shape: tuple[int, ...] = shape, pairs: int = pairs) -> None:
            for number in range(pairs):
                torch.randn(shape, generator=generator_at(0, number))

        work = {
            "noise": draw,
            "batch": make,
            "move": functools.partial(batch.to, models.device, torch.bfloat16),
        }
        found[name] = {"pairs": pairs} | {
            f"{what}_ms": 1e3 * timed(each, models, repeats=5)["seconds"] for what, each in work.items()
        }
    return found


def host_png(models: Models) -> Found:
    """Milliseconds and kilobytes per PNG of a smooth image with little noise, on 1, 2 and 8 threads."""
    random, found = np.random.default_rng(0), {}
    for side in (64,) if models.tiny else (512, 1024):
        coarse = Image.fromarray(random.integers(0, 255, (side // 16, side // 16, 3), dtype=np.uint8))
        smooth = np.asarray(coarse.resize((side, side), Image.Resampling.BICUBIC)).astype(float)
        noisy = (smooth + random.normal(0, 3, smooth.shape)).clip(0, 255).astype(np.uint8)
        images = [np.ascontiguousarray(noisy.transpose(2, 0, 1))] * 8
        entry: Found = {"kilobytes": len(encode_png(images[0])) / 1000}
        for threads in (1, 2, 8):
            with ThreadPoolExecutor(threads) as pool:
                seconds = timed(lambda pool=pool, images=images: list(pool.map(encode_png, images)), models, repeats=3)
            entry[f"ms_{threads}_threads"] = 1e3 * seconds["seconds"] / len(images)
        found[f"{side} px"] = entry
    return found
