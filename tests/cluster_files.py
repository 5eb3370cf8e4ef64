"""What must hold of the files in `cluster/`, said by functions that a mistake makes raise."""

import re
from pathlib import Path
from typing import Any

import botocore.session
import yaml
from botocore.validate import ParamValidator

ROOT = Path(__file__).parents[1]
RAY = next(line for line in (ROOT / "requirements.lock").read_text().splitlines() if line.startswith("ray=="))[5:11]
IMAGE = re.compile(rf"rayproject/ray:{re.escape(RAY)}-py311-gpu")
# compute.instances.insert, of what these files use
GCP_KEYS = {
    "machineType": {},
    "disks": {
        "boot": {}, "autoDelete": {}, "type": {}, "initializeParams": {"diskSizeGb": {}, "sourceImage": {}},
    },
    "shieldedInstanceConfig": {"enableVtpm": {}, "enableIntegrityMonitoring": {}, "enableSecureBoot": {}},
    "scheduling": {
        "provisioningModel": {}, "instanceTerminationAction": {}, "onHostMaintenance": {}, "automaticRestart": {},
    },
    "serviceAccounts": {"email": {}, "scopes": {}},
}  # fmt: skip


def check_aws_node(node_config: dict[str, Any]) -> None:
    """Every key and type as EC2's own model of RunInstances has it."""
    model = botocore.session.get_session().get_service_model("ec2").operation_model("RunInstances").input_shape
    faults = ParamValidator().validate({**node_config, "MinCount": 1, "MaxCount": 1}, model)
    unknown = [f"unknown key {key}" for key in _unknown(node_config, model)]
    assert not faults.has_errors() and not unknown, f"{faults.generate_report()} {unknown}"
    assert node_config["MetadataOptions"]["HttpTokens"] == "required", "a pod that is tricked reads the node's role"
    assert node_config["ImageId"].startswith("ami-")


def _unknown(value: Any, shape: Any) -> list[str]:
    if shape.type_name == "structure":
        wrong = [key for key in value if key not in shape.members]
        return wrong + [k for key in value if key in shape.members for k in _unknown(value[key], shape.members[key])]
    return [key for item in value for key in _unknown(item, shape.member)] if shape.type_name == "list" else []


def check_gcp_node(value: Any, keys: dict[str, Any] = GCP_KEYS) -> None:
    for item in value if isinstance(value, list) else [value]:
        if isinstance(item, dict):
            assert item.keys() <= keys.keys(), f"unknown keys {sorted(item.keys() - keys.keys())}"
            for key, inside in item.items():
                check_gcp_node(inside, keys[key])
                assert key != "sourceImage" or "/family/" not in inside, "a family is another image tomorrow"


def check_credentials(provider: str, node_config: dict[str, Any]) -> None:
    """Workers write to the bucket of `run.dir`; the role that Ray creates is the head's only."""
    if provider == "aws":
        assert node_config.get("IamInstanceProfile", {}).get("Arn", "").startswith("arn:aws:iam::")
    else:
        (account,) = node_config.get("serviceAccounts", [{}])
        assert account.get("email") and account["scopes"] == ["https://www.googleapis.com/auth/cloud-platform"]


MARKETS = {"trainer": {"market": "on-demand"}, "generator": {"market": "spot"}}
"""Labels that `resources.<role>.node_labels` names, so that Ray places each role on its nodes only."""


def check_ray_up(config: dict[str, Any]) -> None:
    from ray.autoscaler._private.util import validate_config

    validate_config(config)
    types, start = (
        config["available_node_types"],
        [*config["head_start_ray_commands"], *config["worker_start_ray_commands"]],
    )
    for node_type in types.values():
        (check_aws_node if config["provider"]["type"] == "aws" else check_gcp_node)(node_type["node_config"])
    assert set(types) == {"head", "trainer", "generator"} and config["head_node_type"] == "head"
    assert sum(node_type["max_workers"] for node_type in types.values()) <= config["max_workers"]
    assert types["head"]["resources"] == {"CPU": 0}
    spot = {name for name, node_type in types.items() if "spot" in str(node_type["node_config"]).lower()}
    assert spot == {"generator"}, f"{spot} may be taken away"
    assert {name: types[name].get("labels") for name in MARKETS} == MARKETS
    for name in MARKETS:
        check_credentials(config["provider"]["type"], types[name]["node_config"])
    assert IMAGE.fullmatch(config["docker"]["image"]), config["docker"]["image"]
    assert "install -m 600 /tmp/cdpo/auth_token ~/.cdpo_token" in config["setup_commands"][0]
    started = [command for command in start if "ray start" in command]
    assert len(started) == 2
    for command in started:
        assert "RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH=$HOME/.cdpo_token " in command, command
        assert "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO=1" in command
    assert "--dashboard-host=127.0.0.1" in started[0]
    assert "0.0.0.0" not in str(config)
    assert any("--require-hashes -r" in command for command in config["setup_commands"])


