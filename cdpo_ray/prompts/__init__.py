"""Prompt sets, prompt files and hub data sets."""
