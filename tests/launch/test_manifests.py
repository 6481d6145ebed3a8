"""The YAML for Kubeflow and SkyPilot has the fields that their documents describe, and holds the whole recipe.

Fields of a TrainJob as of Kubeflow Trainer 2.2.0 (pkg/apis/trainer/v1alpha1/trainjob_types.go), of a task as in
SkyPilot's YAML reference of version 0.10.
"""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from training_hub.errors import RecipeError
from training_hub.launch.kubeflow import TrainJob, manifest
from training_hub.launch.layout import layout_of
from training_hub.launch.resources import Resources, Volume, volume_of
from training_hub.launch.skypilot import Task, task_yaml
from training_hub.recipe import Recipe
from training_hub.recipe.load import load

TEMPLATE = "{% for m in messages %}\n  {{ m.content }} # 'x'\n{% endfor %}\n"
DISK = (Volume("claim", "/mnt/runs"),)
NODES = Resources(2, 8, gpus_per_node=8, cpus_per_node=32, memory="200Gi", container="reg/hub:1")


def recipe(**sections: Any) -> Recipe:
    base = {"output": "/mnt/runs/run", "model": {"path": "org/model"}, "data": {"path": "/mnt/runs/chat.jsonl"}}
    return Recipe.model_validate({**base, **sections})


def trainjob(asked: Recipe | None = None, **settings: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    job = TrainJob(**{"resources": NODES, "volumes": DISK, **settings})
    config, job_of = yaml.safe_load_all(manifest(asked or recipe(), job))
    return config, job_of


def test_a_trainjob_is_one_of_the_published_schema():
    _, job = trainjob(namespace="team", secrets=("HF_TOKEN",))
    assert (job["apiVersion"], job["kind"]) == ("trainer.kubeflow.org/v1alpha1", "TrainJob")
    assert job["metadata"] == {"name": "training-hub", "namespace": "team"}
    assert set(job["spec"]) == {"runtimeRef", "trainer", "runtimePatches"}
    assert job["spec"]["runtimeRef"] == {"name": "torch-distributed"}
    trainer = job["spec"]["trainer"]
    known = {"image", "command", "args", "env", "numNodes", "resourcesPerNode", "numProcPerNode"}
    assert set(trainer) <= known
    assert (trainer["image"], trainer["numNodes"], trainer["numProcPerNode"]) == ("reg/hub:1", 2, 8)
    amounts = {"cpu": 32, "memory": "200Gi", "nvidia.com/gpu": 8}
    assert trainer["resourcesPerNode"] == {"requests": amounts, "limits": amounts}
    assert trainer["env"][0]["valueFrom"] == {"secretKeyRef": {"name": "training-hub", "key": "HF_TOKEN"}}


def test_each_pod_sees_the_recipe_and_the_volumes():
    config, job = trainjob()
    (patch,) = job["spec"]["runtimePatches"]
    (node,) = patch["trainingRuntimeSpec"]["template"]["spec"]["replicatedJobs"]
    pod = node["template"]["spec"]["template"]["spec"]
    assert (node["name"], pod["containers"][0]["name"]) == ("node", "node")
    volumes = {one["name"]: one for one in pod["volumes"]}
    mounts = {one["mountPath"]: volumes[one["name"]] for one in pod["containers"][0]["volumeMounts"]}
    assert mounts["/mnt/runs"]["persistentVolumeClaim"] == {"claimName": "claim"}
    assert mounts["/etc/training-hub"]["configMap"] == {"name": config["metadata"]["name"]}
    command = job["spec"]["trainer"]["command"]
    assert command == ["python3", "-m", "training_hub", "sft", "--config", "/etc/training-hub/recipe.yaml"]


def test_the_recipe_in_the_config_map_leaves_the_processes_to_what_the_runtime_says():
    asked = recipe(data={"path": "/mnt/runs/chat.jsonl", "chat_template": TEMPLATE}, processes={"procs": 4, "nodes": 1})
    config, _ = trainjob(asked)
    sent = load(config["data"]["recipe.yaml"])
    assert sent.model_dump(exclude={"processes"}) == asked.model_dump(exclude={"processes"})
    told = {"PET_NNODES": "2", "PET_NPROC_PER_NODE": "8", "PET_NODE_RANK": "1"}
    place = {"PET_MASTER_ADDR": "training-hub-node-0-0.training-hub", "PET_MASTER_PORT": "29400"}
    found = layout_of(sent, {**told, **place}, lambda: 8)
    assert (found.procs, found.nodes, found.node_rank) == (8, 2, 1)
    assert (found.host, found.port) == ("training-hub-node-0-0.training-hub", 29400)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"name": "My_Job"}, "--name: found 'My_Job'"),
        ({"resources": Resources(2, 8)}, "--image: not given"),
        ({"resources": Resources(2, "gpu", container="i")}, "--procs-per-node: found gpu"),
        ({"volumes": ()}, "'/mnt/runs/run' lies on no volume, so"),
        ({"volumes": (Volume("claim", "/wor"),)}, "lies on no volume (/wor)"),
    ],
)
def test_what_kubeflow_could_not_do_with_is_refused(settings: dict[str, Any], said: str):
    with pytest.raises(RecipeError) as caught:
        trainjob(**settings)
    assert said in str(caught.value)


