"""Settings and metrics of a run -> model card of an export."""

import html
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import yaml
from markupsafe import Markup

from cdpo_ray.config import HUB_ID
from cdpo_ray.config.model import GUIDANCE_FROM_ZERO
from cdpo_ray.evaluation.report import measure_results, signs_of_reward_hacking
from cdpo_ray.export import readers_of
from cdpo_ray.export.pairs import stage_file
from cdpo_ray.export.trained import is_path, without_paths
from cdpo_ray.models import model_class
from cdpo_ray.models.single_file import stated_by
from cdpo_ray.pages.page import reasons_without_interval
from cdpo_ray.records import ARMS
from cdpo_ray.store import flat

ACTIVE = re.compile(r"[\\`*_\[\]|~$]")
"""Active characters of Markdown within a line; those of HTML are escaped separately."""

GUIDANCE_CALLS = {
    "qwen_image": "true_cfg_scale={}, negative_prompt=' '",
    "sana": "guidance_scale={}, use_resolution_binning=False",
}
"""Family -> arguments of its pipeline for guidance, and for the exact image size."""

PLACEHOLDER = "path/to"
"""Folder of a local model in the code of a card."""
REPLACE = f"# Replace {PLACEHOLDER} by the folder on your machine that holds the model.\n"


@dataclass(frozen=True)
class RunFacts:
    """Content of a model card.

    Attributes:
        name: name of the run.
        settings: the whole configuration, as plain values.
        round: number of the exported round, 1-based.
        num_prompts, num_heldout: number of training prompts and of held-out prompts.
        ranking: description of how the rewards rank images.
        curriculum: description of the curriculum.
        training: manifest of `4-training`.
        metrics: content of `metrics.json`; `None`: the run was not evaluated.
        examples: held-out prompts whose images the folder holds, see `picture_file`.
    """

    name: str
    settings: Mapping[str, Any]
    round: int
    num_prompts: int
    num_heldout: int
    ranking: str
    curriculum: str
    training: Mapping[str, Any]
    metrics: Mapping[str, Any] | None
    examples: Sequence[str] = ()


def picture_file(number: int, arm: str) -> str:
    """Path within the export of an example's image.

    Args:
        number: of the example, from 0.
        arm: ``base`` or ``tuned``.
    """
    return f"images/{number}-{arm}.png"


def model_card(facts: RunFacts, format_name: str, denoiser_name: str) -> str:
    """The card in Markdown, with the front matter that the hub reads; the user adds the licence.

    Untrusted text (names, paths) is escaped, so that it cannot become markup. Of paths of this machine there are only
    the names.

    Args:
        facts: content of the card.
        format_name: key of `cdpo_ray.export.FORMATS`.
        denoiser_name: `unet` or `transformer`.
    """
    settings, is_lora = without_paths(facts.settings), facts.settings["training"]["method"] == "lora"
    model = facts.settings["model"]
    results = measure_results(facts.metrics, settings["rewards"]) if facts.metrics else []
    return _template("card.md.jinja").render(
        front_matter=Markup(front_matter(model, format_name, is_lora=is_lora, examples=facts.examples)),
        pictures=[
            (prompt, *(Markup(f"![{arm}]({picture_file(number, arm)})") for arm in ARMS))
            for number, prompt in enumerate(facts.examples)
        ],
        facts=facts,
        settings=settings,
        format=format_name,
        is_lora=is_lora,
        denoiser_name=denoiser_name,
        model=settings["model"],
        base_name=_base_name(settings["model"]),
        base=Markup(_loading_base(model)),
        call=Markup(_call(settings["model"]["family"], settings["generation"])),
        kohya_file=Markup(f"{facts.name}.safetensors"),
        readers=Markup(readers_of(format_name, settings["model"]["family"])),
        diffusers_reads_kohya=settings["model"]["family"] != "stable_diffusion_3",
        ranking=facts.ranking,
        making=_table({"generation": settings["generation"], "rewards": _reward_settings(settings["rewards"])}),
        curriculum=_table({"curriculum": settings["curriculum"]}),
        training=_table({"training": _training_settings(settings["training"])}),
        results=results,
        no_interval=reasons_without_interval(facts.metrics),
        hacking=[f"{sign.name} {sign.verdict}" for sign in signs_of_reward_hacking(results)],
    )


def pairs_card(name: str, settings: Mapping[str, Any], num_stages: int, ranking: str, curriculum: str) -> str:
    """The card of exported pairs in Markdown, with the front matter that the hub and `datasets` read.

    Args:
        name: name of the run.
        settings: the whole configuration, as plain values.
        num_stages: number of stages.
        ranking: description of how the rewards rank images.
        curriculum: description of the curriculum.
    """
    settings = without_paths(settings)
    splits = [{"split": f"stage_{stage}", "path": stage_file(stage)} for stage in range(1, num_stages + 1)]
    front = {
        "tags": ["text-to-image", "preferences", "dpo", "curriculum-dpo", "cdpo_ray"],
        "configs": [{"config_name": "default", "data_files": splits}],
    }
    return _template("pairs.md.jinja").render(
        front_matter=Markup(yaml.safe_dump(front, sort_keys=False)),
        name=name,
        settings=settings,
        base_name=_base_name(settings["model"]),
        ranking=ranking,
        curriculum=curriculum,
        making=_table({"generation": settings["generation"], "rewards": _reward_settings(settings["rewards"])}),
    )


