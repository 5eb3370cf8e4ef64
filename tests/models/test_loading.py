"""Every weight of a module comes from its folder, and failed downloads are reported with their cause."""

import contextlib
import hashlib
import http.server
import json
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel
from huggingface_hub import constants, hf_api
from original_names import original_weights, write_single_file
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import CLIPTextModel

from cdpo_ray.errors import ModelError
from cdpo_ray.models import load_model
from cdpo_ray.models.loading import fetch, load_part

COMMIT = "0" * 40
KINDS = {"unet": UNet2DConditionModel, "vae": AutoencoderKL, "text_encoder": CLIPTextModel}

Weights = dict[str, Tensor]
Change = Callable[[Weights], Weights]


def weights_path(part_dir: Path) -> Path:
    (found,) = part_dir.glob("*.safetensors")
    return found


@pytest.fixture
def changed(tiny_sd15: Path, tmp_path: Path) -> Callable[[str, Change], Path]:
    """Function that copies a part of the tiny model with changed weights."""

    def change(part: str, other: Change) -> Path:
        part_dir = Path(shutil.copytree(tiny_sd15 / part, tmp_path / part))
        path = weights_path(part_dir)
        save_file(other(load_file(path)), path, metadata={"format": "pt"})
        return part_dir

    return change


def without(end: str) -> Change:
    return lambda weights: {name: value for name, value in weights.items() if not name.endswith(end)}


def renamed(old: str, new: str) -> Change:
    return lambda weights: {name.replace(old, new): value for name, value in weights.items()}


def prefixed(prefix: str) -> Change:
    return lambda weights: {f"{prefix}{name}": value for name, value in weights.items()}


def plus(**others: Tensor) -> Change:
    return lambda weights: weights | {name.replace("__", "."): value for name, value in others.items()}


def with_lora(weights: Weights) -> Weights:
    names = [name for name in weights if name.endswith("to_q.weight")]
    factors = {name.replace("to_q.weight", "to_q.lora_A.default.weight"): torch.zeros(2, 2) for name in names}
    return renamed("to_q.weight", "to_q.base_layer.weight")(weights) | factors


def shorter(end: str) -> Change:
    return lambda weights: {
        name: value[:-1].clone() if name.endswith(end) else value for name, value in weights.items()
    }


