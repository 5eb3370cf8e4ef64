"""The embedded world: captioned scenes, their oracle, a tiny latent diffusion pipeline and a tiny CLIP model."""

from pathlib import Path

PIPELINE_DIR = Path(__file__).parent / "weights" / "pipeline"
CONSISTENCY_DIR = Path(__file__).parent / "weights" / "consistency"
CLIP_DIR = Path(__file__).parent / "weights" / "clip"

__all__ = ["CLIP_DIR", "CONSISTENCY_DIR", "PIPELINE_DIR"]
