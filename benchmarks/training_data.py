"""Two workers train on sets of a thousand to a million pairs: updates per second, and memory of a worker.

Latents and embeddings have the shapes of Stable Diffusion 1.5, one prompt with four images per pair; the net is a small
one whose time is the same for all sets. All sets consist of the same shard, linked under as many names as needed, so
that a million pairs need neither 249 GB nor their time to be written; what is drawn is decoded and kept as always.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor, nn

from cdpo_ray.config.training import TrainingSection
from cdpo_ray.dataflow.columns import tensor_column
from cdpo_ray.store import write_table
from cdpo_ray.training.bank import SampleBank
from cdpo_ray.training.batches import PairBatch, StagePairs, prefetched
from cdpo_ray.training.loop import Feed

LATENT, EMBEDDING, NUM_IMAGES = (4, 64, 64), (77, 768), 4
PROMPTS_PER_SHARD = 500
NUM_WORKERS = 2
MB = 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, nargs="+", default=[10**3, 10**4, 10**5, 10**6])
    parser.add_argument("--updates", type=int, default=20, help="number of timed updates per set and repetition")
    parser.add_argument("--batch", type=int, default=16, help="number of pairs per update, of all workers")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--dir", type=Path, default=Path("runs"), help="folder for the sets and the records")
    parser.add_argument("--worker", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker is not None:
        work(options)
        return
    options.dir.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=options.dir) as folder:
        write_sets(Path(folder), options.pairs)
        command = [sys.executable, __file__, *sys.argv[1:], "--dir", folder]
        environment = os.environ | {"TMPDIR": folder}
        workers = [subprocess.Popen([*command, "--worker", str(rank)], env=environment) for rank in range(NUM_WORKERS)]
        if sum(worker.wait() for worker in workers):
            raise SystemExit("a worker failed")


def write_sets(folder: Path, sizes: list[int]) -> None:
    rng = np.random.default_rng(0)
    shapes = {"latents": (NUM_IMAGES, *LATENT), "prompt_embedding": EMBEDDING}
    columns = {
        name: tensor_column(rng.standard_normal((PROMPTS_PER_SHARD, *shape), np.float32).astype(np.float16))
        for name, shape in shapes.items()
    }
    write_table(pa.table({"prompt_index": np.arange(PROMPTS_PER_SHARD), **columns}), folder / "shard.parquet")
    for size in sizes:
        (folder / str(size)).mkdir()
        for number in range(-(-size // PROMPTS_PER_SHARD)):
            os.link(folder / "shard.parquet", folder / str(size) / f"samples-{number:012d}.parquet")
        (folder / str(size) / "manifest.json").write_text(manifest(size))


def manifest(size: int) -> str:
    """A manifest without files, whose fingerprint names the cache of this set: hashing its links would take minutes."""
    import json

    from cdpo_ray.store import fingerprint_of

    files = {f"{size} pairs": {"bytes": 0, "sha256": "0" * 64}}
    return json.dumps({"files": files, "fingerprint": fingerprint_of(files)})


class Net(nn.Module):
    """Noise predicted from latents and the mean embedding; a few convolutions."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.into, self.out = nn.Conv2d(4, width, 3, padding=1), nn.Conv2d(width, 4, 3, padding=1)
        self.words = nn.Linear(EMBEDDING[1], width)
        self.middle = nn.ModuleList(nn.Conv2d(width, width, 3, padding=1) for _ in range(2))

    def forward(self, latents: Tensor, embeddings: Tensor) -> Tensor:
        hidden = self.into(latents) + self.words(embeddings.mean(dim=1))[:, :, None, None]
        for layer in self.middle:
            hidden = hidden + torch.relu(layer(hidden))
        return self.out(hidden)


