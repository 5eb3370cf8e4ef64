"""Base class and value types that all sections share."""

import difflib
import os
import re
from collections.abc import Iterable
from types import UnionType
from typing import Annotated, Any, ClassVar, Union, get_args, get_origin

from pydantic import AfterValidator, BaseModel, ConfigDict, Field
from pydantic.fields import FieldInfo

from cdpo_ray.user_code import USER_FUNCTION

HUB_ID = re.compile(r"^[\w.-]+/[\w.-]+$")
COMMIT = re.compile(r"^[0-9a-f]{40}$")
WHERE_COMMITS_ARE = "the history of the hub page's `Files and versions` lists the commits"
OBJECT_STORES = ("s3", "gs")
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class Section(BaseModel):
    """Immutable values; unknown keys are refused, and the docstring below a key is its description."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True)

    HOW_NOT_WHAT: ClassVar[frozenset[str]] = frozenset()
    """Keys that decide how a step runs, or whether it fails, but not its outcome: a finished step stays valid."""

    @property
    def outcome(self) -> dict[str, Any]:
        """The keys that decide the outcome of a step, as plain values."""
        return self.model_dump(mode="json", exclude=set(self.HOW_NOT_WHAT))


def nearest(name: str, known: Iterable[str]) -> str | None:
    """The known name that is most similar, if any is similar enough to suggest."""
    return next(iter(difflib.get_close_matches(name, known, n=1)), None)


def check_name(name: str, known: Iterable[str]) -> str:
    """A known name, or a user's function ``module:function``.

    Raises:
        ValueError: the name is neither; suggests one that is similar.
    """
    if name in (known := tuple(known)) or USER_FUNCTION.match(name):
        return name
    near = nearest(name, known)
    hint = f"; did you mean {near!r}?" if near else ""
    raise ValueError(f"must be one of {', '.join(map(repr, known))} or 'module:function'{hint}")


def sections_in(annotation: Any) -> tuple[type[BaseModel], ...]:
    """Sections that the value of a field can be: one, none, or several for variants."""
    if isinstance(annotation, type):
        return (annotation,) if issubclass(annotation, BaseModel) else ()
    if get_origin(annotation) is Annotated:
        return sections_in(get_args(annotation)[0])
    is_union = get_origin(annotation) in (Union, UnionType)
    return tuple(section for each in get_args(annotation) for section in sections_in(each)) if is_union else ()


def fields_of(annotation: Any) -> dict[str, FieldInfo]:
    """Fields of a section; of variants, the fields that any of them has."""
    return {name: field for section in sections_in(annotation) for name, field in section.model_fields.items()}


def named(variant: Any) -> Any:
    """A variant that is given by its name alone, as a mapping."""
    return {"name": variant} if isinstance(variant, str) else variant


def check_place(text: str) -> str:
    """A folder on local disk, with `~` expanded, or in an object store.

    Raises:
        ValueError: the text contains credentials, or has an unsupported scheme.
    """
    if re.search(r"://[^/\s]*@", text):
        raise ValueError("must not contain credentials; set them in the environment")
    scheme, separator, _ = text.partition("://")
    if separator and scheme not in OBJECT_STORES:
        raise ValueError(f"must be a local folder, {' or '.join(f'{store}://...' for store in OBJECT_STORES)}")
    return os.path.expanduser(text)


def without_credentials(text: str) -> str:
    """A text to show: URLs lose user, password, and everything after ``?`` or ``#``, such as a key."""
    text = re.sub(r"(?<=://).*@|[^\s'\"/:@]{1,64}:[^\s/]{1,256}@", "***@", text)
    ends = r"(?=['\"](?:[,;:})\]\s]|$)|$)"  # a quote may be part of a key
    return re.sub(rf"(://[^\s?#]*[?#]|\?[^\s=]{{1,64}}=).+?{ends}", r"\1***", text)


def looked_for(path: str) -> str:
    """The absolute form of a missing path, for a message."""
    absolute = os.path.abspath(path)
    return absolute if path == absolute else f"{absolute} (relative paths start at the working directory)"


Place = Annotated[str, Field(min_length=1), AfterValidator(check_place)]
LocalPath = Annotated[str, Field(min_length=1), AfterValidator(os.path.expanduser)]
"""A path, or a built-in name or a hub id where the key allows one."""


def check_pinned(place: str, revision: str | None, *, key: str, revision_key: str, kind: str) -> None:
    """Check for an existing file or folder (`kind`), or a hub id with a commit; errors name both keys."""
    if os.path.isfile(place) if kind == "file" else os.path.isdir(place):
        return
    if not HUB_ID.match(place):
        raise ValueError(
            f"`{key}` must be an existing {kind} or a hub id, got {place!r}: no {kind} {looked_for(place)}"
        )
    if revision is None or not COMMIT.match(revision):
        raise ValueError(
            f"`{revision_key}` must be a commit of 40 hex digits for a hub id, got {revision!r}; {WHERE_COMMITS_ARE}"
        )


def is_single_file(path: Any) -> bool:
    """Whether a model's path is a file, which holds all of its weights."""
    return isinstance(path, str) and os.path.isfile(os.path.expanduser(path))


def check_is_safetensors(path: str) -> None:
    """Check for the ending of safetensors; pickled checkpoints can run code."""
    if not path.endswith(".safetensors"):
        raise ValueError(
            f"`path` must be a folder in diffusers layout or a .safetensors file, got the file {path!r}; pickled"
            " checkpoints (.ckpt, .pt) can run code and are not read: get or make the .safetensors version"
        )


def check_weights(path: str, revision: str | None) -> None:
    """Check for `embedded`, an existing folder, or a hub id with a commit."""
    if path == "embedded" or os.path.isdir(path):
        return
    if os.path.isfile(path):
        raise ValueError(f"`path` must be a folder in diffusers layout, or a hub id, got the file {path!r}")
    if path.endswith((".safetensors", ".ckpt")):
        raise ValueError(f"`path` {path!r}: no file {looked_for(path)}")
    if not HUB_ID.match(path) or path.startswith(("./", "../")):
        raise ValueError(
            f"`path` must be 'embedded', an existing folder or a hub id, got {path!r}: no folder {looked_for(path)}"
        )
    if revision is None or not COMMIT.match(revision):
        raise ValueError(
            f"`path` {path!r} is not a local folder, so it is read as a hub id, which needs `revision`"
            f" (a full commit of 40 hex digits), got {revision!r}; {WHERE_COMMITS_ARE}; as a folder it would be"
            f" {looked_for(path)}"
        )
