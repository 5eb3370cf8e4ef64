"""One LoRA DPO update: ours against a loop written after diffusers' documentation.

Both start from the same weights and use the same pairs, timesteps and noise. Ours uses cached latents and prompt
embeddings and disables the adapters for the reference; the stock loop encodes images and prompts in each update and
keeps a frozen copy of the model. Drawing timesteps and noise and reading images are excluded from both timings.
"""

import argparse
import functools
import math
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from alone import form_group_alone
from architectures import MODELS, model_dir
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from peft import LoraConfig
from rates import CLOCKS, machine, print_rates, rates_in_turns
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTokenizer

from cdpo_ray.config.training import LoraSection, TrainingSection
from cdpo_ray.models import load_model
from cdpo_ray.policy.policy import make_policy
from cdpo_ray.testbed.scenes import scene_prompts
from cdpo_ray.training.batches import PairBatch
from cdpo_ray.training.losses import preference_loss
from cdpo_ray.training.update import loss_of_pairs

TARGETS = ("to_q", "to_k", "to_v", "to_out.0")
LORA_RANK, LEARNING_RATE, WEIGHT_DECAY, MAX_GRAD_NORM, BETA = 8, 5e-4, 1e-4, 1.0, 200.0


@dataclass(frozen=True)
class ImagePairs:
    """Images ``[pair, 3, height, width]`` in [-1, 1], one prompt per pair, and drawn timesteps and noise."""

    images_w: Tensor
    images_l: Tensor
    prompts: list[str]
    timesteps: Tensor
    noise: Tensor

    @classmethod
    def draw(cls, num_pairs: int, pixels: int, latent_shape: Sequence[int]) -> "ImagePairs":
        random = torch.Generator().manual_seed(0)
        shape = (num_pairs, 3, pixels, pixels)
        images_w, images_l = (torch.rand(shape, generator=random) * 2 - 1 for _ in range(2))
        timesteps = torch.randint(1000, (num_pairs,), generator=random)
        noise = torch.randn((num_pairs, *latent_shape), generator=random)
        return cls(images_w, images_l, scene_prompts("train", num_pairs, seed=0), timesteps, noise)


class Stock:
    """The loop of the documentation: four networks, nothing is cached."""

    def __init__(self, folder: Path, pairs: ImagePairs, device: str, dtype: torch.dtype) -> None:
        self.device, self.dtype = device, dtype
        self.scheduler = DDPMScheduler.from_pretrained(folder, subfolder="scheduler")
        tokenizer = CLIPTokenizer.from_pretrained(folder, subfolder="tokenizer")
        self.vae = AutoencoderKL.from_pretrained(folder, subfolder="vae", torch_dtype=dtype).to(device)
        self.text_encoder = CLIPTextModel.from_pretrained(folder, subfolder="text_encoder", dtype=dtype).to(device)
        self.unet, self.reference = (
            UNet2DConditionModel.from_pretrained(folder, subfolder="unet", torch_dtype=dtype).to(device)
            for _ in range(2)
        )
        for part in (self.vae, self.text_encoder, self.unet, self.reference):
            part.requires_grad_(False)
        self.unet.add_adapter(LoraConfig(r=LORA_RANK, lora_alpha=LORA_RANK, target_modules=list(TARGETS)))
        self.trainable = [parameter for parameter in self.unet.parameters() if parameter.requires_grad]
        for parameter in self.trainable:
            parameter.data = parameter.data.float()
        self.optimizer = torch.optim.AdamW(self.trainable, lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY)
        words = tokenizer(pairs.prompts, padding="max_length", truncation=True, return_tensors="pt")
        self.token_ids = words.input_ids.to(device)
        self.images = torch.cat([pairs.images_w, pairs.images_l]).to(device, dtype)
        self.timesteps, self.noise = pairs.timesteps.repeat(2).to(device), pairs.noise.repeat(2, 1, 1, 1).to(device)

    @torch.no_grad()
    def encode_images(self) -> Tensor:
        """Mode of the posterior instead of a draw: both routes must use the same latents."""
        return self.vae.encode(self.images).latent_dist.mode() * self.vae.config.scaling_factor

    @torch.no_grad()
    def encode_prompts(self) -> Tensor:
        return self.text_encoder(self.token_ids)[0]

    def update(self) -> Tensor:
        latents, embeddings = self.encode_images(), self.encode_prompts().repeat(2, 1, 1)
        noisy_latents = self.scheduler.add_noise(latents, self.noise.to(latents.dtype), self.timesteps)
        with torch.autocast(self.device, dtype=self.dtype, enabled=self.dtype != torch.float32):
            prediction = self.unet(noisy_latents, self.timesteps, embeddings).sample
            with torch.no_grad():
                reference = self.reference(noisy_latents, self.timesteps, embeddings).sample
        errors_w, errors_l = self.errors(prediction).chunk(2)
        reference_w, reference_l = self.errors(reference).chunk(2)
        difference = (errors_w - errors_l) - (reference_w - reference_l)
        loss = -F.logsigmoid(-BETA / 2 * difference).mean()
        loss.backward()
        nn.utils.clip_grad_norm_(self.trainable, MAX_GRAD_NORM)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.detach()

    def errors(self, prediction: Tensor) -> Tensor:
        return F.mse_loss(prediction.float(), self.noise.float(), reduction="none").mean(dim=(1, 2, 3))


