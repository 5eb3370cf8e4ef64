"""Embeddings of images and prompts -> cosine similarities."""

from collections.abc import Callable, Sequence

import torch.nn.functional as F
from torch import Tensor


def cosines(images: Tensor, prompts: Sequence[str], embed: Callable[[list[str]], Tensor]) -> Tensor:
    """Cosine similarity of each image's embedding and its prompt's, -1 to 1, ``[image]``.

    Args:
        images: embeddings ``[image, width]``.
        prompts: one per image; duplicates, of which a batch has many, are embedded once.
        embed: distinct prompts -> embeddings ``[prompt, width]``.
    """
    distinct = {prompt: row for row, prompt in enumerate(dict.fromkeys(prompts))}
    texts = F.normalize(embed(list(distinct)), dim=-1)
    return (F.normalize(images, dim=-1) * texts[[distinct[prompt] for prompt in prompts]]).sum(-1)
