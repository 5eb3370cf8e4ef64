"""Curriculum DPO for text-to-image models, on Ray."""

__version__ = "0.2.0"
