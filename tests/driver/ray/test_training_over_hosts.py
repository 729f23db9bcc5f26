"""Training over three hosts with two networks each, whose names resolve to the loopback interface."""

import ast

import pytest
from hosts import CHECKOUT, run_on_first_host, start_hosts

from raylit.driver.ray.actor import ActorInfo
from raylit.driver.ray.actor_group import order_by_host_and_gpu

SECOND_NETWORK = """
ip link add second0 type veth peer name far0
ip link set far0 up
ip addr add 10.99.0.{number}/24 dev second0
ip link set second0 up
ip route replace default dev second0
"""
"""A network that leads to no other host, though the default route goes there."""

PLACED = """
import os, re, socket, sys
sys.path.insert(0, {tests!r})
import torch
from models import Regression, fit, make_data
import raylit as pl

def own_addresses():
    '''Return the local addresses of this process's TCP connections.'''
    sockets = set()
    for number in os.listdir("/proc/self/fd"):
        try:
            sockets.update(re.findall(r"socket:.(\\d+)", os.readlink(f"/proc/self/fd/{{number}}")))
        except OSError:
            pass  # closed meanwhile
    with open("/proc/self/net/tcp") as table:
        rows = [line.split() for line in table][1:]
    local = [row[1].partition(":")[0] for row in rows if row[3] == "01" and row[9] in sockets]
    return sorted({{socket.inet_ntoa(bytes.fromhex(address)[::-1]) for address in local}})

class Placed(Regression):
    def on_train_end(self):
        trainer = self.trainer
        place = (socket.gethostname(), self.global_rank, self.local_rank, trainer.node_rank, trainer.num_nodes)
        networks = (os.environ.get("GLOO_SOCKET_IFNAME"), os.environ.get("NCCL_SOCKET_IFNAME"), own_addresses())
        self.seen = [None] * trainer.world_size
        torch.distributed.all_gather_object(self.seen, (place, networks))

def make(kind):
    torch.manual_seed(3)
    return kind()
"""

SAME_AS_ONE = """
data = make_data(48)  # in the driver's memory alone
alone = make(Regression)
fit(alone, batch_size=12, data=data)
for num_workers in (3, 6):
    model = make(Placed)
    fit(model, batch_size=12, data=data, num_workers=num_workers, resources_per_worker={{"CPU": 6 // num_workers}})
    pairs = [(value, alone.state_dict()[name]) for name, value in model.state_dict().items()]
    same = all(torch.allclose(*pair, rtol=1e-5, atol=1e-6) for pair in pairs)
    print("SEEN", [same, model.seen])
"""

OWN_NETWORK = """
os.environ["GLOO_SOCKET_IFNAME"] = "second0"
model = make(Placed)
fit(model, num_workers=2, resources_per_worker={{"CPU": 1, "h1": 0.5}})
print("SEEN", [model.seen])
"""

PREPARED = """
class Downloaded(pl.DataModule):
    def __init__(self, folder, prepare_data_per_node):
        self.folder = folder
        self.prepare_data_per_node = prepare_data_per_node

    def prepare_data(self):
        os.makedirs(self.folder, exist_ok=True)
        torch.save(make_data(48).tensors, os.path.join(self.folder, "data.pt"))
        with open(os.path.join(self.folder, "calls"), "a") as calls:
            calls.write(f"{{self.trainer.global_rank}} ")

    def setup(self):
        with open(os.path.join(self.folder, "calls")) as calls:
            self.calls = calls.read().split()
        self.train = torch.utils.data.TensorDataset(*torch.load(os.path.join(self.folder, "data.pt")))

    def train_dataloader(self):
        return torch.utils.data.DataLoader(self.train, batch_size=4)

class Told(Regression):
    def on_train_end(self):
        self.calls = [None] * self.trainer.world_size
        torch.distributed.all_gather_object(self.calls, self.trainer.datamodule.calls)

for folder, is_per_node in (("/tmp/own-disk", True), ({shared!r}, False), ("/tmp/own-disk-2", False)):
    model = Told()
    try:
        pl.fit(model, Downloaded(folder, is_per_node), num_workers=6, resources_per_worker={{"CPU": 1}}, max_epochs=1,
               logger=False, enable_checkpointing=False, enable_progress_bar=False)
        print("SEEN", model.calls)
    except Exception as error:
        print("SEEN", [type(error).__name__, "/tmp/own-disk-2/calls" in str(error)])
"""

