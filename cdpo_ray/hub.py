"""What the hub does not give -> a line that says how to stage it."""

from huggingface_hub.errors import HfHubHTTPError

FETCH_ERRORS = (OSError, ValueError, HfHubHTTPError)
"""What huggingface_hub raises where something is not here and cannot be fetched."""


def how_to_stage(
    hub_id: str, filename: str, revision: str | None, error: Exception, *, key: str, dataset: bool = False
) -> str:
    """One line: what is missing, at which revision, why, and the command that fetches it beforehand.

    Args:
        filename: within the hub id; empty: all of it.
        error: one of `FETCH_ERRORS`.
        key: of the configuration.
        dataset: the hub id is a data set, not a model.
    """
    reason = str(error).strip().split("\n")[0]
    kind = "--repo-type dataset" if dataset else ""
    stage = " ".join(filter(None, ["hf download", kind, hub_id, filename, "--revision", revision]))
    return f"`{key}` {hub_id} (revision {revision}): cannot be fetched: {reason}; stage it first: `{stage}`"
