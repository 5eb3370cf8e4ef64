"""Exported folder -> repository on the hub."""

from pathlib import Path

from huggingface_hub import HfApi

from cdpo_ray.errors import ExportError
from cdpo_ray.hub import FETCH_ERRORS, how_to_upload


def push(folder: Path, hub_id: str, *, dataset: bool) -> str:
    """Upload a folder in one commit; a repository that does not exist is created, private.

    The token is that of the environment (``HF_TOKEN``) or of `hf auth login`; it is never printed.

    Args:
        folder: on this machine.
        hub_id: ``organization/name``.
        dataset: whether the repository is a data set, not a model.

    Returns:
        Address of the commit.

    Raises:
        ExportError: the hub cannot be reached, or refuses.
    """
    kind = "dataset" if dataset else "model"
    try:
        api = HfApi()
        api.create_repo(hub_id, repo_type=kind, private=True, exist_ok=True)
        done = api.upload_folder(
            repo_id=hub_id, folder_path=folder, repo_type=kind, commit_message="Upload an export of cdpo_ray"
        )
    except FETCH_ERRORS as error:
        raise ExportError(how_to_upload(hub_id, str(folder), error, dataset=dataset)) from None
    return str(done.commit_url)
