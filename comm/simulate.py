"""Replays the messages of a dispatch and combine through links and network cards, forward and backward.

Every message passes, in this order, the sending rank's processor, its port (its own into the node's fabric, or the
card that it shares), the wire, the port of the receiver, the receiving rank's processor. Each of them serves one
message after the other, in order of arrival. Assumed:

- A port sends and receives at once. A message begins to leave the receiving port as it begins to arrive (cut-through).
- Sending and receiving are done by two processors of a rank (`Network.one_thread`: by one, which first hands over what
  it sends), apart from the one that copies rows and computes.
- Between nodes nothing but cards is short: a fat tree without collisions.
- Ranks start together, and each sends to its own node first, then to the node behind it, and so on, as NCCL does. With
  expected shares all nodes then do the same at the same time, so that one node stands for all.
- The backward pass takes the turns of the forward pass, with twice the work of the experts.

Imports no torch. Shapes: S ranks that are looked at, P peers of an exchange, n messages.
"""

from collections import defaultdict
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np

from twohop.comm.cost import CostModel, LevelCost, Workload
from twohop.comm.network import Network
from twohop.comm.routes import ROUTES
from twohop.comm.schedule import schedule
from twohop.comm.shipment import Array, Indices, Peers, Shipment

INTEGER, ASSIGNMENT, WEIGHT_GRADIENT = 8, 8, 4  # bytes


@dataclass(frozen=True)
class Simulated:
    """What a simulation found. Bytes and messages as `TrafficMeter` counts them, for each rank that was looked at."""

    forward_s: float
    backward_s: float
    sent: dict[str, dict[str, tuple[list[float], list[int]]]]  # level -> phase -> (bytes, messages) of each rank

    def total(self, level: str) -> tuple[float, int]:
        """Bytes and messages of a level over all phases and all ranks that were looked at."""
        pairs = self.sent.get(level, {}).values()
        return sum(sum(sent) for sent, _ in pairs), sum(sum(messages) for _, messages in pairs)


def simulate(
    shipment: Shipment,
    network: Network,
    work: Workload,
    *,
    backward: bool = True,
    agreement: bool = True,
    beside_s: float = 0.0,
) -> Simulated:
    """Times and traffic of one dispatch with its combine.

    Args:
        shipment: what is sent.
        network: what it is sent through.
        work: sizes of rows, and the seconds of the experts in the forward pass.
        backward: also the backward pass.
        agreement: also the plan, counts and assignments; without them it is the bare exchange of rows.
        beside_s: seconds of what runs beside the first hop (a shared expert).
    """
    run = _Run(shipment, network, work)
    if agreement:
        run.busy_S += network.plan_s
        for hop, numbers in enumerate(shipment.numbers_of_counts):
            run.exchange_alone(hop, "counts", np.full(shipment.peers[hop].to_SP.shape, float(numbers * INTEGER)))
        for hop, assignments_SP in enumerate(shipment.assignments_SP):
            run.exchange_alone(hop, "metadata", assignments_SP * ASSIGNMENT)
    run.walk("dispatch", "combine", work.experts_s, beside_s)
    forward_s = run.now
    if backward:
        run.walk("combine backward", "dispatch backward", 2 * work.experts_s, 2 * beside_s)
    if backward and agreement:
        for hop in reversed(range(len(shipment.hops))):
            home_SP = (
                shipment.peers[hop].back(shipment.assignments_SP[hop]) if run.whole else shipment.assignments_SP[hop]
            )
            run.exchange_alone(hop, "metadata backward", home_SP * WEIGHT_GRADIENT)
    return Simulated(forward_s, run.now - forward_s, {level: dict(phases) for level, phases in run.sent.items()})


@dataclass
class _Queue:
    """Ports or processors that serve one message after the other."""

    free: Array  # when each of them has served all that came so far

    def serve(self, at_n: Indices, ready_n: Array, service_n: Array) -> Array:
        """When each message has been served, in order of readiness at each place."""
        order_n = np.lexsort((ready_n, at_n))
        sorted_at = at_n[order_n]
        bounds = np.searchsorted(sorted_at, np.arange(len(self.free) + 1))
        done_n = np.empty(len(order_n))
        for place, (start, end) in enumerate(pairwise(bounds)):
            if start == end:
                continue
            chosen = order_n[start:end]
            served = np.cumsum(service_n[chosen])
            # done = max(ready, done of the one before) + service, without a loop.
            waited = np.maximum.accumulate(ready_n[chosen] - served + service_n[chosen])
            done_n[chosen] = served + np.maximum(waited, self.free[place])
            self.free[place] = done_n[chosen[-1]]
        return done_n


