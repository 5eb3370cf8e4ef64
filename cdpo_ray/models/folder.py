"""Checks of an untrusted model folder against the configured family; does not import torch."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path, PurePath
from typing import Any

from huggingface_hub import try_to_load_from_cache
from huggingface_hub.errors import HFValidationError

from cdpo_ray.errors import ModelError
from cdpo_ray.models.layouts import (
    INDEX,
    LAYOUTS,
    Component,
    Config,
    Configs,
    Faults,
    Layout,
    config_path,
    one_of,
    shown,
    unquoted,
)
from cdpo_ray.models.single_file import architecture_of, file_faults, read_shapes, stated_by
from cdpo_ray.testbed import PIPELINE_DIR

# A model folder is untrusted: no name in its files leads out of the folder, and no code in it runs.
MAX_JSON_BYTES = 2**24
LIBRARIES = ("diffusers", "transformers")
FOLDER_ADVICE = "give a folder in diffusers layout with safetensors weights"


def check_model(
    family: str,
    path: str,
    revision: str | None = None,
    config: Mapping[str, Any] | None = None,
    teacher: Mapping[str, Any] | None = None,
    **_: Any,
) -> dict[str, Any]:
    """Compare a model and its teacher with the family; files that are not on this machine are not compared.

    Args:
        family: name in `LAYOUTS`.
        path, revision: ``embedded``, a folder, a hub id at a revision, or a single file.
        config: ``path`` and ``revision`` of the model whose configurations complete a single file.
        teacher: ``path`` and ``revision`` of a consistency model's teacher.

    Returns:
        Values for the scheduler's configuration that a single file states, see `stated_by`.

    Raises:
        ModelError: if they differ; lists all differences.
    """
    folder = folder_of(**config or {"path": path, "revision": revision})
    stated: dict[str, Any] = {}
    if config:
        stated = check_single_file(family, Path(path), folder, partial=not Path(config["path"]).is_dir())
    elif folder and path != "embedded":
        check_folder(family, folder, partial=not Path(path).is_dir())
    if teacher and teacher["path"] != "embedded" and (teacher_dir := folder_of(**teacher)):
        check_teacher(teacher_dir, student=folder, partial=not Path(teacher["path"]).is_dir())
    return stated


def folder_of(path: str, revision: str | None = None) -> Path | None:
    """Folder of a model on this machine, which for a hub id is its snapshot in the cache; `None`: there is none."""
    if path == "embedded":
        return PIPELINE_DIR
    if Path(path).is_dir():
        return Path(path)
    try:
        found = try_to_load_from_cache(path, config_path(INDEX), revision=revision)
    except HFValidationError:  # not a valid hub id: loading it reports that
        return None
    return Path(found).parent if isinstance(found, str) else None


def check_single_file(family: str, path: Path, config_dir: Path | None, *, partial: bool = False) -> dict[str, Any]:
    """Compare a single-file checkpoint with a family, and with the configurations that complete it.

    Args:
        family: name in `LAYOUTS`.
        config_dir: folder of the configurations; `None`: not on this machine.
        partial: whether missing files are allowed in it.

    Returns:
        Values for the scheduler's configuration that the file states, see `stated_by`.

    Raises:
        ModelError: if they differ; lists all differences.
    """
    where = f"`model.path` {path}"
    try:
        shapes = read_shapes(path)
        architecture = architecture_of(shapes)
    except ValueError as error:
        advice = "give a file with all parts of a Stable Diffusion or SDXL model, or a folder in diffusers layout"
        raise ModelError(f"{where}: {error}; {advice}") from None
    if architecture.family != family:
        raise ModelError(
            f"{where}: does not fit `model.family` {family}: it holds {architecture.name}; it fits `model.family`"
            f" {architecture.family}"
        )
    values = stated_by(path)
    if config_dir is None:
        return values
    check_folder(family, config_dir, partial=partial, key="model.config.path")
    layout = LAYOUTS[family]
    configs = dict(_read(layout, config_dir, (INDEX, *layout.parts), partial)[0])
    if "scheduler" in configs:
        configs["scheduler"] = {**configs["scheduler"], **values}
    if faults := [*file_faults(architecture, shapes, configs), *layout.faults(configs)]:
        advice = f"give as `model.config` the {architecture.name} model that it was made from, in diffusers layout"
        raise _refusal(f"{where}: does not fit", faults, advice)
    return values


def check_folder(family: str, folder: Path, *, partial: bool = False, key: str = "model.path") -> None:
    """Compare a model folder with a family.

    Args:
        family: name in `LAYOUTS`.
        partial: whether missing files are allowed.
        key: config key to name in errors; `model.config.path`: weights are not read and may be missing.

    Raises:
        ModelError: if they differ; lists all differences, and the family that the folder fits.
    """
    if code := _own_code(folder):
        raise ModelError(
            f"`{key}` {folder}: model_index.json requires custom code, {code}, which is not run; give a folder"
            " whose parts are classes of diffusers and transformers"
        )
    if not (folder / config_path(INDEX)).exists():
        single = sorted(path.name for path in folder.glob("*.safetensors"))
        advice = f"give a file of it: {folder}/{unquoted(single[0])}" if single else FOLDER_ADVICE
        raise ModelError(f"`{key}` {folder}: has no {config_path(INDEX)}; {advice}")
    if faults := _faults(LAYOUTS[family], folder, partial):
        fits = fitting_families(folder, partial=partial)
        advice = f"it fits `model.family` {one_of(fits)}" if fits else "give another model, or correct its files"
        raise _refusal(f"`{key}` {folder}: does not fit `model.family` {family}", faults, advice)
    faults = [
        fault
        for name, part in named_parts(family, folder).items()
        for fault in _file_faults(folder / name, part if key == "model.path" else replace(part, weights=None), partial)
    ]
    if faults:
        raise _refusal(f"`{key}` {folder}: cannot be loaded", faults, FOLDER_ADVICE)


def fitting_families(folder: Path, *, partial: bool = False) -> list[str]:
    """Families whose layout a model folder has, or whose weights a single file has.

    Args:
        partial: whether missing files are allowed.
    """
    if folder.is_file():
        try:
            return [architecture_of(read_shapes(folder)).family]
        except ValueError:
            return []
    return [family for family, layout in LAYOUTS.items() if not _faults(layout, folder, partial)]


def check_teacher(folder: Path, *, student: Path | None, partial: bool = False) -> None:
    """Compare a teacher's UNet and scheduler with the consistency model that was distilled from it.

    Args:
        student: folder of the consistency model; `None`: not on this machine.
        partial: whether missing files are allowed.

    Raises:
        ModelError: if they differ; lists all differences.
    """
    layout = LAYOUTS["stable_diffusion"]
    configs, faults = _read(layout, folder, ("unet", "scheduler"), partial)
    student_configs = _read(layout, student, ("vae", "text_encoder"), partial=True)[0] if student else {}
    faults += _file_faults(folder / "unet", layout.parts["unet"], partial)
    faults = faults or list(layout.faults({**student_configs, **configs}))
    if faults:
        advice = "give the Stable Diffusion model that the consistency model was distilled from"
        raise _refusal(f"`model.teacher.path` {folder}: is not the teacher", faults, advice)


def read_config(path: Path) -> Config:
    """Read a JSON object.

    Raises:
        ValueError: if the file is missing, too large, unreadable or not a JSON object.
    """
    try:
        if not path.is_file():
            raise ValueError("is missing")
        if path.stat().st_size > MAX_JSON_BYTES:
            raise ValueError(f"must not have more than {MAX_JSON_BYTES:,} bytes")
        content = path.read_bytes()
    except OSError as error:
        raise ValueError(f"cannot be read ({error.strerror})") from None
    try:
        found = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"is not JSON ({type(error).__name__})") from None
    if not isinstance(found, dict):
        raise ValueError(f"must hold a JSON object, got {shown(found)}")
    return found


def named_parts(family: str, folder: Path) -> dict[str, Component]:
    """Parts of the family that a folder's index names, without the optional ones that it leaves out."""
    index = read_config(folder / config_path(INDEX))
    return {name: part for name, part in LAYOUTS[family].parts.items() if not _is_left_out(part, index.get(name))}