@pytest.mark.parametrize(
    ("part", "other", "message"),
    [
        ("text_encoder", without("layers.0.mlp.fc1.weight"), r"lacks 1 weights of CLIPText.* the first .*fc1\.weight$"),
        ("text_encoder", prefixed("cond_stage_model."), r"lacks \d+ weights .*, and has \d+ weights .*cond_stage"),
        ("text_encoder", plus(foo__weight=torch.zeros(1)), r"has 1 weights that .* lacks, .*foo\.weight$"),
        ("text_encoder", shorter("fc1.weight"), r"of shape \[63, 32\], not \[64, 32\]"),
        ("unet", without("conv_in.bias"), r"unet/ lacks 1 weights of UNet2DConditionModel, the first conv_in\.bias$"),
        ("unet", plus(motion__weight=torch.zeros(1)), r"unet/ has 1 weights that .* lacks, .* motion\.weight$"),
        ("unet", with_lora, r"unet/ lacks .*it was saved with a LoRA attached: merge or unload"),
        ("unet", shorter("conv_in.bias"), r"conv_in\.bias"),
        ("vae", without("decoder.conv_out.weight"), r"vae/ lacks 1 weights of AutoencoderKL"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)  # fmt: skip
def test_fault_37_missing_and_unexpected_weights_are_named(
    part: str, other: Change, message: str, changed: Callable[[str, Change], Path]
) -> None:
    with pytest.raises(ValueError, match=message):
        load_part(KINDS[part], changed(part, other), torch.float32)


def whole_clip(weights: Weights) -> Weights:
    return weights | {
        "text_model.embeddings.position_ids": torch.arange(77)[None],
        "text_projection.weight": torch.zeros(2, 2),
        "vision_model.embeddings.class_embedding": torch.zeros(2),
        "logit_scale": torch.zeros(1),
    }


@pytest.mark.parametrize(
    ("part", "other"),
    [
        ("text_encoder", whole_clip),
        ("text_encoder", prefixed("text_model.")),
        ("vae", renamed("attentions.0.to_q", "attentions.0.query")),
    ],
)
def test_older_names_and_the_rest_of_clip_are_accepted(
    part: str, other: Change, tiny_sd15: Path, changed: Callable[[str, Change], Path]
) -> None:
    assert_same(load_part(KINDS[part], changed(part, other), torch.float32), KINDS[part], tiny_sd15 / part)


def assert_same(net: nn.Module, kind: Any, part_dir: Path) -> None:
    stock = kind.from_pretrained(part_dir).state_dict()
    found = net.state_dict()
    assert list(found) == list(stock) and all(torch.equal(found[name], stock[name]) for name in stock)


def split(part_dir: Path, variant: str = "") -> None:
    """Replace the weights by two shards and their index."""
    path = weights_path(part_dir)
    stem, weights = path.name.split(".")[0], load_file(path)
    path.unlink()
    files = [f"{stem}{variant}-0000{number}-of-00002.safetensors" for number in (1, 2)]
    halves = dict(zip(files, (sorted(weights)[0::2], sorted(weights)[1::2]), strict=True))
    for file, names in halves.items():
        save_file({name: weights[name] for name in names}, part_dir / file, metadata={"format": "pt"})
    index = {"metadata": {}, "weight_map": {name: file for file, names in halves.items() for name in names}}
    (part_dir / f"{stem}.safetensors.index{variant}.json").write_text(json.dumps(index))


@pytest.mark.parametrize("sharded", [False, True])
@pytest.mark.parametrize("part", ["unet", "text_encoder"])
def test_weights_of_a_single_variant_are_loaded(
    part: str, sharded: bool, tiny_sd15: Path, changed: Callable[[str, Change], Path]
) -> None:
    part_dir = changed(part, dict)
    path = weights_path(part_dir)
    if sharded:
        split(part_dir, ".fp16")
    else:
        path.rename(path.with_suffix(".fp16.safetensors"))
    assert_same(load_part(KINDS[part], part_dir, torch.float32), KINDS[part], tiny_sd15 / part)


def test_fault_37_a_weight_that_is_in_the_index_but_not_in_its_shard_is_named(
    changed: Callable[[str, Change], Path],
) -> None:
    part_dir = changed("unet", dict)
    split(part_dir)
    shard = min(part_dir.glob("*.safetensors"))
    weights = load_file(shard)
    lost = min(weights)
    save_file({name: value for name, value in weights.items() if name != lost}, shard, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=f"unet/ lacks 1 weights of UNet2DConditionModel, the first {lost}$"):
        load_part(UNet2DConditionModel, part_dir, torch.float32)


@pytest.mark.parametrize("part", ["unet", "text_encoder"])
def test_fault_37_truncated_weights_and_invalid_configurations_are_reported_in_one_line(
    part: str, tiny_sd15: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(tiny_sd15, tmp_path / "model"))
    path = weights_path(folder / part)
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(ModelError, match=rf"^`model\.path` {folder} \(revision None\): cannot be loaded: .*; give a"):
        load_model("stable_diffusion", path=str(folder), device="cpu")
    path.write_bytes(content)
    config = folder / part / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"act_fn": {}, "num_attention_heads": "\x1b[31m"}))
    with pytest.raises(ModelError, match=r"^`model\.path` .*: cannot be loaded: [ -~]*$"):
        load_model("stable_diffusion", path=str(folder), device="cpu")


def test_a_missing_part_of_a_local_model_is_not_looked_up_on_the_hub(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="unet/ is missing"):
        load_part(UNet2DConditionModel, tmp_path / "unet", torch.float32)


