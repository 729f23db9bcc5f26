"""Examination of a cluster for `raylit doctor`: what its hosts are like, how they are connected, what will go wrong.

Driver; the functions and the actor at the end run on the cluster's hosts. Everything that waits has a deadline.
"""

import collections
import dataclasses
import json
import time
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import ray
import torch
import torch.distributed as dist
from ray import cloudpickle
from ray.exceptions import GetTimeoutError, RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from raylit import storage
from raylit.accelerators import Accelerator, CPUAccelerator, CUDAAccelerator
from raylit.compat.ray_core import measure_package, read_package_limits
from raylit.config import Workers
from raylit.driver.ray import host_probe, local_cluster
from raylit.driver.ray.host_probe import PACKAGES, HostProbe
from raylit.driver.ray.placement import Placement, format_gigabytes
from raylit.driver.ray.rendezvous import Rendezvous, RendezvousInfo
from raylit.errors import RaylitError
from raylit.text_table import draw_table, fitting_widths, printable

_PROBE_S = 60.0
"""Time for a process on each host to start and to answer, also on a busy host."""
_STORAGE_S = 60.0
"""Time for each step of the check of the checkpoint directory."""
_CLOCK_S = 5.0
_NUM_CLOCK_READS = 5
_PACKAGE_S = 5.0
"""Time to measure the working directory."""
_MAX_CLOCK_SKEW_S = 1.0
_MIN_SHM_BYTES = 128 * 2**20
"""A container has 64 MB of /dev/shm unless it asks for more; the workers of one loader fill that with a few batches."""
_MIN_OPEN_FILES = 4096
"""Ray's own advice; each connection between two workers, and each batch that a loader's worker shares, takes some."""
_MIN_BYTES_PER_S = 12.5e6
"""100 Mbit/s: gradients of ten million parameters take three seconds."""
_NUM_WARM_UPS, _NUM_LATENCY_ROUNDS = 5, 50
_FIRST_BYTES, _MAX_BYTES = 2**20, 64 * 2**20
_TARGET_S = 0.5
"""Time that the all-reduce by which the bandwidth is measured should take."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Problem:
    """Something that will stop or spoil a training, and what to change."""

    check: str
    found: str
    change: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class HostReport:
    """Facts about one host. None: unknown."""

    host: str
    address: str
    node_id: str
    is_driver: bool
    resources: dict[str, float]
    """Amounts of CPU, GPU and TPU that Ray offers there."""
    object_store_bytes: int
    interface: str | None = None
    """Network interface for collectives between hosts."""
    versions: dict[str, str] = dataclasses.field(default_factory=dict)
    """Versions by package, and of Python; empty if the host did not answer."""
    shm_bytes: int | None = None
    shm_free_bytes: int | None = None
    open_files: int | None = None
    clock_offset_s: float | None = None
    """Time of its clock minus that of the driver's."""
    clock_error_s: float | None = None
    """Half the shortest round trip of the comparison."""
    checkpoint_dir: str | None = None
    """"ok", or what is wrong with the checkpoint directory there; None if none was given or it was not checked."""