def other_parts(family: str, folder: Path) -> list[str]:
    """Parts that a checked folder's index names and the family does not have."""
    index = read_config(folder / config_path(INDEX))
    known = (*LAYOUTS[family].parts, "_class_name")
    return [name for name, value in index.items() if isinstance(value, list) and len(value) == 2 and name not in known]


def weights_variant(part_dir: Path, stem: str) -> str | None:
    """Variant of a part's safetensors weights, such as ``fp16``; `None`: there are weights without a variant, or none.

    Files are named ``model.fp16.safetensors`` or, if sharded, ``model.safetensors.index.fp16.json``.

    Args:
        stem: prefix of the file names, here ``model``.
    """
    names = {path.name for path in part_dir.glob(f"{stem}.*")}
    if names & {f"{stem}.safetensors", f"{stem}.safetensors.index.json"}:
        return None
    ends = [name.removeprefix(f"{stem}.").split(".") for name in sorted(names)]
    found = [end[0] for end in ends if end[1:] == ["safetensors"] and "-of-" not in end[0]]
    found += [end[2] for end in ends if end[:2] == ["safetensors", "index"] and end[3:] == ["json"]]
    return "fp16" if "fp16" in found else next(iter(found), None)


def _refusal(what: str, faults: Sequence[str], advice: str) -> ModelError:
    if len(faults) == 1:
        return ModelError(f"{what}: {faults[0]}; {advice}")
    return ModelError("\n  ".join([f"{what}: {len(faults)} faults", *faults, advice]))


