"""Who is told of a run beside TensorBoard and Ray; changes nothing that a run makes."""

from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from pydantic import Field, model_validator

from cdpo_ray.config.section import LocalPath, Section


class WandbOptions(Section):
    """A project of Weights & Biases; its key is WANDB_API_KEY of the environment."""

    project: Annotated[str, Field(min_length=1)]
    entity: str | None = None
    mode: Literal["online", "offline"] = "online"


class MlflowOptions(Section):
    """An experiment on an MLflow server; user and password, or token, are MLFLOW_TRACKING_... of the environment."""

    tracking_uri: LocalPath
    experiment: Annotated[str, Field(min_length=1)]

    @model_validator(mode="after")
    def _holds_no_secret(self) -> "MlflowOptions":
        if "@" in urlsplit(self.tracking_uri).netloc:
            raise ValueError(
                "`tracking_uri` must hold neither user nor password; set MLFLOW_TRACKING_USERNAME and"
                " MLFLOW_TRACKING_PASSWORD in the environment"
            )
        return self


class TrackingSection(Section):
    wandb: WandbOptions | None = None
    mlflow: MlflowOptions | None = None

    @property
    def options(self) -> dict[str, dict[str, Any]]:
        """Of each tracker that was asked for, by name."""
        asked = {"wandb": self.wandb, "mlflow": self.mlflow}
        return {name: options.model_dump(exclude_none=True) for name, options in asked.items() if options}
