"""Held-out prompts -> images of the base model, and of the policy after each stage, as PNG files of `4-training`."""

import contextlib
import math
from collections.abc import Iterator
from pathlib import Path

import torch

from cdpo_ray.dataflow.images import encode_png
from cdpo_ray.dataflow.memory import is_out_of_memory
from cdpo_ray.errors import ModelError
from cdpo_ray.generation.generator import Sampling, sample_batches
from cdpo_ray.models.family import TextToImageModel
from cdpo_ray.records import PREVIEW_PROMPTS, preview_file
from cdpo_ray.store import make_folder, write_bytes, write_json
from cdpo_ray.training.job import PreviewJob


class Previewer:
    """Samples one image per preview prompt; each worker writes those of its share of the prompts.

    An image is a function of the weights, the seed and the prompt: one that is sampled again after a restart replaces
    an identical one (up to rounding errors, if the number of workers has changed). Uses no global RNG and runs the
    denoiser eagerly even if it is compiled, so training is the same without it: another batch size would change the
    compiled graphs.

    Args:
        model: with VAE and text encoders; the latter are not needed afterwards.
        output_dir: folder of `4-training`.
        worker_rank, num_workers: of the training.

    Raises:
        ModelError: memory does not suffice.
    """

    def __init__(
        self, job: PreviewJob, model: TextToImageModel, output_dir: Path, *, worker_rank: int, num_workers: int
    ) -> None:
        self.prompts = list(job.prompts[worker_rank::num_workers])
        # With fewer prompts than others a worker samples the last one too: ZeRO 3 needs the same launches everywhere.
        num_others = math.ceil(len(job.prompts) / num_workers) - len(self.prompts)
        self.sampled = self.prompts + list(job.prompts[-1:]) * num_others
        self.sampling = Sampling(**job.sampling)
        self.output_dir = output_dir
        with _enough_memory():
            self.conditioning, _ = model.encode_prompts(self.sampled)
        if worker_rank == 0:
            make_folder((output_dir / PREVIEW_PROMPTS).parent)
            write_json(output_dir / PREVIEW_PROMPTS, list(job.prompts))

    def write(self, model: TextToImageModel, stage: int) -> None:
        """Sample and write the images of this worker's prompts.

        Args:
            model: its denoiser is sampled, in evaluation mode.
            stage: stage that has ended, 1-based; 0: the base model.

        Raises:
            ModelError: memory does not suffice.
            StoreError: an image cannot be written.
        """
        was_training = model.denoiser.training
        model.denoiser.eval()
        try:
            with torch.compiler.set_stance("force_eager"):
                batches = sample_batches(model, self.sampled, self.conditioning, self.sampling)
                pixels = [batch.images.cpu().numpy() for batch in batches]
        finally:
            model.denoiser.train(was_training)
        for prompt, image in zip(self.prompts, (image for few in pixels for image in few), strict=False):
            path = self.output_dir / preview_file(stage, prompt)
            make_folder(path.parent)
            write_bytes(path, encode_png(image))


@contextlib.contextmanager
def _enough_memory() -> Iterator[None]:
    try:
        yield
    except Exception as error:
        if is_out_of_memory(error):
            raise ModelError(f"out of memory while the preview prompts are encoded: {error}") from None
        raise
