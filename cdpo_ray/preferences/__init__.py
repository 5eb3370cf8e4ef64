"""Preferences that people have -> samples."""
