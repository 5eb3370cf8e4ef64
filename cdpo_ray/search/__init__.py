"""Search over schedules with Ray Tune: trials on the same samples and scores -> the best schedule."""
