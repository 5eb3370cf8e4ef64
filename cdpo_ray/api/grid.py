"""Images of base and fine-tuned model -> one image."""

import textwrap
from collections.abc import Sequence
from pathlib import Path

import matplotlib
from PIL import Image, ImageDraw, ImageFont

from cdpo_ray.errors import printable
from cdpo_ray.pages.page import PIXELATED_BELOW, shrunk
from cdpo_ray.records import ARMS

FONT_PIXELS, LINE_PIXELS, CHARACTER_PIXELS = 13, 17, 8
MARGIN, LABEL_PIXELS = 4, 50
MAX_PROMPT_CHARS = 200


def before_after_grid(prompts: Sequence[tuple[str, Sequence[tuple[Image.Image, Image.Image]]]]) -> Image.Image:
    """Draw, for each prompt, its text, a row of the base model's images, and a row of the fine-tuned model's.

    Args:
        prompts: text of each prompt and its (base, tuned) images; at least one prompt with one pair. Images of more
            than `MAX_PIXELS` are shrunk, images below `PIXELATED_BELOW` are enlarged without interpolation.
    """
    rows = [[[shown(pair[arm]) for pair in pairs] for arm in range(len(ARMS))] for _, pairs in prompts]
    images = [image for arms in rows for row in arms for image in row]
    image_width, image_height = max(image.width for image in images), max(image.height for image in images)
    width = LABEL_PIXELS + (image_width + MARGIN) * max(len(row) for arms in rows for row in arms)
    texts = [
        textwrap.wrap(printable(prompt, MAX_PROMPT_CHARS), (width - 2 * MARGIN) // CHARACTER_PIXELS)
        for prompt, _ in prompts
    ]
    row_height = image_height + MARGIN
    height = sum(len(lines) * LINE_PIXELS + len(ARMS) * row_height + 2 * MARGIN for lines in texts)
    canvas = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(canvas)
    # matplotlib's own font covers more scripts than Pillow's
    font = ImageFont.truetype(Path(matplotlib.get_data_path(), "fonts", "ttf", "DejaVuSans.ttf"), FONT_PIXELS)
    top = 0
    for lines, arms in zip(texts, rows, strict=True):
        for line in lines:
            draw.text((MARGIN, top + MARGIN), line, fill="black", font=font)
            top += LINE_PIXELS
        top += 2 * MARGIN
        for arm, row in zip(ARMS, arms, strict=True):
            draw.text((MARGIN, top + image_height // 2), arm, fill="black", font=font, anchor="lm")
            for column, image in enumerate(row):
                canvas.paste(image, (LABEL_PIXELS + column * (image_width + MARGIN), top))
            top += row_height
    return canvas


def shown(image: Image.Image) -> Image.Image:
    """The image at the size that the grid shows it at."""
    factor = -(-PIXELATED_BELOW // max(image.size))
    if factor > 1:
        return image.resize((factor * image.width, factor * image.height), Image.Resampling.NEAREST)
    return shrunk(image)
