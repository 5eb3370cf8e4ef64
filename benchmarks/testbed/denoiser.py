"""Latents and captions -> UNet2DConditionModel and CLIPTextModel, saved as a StableDiffusionPipeline."""

import copy
import os
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
import torch.distributed as dist
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import get_ema_multi_avg_fn
from tqdm import tqdm
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from benchmarks.testbed.figures import save_figures
from benchmarks.testbed.pool import Pool, cosine_schedule, draw_pool
from benchmarks.testbed.tokenizer import CONTEXT_LENGTH, save_tokenizer
from cdpo_ray.resources import usable_cpus
from cdpo_ray.testbed.scenes import caption

LEARNING_RATE = 1e-3
WEIGHT_DECAY = 1e-2
BATCH_SIZE_PER_WORKER = 32
EMPTY_CAPTION_SHARE = 0.1  # for classifier-free guidance
SCHEDULE_STRETCH = 1.3  # the cosine ends at an eighth of the peak rate; weight averaging replaces the rest
EMA_DECAY = 0.998
NUM_TIMESTEPS = 1000
NUM_BINS = 20
BIN_DECAY = 0.99
POOL_BATCH_SIZE = 256


class Denoiser(nn.Module):
    """Text encoder and UNet, trained together from scratch."""

    def __init__(self, tokenizer: CLIPTokenizer) -> None:
        super().__init__()
        self.text_encoder = CLIPTextModel(
            CLIPTextConfig(
                vocab_size=len(tokenizer),
                hidden_size=128,
                intermediate_size=512,
                num_hidden_layers=2,
                num_attention_heads=4,
                max_position_embeddings=CONTEXT_LENGTH,
                projection_dim=128,
                bos_token_id=tokenizer.bos_token_id,
                eos_token_id=tokenizer.eos_token_id,
                pad_token_id=tokenizer.pad_token_id,
            )
        )
        self.unet = UNet2DConditionModel(
            sample_size=8,
            block_out_channels=(64, 128),
            layers_per_block=1,
            down_block_types=("CrossAttnDownBlock2D",) * 2,
            up_block_types=("CrossAttnUpBlock2D",) * 2,
            cross_attention_dim=128,
            attention_head_dim=4,  # diffusers' name for the number of heads
            norm_num_groups=16,
        ).to(memory_format=torch.channels_last)

    def forward(self, noisy_latents: Tensor, timesteps: Tensor, token_ids: Tensor) -> Tensor:
        """Predict the noise ``[image, 4, 8, 8]`` from latents, timesteps ``[image]`` and tokens ``[image, token]``."""
        return self.unet(noisy_latents, timesteps, self.text_encoder(token_ids).last_hidden_state).sample


class BinnedError:
    """Divides each error by the running mean of its bin of timesteps.

    Plain errors of low timesteps are thirty times those of high timesteps and dominate them, but at high timesteps the
    text determines the layout.
    """

    def __init__(self) -> None:
        self.mean = torch.ones(NUM_BINS)

    def __call__(self, error: Tensor, timesteps: Tensor) -> Tensor:
        """``[image]`` errors and timesteps -> the mean of the normalised errors."""
        bins = timesteps * NUM_BINS // NUM_TIMESTEPS
        counts = torch.bincount(bins, minlength=NUM_BINS)
        sums = torch.zeros(NUM_BINS).index_add_(0, bins, error.detach())
        seen = counts > 0
        self.mean[seen] += (1 - BIN_DECAY) * (sums[seen] / counts[seen] - self.mean[seen]) * counts[seen].clamp(max=4)
        return (error / self.mean[bins]).mean()


def make_scheduler() -> DDIMScheduler:
    """Stable Diffusion's noise schedule."""
    return DDIMScheduler(
        num_train_timesteps=NUM_TIMESTEPS,
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )


@torch.no_grad()
def encode_pool(pool: Pool, vae: AutoencoderKL) -> Tensor:
    """``[scene, 4, 8, 8]`` scaled latents, sampled once from the posterior."""
    batches = torch.arange(len(pool.scenes)).split(POOL_BATCH_SIZE)
    latents = [vae.encode(pool.pixels(index)).latent_dist.sample() for index in batches]
    return torch.cat(latents) * vae.config.scaling_factor


@torch.no_grad()
def move_average(average: Iterable[Tensor], current: Iterable[Tensor], decay: float) -> None:
    """Exponential moving average of the weights, in place."""
    get_ema_multi_avg_fn(decay)(list(average), list(current), None)


