"""What the hub does not give -> a line that says how to stage it."""

FETCH_ERRORS = (Exception,)
"""What huggingface_hub, and the HTTP library under it, raise where something is not here and cannot be fetched."""


def how_to_stage(
    hub_id: str, filename: str, revision: str | None, error: Exception, *, key: str, dataset: bool = False
) -> str:
    """One line: what is missing, at which revision, and the command that fetches it beforehand.

    Of the error its name alone is told: what it says may hold an address, or a header with a token.

    Args:
        filename: within the hub id, or the options that choose files of it; empty: all of it.
        error: one of `FETCH_ERRORS`.
        key: of the configuration.
        dataset: the hub id is a data set, not a model.
    """
    kind = "--repo-type dataset" if dataset else ""
    stage = " ".join(filter(None, ["hf download", kind, hub_id, filename, "--revision", revision]))
    return (
        f"`{key}` {hub_id} (revision {revision}): is not on this machine and cannot be fetched"
        f" ({type(error).__name__}); stage it with `{stage}`, after which HF_HUB_OFFLINE=1 may be set"
    )
