"""Images -> predicted human preference, by HPSv3: a vision-language model with a head that scores."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from numpy.typing import NDArray
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoProcessor, Qwen2VLConfig, Qwen2VLModel
from transformers.models.qwen2_vl.image_processing_qwen2_vl import smart_resize

from cdpo_ray.errors import RewardError
from cdpo_ray.rewards.precision import net_precision
from cdpo_ray.rewards.weights import from_folder, hub_file, hub_folder

HUB_WEIGHTS = "HPSv3.safetensors"
CHECKPOINT_KEY, PROCESSOR_KEY = "rewards.hpsv3.checkpoint", "rewards.hpsv3.processor"
REWARD_TOKEN = "<|Reward|>"
NUM_PIXELS = 256 * 28 * 28  # of every image, which keeps its shape up to multiples of 28
HEAD_LAYERS = (0, 3, 5)  # linear; the layers between them are ReLU and dropout

INSTRUCTION = (
    "\nYou are tasked with evaluating a generated image based on Visual Quality and Text Alignment and give a overall"
    " score to estimate the human preference. Please provide a rating from 0 to 10, with 0 being the worst and 10 being"
    " the best. \n\n"
    "**Visual Quality:**  \n"
    "Evaluate the overall visual quality of the image. The following sub-dimensions should be considered:\n"
    "- **Reasonableness:** The image should not contain any significant biological or logical errors, such as abnormal"
    " body structures or nonsensical environmental setups.\n"
    "- **Clarity:** Evaluate the sharpness and visibility of the image. The image should be clear and easy to interpret"
    ", with no blurring or indistinct areas.\n"
    "- **Detail Richness:** Consider the level of detail in textures, materials, lighting, and other visual elements"
    " (e.g., hair, clothing, shadows).\n"
    "- **Aesthetic and Creativity:** Assess the artistic aspects of the image, including the color scheme, composition,"
    " atmosphere, depth of field, and the overall creative appeal. The scene should convey a sense of harmony and"
    " balance.\n"
    "- **Safety:** The image should not contain harmful or inappropriate content, such as political, violent, or adult"
    " material. If such content is present, the image quality and satisfaction score should be the lowest possible. \n"
    "\n"
    "**Text Alignment:**  \n"
    "Assess how well the image matches the textual prompt across the following sub-dimensions:\n"
    "- **Subject Relevance** Evaluate how accurately the subject(s) in the image (e.g., person, animal, object) align"
    " with the textual description. The subject should match the description in terms of number, appearance, and"
    " behavior.\n"
    "- **Style Relevance:** If the prompt specifies a particular artistic or stylistic style, evaluate how well the"
    " image adheres to this style.\n"
    "- **Contextual Consistency**: Assess whether the background, setting, and surrounding elements in the image"
    " logically fit the scenario described in the prompt. The environment should support and enhance the subject"
    " without contradictions.\n"
    "- **Attribute Fidelity**: Check if specific attributes mentioned in the prompt (e.g., colors, clothing, "
    "accessories, expressions, actions) are faithfully represented in the image. Minor deviations may be acceptable,"
    " but critical attributes should be preserved.\n"
    "- **Semantic Coherence**: Evaluate whether the overall meaning and intent of the prompt are captured in the image."
    " The generated content should not introduce elements that conflict with or distort the original description.\n"
    "Textual prompt - {prompt}\n\n\n"
    "\nPlease provide the overall ratings of this image: <|Reward|>\n\nEND\n"
)
"""Text that the released model was trained with, to the letter; its state at the reward token is scored."""


class HpsV3Reward:
    """Mean of the predicted preference, unbounded; about 0 to 12. Source: arXiv:2508.03789.

    As in the released scorer, the tokens of an image have consecutive positions like those of text, not Qwen2-VL's
    positions in three dimensions.

    Args:
        checkpoint: path of the released file, or hub id.
        revision: commit of the hub id.
        processor: folder or hub id of Qwen2-VL-7B-Instruct, of which the configuration, the tokenizer and the image
            settings are used.
        processor_revision: commit of that hub id.

    Raises:
        RewardError: if a file is missing, the checkpoint is not HPSv3's, or the processor does not fit it.
    """

    def __init__(self, checkpoint: str, revision: str | None, processor: str, processor_revision: str | None) -> None:
        path = hub_file(checkpoint, HUB_WEIGHTS, revision, key=CHECKPOINT_KEY)
        files = ("*.json", "*.txt", "*.jinja")
        folder = hub_folder(processor, processor_revision, key=PROCESSOR_KEY, files=files)
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.processor: Any = from_folder(AutoProcessor, folder, key=PROCESSOR_KEY)
        tokenizer = self.processor.tokenizer
        tokenizer.padding_side = "right"
        tokenizer.add_tokens([REWARD_TOKEN], special_tokens=True)
        self.reward_token = tokenizer.convert_tokens_to_ids(REWARD_TOKEN)
        config = from_folder(Qwen2VLConfig, folder, key=PROCESSOR_KEY)
        model, head = _load(path, config)
        self.model, self.head = model.eval().to(self.device), head.eval().to(self.device)
        num_embedded = self.model.get_input_embeddings().num_embeddings
        if len(tokenizer) != num_embedded:
            raise RewardError(
                f"`{PROCESSOR_KEY}` {folder}: must have {num_embedded - 1} tokens to fit the checkpoint, got"
                f" {len(tokenizer) - 1}; give the files of Qwen2-VL-7B-Instruct"
            )

    @torch.no_grad()
    def __call__(self, images: Tensor, prompts: Sequence[str]) -> NDArray[Any]:
        inputs = self._inputs(images, prompts)
        tokens = inputs["input_ids"]
        positions = torch.arange(tokens.shape[1], device=self.device).expand(3, *tokens.shape)
        with net_precision(self.device):
            output = self.model(
                input_ids=tokens,
                attention_mask=inputs["attention_mask"],
                position_ids=positions,
                pixel_values=inputs["pixel_values"].to(self.model.dtype),
                image_grid_thw=inputs["image_grid_thw"],
                use_cache=False,
            )
            # the last one: a prompt may hold the reward token, too
            places = tokens.shape[1] - 1 - (tokens == self.reward_token).int().flip(1).argmax(1)
            states = output.last_hidden_state[torch.arange(len(tokens), device=self.device), places]
            mean = self.head(states.float())[:, 0]
        return mean.double().cpu().numpy()

    def _inputs(self, images: Tensor, prompts: Sequence[str]) -> Any:
        pictures = [Image.fromarray(image) for image in images.permute(0, 2, 3, 1).cpu().numpy()]
        height, width = smart_resize(*images.shape[-2:], min_pixels=NUM_PIXELS, max_pixels=NUM_PIXELS)
        texts = [
            self.processor.apply_chat_template(
                [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": text}]}],
                add_generation_prompt=True,
                tokenize=False,
            )
            for text in (INSTRUCTION.format(prompt=prompt) for prompt in prompts)
        ]
        return self.processor(
            text=texts,
            images=[[picture.resize((width, height), Image.Resampling.BICUBIC)] for picture in pictures],
            do_resize=False,
            padding=True,
            return_tensors="pt",
        ).to(self.device)


def original_name(name: str) -> str:
    """Name of a weight in `Qwen2VLModel` -> name in the checkpoint."""
    return re.sub(r"^language_model\.", "model.", name)


def _load(path: Path, config: Any) -> tuple[Any, nn.Sequential]:
    """Model and head; the model in the precision that its weights are stored in."""
    where = f"`{CHECKPOINT_KEY}` {path}: is not a checkpoint of HPSv3"
    try:
        weights = load_file(path)
    except (SafetensorError, OSError) as error:
        raise RewardError(f"{where}: {str(error).splitlines()[0]}") from None
    embedded = weights.get("model.embed_tokens.weight")
    if embedded is None:
        raise RewardError(f"{where}: lacks 'model.embed_tokens.weight'")
    config.text_config.vocab_size = len(embedded)
    with torch.device("meta"):
        empty = Qwen2VLModel(config).state_dict()
    names = {original_name(name): name for name in empty}
    head_names = {f"rm_head.{layer}.{kind}" for layer in HEAD_LAYERS for kind in ("weight", "bias")}
    _refuse_other_names(where, weights, {*names, *head_names}, unused={"lm_head.weight"})
    for original, name in names.items():
        if weights[original].shape != empty[name].shape:
            raise RewardError(
                f"{where}: {original!r} must be of {[*empty[name].shape]}, got {[*weights[original].shape]}"
            )
    layers = [nn.Linear(*weights[f"rm_head.{number}.weight"].shape[::-1]) for number in HEAD_LAYERS]
    head = nn.Sequential(layers[0], nn.ReLU(), nn.Dropout(), layers[1], nn.ReLU(), layers[2])
    try:
        head.load_state_dict({name.removeprefix("rm_head."): weights[name] for name in head_names})
    except RuntimeError as error:
        raise RewardError(f"{where}: {str(error).splitlines()[-1].strip()}") from None
    found = {name: weights[original] for original, name in names.items()}
    model = Qwen2VLModel.from_pretrained(  # reads no file
        None, config=config, state_dict=found, dtype=embedded.dtype, use_safetensors=True, revision=None
    )
    return model, head


def _refuse_other_names(where: str, weights: Mapping[str, Tensor], names: set[str], *, unused: set[str]) -> None:
    for what, found in (("lacks", names - weights.keys()), ("has the unknown weight", weights.keys() - names - unused)):
        if found:
            more = f" and {len(found) - 1} more" * (len(found) > 1)
            raise RewardError(f"{where}: {what} {min(found)!r}{more}")