def check_rayjob(job: dict[str, Any]) -> None:
    spec = job["spec"]
    known = {"entrypoint", "shutdownAfterJobFinishes", "ttlSecondsAfterFinished", "backoffLimit", "rayClusterSpec"}
    assert (job["apiVersion"], job["kind"]) == ("ray.io/v1", "RayJob") and set(spec) == known
    assert spec["entrypoint"].startswith("cdpo run configs/") and spec["shutdownAfterJobFinishes"]
    assert (ROOT / spec["entrypoint"].split()[2]).is_file()
    check_kuberay(spec["rayClusterSpec"], num_gpus="1")


def check_raycluster(cluster: dict[str, Any]) -> None:
    """The autoscaler's own reading of the file has the labels; spot nodes need their toleration."""
    from ray.autoscaler._private.kuberay.autoscaling_config import _derive_autoscaling_config_from_ray_cr

    spec = cluster["spec"]
    assert (cluster["apiVersion"], cluster["kind"]) == ("ray.io/v1", "RayCluster")
    known = {"rayVersion", "authOptions", "enableInTreeAutoscaling", "autoscalerOptions"}
    assert set(spec) == known | {"headGroupSpec", "workerGroupSpecs"}
    assert spec["enableInTreeAutoscaling"] and spec["autoscalerOptions"]["version"] == "v2", "version 1 ignores labels"
    check_kuberay(spec, num_gpus="8")
    whole = {**cluster, "metadata": {**cluster["metadata"], "namespace": "default"}}
    types = _derive_autoscaling_config_from_ray_cr(whole)["available_node_types"]
    assert types["headgroup"]["resources"]["CPU"] == 0
    assert {name: types[name]["labels"] for name in MARKETS} == MARKETS
    for group in spec["workerGroupSpecs"]:
        pod = group["template"]["spec"]
        assert pod["nodeSelector"] == {"cdpo/pool": group["groupName"]} and pod["restartPolicy"] == "Never"
        assert any(each["key"] == "cdpo/spot" for each in pod["tolerations"]) == (group["groupName"] == "generator")
        (container,) = pod["containers"]
        assert {each["name"] for each in pod["volumes"]} == {each["name"] for each in container["volumeMounts"]}


def check_kuberay(cluster: dict[str, Any], *, num_gpus: str) -> None:
    assert cluster["rayVersion"] == RAY
    assert cluster["authOptions"] == {"mode": "token"}
    head, workers = cluster["headGroupSpec"], cluster["workerGroupSpecs"]
    assert head["serviceType"] == "ClusterIP" and head["rayStartParams"] == {"num-cpus": "0"}
    assert [group["groupName"] for group in workers] == ["trainer", "generator"]
    for group in [head, *workers]:
        pod = group["template"]["spec"]
        assert pod["securityContext"]["runAsNonRoot"] and pod["securityContext"]["runAsUser"] > 0
        (container,) = pod["containers"]
        assert re.fullmatch(r"[\w/-]+:\d[\w.-]*", container["image"]), container["image"]
        assert container["securityContext"] == {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}
        for variable in container["env"]:
            secret = re.search(r"TOKEN|KEY|SECRET|PASSWORD", variable["name"])
            assert not secret or set(variable["valueFrom"]) == {"secretKeyRef"}, variable["name"]
    for group in workers:
        assert group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]
        (container,) = group["template"]["spec"]["containers"]
        assert container["resources"]["limits"]["nvidia.com/gpu"] == num_gpus
        assert group["template"]["spec"]["automountServiceAccountToken"] is False


def check_dockerfile(text: str) -> None:
    lines = [line.split(maxsplit=1) for line in text.replace("\\\n", " ").splitlines() if line and line[0] not in "# "]
    (base,) = [rest for word, rest in lines if word == "FROM"]
    assert IMAGE.fullmatch(base), base
    assert any("--require-hashes -r requirements.lock" in rest for word, rest in lines if word == "RUN")
    assert lines[-1][0] == "USER" and lines[-1][1] not in ("root", "0"), "the last line names who it runs as"
    for word, rest in lines:
        assert word in ("FROM", "WORKDIR", "COPY", "RUN", "USER"), word
        if word == "COPY":
            for source in [part for part in rest.split() if not part.startswith("--")][:-1]:
                assert (ROOT / source).exists(), source


def ray_up(name: str) -> dict[str, Any]:
    from ray.autoscaler._private.util import prepare_config

    config: dict[str, Any] = prepare_config(yaml.safe_load((ROOT / "cluster" / name).read_text()))
    return config
