"""A process group for the tests that train in their own process."""

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(scope="session")
def group_of_one() -> Iterator[None]:
    """One group for the whole session: DeepSpeed keeps the first one and fails once it is destroyed."""
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def one_worker(group_of_one: None) -> Iterator[None]:
    """Environment variables that a launcher sets for the only worker."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}.items():
            patch.setenv(name, value)
        yield