@dataclass(frozen=True, kw_only=True, slots=True)
class WorkerReport:
    """Start and all-reduce of the workers. None: not measured."""

    num_workers: int
    accelerator: str
    backend: str
    start_s: float
    """Time until their processes ran, with torch and raylit imported."""
    join_s: float | None = None
    """Time to form the process group."""
    latency_s: float | None = None
    """Time of an all-reduce of one number."""
    bytes_per_s: float | None = None
    """Bus bandwidth of a large all-reduce, as nccl-tests computes it: 2 (n - 1) / n times its bytes by its time."""
    size_bytes: int | None = None
    """Size of that all-reduce."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Diagnosis:
    """Findings on a cluster; `problems` is empty if a training has what it needs."""

    hosts: tuple[HostReport, ...] = ()
    workers: WorkerReport | None = None
    checkpoint_dir: str | None = None
    problems: tuple[Problem, ...] = ()

    def to_json(self) -> str:
        return json.dumps({"is_healthy": not self.problems, **dataclasses.asdict(self)}, indent=2)


def examine_cluster(
    *,
    num_workers: int | None = None,
    checkpoint_dir: str | None = None,
    working_dir: str | None = None,
    start_timeout_s: float = 60.0,
) -> Diagnosis:
    """Examine the cluster that RAY_ADDRESS names, or this machine.

    Args:
        num_workers: Number of workers to start. None: one per GPU of the cluster, or else one per host, but 2 at least.
        checkpoint_dir: Directory or URL that every host should read and write. None: not checked.
        working_dir: Directory that is to be uploaded with a job. None: not checked.
        start_timeout_s: Limit for the workers to be placed and start, and for what they measure.
    """
    problems = [] if working_dir is None else list(check_working_dir(working_dir))
    directory = None if checkpoint_dir is None else storage.absolute(checkpoint_dir)
    try:
        local_cluster.connect()
    except RaylitError as error:
        problems.append(Problem(check="connection", found=str(error)))
        return Diagnosis(checkpoint_dir=directory, problems=tuple(problems))
    hosts, unanswered = _probe_hosts()
    problems += [*unanswered, *check_hosts(hosts)]
    # Only hosts with raylit can run what follows.
    able = [host for host in hosts if host.versions.get("raylit", "none") != "none"]
    if directory is not None and able:
        states = _check_directory(directory, able)
        hosts = [dataclasses.replace(host, checkpoint_dir=states.get(host.node_id)) for host in hosts]
        problems += _explain_directory(directory, hosts)
    workers = None
    if len(able) == len(hosts):
        workers, faults = _measure_workers(hosts, num_workers, timeout_s=start_timeout_s)
        problems += faults
    return Diagnosis(hosts=tuple(hosts), workers=workers, checkpoint_dir=directory, problems=tuple(problems))


def format_diagnosis(diagnosis: Diagnosis) -> str:
    """Format the findings as tables and a list of problems."""
    lines = []
    if diagnosis.hosts:
        lines += _draw_hosts(diagnosis) + _draw_versions(diagnosis.hosts)
    if diagnosis.workers is not None:
        lines.append(_describe_workers(diagnosis.workers))
    if not diagnosis.problems:
        lines.append("No problems found.")
    for number, problem in enumerate(diagnosis.problems, start=1):
        change = f" Change: {problem.change}." if problem.change else ""
        lines.append(f"Problem {number} ({problem.check}): {problem.found}.{change}")
    return printable("\n".join(lines))


# Hosts


def _probe_hosts() -> tuple[list[HostReport], list[Problem]]:
    """Return a report on every host, the driver's first, and the hosts that did not answer as problems."""
    own_id = ray.get_runtime_context().get_node_id()
    nodes = [node for node in ray.nodes() if node["Alive"]]
    nodes.sort(key=lambda node: (node["NodeID"] != own_id, node["NodeManagerAddress"], node["NodeID"]))
    actor_class: Any = ray.remote(HostProbe)
    cloudpickle.register_pickle_by_value(host_probe)
    try:
        probes = [actor_class.options(**_options_on(node["NodeID"])).remote() for node in nodes]
    finally:
        cloudpickle.unregister_pickle_by_value(host_probe)
    try:
        calls = [probe.examine.remote(node["NodeManagerAddress"]) for probe, node in zip(probes, nodes, strict=True)]
        answers = _collect(calls, timeout_s=_PROBE_S)
        reports, problems = [], []
        for node, probe, answer in zip(nodes, probes, answers, strict=True):
            report = HostReport(
                host=node["NodeManagerHostname"],
                address=node["NodeManagerAddress"],
                node_id=node["NodeID"],
                is_driver=node["NodeID"] == own_id,
                resources={name: node["Resources"].get(name, 0.0) for name in ("CPU", "GPU", "TPU")},
                object_store_bytes=int(node["Resources"].get("object_store_memory", 0)),
            )
            if isinstance(answer, str):
                problems.append(
                    Problem(
                        check="hosts",
                        found=f"no process of this check has answered on {report.host} ({report.address}): {answer}",
                        change=f"see Ray's logs there (/tmp/ray/session_latest/logs), or end the node {report.host}",
                    )
                )
            else:
                names = {name: answer[name] for name in ("interface", "versions", "shm_bytes", "shm_free_bytes")}
                offset_s, error_s = _compare_clock(probe)
                report = dataclasses.replace(
                    report,
                    **names,
                    host=answer["host"],
                    open_files=answer["open_files"],
                    clock_offset_s=offset_s,
                    clock_error_s=error_s,
                )
                if report.interface is not None and report.interface not in answer["interfaces"]:
                    problems.append(_build_interface_problem(report, answer["interfaces"]))
            reports.append(report)
    finally:
        for probe in probes:
            ray.kill(probe)
    return reports, problems