def train_denoiser(
    weights_dir: Path, *, num_updates: int, num_scenes: int, seed: int, num_workers: int = 2, save_every: int = 1000
) -> None:
    """Train data-parallel in ``num_workers`` processes of one thread each and save ``pipeline``.

    Args:
        num_scenes: number of scenes of all workers; each draws its share.
        save_every: number of updates between saves of the pipeline, so that an interrupted training leaves one.
    """
    start = time.perf_counter()
    rendezvous = (weights_dir / "rendezvous").absolute()
    rendezvous.unlink(missing_ok=True)
    torch.multiprocessing.spawn(  # type: ignore[attr-defined]
        _train_worker,
        (num_workers, rendezvous, weights_dir, num_updates, num_scenes // num_workers, seed, save_every),
        nprocs=num_workers,
    )
    rendezvous.unlink(missing_ok=True)
    images_seen = num_updates * BATCH_SIZE_PER_WORKER * num_workers
    figures = {"seed": seed, "num_updates": num_updates, "images_seen": images_seen, "num_cpus": usable_cpus()}
    save_figures(weights_dir, "denoiser", {**figures, "train_seconds": time.perf_counter() - start})


def _train_worker(
    worker_rank: int,
    num_workers: int,
    rendezvous: Path,
    weights_dir: Path,
    num_updates: int,
    num_scenes: int,
    seed: int,
    save_every: int,
) -> None:
    torch.set_num_threads(1)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=worker_rank, world_size=num_workers)
    pipeline_dir = weights_dir / "pipeline"
    if worker_rank == 0:
        save_tokenizer(pipeline_dir / "tokenizer")
    dist.barrier()
    tokenizer = CLIPTokenizer.from_pretrained(pipeline_dir / "tokenizer")
    vae = AutoencoderKL.from_pretrained(pipeline_dir / "vae", torch_dtype=torch.float32, use_safetensors=True).eval()
    torch.manual_seed(seed)  # the same start for every worker
    denoiser = Denoiser(tokenizer)
    average = copy.deepcopy(denoiser).requires_grad_(False)
    torch.manual_seed(seed + 1 + worker_rank)
    batches = draw_batches(draw_pool(num_scenes, seed + 1 + worker_rank), vae, tokenizer)

    parallel = DistributedDataParallel(denoiser)
    optimizer = torch.optim.AdamW(denoiser.parameters(), LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    schedule = cosine_schedule(optimizer, round(SCHEDULE_STRETCH * num_updates), num_warmup_updates=100)
    binned = BinnedError()
    progress = tqdm(range(num_updates), desc="denoiser", mininterval=5, disable=worker_rank > 0)
    for update in progress:
        noisy_latents, timesteps, token_ids, noise = next(batches)
        prediction = parallel(noisy_latents, timesteps, token_ids)
        loss = binned((prediction - noise).square().mean((1, 2, 3)), timesteps)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(denoiser.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        decay = min(EMA_DECAY, (1 + update) / (10 + update))  # a shorter average at the start
        move_average(average.parameters(), denoiser.parameters(), decay)
        if update % 50 == 0:
            progress.set_postfix(loss=f"{loss.item():.4f}")
        if worker_rank == 0 and (update + 1) % save_every == 0:
            save_pipeline(copy.deepcopy(average), vae, tokenizer, pipeline_dir)
    if worker_rank == 0:
        save_pipeline(average, vae, tokenizer, pipeline_dir)
    dist.barrier()
    dist.destroy_process_group()


def draw_batches(
    pool: Pool, vae: AutoencoderKL, tokenizer: CLIPTokenizer
) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
    """Endless random batches.

    Yields:
        Noisy latents ``[image, 4, 8, 8]``, timesteps ``[image]``, token ids ``[image, token]`` and the noise.
    """
    latents = encode_pool(pool, vae)
    padding = {"padding": "max_length", "truncation": True, "return_tensors": "pt"}
    token_ids = tokenizer([caption(scene) for scene in pool.scenes], **padding).input_ids
    empty_ids = tokenizer([""], **padding).input_ids
    scheduler = make_scheduler()
    while True:
        index = torch.randint(len(latents), (BATCH_SIZE_PER_WORKER,))
        has_caption = torch.rand(BATCH_SIZE_PER_WORKER, 1) >= EMPTY_CAPTION_SHARE
        timesteps = torch.randint(NUM_TIMESTEPS, (BATCH_SIZE_PER_WORKER,))
        noise = torch.randn_like(latents[index])
        noisy_latents = scheduler.add_noise(latents[index], noise, timesteps)
        noisy_latents = noisy_latents.contiguous(memory_format=torch.channels_last)
        yield noisy_latents, timesteps, torch.where(has_caption, token_ids[index], empty_ids), noise


def save_pipeline(denoiser: Denoiser, vae: AutoencoderKL, tokenizer: CLIPTokenizer, pipeline_dir: Path) -> None:
    """Write a folder that ``StableDiffusionPipeline.from_pretrained`` loads; all weights in fp16."""
    vae.register_to_config(_name_or_path="")  # otherwise the folder that it was loaded from
    pipeline = StableDiffusionPipeline(
        vae=vae,
        text_encoder=denoiser.text_encoder,
        tokenizer=tokenizer,
        unet=denoiser.unet,
        scheduler=make_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.to(torch.float16).save_pretrained(pipeline_dir)
    vae.float()
    config_path = pipeline_dir / "text_encoder" / "config.json"  # transformers would load fp16, diffusers loads fp32
    config_path.write_text(config_path.read_text().replace('"dtype": "float16"', '"dtype": "float32"'))
