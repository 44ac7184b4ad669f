"""What a cluster is made of, as far as messages see it. Times in seconds, sizes in bytes. Imports no torch."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Link:
    """How messages travel on one level of the network: inside a node, or between nodes."""

    byte_s: float  # a byte through one port, which sends and receives at the same time
    send_s: float = 0.0  # of the sending rank's processor, for each message
    receive_s: float = 0.0  # of the receiving rank's processor, for each message
    latency_s: float = 0.0  # from port to port


@dataclass(frozen=True)
class Network:
    """Nodes of equal ranks. A rank has a port into its node's fabric; its node's network cards are shared evenly."""

    between: Link  # a port is a network card
    inside: Link  # a port is a rank's
    nics: int = 1  # network cards of a node
    copied_byte_s: float = 0.0  # to copy, or add, one byte of a row on its way
    exchange_s: float = 0.0  # processor time of an exchange, whatever it carries
    plan_s: float = 0.0  # processor time of the plan of a dispatch
    one_thread: bool = False  # a rank sends and receives in turns, as gloo's only thread does, not side by side
