"""An emulated cluster: network namespaces as nodes, a bridge as switch, links shaped to a rate. Needs root.

    with Cluster(nodes=2, rate="200mbit") as cluster:
        run = cluster.run(["train.py", "--steps", "3"], ranks_per_node=4)
        print(run.exit_code, run.traffic)

    node0 [eth0]--veth--[port0]  switch (bridge)  [port1]--veth--[eth0] node1

Every node has its own network, process and mount namespace and shares the file system with the caller.
Nothing has a name outside: each set of namespaces lives exactly as long as its process 1, which waits for
the end of a pipe that only the owner of the cluster holds open. However the owner ends, kill -9 included, the
pipe closes, process 1 ends, and the kernel kills whatever runs on the node and frees its interfaces.
"""

import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import IO, Any, NamedTuple

MAX_NODES = 64
INTERFACE = "eth0"
POLL_S = 0.02
MASTER_PORT = 29500  # the same for everyone: a node's ports are its own
TOOLS = {"ip": "iproute2", "tc": "iproute2", "unshare": "util-linux", "nsenter": "util-linux"}

# Jumbo frames, cut by the sender (gso_max_segs 1): what an interface counts as one packet is then one frame on
# the wire, with its own header, and not the 64 KiB a virtual link would otherwise pass on as one.
MTU = 9000
# The token bucket fills in one millisecond: small against the transfers that are measured (a bucket sends
# its content at once, without regard to the rate), large against the delay of a timer on a busy machine.
BURST_S = 1e-3
MIN_BURST_BYTES = 2 * MTU
# A switch that never drops: TCP's own windows bound the queue long before this does, and a lost packet would
# show TCP's retransmission timer (200 ms) instead of the link.
QUEUE_BYTES = 256 * 2**20

# What becomes process 1 of a node; arguments: the node's name and its /etc/hosts. Ignoring SIGCHLD, it reaps orphans.
# TCP shall fill the link and do no more: BBR, which the machine may have as its default, probes the path for
# seconds, and slow start after a pause would tax every step; on the short round trips of a cluster neither shows.
# Reno is the one algorithm that every kernel has. Bytes wait in their own socket rather than in the link's
# queue, where they would delay everybody's acknowledgements and counts.
_PROCESS_ONE = """
trap '' CHLD
mount -t sysfs sysfs /sys &&
mount -t tmpfs tmpfs /mnt && echo "$2" > /mnt/hosts && mount --bind /mnt/hosts /etc/hosts && umount /mnt &&
echo "$1" > /proc/sys/kernel/hostname &&
echo reno > /proc/sys/net/ipv4/tcp_congestion_control &&
echo 0 > /proc/sys/net/ipv4/tcp_slow_start_after_idle &&
echo 1 > /proc/sys/net/ipv4/tcp_no_metrics_save &&
echo 65536 > /proc/sys/net/ipv4/tcp_limit_output_bytes &&
echo 1 > /proc/sys/net/ipv6/conf/default/disable_ipv6 &&
echo ready && exec cat
"""


class NetlabError(Exception):
    """The cluster cannot be built or driven: one clear message."""


class Traffic(NamedTuple):
    """What passed a node's interface, in bytes with Ethernet headers and in packets."""

    sent_bytes: int
    sent_packets: int
    received_bytes: int
    received_packets: int

    def since(self, earlier: "Traffic") -> "Traffic":
        return Traffic(*(now - then for now, then in zip(self, earlier, strict=True)))


@dataclass(frozen=True)
class Run:
    """How a command went: `exit_code` is the first failing node's, `traffic` what each node sent and received."""

    exit_code: int
    seconds: float
    traffic: list[Traffic]