class Ours:
    """The package's update on cached latents and prompt embeddings; the optimizer is torch's, or DeepSpeed's."""

    def __init__(self, folder: Path, pairs: ImagePairs, latents: Tensor, options: argparse.Namespace) -> None:
        self.model = load_model(
            "stable_diffusion",
            path=str(folder),
            dtype=options.dtype,
            device=options.device,
            compile=options.compile,
            for_training=True,
        )
        self.denoiser = self.model.denoiser
        policy = make_policy(self.model, LoraSection(rank=LORA_RANK))
        self.trainable = policy.trainable
        self.engine = _start_engine(self.denoiser, self.trainable, options) if options.deepspeed else None
        self.policy = replace(policy, net=self.engine or self.denoiser)
        self.optimizer = torch.optim.AdamW(self.trainable, lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY)
        conditioning, _ = self.model.encode_prompts(pairs.prompts)
        latents_w, latents_l = latents.chunk(2)
        # On the host, as in the bank: moving it to the device is part of the update.
        self.batch = PairBatch(
            latents_w.cpu(),
            latents_l.cpu(),
            {name: value.cpu() for name, value in conditioning.items()},
            {"timestep": pairs.timesteps},
            pairs.noise,
        )

    def update(self) -> Tensor:
        batch = self.batch.to(self.model.device, self.model.dtype)
        loss, _ = loss_of_pairs(self.policy, batch, preference_loss=functools.partial(preference_loss, beta=BETA))
        if self.engine:
            self.engine.backward(loss)
            self.engine.step()
            return loss.detach()
        loss.backward()
        nn.utils.clip_grad_norm_(self.trainable, MAX_GRAD_NORM)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.detach()


def _start_engine(denoiser: nn.Module, trainable: Sequence[nn.Parameter], options: argparse.Namespace) -> nn.Module:
    from cdpo_ray.training.engine import start_engine

    form_group_alone(options.device)
    section = TrainingSection(
        beta=BETA,
        learning_rate=LEARNING_RATE,
        weight_decay=WEIGHT_DECAY,
        max_grad_norm=MAX_GRAD_NORM,
        global_batch_size=options.pairs,
    )
    return start_engine(denoiser, trainable, section, num_workers=1)


def same_adapters(ours: Ours, stock: Stock) -> None:
    """Give both the same non-zero LoRA: at zero every loss is ln 2, and agreement would prove nothing."""
    random = torch.Generator().manual_seed(1)
    for mine, theirs in zip(ours.trainable, stock.trainable, strict=True):
        values = torch.randn(mine.shape, generator=random) / math.sqrt(mine[0].numel())
        mine.data.copy_(0.3 * values)
        theirs.data.copy_(0.3 * values)


def peak_bytes(route: Ours | Stock) -> int:
    """Peak GPU memory of an update, beyond the memory that was allocated before."""
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    route.update()
    return torch.cuda.max_memory_allocated() - before


def main() -> None:
    """Build both routes, check that they agree, and time them alternately."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, default="embedded")
    parser.add_argument("--pairs", type=int, default=16, help="pairs per update")
    parser.add_argument("--pixels", type=int, default=512, help="side of an image; the embedded model's are 32")
    parser.add_argument("--updates", type=int, default=5, help="updates per repetition")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--clock", choices=CLOCKS, default="wall", help="cpu: processor time, for a busy machine")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of torch")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    parser.add_argument("--compile", action="store_true", help="compile our denoiser; the stock loop is not compiled")
    parser.add_argument("--deepspeed", action="store_true", help="our optimizer is DeepSpeed's engine, as in a run")
    parser.add_argument("--tolerance", type=float, default=1e-4, help="relative difference of the first losses")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as scratch:
        folder = model_dir(options.model, Path(scratch), pixels=options.pixels)
        compare(folder, options)


def compare(folder: Path, options: argparse.Namespace) -> None:
    """Print first losses, rates and, on a GPU, memory."""
    unet = UNet2DConditionModel.load_config(folder, subfolder="unet")
    vae = AutoencoderKL.load_config(folder, subfolder="vae")
    side = unet["sample_size"]
    pixels = side * 2 ** (len(vae["block_out_channels"]) - 1)
    pairs = ImagePairs.draw(options.pairs, pixels, (unet["in_channels"], side, side))
    stock = Stock(folder, pairs, options.device, getattr(torch, options.dtype))
    stock_bytes = torch.cuda.memory_allocated()  # 0 without a GPU
    ours = Ours(folder, pairs, stock.encode_images(), options)
    resident = {"ours": torch.cuda.memory_allocated() - stock_bytes, "stock": stock_bytes}
    same_adapters(ours, stock)
    print(f"{options.model}, {options.pairs} pairs per update, {pixels} px, {options.dtype}", end=", ")
    print(f"{machine(options.device)}, {options.clock} time")
    first, first_stock = float(ours.update()), float(stock.update())
    print(f"first loss: ours {first:.6f}, stock {first_stock:.6f} (ln 2 = {math.log(2):.6f})")
    assert math.isclose(first, first_stock, rel_tol=options.tolerance), "the routes disagree"

    def updates(route: Ours | Stock) -> None:
        for _ in range(options.updates):
            route.update()

    routes = {"ours": lambda: updates(ours), "stock": lambda: updates(stock)}
    rates = rates_in_turns(
        routes, num_items=options.updates, repeats=options.repeats, device=options.device, clock=options.clock
    )
    print_rates(rates, "updates")
    if options.device == "cuda":
        for name, route in (("ours", ours), ("stock", stock)):
            print(f"{name}: {resident[name] / 2**30:.2f} GiB resident, {peak_bytes(route) / 2**30:.2f} GiB an update")


if __name__ == "__main__":
    main()
