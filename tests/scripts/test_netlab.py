"""The emulated cluster: its nodes, links, counters and faults, and that nothing is left however it ends."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).parents[2] / "scripts"
sys.path.insert(0, str(SCRIPTS))

import netlab_cluster  # noqa: E402
from netlab_cluster import Cluster, NetlabError, parse_rate  # noqa: E402

MIB = 2**20

SERVER = """
import socket, sys
server = socket.create_server(("", 5000))
print("listening", flush=True)
while True:
    connection, _ = server.accept()
    with connection:
        size = int.from_bytes(connection.recv(8, socket.MSG_WAITALL), "big")
        while size and (part := connection.recv(min(size, 1 << 20))):
            size -= len(part)
        connection.sendall(b".")
"""
CLIENT = """
import socket, sys, time
address, size = sys.argv[1], int(sys.argv[2])
connection = socket.create_connection((address, 5000), timeout=1)
connection.settimeout(20)
start = time.monotonic()
connection.sendall(size.to_bytes(8, "big") + bytes(size))
connection.recv(1, socket.MSG_WAITALL)
print(time.monotonic() - start)
"""


def why_not_here() -> str | None:
    try:
        netlab_cluster.check_machine()
    except NetlabError as error:
        return str(error)
    trial = ["unshare", "--net", "--uts", "--pid", "--fork", "--mount-proc", "true"]
    done = subprocess.run(trial, capture_output=True, text=True)
    return f"no network namespaces here: {done.stderr.strip()}" if done.returncode else None


REASON = why_not_here()
needs_namespaces = pytest.mark.skipif(REASON is not None, reason=str(REASON))


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    with Cluster(nodes=2, rate="100mbit") as cluster:
        servers = [serve(cluster, node) for node in range(2)]
        yield cluster
    for server in servers:
        server.communicate(timeout=10)


def serve(cluster: Cluster, node: int) -> subprocess.Popen:
    server = cluster.start(node, [sys.executable, "-c", SERVER], stdout=subprocess.PIPE, text=True)
    assert server.stdout
    assert server.stdout.readline() == "listening\n"
    return server


def send(cluster: Cluster, source: int, target: int, size: int) -> float | None:
    """Seconds to send `size` bytes and hear of their arrival; None if there is no way."""
    line = [sys.executable, "-c", CLIENT, cluster.address(target), str(size)]
    client = cluster.start(source, line, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    output, _ = client.communicate(timeout=30)
    return float(output) if client.returncode == 0 else None


def output_of(cluster: Cluster, node: int, command: str) -> str:
    return cluster.start(node, ["sh", "-c", command], stdout=subprocess.PIPE, text=True).communicate(timeout=30)[0]


@pytest.mark.parametrize(("rate", "bits"), [("100kbit", 100_000), ("200mbit", 200_000_000), ("2.5gbit", 2_500_000_000)])
def test_a_rate_is_read(rate: str, bits: int) -> None:
    assert parse_rate(rate) == bits


@pytest.mark.parametrize("rate", ["", "fast", "200", "200mb", "-1mbit", "0mbit", "99kbit", "101gbit", "1mbit; reboot"])
def test_a_bad_rate_is_refused(rate: str) -> None:
    with pytest.raises(NetlabError, match=r"rate '.*': write a number and kbit, mbit or gbit"):
        Cluster(nodes=2, rate=rate)


@pytest.mark.parametrize("nodes", [0, 65])
def test_a_bad_number_of_nodes_is_refused(nodes: int) -> None:
    with pytest.raises(NetlabError, match=f"{nodes} nodes: from 1 to 64"):
        Cluster(nodes=nodes, rate="1gbit")


def test_what_the_machine_lacks_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(netlab_cluster.shutil, "which", lambda tool: f"/usr/bin/{tool}")
    monkeypatch.setattr(netlab_cluster.os, "geteuid", lambda: 1000)
    with pytest.raises(NetlabError, match="needs root"):
        Cluster(nodes=2, rate="1gbit")
    monkeypatch.setattr(netlab_cluster.shutil, "which", lambda tool: None if tool == "tc" else f"/usr/bin/{tool}")
    with pytest.raises(NetlabError, match="needs iproute2"):
        Cluster(nodes=2, rate="1gbit")


@pytest.mark.parametrize(
    ("argv", "program"),
    [
        (["twohop", "train", "model=moe"], ["-m", "twohop.trainer", "train", "model=moe"]),
        (["python", "train.py", "-x"], ["train.py", "-x"]),
        (["python3", "-m", "package"], ["-m", "package"]),
        (["python", "-c", "pass"], ["--no-python", "python", "-c", "pass"]),
        (["./bench", "1"], ["--no-python", "./bench", "1"]),
    ],
)
def test_a_command_becomes_the_launchers(argv: list[str], program: list[str]) -> None:
    assert netlab_cluster._python_program(argv)[1] == program


@needs_namespaces
def test_nodes_know_themselves_and_each_other(cluster: Cluster) -> None:
    for node in range(2):
        assert output_of(cluster, node, "hostname; getent ahostsv4 node1 | head -n 1").split()[:2] == [
            f"node{node}",
            cluster.address(1),
        ]
        assert output_of(cluster, node, "ls /sys/class/net").split() == ["eth0", "lo"]
        assert output_of(cluster, node, "echo $MASTER_ADDR $GLOO_SOCKET_IFNAME $NODE_RANK").split() == [
            cluster.address(0),
            "eth0",
            str(node),
        ]
    assert send(cluster, 0, 1, 1) is not None
    assert send(cluster, 1, 0, 1) is not None


@needs_namespaces
def test_only_traffic_between_nodes_is_counted(cluster: Cluster) -> None:
    before = cluster.counters()
    assert send(cluster, 0, 0, MIB) is not None
    for now, then in zip(cluster.counters(), before, strict=True):
        assert now.since(then).sent_bytes < 1000  # the last packets of earlier tests
    assert send(cluster, 0, 1, MIB) is not None
    sent, received = (now.since(then) for now, then in zip(cluster.counters(), before, strict=True))
    assert MIB <= sent.sent_bytes <= 1.02 * MIB
    assert MIB <= received.received_bytes <= 1.02 * MIB
    assert received.sent_bytes <= 0.02 * MIB


@needs_namespaces
@pytest.mark.parametrize(("source", "target"), [(0, 1), (1, 0)])
def test_the_rate_is_enforced(cluster: Cluster, source: int, target: int) -> None:
    seconds = send(cluster, source, target, 4 * MIB)
    assert seconds is not None
    assert seconds >= 0.9 * 4 * MIB * 8 / 100e6


@needs_namespaces
@pytest.mark.parametrize(("source", "target"), [(0, 1), (1, 0)])
def test_one_link_may_be_slower_in_both_directions(cluster: Cluster, source: int, target: int) -> None:
    cluster.set_rate("20mbit", node=1)
    try:
        seconds = send(cluster, source, target, MIB)
    finally:
        cluster.set_rate("100mbit")
    assert seconds is not None
    assert seconds >= 0.9 * MIB * 8 / 20e6


@needs_namespaces
def test_a_pulled_cable_is_seen_and_put_back(cluster: Cluster) -> None:
    cluster.set_link(1, up=False)
    assert output_of(cluster, 1, "cat /sys/class/net/eth0/carrier") == "0\n"
    assert send(cluster, 0, 1, 1) is None
    cluster.set_link(1, up=True)
    assert output_of(cluster, 1, "cat /sys/class/net/eth0/carrier") == "1\n"
    assert send(cluster, 0, 1, 1) is not None


@needs_namespaces
def test_a_blackhole_is_silent_and_ends(cluster: Cluster) -> None:
    cluster.blackhole(1)
    assert output_of(cluster, 1, "cat /sys/class/net/eth0/carrier") == "1\n"
    assert send(cluster, 0, 1, 1) is None
    assert send(cluster, 1, 0, 1) is None
    cluster.blackhole(1, on=False)
    assert send(cluster, 0, 1, 1) is not None


@needs_namespaces
def test_what_a_tool_refuses_is_told(cluster: Cluster) -> None:
    with pytest.raises(NetlabError, match=r'ip failed: Cannot find device "port7"'):
        cluster.set_link(7, up=False)


@needs_namespaces
def test_clusters_stand_side_by_side(cluster: Cluster) -> None:
    before = cluster.counters()
    with Cluster(nodes=3, rate="1gbit") as other:
        server = serve(other, 2)
        assert send(other, 0, 2, MIB) is not None
        assert other.counters()[2].received_bytes >= MIB
    server.communicate(timeout=10)
    assert sum(now.since(then).sent_bytes for now, then in zip(cluster.counters(), before, strict=True)) < MIB


@needs_namespaces
def test_a_command_that_takes_too_long_is_stopped(cluster: Cluster) -> None:
    with Cluster(nodes=1, rate="1gbit") as other:
        with pytest.raises(NetlabError, match=r"sleep 1000 did not end within 0\.2 s"):
            other.run(["sleep", "1000"], None, timeout_s=0.2)
        assert "sleep" not in output_of(other, 0, "cat /proc/[0-9]*/comm")


@needs_namespaces
def test_bytes_on_the_link_agree_with_what_gloo_was_given() -> None:
    kib, repeats, exchanges = 4096, 2, 2
    probe = [sys.executable, str(SCRIPTS / "netlab_probe.py"), "--rate", "1gbit", "--kib", str(kib)]
    with Cluster(nodes=2, rate="1gbit") as cluster:
        run = cluster.run([*probe, "--repeats", str(repeats)], ranks_per_node=2, timeout_s=60)
    assert run.exit_code == 0
    payload = kib * 1024 * exchanges * (1 + repeats)  # a node's; the first of each exchange opens the connections
    for traffic in run.traffic:
        assert payload <= traffic.sent_bytes <= 1.04 * payload
        assert payload <= traffic.received_bytes <= 1.04 * payload


@pytest.fixture
def netlab() -> Iterator[Callable[..., subprocess.Popen]]:
    """Starts the command with these arguments; a test that fails leaves nothing behind either."""
    started: list[subprocess.Popen] = []

    def start(*argv: str) -> subprocess.Popen:
        line = [sys.executable, str(SCRIPTS / "netlab"), *argv]
        started.append(subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True))
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.communicate()


@needs_namespaces
def test_output_exit_code_and_counters_arrive(netlab: Callable[..., subprocess.Popen], tmp_path: Path) -> None:
    script = "echo out $NODE_RANK; echo err $NODE_RANK >&2; if [ $NODE_RANK = 1 ]; then exit 7; fi; sleep 0.3; exit 5"
    process = netlab("--plain", "--json", str(tmp_path / "out.json"), "--", "sh", "-c", script)
    output, errors = process.communicate(timeout=30)
    assert process.returncode == 7  # of node 1, which failed first
    assert output == "out 0\n"
    assert errors.startswith("err 0\n[node 1] err 1\n")
    result = json.loads((tmp_path / "out.json").read_text())
    assert (result["exit_code"], result["nodes"], result["rate_bits_per_s"]) == (7, 2, 10**9)
    assert result["bytes_between_nodes"] == sum(node["sent_bytes"] for node in result["traffic"])


@needs_namespaces
def test_survivors_have_a_limited_time(netlab: Callable[..., subprocess.Popen]) -> None:
    script = "if [ $NODE_RANK = 1 ]; then kill -9 $$; fi; trap 'echo asked to stop; exit' TERM; sleep 1000 & wait"
    process = netlab("--plain", "--grace", "0.2", "--", "sh", "-c", script)
    output, _ = process.communicate(timeout=30)
    assert (process.returncode, output) == (128 + signal.SIGKILL, "asked to stop\n")


@needs_namespaces
@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--rate", "fast", "--", "true"], "netlab: rate 'fast'"),
        (["--nodes", "0", "--", "true"], "netlab: 0 nodes"),
        (["--ranks-per-node", "0", "--", "true"], "netlab: 0 ranks per node"),
        (["--nodes", "2"], "no command"),
        (["--json", "/nowhere/x.json", "--", "true"], "the folder /nowhere does not exist"),
    ],
)
def test_bad_input_gives_one_message(netlab: Callable[..., subprocess.Popen], argv: list[str], message: str) -> None:
    process = netlab(*argv)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 2
    assert message in errors
    assert "Traceback" not in errors


def network(pid: int | str) -> str | None:
    try:
        return os.readlink(f"/proc/{pid}/ns/net")
    except OSError:
        return None  # has ended meanwhile


def processes_in(networks: set[str | None]) -> list[int]:
    return [int(name) for name in os.listdir("/proc") if name.isdigit() and network(name) in networks - {None}]


def networks_of(owner: int) -> set[str | None]:
    """The networks that the children of a process live in, this one left out."""
    children = []
    for name in filter(str.isdigit, os.listdir("/proc")):
        try:
            parent = int(Path(f"/proc/{name}/stat").read_text().rpartition(")")[2].split()[1])
        except OSError:
            continue
        children += [name] if parent == owner else []
    return {network(child) for child in children} - {network("self")}


@needs_namespaces
@pytest.mark.parametrize("ending", ["success", "failure", signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_nothing_is_left(netlab: Callable[..., subprocess.Popen], ending: str | signal.Signals, tmp_path: Path) -> None:
    # A command with a child in a session of its own, which no terminal and no process group would reach.
    gate = tmp_path / "gate"
    wait = f"while [ ! -e {gate} ]; do sleep 0.05; done"
    script = f"setsid sleep 1000 & echo started; {wait}; exit {int(ending == 'failure')}"
    process = netlab("--plain", "--nodes", "2", "--", "sh", "-c", script)
    assert process.stdout
    assert process.stdout.readline() == "started\n"
    networks = networks_of(process.pid)
    assert len(networks) == 3  # two nodes and the switch
    assert len(processes_in(networks)) >= 8
    if isinstance(ending, signal.Signals):
        process.send_signal(ending)
    else:
        gate.touch()
    process.communicate(timeout=30)
    codes = {"success": 0, "failure": 1, signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGKILL: -9}
    assert process.returncode == codes[ending]
    deadline = time.monotonic() + 10
    while ending == signal.SIGKILL and processes_in(networks) and time.monotonic() < deadline:
        time.sleep(0.02)  # the kernel's work then, of which nobody hears
    assert processes_in(networks) == []
    assert not [name for name in os.listdir("/sys/class/net") if name.startswith("port")]
