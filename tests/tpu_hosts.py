"""TPU hosts that this machine only pretends to have: Ray nodes with the resources, labels and variables of slices."""

from ray.cluster_utils import Cluster

from raylit.accelerators import registry
from raylit.accelerators.torch_tpu import TorchTPUAccelerator
from raylit.accelerators.tpu_slices import TPUHost, TPUInventory


def make_inventory(*slices, can_grow=False):
    """What a cluster with these slices has: each is (name, version, topology, hosts, chips per host)."""
    hosts = [
        TPUHost(num_devices=chips, accelerator_version=version, topology=topology, slice_name=name)
        for name, version, topology, num_hosts, chips in slices
        for _ in range(num_hosts)
    ]
    return TPUInventory(hosts=tuple(hosts), where="this cluster", can_grow=can_grow)


def pretend_slices(monkeypatch, *slices):
    """Let Trainers be made as on a driver that is connected to a cluster with these slices and has TorchTPU."""
    monkeypatch.setitem(registry._BUILT_IN, "tpu", TorchTPUAccelerator)
    monkeypatch.setattr("raylit.trainer.arguments.workers.is_on_cluster", lambda: True)
    monkeypatch.setattr("raylit.trainer.arguments.workers._find_tpus", lambda: make_inventory(*slices))


def start_cluster(*, num_head_cpus=1):
    """Start a Ray cluster whose head has no TPU; the caller shuts it down."""
    return Cluster(initialize_head=True, head_node_args={"num_cpus": num_head_cpus, "include_dashboard": False})


def add_slice(cluster, name, *, version="v6e", topology="2x4", num_cores=8, hosts=2, chips=4, variables=None):
    """Add the hosts of a slice. They register in the reverse order of their TPU_WORKER_ID."""
    pod_type = f"{version}-{num_cores}"
    for worker_id in reversed(range(hosts)):
        resources = {"TPU": chips}
        if worker_id == 0:
            resources[f"TPU-{pod_type}-head"] = 1
        cluster.add_node(
            num_cpus=2,
            resources=resources,
            labels={
                "ray.io/tpu-slice-name": name,
                "ray.io/tpu-worker-id": str(worker_id),
                "ray.io/tpu-pod-type": pod_type,
                "ray.io/tpu-topology": topology,
            },
            env_vars={
                "TPU_NAME": name,
                "TPU_WORKER_ID": str(worker_id),
                "TPU_WORKER_HOSTNAMES": ",".join(["127.0.0.1"] * hosts),
                **(variables or {}),
            },
        )