def parse_rate(rate: str) -> int:
    """Bits per second of e.g. "200mbit" (kbit, mbit, gbit; 100kbit to 100gbit)."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([kmg])bit", rate)
    bits_per_s = int(float(match[1]) * {"k": 1e3, "m": 1e6, "g": 1e9}[match[2]]) if match else 0
    if not 100_000 <= bits_per_s <= 100_000_000_000:
        raise NetlabError(
            f"rate {rate!r}: write a number and kbit, mbit or gbit, from 100kbit to 100gbit, as in 200mbit"
        )
    return bits_per_s


def read_traffic(pid: int | str = "self") -> Traffic:
    """The traffic so far of the node on which process `pid` runs."""
    with open(f"/proc/{pid}/net/dev") as file:
        fields = next(line for line in file if line.strip().startswith(f"{INTERFACE}:")).split()
    return Traffic(int(fields[9]), int(fields[10]), int(fields[1]), int(fields[2]))


def check_machine() -> None:
    """Raise NetlabError unless this process may build a cluster here."""
    missing = sorted({package for tool, package in TOOLS.items() if shutil.which(tool) is None})
    if missing:
        raise NetlabError(
            f"netlab needs {' and '.join(missing)} (the commands {', '.join(TOOLS)}): install and try again"
        )
    if os.geteuid() != 0:
        raise NetlabError("netlab needs root to make network namespaces: run it with sudo")


class _Namespaces:
    """One set of network, process, mount and host name namespaces, kept alive by a pipe."""

    def __init__(self, name: str, hosts: str) -> None:
        unshare = ["unshare", "--net", "--uts", "--pid", "--fork", "--kill-child", "--mount-proc"]
        # A session of its own: Ctrl-C at the terminal reaches only the owner, who then ends the nodes in order.
        self._holder = subprocess.Popen(
            [*unshare, "sh", "-c", _PROCESS_ONE, "sh", name, hosts],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        assert self._holder.stdout
        if self._holder.stdout.readline() != "ready\n":
            raise NetlabError(f"cannot make namespaces here: {self._holder.communicate()[1].strip()}")
        self.pid = self._holder.pid  # of `unshare`: it shares the network, and stays until process 1 has ended

    def configure(self, tool: str, *commands: str) -> None:
        """Run `ip` or `tc` commands on this set's network, with process numbers as the owner sees them."""
        line = ["nsenter", f"--net=/proc/{self.pid}/ns/net", tool, "-batch", "-"]
        done = subprocess.run(line, input="\n".join(commands) + "\n", text=True, capture_output=True)
        if done.returncode:
            raise NetlabError(f"{tool} failed: {done.stderr.strip()} (commands: {'; '.join(commands)})")

    def command_line(self, argv: Sequence[str]) -> list[str]:
        """What to start outside so that `argv` runs inside, in the caller's working directory."""
        proc = f"/proc/{self.pid}/ns"
        spaces = [f"--{kind}={proc}/{kind}" for kind in ("net", "uts")]
        spaces += [f"--mount={proc}/mnt", f"--pid={proc}/pid_for_children"]
        return ["nsenter", *spaces, "--", "env", "-C", os.getcwd(), *argv]

    def signal_all(self, number: int) -> None:
        """Signal every process of the node except process 1, as a machine does when it shuts down."""
        line = self.command_line(["sh", "-c", f"kill -{number} -1"])
        subprocess.run(line, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    def close(self) -> None:
        """End process 1 and with it all processes and interfaces; returns when they are gone."""
        self._holder.communicate()


class Cluster:
    """`nodes` nodes whose links carry `rate` in each direction; a context manager, gone after the block.

    Several clusters may exist at once, in one process or in many. Must be built by root.
    """

    def __init__(self, nodes: int, rate: str) -> None:
        if not 1 <= nodes <= MAX_NODES:
            raise NetlabError(f"{nodes} nodes: from 1 to {MAX_NODES} can be emulated")
        parse_rate(rate)
        check_machine()
        self.num_nodes, self.rate = nodes, rate
        self._nodes: list[_Namespaces] = []
        self._resources = ExitStack()

    def __enter__(self) -> "Cluster":
        try:
            self._switch = self._add_namespaces("switch")
            self._switch.configure("ip", "link add switch type bridge mcast_snooping 0", "link set switch up")
            for node in range(self.num_nodes):
                self._nodes.append(self._add_namespaces(f"node{node}"))
                self._plug_in(node)
            self.set_rate(self.rate)
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Kill everything that runs on the nodes and free the network; returns when it is gone."""
        self._resources.close()

    def address(self, node: int) -> str:
        """The node's address on the emulated network."""
        return f"10.0.0.{node + 1}"

    def start(
        self, node: int, argv: Sequence[str], *, env: Mapping[str, str] | None = None, **popen: Any
    ) -> subprocess.Popen:
        """Start a command on one node, as it is; `popen` are options of subprocess.Popen.

        The Popen's exit code is the command's, its pid is a wrapper's: a signal goes to the command from inside,
        by its pid there, or through `signal_all`.
        """
        options: dict[str, Any] = {"stdin": subprocess.DEVNULL, "start_new_session": True} | popen
        return subprocess.Popen(self._nodes[node].command_line(argv), env=self._environment(node, env), **options)

    def run(
        self,
        argv: Sequence[str],
        ranks_per_node: int | None,
        *,
        env: Mapping[str, str] | None = None,
        timeout_s: float = float("inf"),
        grace_s: float = 10.0,
    ) -> Run:
        """Run a command on all nodes under torch's launcher, or once per node as it is where `ranks_per_node` is None.

        Node 0 writes to the caller's stdout and stderr; the other nodes' stderr follows, with the node in front, if
        any node failed. The rest may go on for `grace_s` after the first failure, so that survivors can say what
        they saw. Raises NetlabError, with all of it stopped, if it takes longer than `timeout_s`.
        """
        before, started = self.counters(), time.monotonic()
        with ExitStack() as files:
            errors = [files.enter_context(tempfile.TemporaryFile()) for _ in range(1, self.num_nodes)]
            commands: list[subprocess.Popen] = []
            try:
                for node, line in enumerate(self._launch_lines(argv, ranks_per_node)):
                    outputs = {"stdout": subprocess.DEVNULL, "stderr": errors[node - 1]} if node else {}
                    commands.append(self.start(node, line, env=env, **outputs))
                exit_code = _wait(commands, started + timeout_s, grace_s)
            finally:
                self._stop(commands)
            if exit_code:
                _show_errors(errors)
        if exit_code is None:
            raise NetlabError(f"{' '.join(argv)} did not end within {timeout_s:g} s and was stopped")
        traffic = [now.since(then) for now, then in zip(self.counters(), before, strict=True)]
        return Run(exit_code, time.monotonic() - started, traffic)

    def counters(self) -> list[Traffic]:
        """Each node's traffic since the cluster was made, as its interface counted it."""
        return [read_traffic(node.pid) for node in self._nodes]

    def set_rate(self, rate: str, node: int | None = None) -> None:
        """Shape the link of one node, or of all, to `rate` in each direction."""
        bits_per_s = parse_rate(rate)
        burst = max(MIN_BURST_BYTES, int(bits_per_s / 8 * BURST_S))
        shape = f"root tbf rate {bits_per_s}bit burst {burst} limit {QUEUE_BYTES}"
        for i in range(self.num_nodes) if node is None else [node]:
            self._nodes[i].configure("tc", f"qdisc replace dev {INTERFACE} {shape}")
            self._switch.configure("tc", f"qdisc replace dev port{i} {shape}")

    def set_link(self, node: int, up: bool) -> None:
        """Pull the node's cable out of the switch, or put it back: the node sees that its carrier is gone."""
        self._switch.configure("ip", f"link set port{node} {'up' if up else 'down'}")

    def blackhole(self, node: int, on: bool = True) -> None:
        """Let the switch lose every packet from and to the node, with the link still up, or carry them again."""
        # 1: listening, 3: forwarding. A disabled port would do too, but comes back with the next carrier event.
        self._switch.configure("ip", f"link set port{node} type bridge_slave state {1 if on else 3}")

    def signal_all(self, node: int, number: int) -> None:
        """Send a signal to every process on the node."""
        self._nodes[node].signal_all(number)

    def _add_namespaces(self, name: str) -> _Namespaces:
        # The second form is what a socket that listens for both IP versions sees as its peer's address.
        hosts = [f"{form}{self.address(i)} node{i}" for form in ("", "::ffff:") for i in range(self.num_nodes)]
        namespaces = _Namespaces(name, "\n".join(["127.0.0.1 localhost", *hosts]))
        self._resources.callback(namespaces.close)
        return namespaces

    def _plug_in(self, node: int) -> None:
        port, pid = f"port{node}", self._nodes[node].pid
        self._switch.configure(
            "ip",
            f"link add {port} mtu {MTU} type veth peer name {INTERFACE} mtu {MTU} netns {pid}",
            f"link set {port} master switch up",
        )
        self._nodes[node].configure(
            "ip",
            "link set lo up",
            f"addr add {self.address(node)}/24 dev {INTERFACE}",
            f"link set {INTERFACE} gso_max_segs 1 up",
        )

    def _environment(self, node: int, extra: Mapping[str, str] | None) -> dict[str, str]:
        cluster = {
            "GLOO_SOCKET_IFNAME": INTERFACE,
            "NCCL_SOCKET_IFNAME": INTERFACE,
            "MASTER_ADDR": self.address(0),
            "MASTER_PORT": str(MASTER_PORT),
            "NODE_RANK": str(node),
        }
        return {"OMP_NUM_THREADS": "1"} | dict(os.environ) | cluster | dict(extra or {})

    def _launch_lines(self, argv: Sequence[str], ranks_per_node: int | None) -> list[list[str]]:
        """What to start on each node."""
        if ranks_per_node is None:
            return [list(argv)] * self.num_nodes
        if ranks_per_node < 1:
            raise NetlabError(f"{ranks_per_node} ranks per node: at least 1 is needed")
        python, program = _python_program(argv)
        if subprocess.run([python, "-c", "from importlib.util import find_spec as f; exit(not f('torch'))"]).returncode:
            raise NetlabError(f"{python} has no torch: activate the environment that has it, or name its Python")
        place = [f"--nnodes={self.num_nodes}", f"--nproc-per-node={ranks_per_node}"]
        meeting = [f"--master-addr={self.address(0)}", f"--master-port={MASTER_PORT}"]
        launcher = [python, "-m", "torch.distributed.run", *place, *meeting]
        return [[*launcher, f"--node-rank={node}", *program] for node in range(self.num_nodes)]

    def _stop(self, commands: Sequence[subprocess.Popen], patience_s: float = 3.0) -> None:
        """End the commands that still run, and what else runs on their nodes: politely, then at once."""
        for number in (signal.SIGTERM, signal.SIGKILL):
            for node, command in enumerate(commands):
                if command.poll() is None:
                    self.signal_all(node, number)
            deadline = time.monotonic() + patience_s
            while any(command.poll() is None for command in commands) and time.monotonic() < deadline:
                time.sleep(POLL_S)


def _python_program(argv: Sequence[str]) -> tuple[str, list[str]]:
    """The Python that runs torch's launcher for this command, and the command as the launcher wants it."""
    found = shutil.which(argv[0]) or argv[0]
    name = os.path.basename(argv[0])
    if name == "twohop":
        beside = os.path.join(os.path.dirname(os.path.abspath(found)), "python")
        return (beside if os.path.exists(beside) else sys.executable), ["-m", "twohop.trainer", *argv[1:]]
    if re.fullmatch(r"python[\d.]*", name) and len(argv) > 1:
        runs_file = argv[1] == "-m" or not argv[1].startswith("-")
        return found, list(argv[1:]) if runs_file else ["--no-python", *argv]
    return sys.executable, ["--no-python", *argv]


def _wait(commands: Sequence[subprocess.Popen], deadline: float, grace_s: float) -> int | None:
    """The exit code of the first command that fails, 0 if none does, None if the deadline passes before."""
    while True:
        codes = [command.poll() for command in commands]
        failed = next((code for code in codes if code), None)
        if failed or None not in codes or time.monotonic() >= deadline:
            break
        time.sleep(POLL_S)
    deadline = min(deadline, time.monotonic() + grace_s)
    while any(command.poll() is None for command in commands) and time.monotonic() < deadline:
        time.sleep(POLL_S)
    if failed is None:
        return None if None in codes else 0
    return failed if failed > 0 else 128 - failed  # as a shell reports a signal


def _show_errors(errors: Sequence[IO[bytes]]) -> None:
    for node, file in enumerate(errors, start=1):
        file.seek(0)
        for line in file.read().decode(errors="replace").splitlines():
            print(f"[node {node}] {line}", file=sys.stderr)