def test_what_lies_on_this_machine_alone_is_refused(tmp_path: Path):
    (tmp_path / "chat.jsonl").write_text("{}\n")
    asked = recipe(data={"path": str(tmp_path / "chat.jsonl")})
    for send in (lambda: trainjob(asked), lambda: task_yaml(asked, Task(Resources(), volumes=DISK))):
        with pytest.raises(RecipeError, match=r"data\.path: .*chat\.jsonl' lies on this machine alone"):
            send()
    asked = recipe(
        data={"path": "/mnt/runs/chat.jsonl", "validation": ["/mnt/runs/a.jsonl", str(tmp_path / "chat.jsonl")]}
    )
    with pytest.raises(RecipeError, match=r"data\.validation: .*chat\.jsonl' lies on this machine alone"):
        trainjob(asked)


def task(asked: Recipe | None = None, **settings: Any) -> dict[str, Any]:
    base: dict[str, Any] = {"resources": NODES, "accelerators": "H100", "volumes": DISK}
    found = yaml.safe_load(task_yaml(asked or recipe(), Task(**{**base, **settings})))
    assert isinstance(found, dict)
    return found


def test_a_task_has_the_documented_fields():
    found = task(infra="k8s", is_spot=True, install="pip install training-hub", secrets=("HF_TOKEN",))
    assert set(found) == {"name", "num_nodes", "resources", "secrets", "volumes", "setup", "run"}
    assert found["resources"] == {
        "infra": "k8s",
        "accelerators": "H100:8",
        "cpus": "32+",
        "memory": "200Gi",
        "use_spot": True,
        "image_id": "docker:reg/hub:1",
        "job_recovery": {"strategy": "EAGER_NEXT_REGION"},
    }
    assert found["volumes"] == {"/mnt/runs": "claim"}
    assert found["secrets"] == {"HF_TOKEN": ""}, "named, and asked for when it is launched"


def test_a_bucket_is_mounted_so_that_files_can_be_appended_to():
    found = task(resources=Resources(), accelerators=None, volumes=(Volume("s3://mine/x", "/mnt/runs"),))
    assert found["file_mounts"] == {"/mnt/runs": {"source": "s3://mine/x", "mode": "MOUNT_CACHED"}}


def test_what_the_task_runs_gives_each_node_the_recipe_and_its_place(tmp_path: Path):
    """The lines before the run itself, by a real shell: the file they write, and what they tell the run."""
    asked = recipe(data={"path": "/mnt/runs/chat.jsonl", "chat_template": TEMPLATE})
    *before, last = task(asked)["run"].rstrip("\n").split("\n")
    assert last == 'python -m training_hub sft --config "$HOME/training-hub-recipe.yaml"'
    program = "\n".join([*before, 'echo "$PET_NODE_RANK $PET_RDZV_ENDPOINT"'])
    told = {"HOME": str(tmp_path), "SKYPILOT_NODE_RANK": "1", "SKYPILOT_NODE_IPS": "10.0.0.4\n10.0.0.5", "PATH": "/bin"}
    ended = subprocess.run(["bash", "-eu", "-c", program], env=told, capture_output=True, text=True, check=True)
    assert ended.stdout == "1 10.0.0.4:29500\n"
    sent = load((tmp_path / "training-hub-recipe.yaml").read_text())
    assert sent.data.chat_template == TEMPLATE
    found = layout_of(sent, {"PET_NODE_RANK": "1", "PET_RDZV_ENDPOINT": "10.0.0.4:29500"}, lambda: 8)
    assert (found.procs, found.nodes, found.node_rank, found.host) == (8, 2, 1, "10.0.0.4")


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"accelerators": None}, "--accelerators: not given for 8 GPUs"),
        ({"resources": Resources()}, "--gpus-per-node: not given for H100"),
        ({"volumes": (Volume("s3://mine", "/mnt/runs"),)}, "lies in the bucket s3://mine"),
        ({"volumes": ()}, "lies on no volume"),
    ],
)
def test_what_skypilot_could_not_do_with_is_refused(settings: dict[str, Any], said: str):
    with pytest.raises(RecipeError) as caught:
        task(**settings)
    assert said in str(caught.value)


def test_a_volume_is_written_with_its_folder():
    assert volume_of("claim:/mnt/runs") == Volume("claim", "/mnt/runs")
    assert volume_of("s3://mine/x:/mnt/runs") == Volume("s3://mine/x", "/mnt/runs")
    for text in ("claim", ":/mnt/runs", "claim:runs", "s3://mine/x"):
        with pytest.raises(RecipeError, match="allowed: SOURCE:/PATH"):
            volume_of(text)
