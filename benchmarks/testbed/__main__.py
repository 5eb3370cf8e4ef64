"""``python -m benchmarks.testbed --out DIR``: train every part, measure, write the card."""

import argparse
import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

from benchmarks.testbed.autoencoder import train_autoencoder
from benchmarks.testbed.card import write_card
from benchmarks.testbed.consistency import train_consistency
from benchmarks.testbed.denoiser import train_denoiser
from benchmarks.testbed.dual_encoder import train_dual_encoder
from benchmarks.testbed.measure import NUM_SCENES, measure


def main(arguments: list[str] | None = None) -> None:
    """Train autoencoder and dual encoder concurrently, the denoiser in two processes, and its consistency model."""
    options = parse(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    common = {"num_scenes": options.num_scenes, "seed": options.seed}
    with ProcessPoolExecutor(2, multiprocessing.get_context("spawn")) as workers:
        parts = (
            workers.submit(train_autoencoder, options.out, num_updates=options.autoencoder_updates, **common),
            workers.submit(train_dual_encoder, options.out, num_updates=options.dual_encoder_updates, **common),
        )
        for part in parts:
            part.result()
    train_denoiser(options.out, num_updates=options.denoiser_updates, **common)
    train_consistency(options.out, num_updates=options.consistency_updates, **common)
    measure(options.out, num_prompts=options.num_eval_prompts, num_scenes=options.num_eval_scenes)
    write_card(options.out)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Options; the defaults are those of the weights in the repository, lower values suit a smoke test."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.testbed", description=main.__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder to write the weights and README.md to")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--autoencoder-updates", type=int, default=1800)
    parser.add_argument("--dual-encoder-updates", type=int, default=1500)
    parser.add_argument("--denoiser-updates", type=int, default=2000)
    parser.add_argument("--consistency-updates", type=int, default=225)
    parser.add_argument("--num-scenes", type=int, default=24000, help="scenes to draw for each part's training")
    parser.add_argument("--num-eval-prompts", type=int, default=96)
    parser.add_argument("--num-eval-scenes", type=int, default=NUM_SCENES)
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
