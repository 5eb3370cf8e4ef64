"""DDPO, a baseline without pairs, in the embedded world; at equal cost of images and updates to the ablation's arms.

Denoising diffusion policy optimization (arXiv:2305.13301) samples images with the current policy by stochastic DDIM, so
that each denoising step is a draw from a normal distribution. It raises the probability of the steps that led to images
of high reward: REINFORCE with PPO's clipped importance weights.

Cost of training, and of an arm of `ablation.py`. Evaluations of the denoiser are counted per sample:

| | DPO | DDPO |
|---|---|---|
| images for training, 128 prompts x 8 | 1,024, of the base model | 1,024, of the policy, over all rounds |
| updates | 200 of 16 pairs | 200 of 5 or 6 images with all their denoising steps |
| sampling: 10 forwards per image | 10,240 | 10,240 |
| reference: 32 forwards per update | 6,400 | 0 |
| policy: forwards with backward | 6,400: 32 per update | 10,240: 10 per image |
| all forwards and backwards | 29,440 | 30,720 |

DDPO trains on each image once, so the number of updates does not change its cost. The default learning rate and clip
range are the released code's; `benchmarks/README.md` has those that were tried.

    python benchmarks/ddpo.py --seed 0
    python benchmarks/ddpo.py --seed 0 --longer 4   # four times the images, rounds and updates
"""

import argparse
import math
import os
import time
from collections import defaultdict, deque
from dataclasses import dataclass, fields, replace

os.environ["OMP_NUM_THREADS"] = "1"  # before torch

import numpy as np
import torch
from diffusers import DDIMScheduler
from numpy.typing import NDArray
from torch import Tensor, nn

from cdpo_ray.config.training import LoraSection
from cdpo_ray.evaluation.statistics import Interval, compare_scores
from cdpo_ray.generation.generator import Sampling, sample_batches
from cdpo_ray.models import load_model
from cdpo_ray.models.family import Conditioning, TextToImageModel, rows_of
from cdpo_ray.policy.policy import make_policy
from cdpo_ray.randomness.noise import noise_at
from cdpo_ray.randomness.numbers import Permutation, seed_of
from cdpo_ray.rewards.scorer import Reward, Scorer, load_reward
from cdpo_ray.testbed.scenes import scene_prompts

ETA = 1.0
MAX_ADVANTAGE, BUFFER_SIZE = 5.0, 16
"""Bound of an advantage's size, and number of a prompt's last rewards that are kept: the released code's."""
DPO_IMAGES, DPO_UPDATES, DPO_IMAGES_PER_UPDATE, NUM_DENOISING_STEPS = 1024, 200, 32, 10
NUM_TRAIN, NUM_HELDOUT, HELDOUT_IMAGES = 128, 96, 4
JUDGES = {"oracle": "attributes right", "clip": "CLIP"}


@dataclass(frozen=True)
class Setting:
    """Settings of DDPO.

    Attributes:
        num_images: number of images sampled, over all rounds.
        images_per_prompt: number of images of a prompt in a round.
        num_rounds: number of rounds: the policy samples images, then it is trained on each of them once.
        num_updates: number of optimizer updates, over all rounds.
        num_denoising_steps: number of sampler steps; all are trained.
        learning_rate: AdamW's.
        clip_range: of the importance weight of a denoising step. The released code's value, 1e-4, is for
            log-probabilities averaged over Stable Diffusion's 16,384 latent values; here there are 256.
        min_count: number of known rewards of a prompt from which on they normalise its rewards, not the round's.

    Raises:
        ValueError: a prompt's images are not divided evenly, a round has no update, or an update no image.
    """

    num_images: int = DPO_IMAGES
    images_per_prompt: int = 8
    num_rounds: int = 32
    num_updates: int = DPO_UPDATES
    num_denoising_steps: int = NUM_DENOISING_STEPS
    learning_rate: float = 3e-4
    clip_range: float = 1e-4
    min_count: int = 8

    def __post_init__(self) -> None:
        if self.num_images % self.images_per_prompt:
            raise ValueError(
                f"`num_images` must be a multiple of `images_per_prompt` = {self.images_per_prompt}, got"
                f" {self.num_images}"
            )
        fewest_images = self.num_images // self.images_per_prompt // self.num_rounds * self.images_per_prompt
        most_updates = math.ceil(self.num_updates / self.num_rounds)
        if self.num_updates < self.num_rounds or fewest_images < most_updates:
            raise ValueError(
                f"`num_updates` must be {self.num_rounds} (`num_rounds`) to {self.num_rounds * fewest_images}, so that"
                f" each round has an update and each update an image, got {self.num_updates}"
            )

    def longer(self, factor: int) -> "Setting":
        """The same setting with ``factor`` times the images, rounds and updates."""
        counts = ("num_images", "num_rounds", "num_updates")
        return replace(self, **{name: factor * getattr(self, name) for name in counts})

    @property
    def num_transitions(self) -> int:
        """Number of denoising steps of all images: forwards of sampling, and forwards with backward of training."""
        return self.num_images * self.num_denoising_steps


