"""The Python API beside the command line: run the pipeline, open a run's folder; `cdpo_ray` exports its names."""
