"""Errors of the hub -> one line with the cause and the remedy."""

from collections.abc import Iterator

from huggingface_hub import get_token

FETCH_ERRORS = (Exception,)
"""Exceptions of huggingface_hub and its HTTP library if a file is not cached and cannot be downloaded."""

_NO_ANSWER = {
    "OfflineModeIsEnabled": "HF_HUB_OFFLINE is set",
    "ProxyError": "the proxy refuses the connection: correct HTTPS_PROXY",
    "FileMetadataError": "the server is not a hub: correct HF_ENDPOINT or the proxy",
    "TimeoutException": "the hub does not answer in time: try again later",
    "Timeout": "the hub does not answer in time: try again later",
    "TimeoutError": "the hub does not answer in time: try again later",
    "SSLError": "the hub's certificate is not trusted: correct SSL_CERT_FILE or the proxy",
    "TransportError": "the hub cannot be reached: check the network, HTTPS_PROXY and HF_ENDPOINT",
    "ConnectionError": "the hub cannot be reached: check the network, HTTPS_PROXY and HF_ENDPOINT",
    "LocalEntryNotFoundError": "a part of it is not in the cache",
}
"""Exception class of huggingface_hub or an HTTP library -> why the hub does not answer; the first match is used."""


def how_to_download(
    hub_id: str, filename: str, revision: str | None, error: Exception, *, key: str, dataset: bool = False
) -> str:
    """One line with what is missing, at which revision, why, and what to do; if it helps, how to download it.

    The text of the error is never part of it: it may hold an address, or a header with a token.

    Args:
        hub_id: id of the model or data set.
        filename: file in the repository, or options of `hf download` that select files; empty: all files.
        revision: commit; ``None``: the latest.
        error: one of `FETCH_ERRORS`.
        key: key of the configuration that names the hub id.
        dataset: whether the hub id is a data set, not a model.
    """
    where = f"`{key}` {hub_id} (revision {revision})"
    cause = cause_of(error)
    if cause and (answer := _answer(cause)):
        return f"{where}: {answer}"
    why = (cause and _no_answer(cause)) or getattr(error, "strerror", None) or type(error).__name__
    kind = "--repo-type dataset" if dataset else ""
    download = " ".join(filter(None, ["hf download", kind, hub_id, filename, "--revision", revision]))
    return (
        f"{where}: is not on this machine and cannot be fetched ({why}); download it with"
        f" `{download}`, after which HF_HUB_OFFLINE=1 may be set"
    )


def how_to_upload(hub_id: str, folder: str, error: Exception, *, dataset: bool = False) -> str:
    """One line with what was not uploaded, why, and the command that uploads it; without the text of the error.

    Args:
        hub_id: id of the repository.
        folder: folder on this machine.
        error: one of `FETCH_ERRORS`.
        dataset: whether the repository is a data set, not a model.
    """
    cause = cause_of(error)
    status = getattr(getattr(cause, "response", None), "status_code", None)
    if status in (401, 403, 404):
        why = f"the hub refuses ({status}); give a token that may write there (HF_TOKEN, or `hf auth login`)"
    elif status is not None:
        why = f"the hub answers with status {status}; try again later"
    else:
        why = (cause and _no_answer(cause)) or getattr(error, "strerror", None) or type(error).__name__
    kind = "--repo-type dataset" if dataset else ""
    upload = " ".join(filter(None, ["hf upload", kind, hub_id, folder, "."]))
    return f"`--push` {hub_id}: {why}; the export is complete, `{upload}` uploads it"


def cause_of(error: BaseException) -> BaseException | None:
    """The error of the hub or the network in the chain of an error's causes; ``None``: there is none."""
    causes = [each for each in _chain(error) if _answer(each) or _no_answer(each)]
    absent = "LocalEntryNotFoundError"  # its cause says why the download failed
    return next((each for each in causes if absent not in _kinds(each)), causes[0] if causes else None)


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)


def _kinds(error: BaseException) -> list[str]:
    return [kind.__name__ for kind in type(error).__mro__]


def _no_answer(error: BaseException) -> str | None:
    return next((_NO_ANSWER[kind] for kind in _kinds(error) if kind in _NO_ANSWER), None)


def _answer(error: BaseException) -> str | None:
    """Answer of the hub and the remedy; ``None``: it did not answer."""
    kinds = _kinds(error)
    if "HFValidationError" in kinds:
        return "is not a valid hub id; correct it"
    if "HfHubHTTPError" not in kinds:
        return None
    status = getattr(getattr(error, "response", None), "status_code", None)
    token = "a token that may read it (HF_TOKEN, or `hf auth login`)"
    if "GatedRepoError" in kinds:
        return f"is gated ({status}); accept its terms on its hub page, and give {token}"
    if "RepositoryNotFoundError" in kinds or (status == 401 and not get_token()):
        return f"is not on the hub, or is private ({status}); correct the name, or give {token}"
    if "RevisionNotFoundError" in kinds:
        return f"has no such revision ({status}); give a commit that exists on the hub"
    if "EntryNotFoundError" in kinds:
        return f"lacks a required file ({status}); correct the hub id, the revision or the name of the file"
    if "DisabledRepoError" in kinds:
        return f"is disabled on the hub ({status}); use another"
    if status == 401:
        return f"the hub refuses the token ({status}), which is invalid or has expired; give {token}"
    if status == 403:
        return f"the hub denies access ({status}); give {token}"
    if status == 429:
        return f"too many requests to the hub ({status}); wait some minutes, or give a token for a higher rate limit"
    if isinstance(status, int) and status >= 500:
        return f"the hub fails ({status}); try again later"
    return f"the hub answers with status {status}; correct the hub id, the revision or HF_ENDPOINT"
