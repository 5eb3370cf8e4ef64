"""Samples -> scores; one file per reward."""

REWARDS = {
    "clip": "cdpo_ray.rewards.clip:ClipReward",
    "hpsv2": "cdpo_ray.rewards.hpsv2:HpsV2Reward",
    "imagereward": "cdpo_ray.rewards.imagereward:ImageReward",
    "pickscore": "cdpo_ray.rewards.pickscore:PickScoreReward",
    "aesthetic": "cdpo_ray.rewards.aesthetic:AestheticReward",
    "vlm_alignment": "cdpo_ray.rewards.vlm_alignment:VlmAlignmentReward",
    "jpeg_size": "cdpo_ray.rewards.jpeg_size:JpegSizeReward",
    "oracle": "cdpo_ray.rewards.oracle:OracleReward",
    "oracle_strict": "cdpo_ray.rewards.oracle:StrictOracleReward",
}
"""Reward in the config -> class, imported on first use: it may need heavy packages.

An instance takes images, uint8 ``[image, 3, height, width]``, with one prompt each, and returns scores ``[image]``;
higher is better.
"""