@dataclass(frozen=True)
class Trajectories:
    """Images of one round with all their denoising steps.

    Attributes:
        latents: ``[step + 1, image, channel, height, width]``, from pure noise to the clean latents.
        log_probs: ``[step, image]``, under the policy that sampled them.
        conditioning: one row per image.
    """

    latents: Tensor
    log_probs: Tensor
    conditioning: Conditioning


class StochasticSampler:
    """DDIM with eta = 1, without guidance. Source: arXiv:2010.02502, eq. 12 and 16."""

    def __init__(self, model: TextToImageModel, num_denoising_steps: int) -> None:
        self.model = model
        self.scheduler = DDIMScheduler.from_config(model.pipeline.scheduler.config)
        self.scheduler.set_timesteps(num_denoising_steps)
        self.timesteps: list[int] = self.scheduler.timesteps.tolist()

    @torch.no_grad()
    def sample(self, conditioning: Conditioning, *address: int | str) -> Trajectories:
        """Sample one image per row of ``conditioning``; the address of its noises is (``address``, image, step)."""
        shape, num_images = self.model.latent_shape(None, None), len(conditioning["prompt_embedding"])

        def noise(step: int) -> Tensor:
            return torch.stack([noise_at(shape, *address, image, step) for image in range(num_images)])

        latents, log_probs = [noise(0)], []
        for step, timestep in enumerate(self.timesteps, start=1):
            prediction = self._predict(latents[-1], conditioning, torch.full((num_images,), timestep))
            mean, std = self.mean(latents[-1], prediction, timestep), self.std(timestep)
            latents.append(mean + std * noise(step))
            log_probs.append(log_probability(latents[-1], mean, std))
        return Trajectories(torch.stack(latents), torch.stack(log_probs), conditioning)

    def log_probs(self, latents: Tensor, conditioning: Conditioning) -> Tensor:
        """Log-probability of each denoising step under the current policy, ``[step, image]``; carries gradients.

        Args:
            latents: ``[step + 1, image, channel, height, width]``.
            conditioning: one row per image.
        """
        num_steps, num_images = len(self.timesteps), latents.shape[1]
        timesteps = torch.tensor(self.timesteps).repeat_interleave(num_images)
        per_row = {name: value.repeat(num_steps, 1, 1) for name, value in conditioning.items()}
        predictions = self._predict(latents[:-1].flatten(0, 1), per_row, timesteps).unflatten(
            0, (num_steps, num_images)
        )
        means = map(self.mean, latents[:-1], predictions, self.timesteps)
        return torch.stack(list(map(log_probability, latents[1:], means, map(self.std, self.timesteps))))

    def mean(self, latents: Tensor, prediction: Tensor, timestep: int) -> Tensor:
        """Mean of a denoising step, ``[image, channel, height, width]``: eq. 12 without its noise."""
        no_noise = torch.zeros_like(latents)
        mean: Tensor = self.scheduler.step(prediction, timestep, latents, ETA, variance_noise=no_noise).prev_sample
        return mean

    def std(self, timestep: int) -> Tensor:
        """Standard deviation of a denoising step, scalar: eq. 16."""
        following = timestep - self.scheduler.config.num_train_timesteps // len(self.timesteps)
        alphas, last = self.scheduler.alphas_cumprod, self.scheduler.final_alpha_cumprod
        alpha, alpha_following = alphas[timestep], alphas[following] if following >= 0 else last
        std: Tensor = ETA * ((1 - alpha_following) / (1 - alpha) * (1 - alpha / alpha_following)).sqrt()
        return std

    def _predict(self, latents: Tensor, conditioning: Conditioning, timesteps: Tensor) -> Tensor:
        prediction: Tensor = self.model.denoiser(
            latents, timesteps, encoder_hidden_states=conditioning["prompt_embedding"], return_dict=False
        )[0]
        return prediction