@dataclass
class _Run:
    """The state of a simulation: when each resource is free again, and what was sent."""

    shipment: Shipment
    network: Network
    work: Workload
    sent: dict[str, dict[str, tuple[list[float], list[int]]]] = field(default_factory=lambda: defaultdict(dict))

    def __post_init__(self) -> None:
        ranks, nics = self.shipment.nodes * self.shipment.ranks_per_node, self.network.nics
        self.busy_S = np.zeros(ranks)  # the processor that copies and computes
        local_S = np.arange(ranks) % self.shipment.ranks_per_node
        nic_S = np.arange(ranks) // self.shipment.ranks_per_node * nics + local_S * nics // self.shipment.ranks_per_node
        # Ports: one of each rank inside the node, then the cards.
        self.port_2S = np.stack([np.arange(ranks), ranks + nic_S])
        ports = ranks + self.shipment.nodes * nics
        self.sending = _Queue(np.zeros(ranks))
        self.receiving = self.sending if self.network.one_thread else _Queue(np.zeros(ranks))
        self.out, self.into = (_Queue(np.zeros(ports)) for _ in range(2))

    @property
    def now(self) -> float:
        """When the last rank has done everything so far."""
        return float(self.busy_S.max())

    @property
    def whole(self) -> bool:
        """Whether all ranks are looked at."""
        return self.shipment.nodes == self.shipment.block[0]

    def exchange_alone(self, hop: int, phase: str, bytes_SP: Array) -> None:
        """An exchange that all ranks wait for."""
        self.busy_S += self.network.exchange_s
        self.busy_S = np.maximum(self.busy_S, self._exchange(self.shipment.peers[hop], phase, bytes_SP))

    def walk(self, there: str, home: str, experts_s: float, beside_s: float) -> None:
        """All chunks through their hops, the experts and home, in the order of a real dispatch."""
        shipment, hops, chunks = self.shipment, len(self.shipment.hops), self.shipment.chunks
        home_CSP = [shipment.home(hop) for hop in range(hops)]
        arrived: dict[tuple[int, int], Array] = {}  # (exchange, chunk) -> when each rank has all of it
        for started, (stage, chunk) in enumerate(schedule(hops, chunks), start=1):
            if stage > 0:
                self.busy_S = np.maximum(self.busy_S, arrived.pop((stage, chunk)))
            if stage == hops:  # to the experts, weighed and summed
                rows_S = 2 * shipment.at_experts_CS[chunk]
                self.busy_S = self.busy_S + experts_s / chunks
            else:
                rows_S = np.zeros_like(self.busy_S)
            if stage < hops:
                rows_S = rows_S + shipment.rows_CSP[stage][chunk].sum(1)
            if stage > hops:  # children summed, after the way home
                rows_S = rows_S + shipment.rows_CSP[2 * hops - stage][chunk].sum(1)
            self.busy_S = self.busy_S + rows_S * self.work.row_bytes * self.network.copied_byte_s
            if stage < 2 * hops:
                self.busy_S = self.busy_S + self.network.exchange_s
                hop = stage if stage < hops else 2 * hops - 1 - stage
                rows_SP = (shipment.rows_CSP if stage < hops else home_CSP)[hop][chunk]
                sent_SP = rows_SP * self._row_bytes(shipment.peers[hop])
                phase = there if stage < hops else home
                arrived[stage + 1, chunk] = self._exchange(shipment.peers[hop], phase, sent_SP)
            if started == chunks:  # all first hops are under way
                self.busy_S = self.busy_S + beside_s

    def _row_bytes(self, peers: Peers) -> float:
        return self.work.between_row_bytes if peers.crosses_SP.any() else self.work.inside_row_bytes

    def _exchange(self, peers: Peers, phase: str, bytes_SP: Array) -> Array:
        """When each rank has sent and received everything; it begins when its processor is free."""
        real = peers.others_SP & (bytes_SP > 0)
        self._meter(peers, phase, np.where(real, bytes_SP, 0.0), real)
        from_n, peer_n = np.nonzero(real)
        in_turn = np.argsort(peers.turn_SP[from_n, peer_n], kind="stable")
        from_n, peer_n = from_n[in_turn], peer_n[in_turn]
        to_n, bytes_n = peers.to_SP[from_n, peer_n], bytes_SP[from_n, peer_n]
        crosses_n = peers.crosses_SP[from_n, peer_n].astype(np.int64)
        network = self.network

        def by_level(name: str) -> Array:
            return np.array([getattr(network.inside, name), getattr(network.between, name)])[crosses_n]

        ready_n = self.sending.serve(from_n, self.busy_S[from_n], by_level("send_s"))
        service_n = bytes_n * by_level("byte_s")
        left_n = self.out.serve(self.port_2S[crosses_n, from_n], ready_n, service_n)
        begins_n = left_n - service_n + by_level("latency_s")
        came_n = self.into.serve(self.port_2S[crosses_n, to_n], begins_n, service_n)
        taken_n = self.receiving.serve(to_n, came_n, by_level("receive_s"))
        done_S = self.busy_S.copy()
        np.maximum.at(done_S, from_n, left_n)
        np.maximum.at(done_S, to_n, taken_n)
        return done_S

    def _meter(self, peers: Peers, phase: str, bytes_SP: Array, real: np.ndarray) -> None:
        for level, is_there in (("between nodes", peers.crosses_SP), ("inside node", ~peers.crosses_SP)):
            here = real & is_there
            if here.any():
                before = self.sent[level].get(phase, ([0.0] * len(real), [0] * len(real)))
                sent = (bytes_SP * here).sum(1) + np.array(before[0])
                self.sent[level][phase] = (sent.tolist(), (here.sum(1) + np.array(before[1])).tolist())


def cost_model(network: Network, block: tuple[int, int], ranks_per_node: int | None = None) -> CostModel:
    """The model by which `auto` chooses, as a probe of an EP group of this shape would find it in this network."""
    ranks_per_node = ranks_per_node or block[1]
    between, inside = network.between, network.inside
    card = ranks_per_node / min(network.nics, ranks_per_node)  # ranks that share it
    levels = {
        "node": LevelCost(max(between.send_s, between.receive_s), between.byte_s * card),
        "local": LevelCost(max(inside.send_s, inside.receive_s), inside.byte_s),
    }
    ranks = block[0] * block[1]
    tiny = Workload(ranks, 1, ranks, 0.0, 1e-9, 1e-9)  # a token for every rank, as the probe has it, but no bytes
    base_s = {
        route: simulate(
            Shipment.expected(tiny, block, route, 1, ranks_per_node), network, tiny, backward=False
        ).forward_s
        for route in ROUTES
    }
    return CostModel(levels, network.copied_byte_s, network.exchange_s, base_s)