@dataclass
class Trainer:
    net: Net
    optimizer: torch.optim.Optimizer

    def update(self, batch: PairBatch) -> None:
        batch = batch.to("cpu", torch.float32)
        noise = batch.noise.repeat(2, 1, 1, 1)
        noisy = torch.cat([batch.latents_w, batch.latents_l]) + noise
        errors = (self.net(noisy, batch.conditioning["prompt_embedding"].repeat(2, 1, 1)) - noise).square()
        chosen, rejected = errors.mean(dim=(1, 2, 3)).chunk(2)
        self.optimizer.zero_grad()
        nn.functional.softplus(chosen - rejected).mean().backward()
        for parameter in self.net.parameters():
            torch.distributed.all_reduce(parameter.grad)
        self.optimizer.step()


def work(options: argparse.Namespace) -> None:
    rank = options.worker
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{options.dir.resolve()}/group", rank=rank, world_size=NUM_WORKERS
    )
    net = Net()
    trainer = Trainer(net, torch.optim.SGD(net.parameters(), lr=1e-4))
    warm = PairBatch(
        torch.randn(options.batch // NUM_WORKERS, *LATENT),
        torch.randn(options.batch // NUM_WORKERS, *LATENT),
        {"prompt_embedding": torch.randn(options.batch // NUM_WORKERS, *EMBEDDING)},
        {},
        torch.randn(options.batch // NUM_WORKERS, *LATENT),
    )
    for _ in range(3):
        trainer.update(warm)
    of_model = memory()["RssAnon"]
    if rank == 0:
        print(f"worker without data: {of_model / MB:.0f} MB")
        print(f"{'pairs':>8} {'records':>8} {'updates/s':>10} {'CPU s/update':>13} {'private MB':>11} {'file MB':>8}")
    for repeat in range(options.repeats):
        for size in options.pairs:
            for state, found in measure(options, trainer, size, repeat).items():
                if rank == 0:
                    private, mapped = (found["RssAnon"] - of_model) / MB, found["RssFile"] / MB
                    print(
                        f"{size:8} {state:>8} {found['rate']:10.2f} {found['cpu']:13.3f} {private:11.0f} {mapped:8.0f}",
                        flush=True,
                    )


def measure(options: argparse.Namespace, trainer: Trainer, size: int, repeat: int) -> dict[str, dict[str, float]]:
    """Updates on pairs whose row groups have not been decoded, then on the same pairs, read from the disk."""
    bank = SampleBank.open(options.dir / str(size))
    rng = np.random.default_rng(repeat)
    num_draws = options.updates * options.batch
    rows = rng.integers(0, bank.latents.shape[0], num_draws)
    chosen = rng.integers(0, NUM_IMAGES, num_draws)
    pairs = StagePairs(1, rows, chosen, (chosen + 1) % NUM_IMAGES)
    feed = Feed(
        bank,
        lambda generator: {"timestep": torch.randint(1000, (), generator=generator)},
        {"prompt_embedding": torch.zeros(1, *EMBEDDING)},
        TrainingSection(beta=1.0, learning_rate=1e-4, global_batch_size=options.batch, num_workers=NUM_WORKERS),
        seed=0,
        worker_rank=options.worker,
        num_workers=NUM_WORKERS,
    )
    found = {}
    for state in ("absent", "present"):
        forget(bank)
        torch.distributed.barrier()
        peaks: dict[str, float] = {}
        started, cpu = time.perf_counter(), time.process_time()
        for batch in prefetched(feed.launches(pairs)):
            trainer.update(batch)
            peaks = {name: max(value, peaks.get(name, 0)) for name, value in memory().items()}
        torch.distributed.barrier()
        found[state] = peaks | {
            "rate": options.updates / (time.perf_counter() - started),
            "cpu": (time.process_time() - cpu) / options.updates,
        }
    torch.distributed.barrier()
    bank.delete_cache()
    torch.distributed.barrier()
    return found


def forget(bank: SampleBank) -> None:
    """Drop the records from the page cache."""
    assert bank.cache
    for path in bank.cache.folder.path.iterdir():
        with path.open("rb") as handle:
            os.fsync(handle.fileno())
            os.posix_fadvise(handle.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def memory() -> dict[str, float]:
    """Resident bytes of this process: private memory, and pages of mapped files."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return {name: 1024.0 * int(lines[name].split()[0]) for name in ("RssAnon", "RssFile")}


if __name__ == "__main__":
    main()