def _compare_clock(probe: Any) -> tuple[float | None, float | None]:
    """Return the offset of a host's clock from the driver's, and the error of that: half the shortest round trip."""
    best: tuple[float, float] | None = None
    for _ in range(_NUM_CLOCK_READS):
        started, started_at = time.perf_counter(), time.time()
        try:
            its_time = ray.get(probe.read_clock.remote(), timeout=_CLOCK_S)
        except (GetTimeoutError, RayError):
            break
        half_s = (time.perf_counter() - started) / 2
        if best is None or half_s < best[1]:
            best = its_time - (started_at + half_s), half_s
    return (None, None) if best is None else best


def _build_interface_problem(host: HostReport, interfaces: Sequence[str]) -> Problem:
    return Problem(
        check="network",
        found=f"GLOO_SOCKET_IFNAME={host.interface} on {host.host}, which has {', '.join(interfaces)}",
        change="unset GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME: raylit takes the interface of Ray's node address",
    )


def _options_on(node_id: str) -> dict[str, Any]:
    """Return Ray's options for a task or an actor on this host that takes no resources from a training."""
    return {"num_cpus": 0, "scheduling_strategy": NodeAffinitySchedulingStrategy(node_id, soft=False)}


def _collect(calls: Sequence[Any], *, timeout_s: float) -> list[Any]:
    """Return the calls' results in order; for one that failed or is late, a text that says so."""
    # Results are small, and fetched here: a large cluster's arrive while others are waited for.
    arrived, _ = ray.wait(list(calls), num_returns=len(calls), timeout=timeout_s)
    results = []
    for call in calls:
        if call not in arrived:
            results.append(f"not within {timeout_s:g} s")
            continue
        try:
            results.append(ray.get(call))
        except RayError as error:
            results.append(_last_line(error))
    return results


def _last_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[-1].strip() if lines else type(error).__name__


# Checks of what the hosts report


def check_hosts(hosts: Sequence[HostReport]) -> list[Problem]:
    """Return the problems of versions, limits, addresses and clocks."""
    return [*_check_versions(hosts), *_check_limits(hosts), *_check_network(hosts), *_check_clocks(hosts)]


def _check_versions(hosts: Sequence[HostReport]) -> Iterator[Problem]:
    for name in ("python", *PACKAGES):
        by_version: dict[str, list[str]] = collections.defaultdict(list)
        for host in hosts:
            if host.versions:
                by_version[host.versions[name]].append(host.host)
        if len(by_version) > 1:
            places = "; ".join(f"{version} on {_join_names(names)}" for version, names in by_version.items())
            own = next((host.versions[name] for host in hosts if host.is_driver and host.versions), None)
            wanted = "the same version" if own in (None, "none", "unknown") else f"{name} {own}, the driver's,"
            yield Problem(
                check="versions",
                found=f"{name} differs between hosts: {places}",
                change=f"install {wanted} on all hosts, for example by one container image",
            )


