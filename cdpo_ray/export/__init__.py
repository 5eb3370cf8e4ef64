"""Trained adapter or model, or drawn pairs -> files that other tools load, with a card."""

from typing import NamedTuple

from cdpo_ray.records import EVALUATION, SAMPLES, STAGES, TRAINING


class Format(NamedTuple):
    """A format of `cdpo export`.

    Attributes:
        write: ``module:function`` that writes it, imported on use.
        readers: programs that read it.
        dataset: whether the hub calls it a data set, not a model.
        steps: folders of the steps whose files are read, after they are verified; an evaluation may be missing.
    """

    write: str
    readers: str
    dataset: bool = False
    steps: tuple[str, ...] = (TRAINING, EVALUATION)


FORMATS = {
    "diffusers": Format("cdpo_ray.export.formats:write_diffusers", "diffusers (`pipe.load_lora_weights`)"),
    "kohya": Format("cdpo_ray.export.kohya:write_kohya", "ComfyUI, Forge, AUTOMATIC1111 (UNets), InvokeAI, sd-scripts"),
    "peft": Format("cdpo_ray.export.formats:write_peft", "peft (`PeftModel.from_pretrained`)"),
    "pairs": Format(
        "cdpo_ray.export.pairs:write_pairs",
        "datasets (`load_dataset`), other trainers",
        dataset=True,
        steps=(SAMPLES, STAGES),
    ),
    "merged": Format("cdpo_ray.export.formats:write_merged", "diffusers (`DiffusionPipeline.from_pretrained`)"),
}
"""A new format is one function and one line here."""

KOHYA_READERS = {"flux2": "diffusers", "z_image": "diffusers", "qwen_image": "ComfyUI, musubi-tuner, diffusers"}
"""Family -> programs that read its `kohya` file, where they are not those of the format."""


def readers_of(format_name: str, family: str) -> str:
    """Programs that read a format of a family's model."""
    readers = FORMATS[format_name].readers
    return KOHYA_READERS.get(family, readers) if format_name == "kohya" else readers
