"""Images -> how well the text that a prompt asks for in quotes is rendered, by text recognition."""

import hashlib
import os
import unicodedata
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cdpo_ray.config import missing_packages
from cdpo_ray.errors import RewardError
from cdpo_ray.prompts.syntax import quoted_texts

WEIGHTS = {
    "Det": ("PP-OCRv6_det_small.onnx", "090f04abcd9d9a7498bc4ebf677e4cb9bdce1fe4197ddb7e529f1ef44e1ff94f"),
    "Rec": ("PP-OCRv6_rec_small.onnx", "6f327246b50388f3c176ae304bd95767ea6dc0c9ae92153ef8cbe210b3c14884"),
}
"""Part of rapidocr -> its weights in the package, and their SHA-256 in the package's own table."""

SAME_MARKS = str.maketrans("‘’‚‛′`“”„‟″«»‐‑‒–—−", '\'\'\'\'\'\'"""""""------')
"""Variants of apostrophes, quotes and hyphens, which recognition confuses."""
EDGE_MARKS = ".,;:'\""
"""Not compared at the ends of a word: punctuation of the prompt's own sentence, and marks of a few pixels."""


class OcrReward:
    """Similarity of the requested and the recognised text, 0 to 1; NaN if the prompt quotes no text.

    For each text in quotes: 1 - edit distance / length of the longer text, with the consecutive recognised words that
    are most similar; the score is the mean. Case, white space and Unicode's variants of a letter are not compared.

    Raises:
        RewardError: if rapidocr or onnxruntime is not installed, or its weights are not the expected ones.
    """

    def __init__(self) -> None:
        if missing := missing_packages("ocr"):
            raise RewardError(f"reward `ocr` {missing}")
        import cv2
        import rapidocr

        # Ray sets torch's number of threads to the actor's CPUs; the other two would take all of the machine's
        num_threads = min(torch.get_num_threads(), os.cpu_count() or 1)
        cv2.setNumThreads(num_threads)
        folder = Path(rapidocr.__file__).parent / "models"
        self.read: Any = rapidocr.RapidOCR(
            params={
                "Global.log_level": "error",  # an image without text is a warning there
                "Global.use_cls": False,  # upside-down text is not the requested text
                "EngineConfig.onnxruntime.intra_op_num_threads": num_threads,
                # given as paths, weights are never downloaded
                **{f"{part}.model_path": str(_verified(folder / name, sha)) for part, (name, sha) in WEIGHTS.items()},
            }
        )

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> NDArray[Any]:
        requested = [["".join(words_of(quoted)) for quoted in quoted_texts(prompt)] for prompt in prompts]
        pixels = images.flip(1).permute(0, 2, 3, 1).contiguous().cpu().numpy()  # OpenCV's order of channels
        scores = np.full(len(prompts), np.nan)
        for number, texts in enumerate(requested):
            if texts:
                words = self._recognized(pixels[number])
                scores[number] = np.mean([similarity(text, words) for text in texts])
        return scores

    def _recognized(self, pixels: NDArray[np.uint8]) -> list[str]:
        found = self.read(pixels)
        if found.boxes is None or found.txts is None:
            return []
        return words_of(" ".join(found.txts[number] for number in reading_order(found.boxes)))


def words_of(text: str) -> list[str]:
    """Words in the form that is compared."""
    words = unicodedata.normalize("NFKC", text).translate(SAME_MARKS).casefold().split()
    return [stripped for word in words if (stripped := word.strip(EDGE_MARKS))]


def similarity(text: str, words: Sequence[str]) -> float:
    """1 - edit distance / length of the longer, of a text and the consecutive words most similar to it, 0 to 1.

    Args:
        text: as words of `words_of`, without the spaces: recognition adds and loses some.
    """
    best = 0.0
    for start in range(len(words)):
        distances, length = list(range(len(text) + 1)), 0  # to each beginning of the text
        for word in words[start:]:
            for letter in word:
                above, distances[0] = distances[0], distances[0] + 1
                for place, other in enumerate(text, start=1):
                    cost = above + (letter != other)
                    above = distances[place]
                    distances[place] = min(above + 1, distances[place - 1] + 1, cost)
            length += len(word)
            best = max(best, 1 - distances[-1] / max(length, len(text)))
            if len(text) <= best * length:  # more words are less similar
                break
    return best


def reading_order(boxes: NDArray[Any]) -> list[int]:
    """Numbers of boxes line by line, left to right; a box whose middle is beside a line's first box is in that line.

    Args:
        boxes: corners ``[box, 4, (x, y)]``.
    """
    middles, lines = boxes.mean(axis=1), list[list[int]]()
    for number in np.argsort(middles[:, 1], kind="stable").tolist():
        bottom = boxes[lines[-1][0], :, 1].max() if lines else -np.inf
        if middles[number, 1] < bottom:
            lines[-1].append(number)
        else:
            lines.append([number])
    return [number for line in lines for number in sorted(line, key=lambda box: middles[box, 0])]


def _verified(path: Path, sha256: str) -> Path:
    found = hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else None
    if found != sha256:
        raise RewardError(
            f"reward `ocr`: {path}: SHA-256 must be {sha256}, got {found or 'no file'}; the installed rapidocr is"
            ' damaged or another version: pip install --force-reinstall "rapidocr==3.10.*"'
        )
    return path
