"""`cluster/`: each file is valid for its system, and mistakes in it are detected."""

from collections.abc import Callable
from typing import Any

import pytest
import yaml
from cluster_files import ROOT, check_dockerfile, check_ray_up, check_raycluster, check_rayjob, ray_up
from jsonschema import ValidationError

RAY_UP = ("gpu.yaml", "gpu-8x.yaml", "gpu-gcp.yaml")
DOCKERFILE = (ROOT / "cluster" / "Dockerfile").read_text()


def kuberay(name: str) -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load((ROOT / "cluster" / name).read_text())
    return found


@pytest.mark.parametrize("name", RAY_UP)
def test_a_ray_up_file_is_valid_for_ray_and_its_cloud(name: str) -> None:
    check_ray_up(ray_up(name))


def test_the_rayjob_requires_a_token_and_no_privileges() -> None:
    check_rayjob(kuberay("rayjob.yaml"))


def test_the_readme_resumes_the_rayjob_by_its_name_because_a_finished_job_never_starts_again() -> None:
    name = kuberay("rayjob.yaml")["metadata"]["name"]
    readme = (ROOT / "cluster" / "README.md").read_text()
    assert f"kubectl delete rayjob/{name} && kubectl apply -f cluster/rayjob.yaml" in readme


def test_the_raycluster_requires_a_token_and_separates_trainers_from_spot_nodes() -> None:
    check_raycluster(kuberay("raycluster.yaml"))


def test_the_image_is_pinned_hashed_and_not_root() -> None:
    check_dockerfile(DOCKERFILE)


def node(config: dict[str, Any], name: str = "generator") -> dict[str, Any]:
    found: dict[str, Any] = config["available_node_types"][name]["node_config"]
    return found


def without_credentials(node_config: dict[str, Any]) -> None:
    for key in {"IamInstanceProfile", "serviceAccounts"} & node_config.keys():
        del node_config[key]


