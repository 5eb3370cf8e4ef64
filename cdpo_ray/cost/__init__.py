"""What a run costs before it is paid: GPU-hours and peak memory from a model's footprint, for a GPU that is named."""
