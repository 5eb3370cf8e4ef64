"""What every section shares: frozen, nothing unknown, weights pinned."""

import re
from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

HUB_ID = re.compile(r"^[\w.-]+/[\w.-]+$")
COMMIT = re.compile(r"^[0-9a-f]{40}$")
OBJECT_STORES = ("s3", "gs")
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


def check_place(text: str) -> str:
    """A folder on local disk or in an object store.

    Raises:
        ValueError: there are credentials in it, or it is of another kind.
    """
    if without_credentials(text) != text:
        raise ValueError("must not hold credentials; give them by the environment")
    scheme, separator, _ = text.partition("://")
    if separator and scheme not in OBJECT_STORES:
        raise ValueError(f"must be a local folder, {' or '.join(f'{store}://...' for store in OBJECT_STORES)}")
    return text


def without_credentials(text: str) -> str:
    """A text to show: of an address with a user and a password in it, neither."""
    return re.sub(r"://[^/\s]*@", "://***@", text)


Place = Annotated[str, Field(min_length=1), AfterValidator(check_place)]


def check_pinned(place: str, revision: str | None, *, key: str, revision_key: str, kind: str) -> None:
    """A file or folder (`kind`) that is here, or a hub id at a commit; the keys are named in errors."""
    if Path(place).is_file() if kind == "file" else Path(place).is_dir():
        return
    if not HUB_ID.match(place):
        raise ValueError(f"`{key}` must be an existing {kind} or a hub id, got {place!r}")
    if revision is None or not COMMIT.match(revision):
        raise ValueError(f"`{revision_key}` must be a commit of 40 hex digits for a hub id, got {revision!r}")


def check_weights(path: str, revision: str | None) -> None:
    if path == "embedded" or Path(path).is_dir():
        return
    if Path(path).is_file():
        raise ValueError(
            f"`path` must be a folder in diffusers layout, got the file {path!r}; load a one-file checkpoint by"
            " `from_single_file` of diffusers, and give the folder that its `save_pretrained` writes"
        )
    if not HUB_ID.match(path) or path.startswith(("./", "../")):
        raise ValueError(f"`path` must be 'embedded', an existing folder or a hub id, got {path!r}: no such folder")
    if revision is None or not COMMIT.match(revision):
        raise ValueError(
            f"`path` {path!r} is no folder here, so it is read as a hub id, which needs `revision`"
            f" (a full commit of 40 hex digits), got {revision!r}"
        )
