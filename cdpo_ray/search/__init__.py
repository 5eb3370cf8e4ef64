"""Ray Tune over the schedules: trials on the same samples and scores -> the best schedule."""
