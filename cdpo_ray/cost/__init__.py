"""Estimated cost of a run: GPU-hours and peak memory, from a model's footprint and a GPU's published data."""
