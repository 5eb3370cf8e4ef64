"""Samples -> scores; a file a reward, a line each in `REWARDS`.

A reward is a class whose instances take images, uint8 ``[image, 3, height, width]``, with a prompt each, and return
scores ``[image]``; higher is better. A reward's file is imported when it is used: it may need heavy packages.
"""

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