def _check_limits(hosts: Sequence[HostReport]) -> Iterator[Problem]:
    small = [host for host in hosts if host.shm_bytes is not None and host.shm_bytes < _MIN_SHM_BYTES]
    if small:
        sizes = ", ".join(f"{host.host} {format_gigabytes(host.shm_bytes or 0)}" for host in small)
        yield Problem(
            check="/dev/shm",
            found=f"it is small: {sizes}; loaders with num_workers > 0 and Ray's object store keep their data there",
            change="start the container with --shm-size=8g (Kubernetes: an emptyDir of medium Memory at /dev/shm)",
        )
    spilling = [
        host
        for host in hosts
        if host not in small and host.shm_bytes is not None and host.shm_bytes < host.object_store_bytes
    ]
    if spilling:
        sizes = ", ".join(
            f"{host.host} {format_gigabytes(host.shm_bytes or 0)} for {format_gigabytes(host.object_store_bytes)}"
            for host in spilling
        )
        yield Problem(
            check="/dev/shm",
            found=f"it is smaller than Ray's object store, which is then on a disk and slow: {sizes}",
            change="enlarge /dev/shm, or start Ray with a smaller store (ray start --object-store-memory)",
        )
    low = [host for host in hosts if host.open_files is not None and host.open_files < _MIN_OPEN_FILES]
    if low:
        limits = ", ".join(f"{host.host} {host.open_files}" for host in low)
        yield Problem(
            check="open files",
            found=f"a process may have few files open: {limits}; connections and shared batches take one each",
            change="run `ulimit -n 65536` before `ray start` on these hosts",
        )


def _check_network(hosts: Sequence[HostReport]) -> Iterator[Problem]:
    loopback = [host.host for host in hosts if host.address.startswith("127.") or host.address == "::1"]
    if len(hosts) > 1 and loopback:
        yield Problem(
            check="network",
            found=f"Ray knows {_join_names(loopback)} by a loopback address, which other hosts cannot reach",
            change="start Ray there with --node-ip-address=ADDRESS",
        )


def _check_clocks(hosts: Sequence[HostReport]) -> Iterator[Problem]:
    skewed = [
        f"{host.host} {host.clock_offset_s:+.1f} s"
        for host in hosts
        if host.clock_offset_s is not None and abs(host.clock_offset_s) > _MAX_CLOCK_SKEW_S + (host.clock_error_s or 0)
    ]
    if skewed:
        yield Problem(
            check="clocks",
            found=f"clocks differ from the driver's: {', '.join(skewed)}; the newest checkpoint is chosen by its time",
            change="run a time service there (chrony, systemd-timesyncd)",
        )


def check_working_dir(directory: str) -> Iterator[Problem]:
    """Check the size of what Ray uploads of a working directory."""
    sizes = measure_package(directory, timeout_s=_PACKAGE_S)
    total = sum(sizes.values())
    job_limit, limit = read_package_limits()
    if total < job_limit:
        return
    largest = [name for name in sorted(sizes, key=lambda name: -sizes[name])[:3] if sizes[name] >= 2**20]
    names = ", ".join(f"{name} {_format_mebibytes(sizes[name])}" for name in largest)
    ways = "`ray job submit`" if total < limit else "`ray job submit` and ray.init(runtime_env=...)"
    yield Problem(
        check="working directory",
        found=(
            f"{directory} has {_format_mebibytes(total)} to upload, of which the largest are {names}; Ray's limits are "
            f"{_format_mebibytes(job_limit)} for `ray job submit` and {_format_mebibytes(limit)} for ray.init: {ways} "
            "will refuse it"
        ),
        change="list data and outputs in .gitignore or .rayignore there, or keep them outside of the directory",
    )


def _format_mebibytes(num_bytes: int) -> str:
    return f"{num_bytes / 2**20:.0f} MiB"


# The checkpoint directory


def _check_directory(directory: str, hosts: Sequence[HostReport]) -> dict[str, str]:
    """Return by node id "ok", or what is wrong with the directory on that host; the first host writes first."""
    token = uuid.uuid4().hex
    mark = storage.join(directory, f".raylit-doctor-{token}")
    answers = [storage.join(directory, f".raylit-doctor-{token}-{index}") for index in range(1, len(hosts))]
    # Actors, not tasks: they can be ended while they wait for a storage that does not answer. To cancel a task that is
    # about to finish makes Ray 2.60 end the driver.
    actor_class: Any = ray.remote(_StorageProbe)
    probes = [actor_class.options(**_options_on(host.node_id)).remote() for host in hosts]
    home, others = probes[0], probes[1:]
    try:
        [state] = _collect([home.write_mark.remote(directory, mark, token)], timeout_s=_STORAGE_S)
        states = {hosts[0].node_id: state}
        if state != "ok" or not others:
            return states
        calls = [
            probe.answer_mark.remote(directory, mark, token, answer)
            for probe, answer in zip(others, answers, strict=True)
        ]
        found = _collect(calls, timeout_s=_STORAGE_S)
        states.update({host.node_id: state for host, state in zip(hosts[1:], found, strict=True)})
        written = [answer for answer, state in zip(answers, found, strict=True) if state == "ok"]
        [missing] = _collect([home.list_missing.remote(written)], timeout_s=_STORAGE_S)
        for host, answer in zip(hosts[1:], answers, strict=True):
            if answer in (missing if isinstance(missing, list) else written):
                states[host.node_id] = "what it writes is not seen by the driver's host"
        return states
    finally:
        _collect([home.remove_files.remote([mark, *answers])], timeout_s=_STORAGE_S)
        for probe in probes:
            ray.kill(probe)