ANSWERS: dict[str, tuple[int, dict[str, str], str]] = {
    "unauthorized": (401, {}, r"is not on the hub, or is private \(401\)"),
    "gated": (403, {"X-Error-Code": "GatedRepo"}, r"is gated \(403\); accept its terms"),
    "gone": (404, {"X-Error-Code": "RepoNotFound"}, r"is not on the hub, or is private \(404\); correct the name"),
    "renumbered": (404, {"X-Error-Code": "RevisionNotFound"}, r"has no such revision \(404\)"),
    "incomplete": (404, {"X-Error-Code": "EntryNotFound"}, r"lacks a required file \(404\)"),
    "closed": (403, {"X-Error-Message": "Access to this resource is disabled."}, r"is disabled on the hub \(403\)"),
    "forbidden": (403, {}, r"the hub denies access \(403\)"),
    "busy": (429, {}, r"too many requests to the hub \(429\)"),
    "down": (503, {}, r"the hub fails \(503\); try again later"),
    "odd": (418, {}, r"answers with status 418"),
}


@pytest.fixture(scope="module")
def hub() -> Iterator[str]:
    """Address of a fake hub that answers as listed in `ANSWERS`."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            status, headers, _ = next(answer for name, answer in ANSWERS.items() if f"/some/{name}" in self.path)
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", "0")
            self.end_headers()

        do_HEAD = do_GET

        def log_message(self, *_: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.fixture
def of_hub(hub: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", hub)
    monkeypatch.setattr(hf_api.api, "endpoint", hub)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    monkeypatch.delenv("HF_TOKEN", raising=False)


@pytest.mark.usefixtures("of_hub")
@pytest.mark.parametrize("name", ANSWERS)
def test_fault_39_the_hubs_answer_is_reported_with_advice(name: str) -> None:
    with pytest.raises(ModelError, match=rf"^`model\.path` some/{name} \(revision {COMMIT}\): .*{ANSWERS[name][2]}"):
        fetch(StableDiffusionPipeline, f"some/{name}", COMMIT, {})


@pytest.mark.usefixtures("of_hub")
@pytest.mark.parametrize("name", ["unauthorized", "gated", "forbidden", "busy", "down"])
def test_fault_39_no_message_contains_a_token(
    name: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_canary")
    with pytest.raises(ModelError, match=rf"\({ANSWERS[name][0]}\)") as caught:
        fetch(StableDiffusionPipeline, f"some/{name}", COMMIT, {})
    assert "canary" not in str(caught.value) + "".join(capfd.readouterr())
    if name == "unauthorized":
        assert "the hub refuses the token" in str(caught.value)


@pytest.mark.usefixtures("of_hub")
def test_fault_39_offline_mode_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ModelError, match=r"cannot be fetched \(HF_HUB_OFFLINE is set\); download it with `hf download"):
        fetch(StableDiffusionPipeline, "some/gone", COMMIT, {})


@pytest.fixture
def serving(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Path], list[str]]]:
    """Function that makes a folder the hub's model `some/tiny`; returns the list of the files that are requested."""
    with contextlib.ExitStack() as stack:

        def serve(folder: Path) -> list[str]:
            requested: list[str] = []
            files = [str(path.relative_to(folder)) for path in sorted(folder.rglob("*")) if path.is_file()]

            class Handler(http.server.BaseHTTPRequestHandler):
                def do_GET(self) -> None:
                    file = self.path.partition(f"/resolve/{COMMIT}/")[2]
                    content: bytes | str = b""
                    if file in files:
                        content = (folder / file).read_bytes()
                        requested.append(file)
                    elif "/tree/" in self.path:
                        content = json.dumps([{"type": "file", "path": name, "size": 1, "oid": ""} for name in files])
                    elif "/api/models/some/tiny" in self.path:
                        siblings = [{"rfilename": name} for name in files]
                        content = json.dumps({"id": "some/tiny", "sha": COMMIT, "siblings": siblings})
                    content = content if isinstance(content, bytes) else content.encode()
                    self.send_response(200 if content else 404)
                    self.send_header("X-Repo-Commit", COMMIT)
                    self.send_header("ETag", f'"{hashlib.sha1(content).hexdigest()}"')
                    self.send_header("Content-Length", str(len(content)))
                    self.end_headers()
                    if self.command == "GET":
                        self.wfile.write(content)

                do_HEAD = do_GET

                def log_message(self, *_: object) -> None:
                    pass

            server = stack.enter_context(http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler))
            threading.Thread(target=server.serve_forever, daemon=True).start()
            stack.callback(server.shutdown)
            address = f"http://127.0.0.1:{server.server_port}"
            monkeypatch.setattr(constants, "ENDPOINT", address)
            monkeypatch.setattr(
                constants, "HUGGINGFACE_CO_URL_TEMPLATE", address + "/{repo_id}/resolve/{revision}/{filename}"
            )
            monkeypatch.setattr(hf_api.api, "endpoint", address)
            monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
            return requested

        yield serve