def front_matter(model: Mapping[str, Any], format_name: str, *, is_lora: bool, examples: Sequence[str] = ()) -> str:
    """YAML metadata for the hub: kind of model, its base model if that is on the hub, and images of some prompts."""
    base = {
        "base_model": model["path"],
        "base_model_revision": model["revision"],
        "base_model_relation": "finetune" if format_name == "merged" else "adapter",
    }
    about: dict[str, Any] = {
        "library_name": "diffusers",
        "pipeline_tag": "text-to-image",
        "tags": ["text-to-image", "diffusers", *(["lora"] if is_lora else []), "dpo", "curriculum-dpo", "cdpo_ray"],
    }
    if examples:
        about["widget"] = [
            {"text": prompt, "output": {"url": picture_file(number, "tuned")}} for number, prompt in enumerate(examples)
        ]
    on_hub = HUB_ID.match(model["path"]) and not Path(model["path"]).exists()
    return yaml.safe_dump(base | about if on_hub else about, sort_keys=False, allow_unicode=True)


def escaped(value: Any) -> str:
    """A value as literal text on one line, escaped for HTML and Markdown; `Markup` is returned unchanged."""
    if isinstance(value, Markup):
        return str(value)
    text = html.escape(" ".join(_text(value).split()), quote=False)
    return ACTIVE.sub(r"\\\g<0>", text)


def _text(value: Any) -> str:
    if value is None:
        return "–"
    if isinstance(value, float):
        return f"{value:.12g}"
    if isinstance(value, Sequence) and not isinstance(value, str):
        return ", ".join(map(str, value))
    return str(value)


def _table(settings: Mapping[str, Any]) -> Markup:
    rows = [f"| {escaped(key)} | {escaped(value)} |" for key, value in flat(settings).items()]
    return Markup("\n".join(["| setting | value |", "|---|---|", *rows]))


def _reward_settings(rewards: Mapping[str, Any]) -> dict[str, Any]:
    """All settings, without those of unused built-in rewards."""
    used = ("weights", "arguments", *rewards["names"])
    return {key: value for key, value in rewards.items() if not isinstance(value, Mapping) or (value and key in used)}


def _training_settings(training: Mapping[str, Any]) -> dict[str, Any]:
    """All settings, with the LoRA's alpha resolved; without `lora` for full fine-tuning."""
    lora = training["lora"]
    resolved = {"lora": lora | {"alpha": lora["alpha"] or lora["rank"]}} if training["method"] == "lora" else {}
    return {key: value for key, value in training.items() if key != "lora"} | resolved


def _base_name(model: Mapping[str, Any]) -> str:
    return "the embedded model of cdpo_ray" if model["path"] == "embedded" else str(model["path"])


def _loading_base(model: Mapping[str, Any]) -> str:
    """Code that loads the base model; a comment says to replace `PLACEHOLDER`, if it is in the code."""
    if model["path"] == "embedded":
        return (
            "from cdpo_ray.models import load_model\n\n"
            f'pipe = load_model({model["family"]!r}, path="embedded").pipeline'
        )
    if config := model["config"]:
        name, stated = model_class(model["family"]).pipeline_class.__name__, stated_by(Path(model["path"]))
        values = "".join(f", {key}={value!r}" for key, value in stated.items())
        scheduler = f"\npipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config{values})" if stated else ""
        return (
            f"import torch\nfrom diffusers import {'DDIMScheduler, ' if stated else ''}{name}\n\n{REPLACE}"
            f"pipe = {name}.from_single_file({_in_code(model['path'])}, config={_in_code(config['path'])},"
            f" dtype=torch.{model['dtype']}){scheduler}"
        )
    revision = f", revision={model['revision']!r}" if model["revision"] else ""
    return (
        f"import torch\nfrom diffusers import DiffusionPipeline\n\n{REPLACE if is_path(model['path']) else ''}"
        f"pipe = DiffusionPipeline.from_pretrained({_in_code(model['path'])}{revision}, dtype=torch.{model['dtype']})"
    )


def _in_code(place: str) -> str:
    """A hub id, or the name of a local model in the folder `PLACEHOLDER`, as a literal of Python."""
    return repr(f"{PLACEHOLDER}/{without_paths(place)}" if is_path(place) else place)


def _call(family: str, generation: Mapping[str, Any]) -> str:
    """Call of the pipeline with the sampling settings of the run."""
    scale = generation["guidance_scale"] - (family in GUIDANCE_FROM_ZERO)
    guidance = GUIDANCE_CALLS.get(family, "guidance_scale={}").format(scale)
    sizes = "".join(f", {side}={generation[side]}" for side in ("height", "width") if generation[side])
    return (
        f'image = pipe("a prompt", num_inference_steps={generation["num_denoising_steps"]},'
        f" {guidance}{sizes}).images[0]"
    )


def _template(name: str) -> jinja2.Template:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        finalize=escaped,
        autoescape=False,  # `finalize` escapes for Markdown and HTML both
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    return environment.get_template(name)
