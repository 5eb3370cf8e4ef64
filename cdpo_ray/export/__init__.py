"""Trained adapter or model -> files that other tools load, with a model card."""

from typing import NamedTuple


class Format(NamedTuple):
    """A format of `cdpo export`.

    Attributes:
        write: ``module:function`` that writes it, imported on use.
        readers: programs that read it.
    """

    write: str
    readers: str


FORMATS = {
    "diffusers": Format("cdpo_ray.export.formats:write_diffusers", "diffusers (`pipe.load_lora_weights`)"),
    "kohya": Format("cdpo_ray.export.kohya:write_kohya", "ComfyUI, Forge, AUTOMATIC1111 (UNets), InvokeAI, sd-scripts"),
    "peft": Format("cdpo_ray.export.formats:write_peft", "peft (`PeftModel.from_pretrained`)"),
    "merged": Format("cdpo_ray.export.formats:write_merged", "diffusers (`DiffusionPipeline.from_pretrained`)"),
}
"""A new format is one function and one line here."""
