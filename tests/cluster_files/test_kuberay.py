"""The manifests for KubeRay 1.7: the schemas of its custom resources, and the rules that its operator adds to them.

The schemas are not in the repository: without ../shared/kuberay those tests are skipped. Kubernetes' own kinds
(PriorityClass, StatefulSet, ...) have no schema here; pods are part of KubeRay's.
"""

import json
import math
import shlex
from collections.abc import Iterator
from typing import Any

import jsonschema
import pytest
from cluster_commands import CHECKOUT, KUBERAY, read_cluster_spec, read_documents, read_job_spec, read_ray_document

SCHEMAS = CHECKOUT.parent / "shared" / "kuberay"
JOBS = KUBERAY[1:]


def read_schema(kind: str) -> dict[str, Any]:
    path = SCHEMAS / f"{kind.lower()}.schema.json"
    if not path.is_file():
        pytest.skip(f"needs {path}")
    found = json.loads(path.read_text(encoding="utf-8"))
    assert (found["kind"], found["group"], found["version"]) == (kind, "ray.io", "v1")
    return found["schema"]


def translate(schema: Any) -> Any:
    """Return OpenAPI's schema as a JSON schema, in which a Kubernetes quantity is a number or text."""
    if isinstance(schema, list):
        return [translate(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    plain = {key: translate(value) for key, value in schema.items() if not key.startswith("x-kubernetes-")}
    if schema.get("x-kubernetes-int-or-string"):
        plain.pop("type", None)
        plain["anyOf"] = [{"type": "integer"}, {"type": "string"}]
    return plain


def find_unknown_keys(value: Any, schema: dict[str, Any], path: str = "") -> Iterator[str]:
    """Yield the paths of keys that the schema does not have; Kubernetes drops them or refuses the manifest."""
    if schema.get("x-kubernetes-preserve-unknown-fields"):
        return
    if isinstance(value, list):
        for number, item in enumerate(value):
            yield from find_unknown_keys(item, schema.get("items", {}), f"{path}[{number}]")
    elif isinstance(value, dict):
        known, others = schema.get("properties", {}), schema.get("additionalProperties")
        for key, item in value.items():
            if key in known:
                yield from find_unknown_keys(item, known[key], f"{path}.{key}")
            elif isinstance(others, dict):
                yield from find_unknown_keys(item, others, f"{path}.{key}")
            elif path and path != ".metadata":
                yield f"{path}.{key}"


@pytest.mark.parametrize("name", KUBERAY)
def test_the_manifest_keeps_to_the_schema(name: str) -> None:
    manifest = read_ray_document(name)
    schema = read_schema(manifest["kind"])
    jsonschema.Draft202012Validator(translate(schema)).validate(manifest)
    assert list(find_unknown_keys(manifest, schema)) == []


def test_a_wrong_key_or_value_is_found() -> None:
    schema = read_schema("RayJob")
    manifest = read_ray_document("rayjob.yaml")
    pod = manifest["spec"]["rayClusterSpec"]["workerGroupSpecs"][0]["template"]["spec"]
    pod["nodeSelectors"] = pod.pop("nodeSelector")
    manifest["spec"]["backOffLimit"] = 1
    assert list(find_unknown_keys(manifest, schema)) == [
        ".spec.rayClusterSpec.workerGroupSpecs[0].template.spec.nodeSelectors",
        ".spec.backOffLimit",
    ]
    manifest["spec"]["deletionStrategy"]["deletionRules"][0]["policy"] = "DeleteAll"
    with pytest.raises(jsonschema.ValidationError, match="DeleteAll"):
        jsonschema.Draft202012Validator(translate(schema)).validate(manifest)


def list_pods(name: str) -> list[dict[str, Any]]:
    spec = read_cluster_spec(name)
    return [group["template"]["spec"] for group in (spec["headGroupSpec"], *spec["workerGroupSpecs"])]


@pytest.mark.parametrize("name", KUBERAY)
def test_every_pod_has_room_in_shared_memory_within_its_limit(name: str) -> None:
    for pod in list_pods(name):
        [container] = pod["containers"]
        resources = container["resources"]
        assert resources["requests"] == resources["limits"]
        [volume] = [volume for volume in pod["volumes"] if volume["name"] == "shm"]
        assert {"name": "shm", "mountPath": "/dev/shm"} in container["volumeMounts"]
        assert volume["emptyDir"]["medium"] == "Memory"
        size, limit = volume["emptyDir"]["sizeLimit"], resources["limits"]["memory"]
        assert size.endswith("Gi")
        assert limit.endswith("Gi")
        assert int(size[:-2]) <= int(limit[:-2]) / 3


@pytest.mark.parametrize("name", KUBERAY)
def test_volumes_that_are_mounted_exist(name: str) -> None:
    claims = {item["metadata"]["name"] for item in read_documents(name) if item["kind"] == "PersistentVolumeClaim"}
    classes = {item["metadata"]["name"] for item in read_documents(name) if item["kind"] == "PriorityClass"}
    for pod in list_pods(name):
        volumes = {volume["name"]: volume for volume in pod["volumes"]}
        assert {mount["name"] for mount in pod["containers"][0]["volumeMounts"]} == set(volumes)
        assert {
            v["persistentVolumeClaim"]["claimName"] for v in volumes.values() if len(v.keys() - {"emptyDir"}) > 1
        } <= claims
        assert {pod["priorityClassName"]} <= classes if "priorityClassName" in pod else True


@pytest.mark.parametrize("name", KUBERAY)
def test_rules_of_the_operator_for_clusters_hold(name: str) -> None:
    spec = read_cluster_spec(name)
    assert spec["authOptions"] == {"mode": "token"}
    is_scaled = spec["enableInTreeAutoscaling"]
    for group in spec["workerGroupSpecs"]:
        assert group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]
        # The operator accepts these two with the second version of the autoscaler only.
        if group.keys() & {"idleTimeoutSeconds", "priority"}:
            assert spec["autoscalerOptions"]["version"] == "v2"
    if is_scaled:
        assert spec["autoscalerOptions"]["version"] == "v2"
        assert all("restartPolicy" not in pod for pod in list_pods(name))
        assert {group["minReplicas"] for group in spec["workerGroupSpecs"]} == {0}
    assert spec["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"


@pytest.mark.parametrize("name", JOBS)
def test_rules_of_the_operator_for_jobs_hold(name: str) -> None:
    spec = read_job_spec(name)
    # deletionRules exclude shutdownAfterJobFinishes and its ttlSecondsAfterFinished.
    assert not spec.keys() & {"shutdownAfterJobFinishes", "ttlSecondsAfterFinished", "clusterSelector"}
    rules = spec["deletionStrategy"]["deletionRules"]
    keys = [(rule["policy"], *sorted(rule["condition"].keys() - {"ttlSeconds"})) for rule in rules]
    assert all(len(key) == 2 for key in keys)
    ttl = {
        (rule["policy"], rule["condition"].get("jobStatus", "Failed")): rule["condition"]["ttlSeconds"]
        for rule in rules
    }
    assert len(ttl) == len(rules)
    assert all(policy != "DeleteWorkers" for policy, _ in ttl)  # not with the autoscaler
    assert {status for policy, status in ttl if policy == "DeleteCluster"} == {"SUCCEEDED", "FAILED", "Failed"}
    assert ttl["DeleteCluster", "SUCCEEDED"] <= ttl.get(("DeleteSelf", "SUCCEEDED"), math.inf)
    assert 0 < spec["preRunningDeadlineSeconds"] < spec["activeDeadlineSeconds"]


@pytest.mark.parametrize("name", JOBS)
def test_a_job_that_is_retried_on_a_new_cluster_has_its_checkpoints_at_a_url(name: str) -> None:
    spec = read_job_spec(name)
    assert spec["backoffLimit"] > 0
    words = shlex.split(spec["entrypoint"])
    assert words[words.index("--trainer.default_root_dir") + 1].startswith(("s3://", "gs://"))


@pytest.mark.parametrize("name", JOBS)
def test_the_cluster_can_grow_to_the_workers_that_the_job_asks_for(name: str) -> None:
    spec = read_job_spec(name)
    words = shlex.split(spec["entrypoint"])
    workers = int(words[words.index("--trainer.num_workers") + 1])
    [group] = spec["rayClusterSpec"]["workerGroupSpecs"]
    limits = group["template"]["spec"]["containers"][0]["resources"]["limits"]
    # torch_xla has one worker for each host.
    per_host = 1 if "google.com/tpu" in limits else int(limits["nvidia.com/gpu"])
    assert workers == group["maxReplicas"] * group.get("numOfHosts", 1) * per_host


def test_the_hosts_of_the_tpu_slice_have_the_chips_of_the_topology() -> None:
    [group] = read_cluster_spec("rayjob-tpu.yaml")["workerGroupSpecs"]
    pod = group["template"]["spec"]
    selector, resources = pod["nodeSelector"], pod["containers"][0]["resources"]
    assert selector["cloud.google.com/gke-tpu-accelerator"] == "tpu-v6e-slice"
    chips = math.prod(map(int, selector["cloud.google.com/gke-tpu-topology"].split("x")))
    assert resources["requests"]["google.com/tpu"] == resources["limits"]["google.com/tpu"]
    assert chips == group["numOfHosts"] * int(resources["limits"]["google.com/tpu"])


def test_the_cluster_that_stays_keeps_its_state_in_the_redis_beside_it() -> None:
    documents = {(item["kind"], item["metadata"]["name"]): item for item in read_documents("raycluster.yaml")}
    options = documents["RayCluster", "raylit"]["spec"]["gcsFaultToleranceOptions"]
    service = documents["Service", "raylit-redis"]["spec"]
    redis = documents["StatefulSet", "raylit-redis"]["spec"]
    assert options["redisAddress"] == f"redis://raylit-redis:{service['ports'][0]['port']}"
    assert service["selector"] == redis["selector"]["matchLabels"] == redis["template"]["metadata"]["labels"]
    [password] = redis["template"]["spec"]["containers"][0]["env"]
    assert options["redisPassword"]["valueFrom"] == password["valueFrom"]


def test_nightly_jobs_are_over_before_the_next_begins() -> None:
    spec = read_ray_document("raycronjob.yaml")["spec"]
    fields = spec["schedule"].split()
    assert len(fields) == 5
    assert all(field == "*" or field.isdigit() for field in fields)
    assert fields[2:] == ["*", "*", "*"]
    retries = spec["jobTemplate"]["backoffLimit"] + 1
    assert spec["jobTemplate"]["activeDeadlineSeconds"] * retries <= 24 * 3600
