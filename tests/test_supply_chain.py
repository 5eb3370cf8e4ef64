"""What no line of the package may do: run code that came with weights or data, or with a value."""

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


def faults(source: str) -> Iterator[str]:
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
            yield from (f"import {name}" for name in names if name.partition(".")[0] in NEVER_IMPORTED)
        if isinstance(node, ast.Call):
            called, given = ast.unparse(node.func), {word.arg: ast.unparse(word.value) for word in node.keywords}
            if called in NEVER_CALLED:
                yield called
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
        "AutoModel.from_pretrained(path, trust_remote_code=True)",
        "import jinja2\njinja2.Environment(loader=loader)",
        "jinja2.Template(text)",
    ],
)
def test_a_line_that_would_is_found(line: str) -> None:
    assert len(list(faults(line))) == 1