RESUMED = """
import time

def resume(path):
    model = make(Regression)
    logger = pl.CSVLogger("/tmp/own-logs")
    saving = pl.ModelCheckpoint("/tmp/own-checkpoints")
    trainer = fit(model, num_workers=1, resources_per_worker={{"CPU": 1, "h1": 1}}, max_epochs=1 if path is None else 2,
                  ckpt_path=path, logger=logger, enable_checkpointing=True, callbacks=[saving])
    return saving.best_model_path, trainer.current_epoch, os.path.exists(os.path.join(logger.log_dir, "metrics.csv"))

path, *_ = resume(None)
print("SEEN", [os.path.exists(path), *resume(path)[1:]])
started = time.monotonic()
try:
    resume("/tmp/other-disk/last.ckpt")
except Exception as error:
    print("SEEN", [type(error).__name__, str(error), time.monotonic() - started])
"""


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    """Three hosts for all tests of this module."""
    directory = tmp_path_factory.mktemp("hosts")
    with start_hosts(directory, hosts=3, cpus_per_host=2, resolve="loopback") as cluster:
        for host in range(3):
            made = cluster.run(host, ["sh", "-ec", SECOND_NETWORK.format(number=host + 1)], timeout=10)
            assert made.returncode == 0, made.stderr
        cluster.directory = directory
        yield cluster


def run(cluster, source):
    """Return the values that the script prints after SEEN."""
    names = {"tests": str(CHECKOUT / "tests"), "shared": str(cluster.directory / "seen-by-all")}
    output = run_on_first_host(cluster, (PLACED + source).format(**names), cluster.directory)
    seen = [ast.literal_eval(line.partition(" ")[2]) for line in output.splitlines() if line.startswith("SEEN ")]
    assert seen, output
    return seen


@pytest.mark.cluster
def test_weights_are_those_of_one_process_and_ranks_go_host_by_host_over_rays_network(cluster):
    three, six = run(cluster, SAME_AS_ONE)
    for (is_same, seen), per_host in ((three, 1), (six, 2)):
        assert is_same
        places = [(f"h{rank // per_host}", rank, rank % per_host, rank // per_host, 3) for rank in range(3 * per_host)]
        assert [place for place, _ in seen] == places
        for rank, (_, (gloo, nccl, addresses)) in enumerate(seen):
            assert (gloo, nccl) == ("eth0", "eth0")
            assert set(addresses) <= {f"10.77.0.{rank // per_host + 1}", "127.0.0.1"}


@pytest.mark.cluster
def test_an_interface_that_the_program_names_is_used(cluster):
    [[seen]] = run(cluster, OWN_NETWORK)
    for (host, *_), (gloo, _, addresses) in seen:
        assert (host, gloo) == ("h1", "second0")
        assert "10.99.0.2" in addresses


@pytest.mark.cluster
def test_prepare_data_runs_once_per_host_or_once_in_all(cluster):
    per_host, once, hidden = run(cluster, PREPARED)
    assert per_host == [["0"], ["0"], ["2"], ["2"], ["4"], ["4"]]
    assert once == [["0"]] * 6
    assert hidden == ["FileNotFoundError", True]


@pytest.mark.cluster
def test_the_drivers_disk_holds_checkpoints_and_logs_and_one_on_a_workers_is_not_found(cluster):
    cluster.run(1, ["sh", "-c", "mkdir -p /tmp/other-disk && touch /tmp/other-disk/last.ckpt"], timeout=10)
    resumed, (name, message, wait_s) = run(cluster, RESUMED)
    assert resumed == [True, 2, True]
    assert name == "CheckpointError"
    assert "Nor is there a directory /tmp/other-disk on h0, where it is read: copy" in message
    assert wait_s < 10


def test_ranks_follow_the_numbers_in_addresses_and_gpus():
    def info(node, ip, gpu):
        return ActorInfo(node_id=node, worker_id="", ip=ip, host=node, gpu_ids=(gpu,), pid=1, num_cores=1)

    infos = [
        info("a", "10.0.0.10", "2"),
        info("b", "10.0.0.9", "10"),
        info("b", "10.0.0.9", "9"),
        info("c", "::1", "0"),
    ]
    assert order_by_host_and_gpu(infos, own_node="c") == [3, 2, 1, 0]