def _own_code(folder: Path) -> str | None:
    """Python file that a folder's index requires; diffusers would refuse it without naming it."""
    try:
        index = read_config(folder / config_path(INDEX))
    except ValueError:
        return None
    named = [value[0] for value in index.values() if isinstance(value, list) and value]
    found = sorted(str(path.relative_to(folder)) for path in folder.rglob("*.py") if path.stem in named)
    return unquoted(found[0]) if found else None


def _faults(layout: Layout, folder: Path, partial: bool) -> list[str]:
    configs, faults = _read(layout, folder, (INDEX, *layout.parts), partial)
    return faults or list(layout.faults(configs))


def _read(layout: Layout, folder: Path, names: Sequence[str], partial: bool) -> tuple[Configs, list[str]]:
    """Configurations of these parts, with defaults, and the faults of each by itself."""
    configs: dict[str, Config] = {}
    faults: list[str] = []
    for name in names:
        file, part = config_path(name), layout.parts.get(name, Component("diffusers", layout.pipelines))
        if INDEX in configs:
            named = configs[INDEX].get(name)
            if _is_left_out(part, named):
                continue
            if class_faults := list(_class_faults(name, named, part)):
                faults += class_faults
                continue
        if partial and not (folder / file).exists():
            continue
        try:
            config = read_config(folder / file)
            kind = config.get("_class_name")
            if part.library == "diffusers" and part.classes and kind not in part.classes:
                raise ValueError(f"must have `_class_name` {one_of(part.classes)}, got {shown(kind)}")
        except ValueError as error:
            faults.append(f"{file} {error}")
            if name == INDEX:
                break
            continue
        text = config.get("text_config")  # configuration of the whole CLIP
        configs[name] = {**part.defaults, **config, **(text if isinstance(text, dict) else {})}
        if "transformers_weights" in configs[name]:  # path of any file, which transformers would read
            faults.append(f"{file} must not have `transformers_weights`")
    return configs, faults


def _is_left_out(part: Component, named: Any) -> bool:
    return part.optional and named in (None, [None, None])


def _class_faults(name: str, named: Any, part: Component) -> Faults:
    """Compare the library and class that the pipeline's index names for a part."""
    where = f"{config_path(INDEX)}: `{name}`"
    if not isinstance(named, list) or len(named) != 2 or not all(isinstance(each, str) for each in named):
        yield f"{where} must be a library and a class, got {shown(named)}"
        return
    got = unquoted(".".join(named))
    if named[0] not in LIBRARIES:
        yield f"{where} must be of {' or '.join(LIBRARIES)}, got {got}"
    elif named[0] != part.library or (part.classes and named[1] not in part.classes):
        allowed = [f"{part.library}.{each}" for each in part.classes] or [f"of {part.library}"]
        yield f"{where} must be {one_of(allowed)}, got {got}"


def _file_faults(part_dir: Path, part: Component, partial: bool) -> Faults:
    """Faults of the names of a part's weight and vocabulary files."""
    if part.weights:
        yield from _weight_faults(part_dir, part.weights, partial)
    if not part.vocabularies or partial:
        return
    # without these files, transformers makes a tokenizer with an empty vocabulary
    if not any(all((part_dir / file).is_file() for file in files) for files in part.vocabularies):
        yield f"{part_dir.name}/ must hold {one_of([' and '.join(files) for files in part.vocabularies])}"


def _weight_faults(part_dir: Path, stem: str, partial: bool) -> Faults:
    if (part_dir / "adapter_config.json").exists():  # transformers would load the base model that it names
        yield f"{part_dir.name}/ holds a PEFT adapter; merge it into the weights and save again"
    variant = weights_variant(part_dir, stem)
    end = f".{variant}" if variant else ""
    weights, index = f"{stem}{end}.safetensors", f"{stem}.safetensors.index{end}.json"
    whole = (part_dir / weights).is_file()
    if not (part_dir / index).exists():
        if not whole and not partial:
            pickled = "; pickled weights are not supported" if any(part_dir.glob("*.bin")) else ""
            yield f"{part_dir.name}/{weights} is missing{pickled}"
        return
    try:
        shards = read_config(part_dir / index).get("weight_map")
    except ValueError as error:
        yield f"{part_dir.name}/{index} {error}"
        return
    if not isinstance(shards, dict) or not all(isinstance(each, str) for each in shards.values()):
        yield f"{part_dir.name}/{index}: `weight_map` must be an object of file names, got {shown(shards)}"
        return
    for shard in sorted(set(shards.values())):
        if PurePath(shard).name != shard:
            yield f"{part_dir.name}/{index}: `weight_map` must name files in the same folder, got {shown(shard)}"
        elif not whole and not partial and not (part_dir / shard).is_file():
            yield f"{part_dir.name}/{unquoted(shard)} is missing"
