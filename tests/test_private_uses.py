"""What the package uses of other libraries without their promise to keep it; each use still exists."""

import ast
import importlib
import inspect
from dataclasses import dataclass
from pathlib import Path

import pytest

import cdpo_ray

PACKAGE = Path(cdpo_ray.__file__).parent


@dataclass(frozen=True)
class PrivateUse:
    """Attribute of a module, of a class in it (dotted), or of the objects that the module makes.

    Attributes:
        why: what it is needed for.
        instead: what to do once it is gone.
    """

    module: str
    attribute: str
    why: str
    instead: str

    @property
    def name(self) -> str:
        return self.attribute.rpartition(".")[2]

    def exists(self) -> bool:
        found = importlib.import_module(self.module)
        try:
            for part in self.attribute.split("."):
                found = getattr(found, part)
        except AttributeError:  # set on objects, or made on demand: then the source names it
            return self.name in inspect.getsource(importlib.import_module(self.module))
        return True


USES = (
    PrivateUse(
        "deepspeed.comm.torch",
        "__compatible_ops__",
        "start_engine sets it to {}, so that no worker compiles a shared-memory all-reduce",
        "look in deepspeed.comm.torch for what decides whether build_shm_op compiles, and switch that off",
    ),
    PrivateUse(
        "deepspeed.runtime.zero.stage_1_and_2",
        "DeepSpeedZeroOptimizer._lazy_init_hp_params_optimizer_state",
        "a commit is restored into ZeRO 1 and 2 before the first step, which is what links parameters to moments",
        "look in DeepSpeedZeroOptimizer.step for what links them; tests/training/test_commits.py is the proof",
    ),
    PrivateUse(
        "deepspeed.runtime.zero.stage3",
        "fp32_partitioned_groups_flat",
        "the parameters that ZeRO 3 gives the optimizer, whose moments are restored before the first step",
        "look in its module for what its optimizer steps; tests/training/test_commits.py is the proof",
    ),
    PrivateUse(
        "deepspeed.runtime.engine",
        "data_parallel_group",
        "limit_waiting shortens the timeout of the group that DeepSpeed makes",
        "find the new name of the engine's group; tests/training/test_waiting.py is the proof",
    ),
    PrivateUse(
        "torch.distributed",
        "ProcessGroup.set_timeout",
        "limit_waiting; torch.distributed.set_timeout is public, but torch 2.11 has none",
        "call torch.distributed.set_timeout, and raise the lowest torch in pyproject.toml to one that has it",
    ),
    PrivateUse(
        "peft.tuners.tuners_utils",
        "BaseTunerLayer._disable_adapters",
        "Adapters switches a LoRA layer by this flag; PEFT's own switch visits every module at each launch",
        "call BaseTunerLayer.enable_adapters, and see what it costs by benchmarks/training_step.py",
    ),
    PrivateUse(
        "peft.tuners.tuners_utils",
        "BaseTunerLayer._active_adapter",
        "Adapters chooses a LoRA layer's adapter by this name; set_adapter also changes what learns",
        "call BaseTunerLayer.set_adapter, and restore requires_grad of the factors",
    ),
    PrivateUse(
        "torch.utils._python_dispatch",
        "TorchDispatchMode",
        "cost/counting.py sees every operator that a net runs, to count its FLOPs and bytes",
        "look in torch.utils.flop_counter for what its own counter uses",
    ),
    PrivateUse(
        "torch.utils._pytree",
        "tree_iter",
        "cost/counting.py finds the tensors in what an operator returns",
        "use torch.utils.pytree",
    ),
    PrivateUse(
        "torch",
        "UntypedStorage._cdata",
        "cost/counting.py tells storages apart; on the meta device they have no address",
        "find another identity of a storage",
    ),
    PrivateUse(
        "torch._ops",
        "_overloadpacket",
        "cost/counting.py looks an operator up in PyTorch's table of FLOP formulas",
        "look in torch.utils.flop_counter for the keys of its registry",
    ),
    PrivateUse(
        "torch",
        "ops.aten._scaled_dot_product_efficient_attention",
        "cost/counting.py counts attention as a fused kernel runs it; on the meta device it would be decomposed",
        "take another fused operator that has a meta kernel",
    ),
    PrivateUse(
        "ray._private.ray_constants",
        "DEBUG_AUTOSCALING_STATUS",
        "cluster_nodes: the key under which the first autoscaler writes what it knows",
        "drop the first autoscaler from cluster_nodes if Ray no longer has it, else find its key",
    ),
    PrivateUse(
        "ray.experimental.internal_kv",
        "_internal_kv_get",
        "cluster_nodes reads what the first autoscaler wrote",
        "as above",
    ),
    PrivateUse(
        "ray.autoscaler.v2.sdk",
        "get_cluster_status",
        "cluster_nodes: node types that the second autoscaler knows; Ray documents no such call",
        "ask Ray's state API for the autoscaler's groups",
    ),
    PrivateUse(
        "ray._private",
        "services",
        "as below",
        "as below",
    ),
    PrivateUse(
        "ray._private.services",
        "ConsolePopen",
        "_own_processes starts Ray's processes in process groups of their own; Ray has no option for it",
        "look in ray._private.services.start_ray_process for what starts a process; tests/test_session.py is the proof",
    ),
    PrivateUse(
        "ray.job_config",
        "JobConfig._client_job",
        "_local_ray: with it Ray does not put the working folder first on the import path of its workers",
        "look in ray._private.worker.connect for where it adds the current directory; tests/test_session.py proves it",
    ),
    PrivateUse(
        "ray._private.worker",
        "_temp_dir",
        "_local_ray gives Ray a private folder; the public way is RAY_TMPDIR, whose subfolder anyone can open",
        "look in ray.init for the new name of the option",
    ),
    PrivateUse(
        "ray._private.worker",
        "logger",
        "session silences this logger by its name, for what it logs is also raised",
        "find the logger that now repeats errors, and name it in _QUIET of cdpo_ray/session.py",
    ),
    PrivateUse(
        "fsspec.asyn",
        "AsyncFileSystem._info",
        "store/lock.py asks a store within a time limit; fsspec documents these coroutines, underscore and all",
        "call the coroutine's new name",
    ),
    PrivateUse(
        "fsspec.asyn",
        "AsyncFileSystem._pipe_file",
        "store/lock.py writes a lock within a time limit; documented as above",
        "call the coroutine's new name",
    ),
)


@pytest.mark.parametrize("use", USES, ids=lambda use: use.name)
def test_a_private_use_is_still_there(use: PrivateUse) -> None:
    assert use.exists(), f"{use.module}.{use.attribute} is gone. It was used for: {use.why}. Now: {use.instead}."


def foreign_private_names(path: Path) -> set[str]:
    """Names with a leading underscore that a file takes from elsewhere: imported, or of anything but self and cls."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Attribute) and not (
            isinstance(node.value, ast.Name) and node.value.id in ("self", "cls")
        ):
            names.add(node.attr)
        elif isinstance(node, ast.ImportFrom):
            names |= {alias.name for alias in node.names}
            if "._" in (node.module or ""):  # all of a private module is private
                names |= {f"_{alias.name}" for alias in node.names}
    return {name for name in names if name.startswith("_") and not (name.startswith("__") and name.endswith("__"))}


def test_no_private_name_is_used_that_is_not_listed() -> None:
    found = {name for path in PACKAGE.rglob("*.py") for name in foreign_private_names(path)}
    unlisted = found - {use.name for use in USES} - {f"_{use.name}" for use in USES}
    assert not unlisted, f"{sorted(unlisted)}: use what is public instead, or list it in {Path(__file__).name}"