def log_probability(latents: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """Logarithm of the normal density of each image's latents, averaged over their values: ``[image]``.

    The released code averages, too, where the density of all values would be the sum.

    Args:
        latents, mean: ``[image, channel, height, width]``.
        std: scalar.
    """
    return (-(((latents - mean) / std) ** 2) / 2 - std.log() - math.log(2 * math.pi) / 2).flatten(1).mean(dim=1)


def clipped_loss(log_probs: Tensor, old_log_probs: Tensor, advantages: Tensor, *, clip_range: float) -> Tensor:
    """PPO's loss of each denoising step, ``[step, image]``: minus the advantage times the clipped importance weight.

    Args:
        log_probs: ``[step, image]``, under the policy; carry gradients.
        old_log_probs: ``[step, image]``, under the policy that sampled the images.
        advantages: ``[image]``.
        clip_range: a weight that leaves 1 by more has no gradient, unless the change made the loss worse.

    Source: arXiv:1707.06347, eq. 7.
    """
    weights = (log_probs - old_log_probs).exp()
    return torch.maximum(-advantages * weights, -advantages * weights.clamp(1 - clip_range, 1 + clip_range))


class PromptStatistics:
    """Last rewards of each prompt, over all rounds: their mean and standard deviation normalise its rewards.

    Args:
        min_count: number of rewards of a prompt below which the round's mean and standard deviation are used.

    Source: arXiv:2305.13301.
    """

    def __init__(self, min_count: int) -> None:
        self.min_count = min_count
        self.rewards: dict[int, deque[float]] = defaultdict(lambda: deque(maxlen=BUFFER_SIZE))

    def advantages(self, prompts: NDArray[np.int64], rewards: NDArray[np.float64]) -> NDArray[np.float64]:
        """Add a round's rewards and normalise them.

        Args:
            prompts: ``[image]``, number of its prompt.
            rewards: ``[image]``.

        Returns:
            ``[image]``, reward minus mean, divided by the standard deviation, at most `MAX_ADVANTAGE` from 0.
        """
        for prompt, reward in zip(prompts.tolist(), rewards.tolist(), strict=True):
            self.rewards[prompt].append(reward)
        known = [self.rewards[prompt] for prompt in prompts.tolist()]
        compared = [own if len(own) >= self.min_count else rewards for own in known]
        means, stds = np.array([(np.mean(values), np.std(values)) for values in compared]).T
        return ((rewards - means) / (stds + 1e-6)).clip(-MAX_ADVANTAGE, MAX_ADVANTAGE)


def train_ddpo(
    model: TextToImageModel, reward: Reward, prompts: list[str], setting: Setting, *, seed: int
) -> dict[str, list[float]]:
    """Train a LoRA into a Stable Diffusion model on the CPU, in place.

    Args:
        reward: scores of the sampled images.
        prompts: training prompts; all are visited in random order before one is visited again.
        seed: seed of the noise, the orders and the LoRA's initial values, which are those of the ablation's arms.

    Returns:
        One number per round: `reward`, mean of the images sampled; `clipped`, share of importance weights outside the
        clip range.

    Raises:
        RuntimeError: a gradient is not finite; the learning rate is too high.
    """
    trainable = make_policy(model, LoraSection(), seed=seed_of(seed, "lora")).trainable
    optimizer = torch.optim.AdamW(trainable, lr=setting.learning_rate, weight_decay=1e-4)
    sampler, statistics = StochasticSampler(model, setting.num_denoising_steps), PromptStatistics(setting.min_count)
    conditioning, _ = model.encode_prompts(prompts)
    visits = np.array_split(visited_prompts(setting, len(prompts), seed), setting.num_rounds)
    updates = np.array_split(np.arange(setting.num_updates), setting.num_rounds)
    records: dict[str, list[float]] = {"reward": [], "clipped": []}
    for number, (visited, numbers) in enumerate(zip(visits, updates, strict=True)):
        rows = visited.repeat(setting.images_per_prompt)
        trajectories = sampler.sample(rows_of(conditioning, rows), seed, "ddpo", number)
        rewards = np.asarray(reward(model.decode(trajectories.latents[-1]), [prompts[row] for row in rows]))
        advantages = torch.from_numpy(statistics.advantages(rows, rewards)).float()
        order = Permutation(len(rows), f"order of DDPO's round {number}", seed)(np.arange(len(rows)))
        clipped = [
            update(sampler, optimizer, trajectories, advantages, images, setting.clip_range)
            for images in np.array_split(order, len(numbers))
        ]
        records["reward"].append(float(rewards.mean()))
        records["clipped"].append(float(np.mean(clipped)))
    return records


def visited_prompts(setting: Setting, num_prompts: int, seed: int) -> NDArray[np.int64]:
    """Numbers of the prompts in the order in which they are visited, ``[num_images / images_per_prompt]``."""
    num_visits = setting.num_images // setting.images_per_prompt
    passes = [
        Permutation(num_prompts, f"prompts of DDPO's pass {number}", seed)(np.arange(num_prompts))
        for number in range(math.ceil(num_visits / num_prompts))
    ]
    return np.concatenate(passes)[:num_visits]


def update(
    sampler: StochasticSampler,
    optimizer: torch.optim.Optimizer,
    trajectories: Trajectories,
    advantages: Tensor,
    images: NDArray[np.int64],
    clip_range: float,
) -> float:
    """Update the policy with all denoising steps of some images of a round, in one launch.

    Args:
        advantages: ``[image]``, of all images of the round.
        images: numbers of the images to train on.

    Returns:
        Share of the importance weights outside the clip range.
    """
    log_probs = sampler.log_probs(trajectories.latents[:, images], rows_of(trajectories.conditioning, images))
    old_log_probs = trajectories.log_probs[:, images]
    clipped_loss(log_probs, old_log_probs, advantages[images], clip_range=clip_range).mean().backward()
    nn.utils.clip_grad_norm_(optimizer.param_groups[0]["params"], 1.0, error_if_nonfinite=True)
    optimizer.step()
    optimizer.zero_grad()
    return float((log_probs.detach() - old_log_probs).expm1().abs().gt(clip_range).float().mean())


def judge_heldout(model: TextToImageModel) -> dict[str, NDArray[np.float64]]:
    """``[prompt, image]`` scores of each judge on held-out prompts, sampled as in the ablation."""
    prompts = scene_prompts("heldout", NUM_HELDOUT, seed=0)
    sampling = Sampling(0, HELDOUT_IMAGES, NUM_DENOISING_STEPS, 1.0, None, None, images_per_batch=32)
    scorer, conditioning = Scorer({judge: {} for judge in JUDGES}), model.encode_prompts(prompts)[0]
    scores = [batch.scores for batch in sample_batches(model, prompts, conditioning, sampling, scorer)]
    return {judge: np.concatenate([batch[judge] for batch in scores]).reshape(NUM_HELDOUT, -1) for judge in JUDGES}


def cost_lines(setting: Setting) -> list[str]:
    """Cost of a setting and of DPO, as text."""
    dpo_trained = DPO_UPDATES * DPO_IMAGES_PER_UPDATE
    rows: list[tuple[str, int, int]] = [
        ("images for training", DPO_IMAGES, setting.num_images),
        ("updates", DPO_UPDATES, setting.num_updates),
        ("forwards of sampling", DPO_IMAGES * NUM_DENOISING_STEPS, setting.num_transitions),
        ("forwards of the reference", dpo_trained, 0),
        ("forwards with backward", dpo_trained, setting.num_transitions),
    ]
    return [f"{name}: DPO {dpo:,}, DDPO {ddpo:,}" for name, dpo, ddpo in rows]


def main() -> None:
    """Train the embedded model and judge it on held-out prompts, before and after."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--longer", type=int, default=1, help="factor of images, rounds and updates")
    for field in fields(Setting):
        parser.add_argument(f"--{field.name.replace('_', '-')}", type=type(field.default), default=field.default)
    options = vars(parser.parse_args())
    setting = Setting(**{field.name: options[field.name] for field in fields(Setting)}).longer(options["longer"])
    torch.set_num_threads(1)
    print(f"seed {options['seed']}, {setting}", *cost_lines(setting), sep="\n", flush=True)
    model = load_model("stable_diffusion", path="embedded", device="cpu")
    base = judge_heldout(model)
    prompts, started = scene_prompts("train", NUM_TRAIN, seed=0), time.perf_counter()
    records = train_ddpo(model, load_reward("clip", {}), prompts, setting, seed=options["seed"])
    seconds, quarter = time.perf_counter() - started, max(1, setting.num_rounds // 4)
    rewards = (np.mean(records["reward"][part]) for part in (slice(quarter), slice(-quarter, None)))
    print("reward of sampled images, first and last quarter of the rounds: {:.4f}, {:.4f}".format(*rewards))
    print(f"importance weights outside the clip range: {np.mean(records['clipped']):.2f}; training: {seconds:.0f} s")
    tuned = judge_heldout(model)
    for judge, name in JUDGES.items():
        found = compare_scores(base[judge], tuned[judge], num_resamples=10_000, seed=0)
        print(f"{name}: {found.base.mean:.4f} -> {found.tuned.mean:.4f}, {_interval_text(found.difference)}")


def _interval_text(found: Interval) -> str:
    return f"{found.mean:+.4f} [{found.low:+.4f}, {found.high:+.4f}]"


if __name__ == "__main__":
    main()