@pytest.mark.parametrize("sharded", [False, True])
def test_a_hub_model_whose_only_weights_are_a_variant_is_downloaded_and_loaded(
    sharded: bool, tiny_sd15: Path, tmp_path: Path, serving: Callable[[Path], list[str]]
) -> None:
    folder = Path(shutil.copytree(tiny_sd15, tmp_path / "hub"))
    for part in KINDS:
        path = weights_path(folder / part)
        if sharded:
            split(folder / part, ".fp16")
        else:
            path.rename(path.with_suffix(".fp16.safetensors"))
    requested = serving(folder)
    model = load_model("stable_diffusion", path="some/tiny", revision=COMMIT, device="cpu")
    assert_same(model.denoiser, UNet2DConditionModel, tiny_sd15 / "unet")
    assert sum(name.endswith(".safetensors") for name in requested) >= (6 if sharded else 3)


def test_a_single_file_is_completed_by_the_hubs_configurations_and_no_weights_are_downloaded(
    tiny_sd15: Path, tmp_path: Path, serving: Callable[[Path], list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_single_file(original_weights(tiny_sd15, "sd1"), tmp_path / "model.safetensors")
    model = {"path": str(path), "config": {"path": "some/tiny", "revision": COMMIT}, "device": "cpu"}
    requested = serving(tiny_sd15)
    assert_same(load_model("stable_diffusion", **model).denoiser, UNet2DConditionModel, tiny_sd15 / "unet")
    assert "unet/config.json" in requested and not any(name.endswith(".safetensors") for name in requested)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert_same(load_model("stable_diffusion", **model).denoiser, UNet2DConditionModel, tiny_sd15 / "unet")
    (snapshot,) = (tmp_path / "cache").glob("models--some--tiny/snapshots/*")
    (snapshot / "tokenizer" / "tokenizer.json").unlink()
    with pytest.raises(ModelError, match=r"^`model\.config\.path` .*tokenizer/ must hold tokenizer\.json"):
        load_model("stable_diffusion", **model)
    shutil.rmtree(tmp_path / "cache")
    with pytest.raises(
        ModelError,
        match=r"^`model\.config\.path` some/tiny .*HF_HUB_OFFLINE.* `hf download some/tiny --include '\*\.json'",
    ):
        load_model("stable_diffusion", **model)


@pytest.mark.usefixtures("of_hub")
@pytest.mark.parametrize("variant", ["", ".fp16"])
def test_a_staged_hub_model_with_a_single_variant_is_loaded_offline(
    variant: str, tiny_sd15: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    snapshot = tmp_path / "cache" / "models--some--tiny" / "snapshots" / COMMIT
    shutil.copytree(tiny_sd15, snapshot)
    for path in list(snapshot.rglob("*.safetensors")):
        path.rename(path.with_name(path.name.replace(".safetensors", f"{variant}.safetensors")))
    model = load_model("stable_diffusion", path="some/tiny", revision=COMMIT, device="cpu")
    assert_same(model.denoiser, UNet2DConditionModel, tiny_sd15 / "unet")