RAY_UP_MISTAKES: dict[str, Callable[[dict[str, Any]], object]] = {
    "unknown section": lambda config: config.update(head_nodes={}),
    "image of another Ray": lambda config: config["docker"].update(image="rayproject/ray:2.59.0-py311-gpu"),
    "floating image": lambda config: config["docker"].update(image="rayproject/ray:latest-gpu"),
    "dashboard for everyone": lambda config: config["head_start_ray_commands"].append(
        "ray start --dashboard-host=0.0.0.0"
    ),
    "no token on workers": lambda config: config.update(
        worker_start_ray_commands=["ray start --address=$RAY_HEAD_IP:6379"]
    ),
    "token for all to read": lambda config: config["setup_commands"].__setitem__(
        0, "cp /tmp/cdpo/auth_token ~/.cdpo_token"
    ),
    "packages without hashes": lambda config: config["setup_commands"].__setitem__(
        1, "pip install -r requirements.lock"
    ),
    "spot trainers": lambda config: config["available_node_types"]["trainer"].update(node_config=node(config)),
    "trainers without label": lambda config: config["available_node_types"]["trainer"].pop("labels"),
    "more nodes than allowed": lambda config: config.update(max_workers=3),
    "trainers without credentials": lambda config: without_credentials(node(config, "trainer")),
    "generators without credentials": lambda config: without_credentials(node(config)),
    "actors on the head": lambda config: config["available_node_types"]["head"].update(resources={"CPU": 8}),
}
NODE_MISTAKES: dict[tuple[str, str], Callable[[dict[str, Any]], object]] = {
    ("gpu.yaml", "misspelt key"): lambda node: node.update(InstanceTyp="m6i.large"),
    ("gpu.yaml", "misspelt inner key"): lambda node: node["InstanceMarketOptions"].update(Market="spot"),
    ("gpu.yaml", "wrong type"): lambda node: node["BlockDeviceMappings"][0]["Ebs"].update(VolumeSize="200 GB"),
    ("gpu.yaml", "open metadata"): lambda node: node["MetadataOptions"].update(HttpTokens="optional"),
    ("gpu-gcp.yaml", "misspelt key"): lambda node: node.update(machinetype="n2-standard-8"),
    ("gpu-gcp.yaml", "misspelt inner key"): lambda node: node["scheduling"].update(preemptable=True),
    ("gpu-gcp.yaml", "credentials that cannot write"): lambda node: node["serviceAccounts"][0].update(
        scopes=["https://www.googleapis.com/auth/devstorage.read_only"]
    ),
    ("gpu-gcp.yaml", "image family"): lambda node: node["disks"][0]["initializeParams"].update(
        sourceImage="projects/deeplearning-platform-release/global/images/family/common-cu128"
    ),
}
RAYJOB_MISTAKES: dict[str, Callable[[dict[str, Any]], object]] = {
    "no token": lambda spec: spec["rayClusterSpec"].pop("authOptions"),
    "another Ray": lambda spec: spec["rayClusterSpec"].update(rayVersion="2.52.0"),
    "dashboard outside": lambda spec: spec["rayClusterSpec"]["headGroupSpec"].update(serviceType="LoadBalancer"),
    "root": lambda spec: spec["rayClusterSpec"]["headGroupSpec"]["template"]["spec"].pop("securityContext"),
    "secret in the file": lambda spec: spec["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]["containers"][0][
        "env"
    ].append({"name": "WANDB_API_KEY", "value": "abc"}),
    "floating image": lambda spec: spec["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]["containers"][0].update(
        image="cdpo-ray:latest"
    ),
    "no config": lambda spec: spec.update(entrypoint="cdpo run configs/none.yaml"),
    "unknown key": lambda spec: spec.update(shutDownAfterJobFinishes=True),
}
RAYCLUSTER_MISTAKES: dict[str, Callable[[dict[str, Any]], object]] = {
    "no token": lambda spec: spec.pop("authOptions"),
    "autoscaler without labels": lambda spec: spec["autoscalerOptions"].pop("version"),
    "misspelt labels": lambda spec: spec["workerGroupSpecs"][0].update(labels=None),
    "trainers tolerate spot nodes": lambda spec: spec["workerGroupSpecs"][0]["template"]["spec"].update(
        tolerations=spec["workerGroupSpecs"][1]["template"]["spec"]["tolerations"]
    ),
    "shared memory not mounted": lambda spec: spec["workerGroupSpecs"][0]["template"]["spec"]["containers"][0].update(
        volumeMounts=[]
    ),
    "unknown key": lambda spec: spec.update(enableAutoscaling=True),
}
DOCKER_MISTAKES = {
    "floating base": ("2.60.0-py311-gpu", "latest"),
    "packages without hashes": (" --require-hashes", ""),
    "root": ("USER 1000", "USER root"),
    "no user": ("USER 1000", ""),
    "a secret": ("USER 1000", "ENV HF_TOKEN=hf_abc\nUSER 1000"),
    "a source that is not there": ("COPY --chown=ray configs ", "COPY --chown=ray config "),
}


@pytest.mark.parametrize("name", RAY_UP)
@pytest.mark.parametrize("mistake", RAY_UP_MISTAKES)
def test_a_mistake_in_a_ray_up_file_is_detected(name: str, mistake: str) -> None:
    config = ray_up(name)
    RAY_UP_MISTAKES[mistake](config)
    with pytest.raises((AssertionError, ValidationError)):
        check_ray_up(config)


@pytest.mark.parametrize(("name", "mistake"), NODE_MISTAKES)
def test_a_mistake_inside_a_node_config_is_detected(name: str, mistake: str) -> None:
    config = ray_up(name)
    NODE_MISTAKES[name, mistake](node(config))
    with pytest.raises(AssertionError):
        check_ray_up(config)


@pytest.mark.parametrize("mistake", RAYJOB_MISTAKES)
def test_a_mistake_in_the_rayjob_is_detected(mistake: str) -> None:
    job = kuberay("rayjob.yaml")
    RAYJOB_MISTAKES[mistake](job["spec"])
    with pytest.raises((AssertionError, KeyError)):
        check_rayjob(job)


@pytest.mark.parametrize("mistake", RAYCLUSTER_MISTAKES)
def test_a_mistake_in_the_raycluster_is_detected(mistake: str) -> None:
    cluster = kuberay("raycluster.yaml")
    RAYCLUSTER_MISTAKES[mistake](cluster["spec"])
    with pytest.raises((AssertionError, KeyError)):
        check_raycluster(cluster)


@pytest.mark.parametrize("mistake", DOCKER_MISTAKES)
def test_a_mistake_in_the_dockerfile_is_detected(mistake: str) -> None:
    right, wrong = DOCKER_MISTAKES[mistake]
    assert right in DOCKERFILE
    with pytest.raises(AssertionError):
        check_dockerfile(DOCKERFILE.replace(right, wrong))
