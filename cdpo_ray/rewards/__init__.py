"""Samples -> scores; one file per reward.

An instance of a reward's class takes images, uint8 ``[image, 3, height, width]``, with one prompt each, and returns
scores ``[image]``; higher is better. `cdpo_ray.config.rewards.REWARDS` has the names.
"""
