"""Messages about files that cannot be downloaded from the hub."""

import errno

from cdpo_ray.hub import how_to_download


def test_fault_25_a_failed_download_is_one_line_with_the_command_that_stages_the_file() -> None:
    error = OSError("no route to the hub\nand a header: Bearer hf_secret")
    assert how_to_download("some/clip", "model.safetensors", "0f", error, key="rewards.clip.checkpoint") == (
        "`rewards.clip.checkpoint` some/clip (revision 0f): is not on this machine and cannot be fetched (OSError);"
        " download it with `hf download some/clip model.safetensors --revision 0f`,"
        " after which HF_HUB_OFFLINE=1 may be set"
    )
    assert "`hf download --repo-type dataset some/set data.csv --revision 0f`" in how_to_download(
        "some/set", "data.csv", "0f", error, key="prompts.train.source", dataset=True
    )


def test_fault_39_the_cause_of_a_chained_exception_is_named() -> None:
    error = FileNotFoundError("the file is not in the cache")
    error.__cause__ = TimeoutError("Bearer hf_secret")
    message = how_to_download("some/clip", "", "0f", error, key="rewards.clip.checkpoint")
    assert "cannot be fetched (the hub does not answer in time: try again later); download it with" in message


def test_fault_39_a_full_disk_is_named() -> None:
    error = OSError(errno.ENOSPC, "No space left on device", "/cache/blob")
    message = how_to_download("some/clip", "", "0f", error, key="rewards.clip.checkpoint")
    assert "cannot be fetched (No space left on device); download it with" in message