def _explain_directory(directory: str, hosts: Sequence[HostReport]) -> Iterator[Problem]:
    faults: dict[str, list[str]] = collections.defaultdict(list)
    for host in hosts:
        if host.checkpoint_dir not in (None, "ok"):
            faults[str(host.checkpoint_dir)].append(host.host)
    if not faults:
        return
    sound = [host.host for host in hosts if host.checkpoint_dir == "ok"]
    places = "; ".join(f"{_join_names(names)}: {fault}" for fault, names in faults.items())
    seen = f", only {_join_names(sound)} {'sees' if len(sound) == 1 else 'see'} it" if sound else ""
    yield Problem(
        check="checkpoint directory",
        found=f"{directory} is not one directory for all hosts{seen}. {places}",
        change=(
            "use a directory that all hosts share (NFS, Lustre, EFS) or a URL (s3://, gs://) that all may write to: "
            "otherwise checkpoints take their way through the driver, and are lost with its host"
        ),
    )


# Workers


def _measure_workers(
    hosts: Sequence[HostReport], num_workers: int | None, *, timeout_s: float
) -> tuple[WorkerReport | None, list[Problem]]:
    """Start workers, form their process group and time all-reduces."""
    num_gpus = int(sum(host.resources["GPU"] for host in hosts))
    accelerator: Accelerator = CUDAAccelerator() if num_gpus else CPUAccelerator()
    workers = Workers(
        num_workers=num_workers or num_gpus or max(2, len(hosts)),
        accelerator=accelerator,
        placement="SPREAD",
        start_timeout_s=timeout_s,
    )
    started = time.monotonic()
    try:
        placement = Placement(workers)
    except RaylitError as error:
        return None, [Problem(check="workers", found=str(error))]
    actors: list[Any] = []
    try:
        actor_class: Any = ray.remote(_WorkerProbe)
        actors += [actor_class.options(**placement.options(index)).remote() for index in range(workers.num_workers)]
        places = _collect([actor.get_place.remote() for actor in actors], timeout_s=timeout_s)
        report = WorkerReport(
            num_workers=workers.num_workers,
            accelerator=accelerator.name,
            backend=accelerator.collective_backend,
            start_s=time.monotonic() - started,
        )
        if late := [place for place in places if isinstance(place, str)]:
            reason = f"{len(late)} of {workers.num_workers} workers did not start: {late[0]}"
            return report, [Problem(check="workers", found=reason, change="see Ray's logs on their hosts")]
        order = sorted(range(len(actors)), key=places.__getitem__)
        names = {host.node_id: host.host for host in hosts}
        ranked = [(actors[index], names.get(places[index][1], places[index][0])) for index in order]
        return _measure_collectives(
            ranked, [places[index][0] for index in order], report, accelerator, timeout_s=timeout_s
        )
    finally:
        for actor in actors:
            ray.kill(actor)
        placement.remove()


