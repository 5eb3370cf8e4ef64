"""What no line of the package may do: run code that came with weights or data, or read what is not pinned."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "cdpo_ray"
NEVER_IMPORTED = {"cloudpickle", "dill", "joblib", "marshal", "shelve", "telnetlib"}
NEVER_CALLED = {
    "pickle.load",
    "pickle.loads",
    "pickle.Unpickler",
    "eval",
    "exec",
    "os.system",
    "os.popen",
    "yaml.unsafe_load",
    "yaml.full_load",
    "np.load",
}
FROM_THE_HUB = ("hf_hub_download", "snapshot_download")
WITHOUT_WEIGHTS = ("Tokenizer", "Processor", "Scheduler", "Config", "config_class")


def faults(source: str) -> Iterator[str]:
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
            yield from (f"import {name}" for name in names if name.partition(".")[0] in NEVER_IMPORTED)
        if isinstance(node, ast.Call):
            called, given = ast.unparse(node.func), {word.arg: ast.unparse(word.value) for word in node.keywords}
            if called in NEVER_CALLED:
                yield called
            yield from loading_faults(called, [ast.unparse(value) for value in node.args], given)
            if called == "yaml.load" and given.get("Loader") not in ("_Loader", "yaml.SafeLoader"):
                yield "yaml.load of any tag"  # `_Loader` is a SafeLoader that refuses repeated keys
            if called == "torch.load" and given.get("weights_only") != "True":
                yield "torch.load without weights_only=True"
            if given.get("trust_remote_code", "False") != "False" or given.get("shell", "False") != "False":
                yield f"{called} with trust_remote_code or shell"
            if called.endswith("Environment") and "jinja2" in source and "autoescape" not in given:
                yield "templates without autoescape"
            if called in ("jinja2.Template", "Template"):
                yield "templates without autoescape"


def loading_faults(called: str, arguments: list[str], given: dict[str | None, str]) -> Iterator[str]:
    kind, _, method = called.rpartition(".")
    if called == "from_folder":  # of `rewards.weights`; it passes on what it is given
        kind, method = arguments[0], "from_folder"
    elif method == "from_pretrained" and given.get(None) == "options":  # in `from_folder`
        return
    loads = method in ("from_folder", "from_pretrained") and not kind.endswith(WITHOUT_WEIGHTS)
    if (loads or method == "load_lora_weights") and given.get("use_safetensors") != "True":
        yield f"{called} without use_safetensors=True"
    at_hub = method == "from_pretrained" and "_dir" not in arguments[0]
    if (at_hub or called in FROM_THE_HUB) and "revision" not in given:
        yield f"{called} without a revision"


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_no_module_runs_what_it_reads(path: Path) -> None:
    assert list(faults(path.read_text())) == []


@pytest.mark.parametrize(
    "line",
    [
        "pickle.load(handle)",
        "from joblib import load",
        "eval(text)",
        "yaml.load(text)",
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "subprocess.run(line, shell=True)",
        "AutoTokenizer.from_pretrained(model_dir, trust_remote_code=True)",
        "UNet.from_pretrained(unet_dir)",
        "UNet.from_pretrained(unet_dir, use_safetensors=False)",
        "UNet.from_pretrained(place, use_safetensors=True)",
        "from_folder(CLIPModel, folder)",
        "pipeline.load_lora_weights(lora_dir)",
        "hf_hub_download(name, file)",
        "snapshot_download(name, allow_patterns=patterns)",
        "import jinja2\njinja2.Environment(loader=loader)",
        "jinja2.Template(text)",
    ],
)
def test_a_line_that_would_is_found(line: str) -> None:
    assert len(list(faults(line))) == 1
