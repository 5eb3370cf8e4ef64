"""Published weights: refused unless verified and complete; their code never runs."""

import json
import shutil
import stat
from pathlib import Path

import pytest
import torch
from reward_models import MakesFolder, build_tiny_clip, sha256
from transformers import CLIPModel

from cdpo_ray.errors import RewardError
from cdpo_ray.rewards.weights import converted, hub_file, hub_folder, model_from_folder

COMMIT = "0123456789abcdef0123456789abcdef01234567"
KEY = "rewards.some.checkpoint"


@pytest.fixture(autouse=True)
def converted_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr("cdpo_ray.rewards.weights.CONVERTED_DIR", tmp_path / "converted")
    return tmp_path / "converted"


def test_missing_weights_offline_are_reported_in_one_line_with_advice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    reason = "is not on this machine and cannot be fetched (HF_HUB_OFFLINE is set); download it with"
    with pytest.raises(RewardError, match="cannot be fetched") as caught:
        hub_file("someone/scorer", "weights.pt", COMMIT, key=KEY)
    assert str(caught.value) == (
        f"`{KEY}` someone/scorer (revision {COMMIT}): {reason} `hf download someone/scorer weights.pt"
        f" --revision {COMMIT}`, after which HF_HUB_OFFLINE=1 may be set"
    )
    with pytest.raises(RewardError, match="cannot be fetched") as caught:
        hub_folder("someone/clip", COMMIT, key=KEY, files=("*.json", "*.txt"))
    assert str(caught.value) == (
        f"`{KEY}` someone/clip (revision {COMMIT}): {reason} `hf download someone/clip"
        f' --include "*.json" --include "*.txt" --revision {COMMIT}`, after which HF_HUB_OFFLINE=1 may be set'
    )


def test_a_token_in_an_error_of_the_hub_is_not_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuses(*_: object, **__: object) -> None:
        raise ValueError("Illegal header value b'Bearer hf_secret'")

    monkeypatch.setattr("cdpo_ray.rewards.weights.hf_hub_download", refuses)
    with pytest.raises(RewardError, match=r"cannot be fetched \(ValueError\); download it") as caught:
        hub_file("someone/scorer", "weights.pt", COMMIT, key=KEY)
    assert "hf_secret" not in str(caught.value)


def test_local_files_and_folders_need_no_hub(tmp_path: Path) -> None:
    (tmp_path / "weights.pt").touch()
    assert hub_file(str(tmp_path / "weights.pt"), "other.pt", None, key=KEY) == tmp_path / "weights.pt"
    assert hub_folder(str(tmp_path), None, key=KEY) == tmp_path


@pytest.mark.parametrize("inside", ["state_dict", None])
def test_a_pinned_pickle_is_converted_once_and_read_bit_for_bit(
    tmp_path: Path, converted_dir: Path, inside: str | None
) -> None:
    generator = torch.Generator().manual_seed(0)
    whole = torch.randn(6, 4, generator=generator)
    # views and a transposed matrix, which safetensors refuses, and fp16 as in HPS v2.1
    tensors = {"a": whole[:3], "b": whole[3:].T, "c": whole.half(), "d": torch.tensor(3)}
    path = tmp_path / "weights.pt"
    torch.save({inside: tensors, "epoch": 3} if inside else tensors, path)
    checksum = sha256(path)
    found = converted(path, checksum, key=KEY)
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[name], value) and found[name].dtype == value.dtype for name, value in tensors.items())
    (safe,) = converted_dir.iterdir()
    assert safe.name == f"{checksum}.safetensors" and stat.S_IMODE(safe.stat().st_mode) == 0o644
    made = safe.stat().st_mtime_ns
    assert converted(path, checksum, key=KEY).keys() == tensors.keys()
    assert safe.stat().st_mtime_ns == made


def test_a_pickle_of_another_checksum_is_refused_before_it_is_read(tmp_path: Path, converted_dir: Path) -> None:
    path = tmp_path / "weights.pt"
    torch.save({"state_dict": MakesFolder(tmp_path / "ran")}, path)
    with pytest.raises(RewardError, match=rf"`{KEY}` .*/weights\.pt: SHA-256 must be 0{{64}}, got {sha256(path)}; "):
        converted(path, "0" * 64, key=KEY)
    assert not (tmp_path / "ran").exists() and not converted_dir.exists()


def test_fault_23_a_pickle_that_runs_code_is_refused_and_does_not_run(tmp_path: Path, converted_dir: Path) -> None:
    path = tmp_path / "evil.pt"
    torch.save({"state_dict": {"a": torch.zeros(2), "b": MakesFolder(tmp_path / "ran")}}, path)
    with pytest.raises(RewardError, match=rf"`{KEY}` .*/evil\.pt: holds more than tensors and was not run: "):
        converted(path, sha256(path), key=KEY)
    assert not (tmp_path / "ran").exists() and not converted_dir.exists()


@pytest.mark.parametrize("content", [[torch.zeros(2)], {"state_dict": {"a": torch.zeros(2), "epoch": 3}}, 3])
def test_a_pickle_of_anything_but_named_tensors_is_refused(
    tmp_path: Path, content: object, converted_dir: Path
) -> None:
    torch.save(content, tmp_path / "odd.pt")
    with pytest.raises(RewardError, match=rf"`{KEY}` .*/odd\.pt: must hold a dict of tensors"):
        converted(tmp_path / "odd.pt", sha256(tmp_path / "odd.pt"), key=KEY)
    assert not converted_dir.exists()


@pytest.mark.parametrize("content", [b"", b"no pickle at all", b"PK\x03\x04 cut off"])
def test_a_damaged_file_is_refused_by_its_path(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "damaged.pt").write_bytes(content)
    with pytest.raises(RewardError, match=rf"`{KEY}` .*/damaged\.pt: "):
        converted(tmp_path / "damaged.pt", sha256(tmp_path / "damaged.pt"), key=KEY)


@pytest.fixture(scope="module")
def tiny_clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_clip(tmp_path_factory.mktemp("whole"))


def test_fault_23_a_folder_whose_weights_are_a_pickle_is_refused_and_does_not_run(
    tiny_clip: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(tiny_clip, tmp_path / "pickled")
    (folder / "model.safetensors").unlink()
    torch.save({"logit_scale": MakesFolder(tmp_path / "ran")}, folder / "pytorch_model.bin")
    with pytest.raises(RewardError, match=rf"`{KEY}` .*/pickled: cannot be loaded as CLIPModel: .*safetensors"):
        model_from_folder(CLIPModel, folder, key=KEY)
    assert not (tmp_path / "ran").exists()


def test_fault_23_code_in_a_folder_does_not_run(tiny_clip: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_clip, tmp_path / "coded")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"auto_map": {"AutoModel": "evil.Evil"}}))
    (folder / "evil.py").write_text(f"import os; os.mkdir({str(tmp_path / 'ran')!r})\n")
    assert type(model_from_folder(CLIPModel, folder, key=KEY)) is CLIPModel
    assert not (tmp_path / "ran").exists()


def test_a_folder_of_damaged_weights_is_refused_by_its_path(tiny_clip: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_clip, tmp_path / "damaged")
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(RewardError, match=rf"`{KEY}` .*/damaged: cannot be loaded as CLIPModel: "):
        model_from_folder(CLIPModel, folder, key=KEY)


def test_an_fp16_model_is_loaded_as_fp32(tiny_clip: Path, tmp_path: Path) -> None:
    CLIPModel.from_pretrained(tiny_clip).half().save_pretrained(tmp_path / "halves")
    assert model_from_folder(CLIPModel, tmp_path / "halves", key=KEY).dtype == torch.float32
