"""A tiny chat model, and a folder of kept answers that is not the user's."""

from pathlib import Path

import pytest


@pytest.fixture(scope="module")
def chat_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a tiny LLaVA with random weights, whose tokens have the words that answers are chosen from."""
    from tiny_captioners import CHOICES, build_llava

    return build_llava(tmp_path_factory.mktemp("models") / "llava", CHOICES)


@pytest.fixture
def local_answers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Answers of a local server, asked without a proxy, are kept in a temporary folder."""
    from cdpo_ray.rewards import kept_answers

    monkeypatch.setattr(kept_answers, "KEPT_DIR", tmp_path / "answers")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
