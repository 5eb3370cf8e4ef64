"""Published prompt sets by name: where they are on the hub, and their columns."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Benchmark:
    """Prompts that `PromptSource.source` selects by name.

    Attributes:
        hub_id: data set on the hub.
        revision: its full commit; ``None``: no public source that we know states one.
        files: files within the data set. Several: the name of each, without its ending, is the category of its prompts.
        column: column of the prompts.
        category_column: column of their categories; ``None``: `category`, if there is one.
        original: where its authors publish the file, if not on the hub.
    """

    hub_id: str
    revision: str | None
    files: tuple[str, ...]
    column: str = "prompt"
    category_column: str | None = None
    original: str = ""


BENCHMARKS = {
    "drawbench": Benchmark(  # arXiv:2205.11487, 200 prompts
        "sayakpaul/drawbench",
        "ad794cba698c253ffdb6d18eff3fc87b004c1135",
        ("DrawBench Prompts - Sheet1.csv",),
        "Prompts",
        "Category",
    ),
    "parti": Benchmark(  # arXiv:2206.10789, 1,632 prompts; another classification is the column `Challenge`
        "nateraw/parti-prompts",
        "944b156abfdad7627c3221b5ec4f6a6fb060a197",
        ("PartiPrompts.tsv",),
        "Prompt",
        "Category",
        "https://github.com/google-research/parti",
    ),
    "hpdv2": Benchmark(  # arXiv:2306.09341, 4 styles of 800 prompts
        "zhwang/HPDv2",
        "b9517430f34b1080d4f741118d2a440155a165cd",
        tuple(f"benchmark/{style}.json" for style in ("anime", "concept-art", "paintings", "photo")),
    ),
    "geneval2": Benchmark(  # arXiv:2512.16853, 800 prompts; `atom_count`: number of things that a prompt asks for
        "Jialuo21/GenEval2",
        None,
        ("geneval2_data.jsonl",),
        "prompt",
        "atom_count",
        "https://github.com/facebookresearch/GenEval2",
    ),
    "pickapic_test": Benchmark(  # arXiv:2305.01569, the 500 prompts of the test set, each once
        "yuvalkirstain/pickapic_v1_no_images",
        "a3592a4f2e6adb7646ef56f3bb18e2968348a163",
        ("data/test_unique-00000-of-00001-73a51cbb6488571d.parquet",),
        "caption",
    ),
}
"""The revisions are those of public projects that pin these data sets, or of the hub's own pages."""
