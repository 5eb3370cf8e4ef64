"""What was trained -> files that other tools load, and a card that says what they are."""

FORMATS = {
    "diffusers": "cdpo_ray.export.formats:write_diffusers",
    "kohya": "cdpo_ray.export.formats:write_kohya",
    "merged": "cdpo_ray.export.formats:write_merged",
}
"""Format -> the function that writes it, imported when used. A new format is one function and one line here."""
