"""Trained adapter or model -> files that other tools load, with a model card."""

FORMATS = {
    "diffusers": "cdpo_ray.export.formats:write_diffusers",
    "kohya": "cdpo_ray.export.formats:write_kohya",
    "merged": "cdpo_ray.export.formats:write_merged",
}
"""Format -> function that writes it, imported on use. A new format is one function and one line here."""