def _measure_collectives(
    ranked: Sequence[tuple[Any, str]],
    ips: Sequence[str],
    report: WorkerReport,
    accelerator: Accelerator,
    *,
    timeout_s: float,
) -> tuple[WorkerReport, list[Problem]]:
    """Form the process group of the workers, given by rank with their hosts, and time all-reduces."""
    if len(ranked) == 1:
        return report, []
    rendezvous = Rendezvous(driver_ip=ray.util.get_node_ip_address(), worker_ips=ips)
    info = rendezvous.next_info()
    started = time.monotonic()
    joined = _collect(
        [actor.join.remote(info, rank, len(ranked), report.backend) for rank, (actor, _) in enumerate(ranked)],
        timeout_s=timeout_s,
    )
    if faults := _name_faults(joined, ranked):
        return report, [
            Problem(
                check="network",
                found=f"the workers could not form a process group ({report.backend}): {faults}",
                change=(
                    "let all hosts reach each other on all TCP ports (firewall, security group, network policy), or "
                    "name the right interface on each host by GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME"
                ),
            )
        ]
    report = dataclasses.replace(report, join_s=time.monotonic() - started)
    timings = _collect([actor.time_all_reduce.remote(accelerator) for actor, _ in ranked], timeout_s=timeout_s)
    if faults := _name_faults(timings, ranked):
        return report, [
            Problem(
                check="all-reduce",
                found=f"it failed between the workers: {faults}",
                change="see the error; with NCCL set NCCL_DEBUG=INFO on the hosts for more",
            )
        ]
    latency_s, bytes_per_s, size_bytes = timings[0]
    report = dataclasses.replace(report, latency_s=latency_s, bytes_per_s=bytes_per_s, size_bytes=size_bytes)
    problems = []
    if bytes_per_s < _MIN_BYTES_PER_S and len(set(ips)) > 1:
        problems.append(
            Problem(
                check="all-reduce",
                found=f"{bytes_per_s / 1e6:.1f} MB/s between the hosts, less than a network of 100 Mbit/s gives",
                change="name a faster interface by GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME, or a faster network",
            )
        )
    return report, problems


def _name_faults(results: Sequence[Any], ranked: Sequence[tuple[Any, str]]) -> str:
    """Return what went wrong, by rank and host; empty if no result is a text."""
    texts: dict[str, list[str]] = collections.defaultdict(list)
    for rank, (result, (_, host)) in enumerate(zip(results, ranked, strict=True)):
        if isinstance(result, str):
            texts[result].append(f"rank {rank} on {host}")
    return "; ".join(f"{_join_names(names)}: {text}" for text, names in texts.items())


# Text


def _draw_hosts(diagnosis: Diagnosis) -> list[str]:
    with_directory = diagnosis.checkpoint_dir is not None
    header = ["Host", "Address", "Interface", "CPU", "GPU", "TPU", "Object store", "/dev/shm", "Open files", "Clock"]
    rows = []
    for host in diagnosis.hosts:
        cells = [
            host.host + (" (driver)" if host.is_driver else ""),
            host.address,
            host.interface or "?",
            *(f"{host.resources[name]:g}" for name in ("CPU", "GPU", "TPU")),
            format_gigabytes(host.object_store_bytes),
            "?" if host.shm_bytes is None else format_gigabytes(host.shm_bytes),
            "?" if host.open_files is None else str(host.open_files),
            "?" if host.clock_offset_s is None else f"{host.clock_offset_s:+.3f} s",
        ]
        rows.append([*cells, {None: "?", "ok": "ok"}.get(host.checkpoint_dir, "fails")] if with_directory else cells)
    header += ["Checkpoints"] if with_directory else []
    return draw_table(header, rows, fitting_widths(header, rows), align="lll" + "r" * 7 + "l" * with_directory)


def _draw_versions(hosts: Sequence[HostReport]) -> list[str]:
    """Return a table with a row for each set of versions."""
    names = ("python", *PACKAGES)
    groups: dict[tuple[str, ...], list[str]] = collections.defaultdict(list)
    for host in hosts:
        groups[tuple(host.versions.get(name, "?") for name in names)].append(host.host)
    rows = [[_join_names(members), *versions] for versions, members in groups.items()]
    header = ["Versions on", *names]
    return draw_table(header, rows, fitting_widths(header, rows), align="l" * len(header))


def _describe_workers(report: WorkerReport) -> str:
    plural = "" if report.num_workers == 1 else "s"
    text = f"{report.num_workers} worker{plural} ({report.accelerator}) started in {report.start_s:.1f} s"
    if report.join_s is not None:
        text += f" and formed a process group in {report.join_s:.1f} s"
    if report.latency_s is not None and report.bytes_per_s is not None:
        text += (
            f"; an all-reduce by {report.backend} takes {report.latency_s * 1e3:.2f} ms, and moves "
            f"{report.bytes_per_s / 1e9:.2f} GB/s"
        )
    return text + "."


