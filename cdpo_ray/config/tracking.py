"""Experiment trackers, besides TensorBoard and Ray's metrics."""

from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from pydantic import Field, model_validator

from cdpo_ray.config.section import LocalPath, Section


class WandbOptions(Section):
    """Report to Weights & Biases; the API key is read from WANDB_API_KEY in the environment."""

    project: Annotated[str, Field(min_length=1)]
    """W&B project of the run."""

    entity: str | None = None
    """W&B user or team that owns the project; `null`: the account's default."""

    mode: Literal["online", "offline"] = "online"
    """Where values are written. `online`: to the server, during the run. `offline`: only to `<run>/wandb`, for machines
    without internet access."""


class MlflowOptions(Section):
    """Report to an MLflow server; credentials are read from MLFLOW_TRACKING_... in the environment."""

    tracking_uri: LocalPath
    """URL of the tracking server, without user and password; or a folder, for which MLflow needs
    MLFLOW_ALLOW_FILE_STORE=true."""

    experiment: Annotated[str, Field(min_length=1)]
    """MLflow experiment of the run; it is created if it does not exist."""

    @model_validator(mode="after")
    def _has_no_secret(self) -> "MlflowOptions":
        if "@" in urlsplit(self.tracking_uri).netloc:
            raise ValueError(
                "`tracking_uri` must contain neither user nor password; set MLFLOW_TRACKING_USERNAME and"
                " MLFLOW_TRACKING_PASSWORD in the environment"
            )
        return self


class TrackingSection(Section):
    """Experiment trackers. TensorBoard files and Ray's metrics are always written. Trackers do not affect results."""

    wandb: WandbOptions | None = None

    mlflow: MlflowOptions | None = None

    @property
    def options(self) -> dict[str, dict[str, Any]]:
        """Options of each configured tracker, by name."""
        given = {"wandb": self.wandb, "mlflow": self.mlflow}
        return {name: options.model_dump(exclude_none=True) for name, options in given.items() if options}
