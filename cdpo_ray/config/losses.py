"""Losses of preference training, each with its options."""

from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BeforeValidator,
    Discriminator,
    Field,
    SerializerFunctionWrapHandler,
    Tag,
    model_serializer,
)

from cdpo_ray.config.section import Section, check_name, named

USER_LOSS = "user"
"""Tag of `UserLoss`, whose names are not a closed list."""


class _Loss(Section):
    name: str

    @property
    def options_of_function(self) -> dict[str, Any]:
        """Keyword arguments of the loss as a function of the margin."""
        return {}

    @property
    def arguments(self) -> dict[str, Any]:
        """Keyword arguments of `cdpo_ray.training.losses.preference_loss`."""
        return {"loss": self.name, "options": self.options_of_function}

    @property
    def sentence(self) -> str:
        """Name and options in one line."""
        plain: Any = self.model_dump(exclude_defaults=True)
        if isinstance(plain, str):
            return plain
        return f"{self.name} ({', '.join(f'{key} {value}' for key, value in plain.items() if key != 'name')})"

    @model_serializer(mode="wrap")
    def _name_alone_if_all_else_is_default(self, serialize: SerializerFunctionWrapHandler) -> Any:
        fields = type(self).model_fields.items()
        is_default = all(
            getattr(self, key) == field.get_default(call_default_factory=True) for key, field in fields if key != "name"
        )
        return self.name if is_default else serialize(self)


class _MarginLoss(_Loss):
    sft_weight: Annotated[float, Field(ge=0)] = 0.0
    """Adds this multiple of the chosen image's denoising error, times beta/2, to the loss. Raise it if the error on
    chosen images rises during training. 0: the plain loss."""

    @property
    def arguments(self) -> dict[str, Any]:
        return super().arguments | {"sft_weight": self.sft_weight}


class DpoLoss(_MarginLoss):
    """-log sigmoid(m) of the margin m, the paper's."""

    name: Literal["dpo"] = "dpo"


class IpoLoss(_MarginLoss):
    """(m - 1/2)^2 of the margin m."""

    name: Literal["ipo"] = "ipo"


class HingeLoss(_MarginLoss):
    """max(0, 1 - m) of the margin m."""

    name: Literal["hinge"] = "hinge"


class RobustLoss(_MarginLoss):
    """`dpo`, corrected for wrong labels."""

    name: Literal["robust"] = "robust"

    label_smoothing: Annotated[float, Field(gt=0, lt=0.5)] = 0.1
    """Share of labels assumed to be wrong; only for `robust`. The default assumes one in ten; set it to the share
    measured on your labels."""

    @property
    def options_of_function(self) -> dict[str, Any]:
        return {"label_smoothing": self.label_smoothing}


class SftLoss(_Loss):
    """The chosen image's denoising error alone."""

    name: Literal["sft"] = "sft"


LOSS_VARIANTS = {loss.model_fields["name"].default: loss for loss in (DpoLoss, IpoLoss, HingeLoss, RobustLoss, SftLoss)}


def _known_loss(name: str) -> str:
    return check_name(name, LOSS_VARIANTS)


def _plain_options(options: dict[str, Any]) -> dict[str, Any]:
    if faulty := [name for name, value in options.items() if not isinstance(value, bool | int | float | str)]:
        raise ValueError(f"`{faulty[0]}` must be a number, a text, true or false")
    return options


class UserLoss(_MarginLoss):
    """A user's own function of the margin."""

    name: Annotated[str, AfterValidator(_known_loss)]
    """`dpo`: -log sigmoid(m) of the margin m, the paper's. `ipo`: (m - 1/2)^2. `hinge`: max(0, 1 - m). `robust`: `dpo`
    corrected for a share `label_smoothing` of wrong labels. `sft`: the chosen image's denoising error alone, a baseline
    without preferences. `module:function`: your own function, which takes margins `[pair]` as a tensor, and `options`
    as keyword arguments, and returns losses `[pair]`."""

    options: Annotated[dict[str, Any], Field(default_factory=dict), AfterValidator(_plain_options)]
    """Keyword arguments of your own function; only for `module:function`."""

    @property
    def options_of_function(self) -> dict[str, Any]:
        return self.options


def _named(given: Any) -> Any:
    if not isinstance(given, str | dict | _Loss):
        raise ValueError("must be a name, or a mapping of `name` and options")
    return {"name": "dpo"} | given if isinstance(given, dict) else named(given)


def _tag(given: Any) -> str:
    name = given["name"] if isinstance(given, dict) else given.name
    return name if isinstance(name, str) and name in LOSS_VARIANTS else USER_LOSS


Loss = Annotated[
    Annotated[DpoLoss, Tag("dpo")]
    | Annotated[IpoLoss, Tag("ipo")]
    | Annotated[HingeLoss, Tag("hinge")]
    | Annotated[RobustLoss, Tag("robust")]
    | Annotated[SftLoss, Tag("sft")]
    | Annotated[UserLoss, Tag(USER_LOSS)],
    Discriminator(_tag),
    BeforeValidator(_named),
]