def _join_names(names: Sequence[str]) -> str:
    """Join names, of a long list the first three: "h0, h1, h2 and 29 more"."""
    if len(names) > 4:
        return f"{', '.join(names[:3])} and {len(names) - 3} more"
    return ", ".join(names)


# On the hosts of the cluster


class _StorageProbe:
    """Ray actor on one host that reads and writes the checkpoint directory."""

    def write_mark(self, directory: str, mark: str, token: str) -> str:
        """Write the file that the other hosts should see; return "ok", or what was wrong."""
        try:
            storage.make_directory(directory)
            storage.write_text(token, mark)
            return "ok" if storage.read_text(mark) == token else "a file that was written there reads back as another"
        except Exception as error:
            return f"it cannot be written: {type(error).__name__}: {error}"

    def answer_mark(self, directory: str, mark: str, token: str, answer: str) -> str:
        """Read the file of the driver's host and write one; write nothing if this is another directory."""
        try:
            if not storage.is_url(directory) and not storage.exists(directory):
                return "there is no such directory"
            if storage.read_text(mark) != token:
                return "it is another directory, without the file that the driver's host has just written"
            storage.write_text(token, answer)
        except Exception as error:
            return f"it cannot be read or written: {type(error).__name__}: {error}"
        return "ok"

    def list_missing(self, paths: Sequence[str]) -> list[str]:
        return [path for path in paths if not storage.exists(path)]

    def remove_files(self, paths: Sequence[str]) -> None:
        for path in paths:
            storage.remove_file(path)


class _WorkerProbe:
    """Ray actor that joins a process group and times all-reduces, with a worker's resources."""

    def get_place(self) -> tuple[str, str, tuple[str, ...]]:
        """Return the address and the id of its node, and its GPUs."""
        context = ray.get_runtime_context()
        gpus = tuple(str(gpu) for gpu in context.get_accelerator_ids().get("GPU", []))
        return ray.util.get_node_ip_address(), context.get_node_id(), gpus

    def join(self, rendezvous: RendezvousInfo, rank: int, world_size: int, backend: str) -> None:
        rendezvous.join(rank=rank, world_size=world_size, backend=backend, own_ip=ray.util.get_node_ip_address())

    def time_all_reduce(self, accelerator: Accelerator) -> tuple[float, float, int]:
        """Return the latency in seconds, the bus bandwidth in bytes per second, and its size in bytes. Collective."""
        accelerator.set_up(num_threads=1)
        number = torch.ones(1, device=accelerator.device())
        _time_rounds(number, accelerator, num_rounds=_NUM_WARM_UPS)
        latency_s = _time_rounds(number, accelerator, num_rounds=_NUM_LATENCY_ROUNDS)
        size_bytes = _FIRST_BYTES
        took_s = _time_rounds(torch.ones(size_bytes // 4, device=accelerator.device()), accelerator, num_rounds=2)
        size_bytes = max(_FIRST_BYTES, min(_MAX_BYTES, int(size_bytes * _TARGET_S / took_s) // 4 * 4))
        buffer = torch.ones(size_bytes // 4, device=accelerator.device())
        took_s = _time_rounds(buffer, accelerator, num_rounds=3)
        world_size = dist.get_world_size()
        return latency_s, 2 * (world_size - 1) / world_size * size_bytes / took_s, size_bytes


def _time_rounds(tensor: torch.Tensor, accelerator: Accelerator, *, num_rounds: int) -> float:
    """Return the time of an all-reduce of this tensor in seconds, the same on all ranks: the slowest's. Collective."""
    accelerator.synchronize()
    started = time.perf_counter()
    for _ in range(num_rounds):
        dist.all_reduce(tensor, dist.ReduceOp.MAX)
    accelerator.synchronize()
    took_s = torch.tensor([(time.perf_counter() - started) / num_rounds], dtype=torch.float64)
    dist.all_reduce(took_s, dist.ReduceOp.MAX)
    return float(took_s)
