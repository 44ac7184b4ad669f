"""GPUs by name, and a cluster of them as `twohop.comm` sees it. Imports no torch."""

from dataclasses import dataclass

from twohop.comm.network import Link, Network
from twohop.trainer.config.plan import HardwareConfig

GIB = 2**30
# Of a rank's processor, for each message inside a node and for each exchange; and the way inside: assumed for all GPUs.
INSIDE_MESSAGE_S, INSIDE_LATENCY_S, EXCHANGE_S = 1e-6, 2e-6, 10e-6


@dataclass(frozen=True)
class Gpu:
    """From the makers' data sheets: dense arithmetic, and NVLink one way."""

    bf16_flops: float
    fp32_flops: float  # without TF32, as is PyTorch's default
    memory_gib: float
    memory_bytes_s: float
    link_bytes_s: float  # to the other GPUs of its node, each way
    fp8_flops: float | None = None  # None: it has none


GPUS = {
    "v100": Gpu(125e12, 15.7e12, 31.7, 0.9e12, 150e9),  # its 16-bit arithmetic is fp16
    "a100": Gpu(312e12, 19.5e12, 79.2, 2.04e12, 300e9),
    "h100": Gpu(989e12, 67e12, 79.2, 3.35e12, 450e9, 1979e12),
    "h200": Gpu(989e12, 67e12, 139.8, 4.8e12, 450e9, 1979e12),
    "b200": Gpu(2250e12, 75e12, 178.4, 8.0e12, 900e9, 4500e12),
}


def network_of(cluster: HardwareConfig) -> Network:
    """The cluster's links and cards."""
    gpu = GPUS[cluster.gpu]
    message_s = cluster.message_us * 1e-6
    return Network(
        between=Link(8e-9 / cluster.inter_gbps, message_s, message_s, cluster.latency_us * 1e-6),
        inside=Link(1 / gpu.link_bytes_s, INSIDE_MESSAGE_S, INSIDE_MESSAGE_S, INSIDE_LATENCY_S),
        nics=cluster.nics_per_node or cluster.gpus_per_node,
        copied_byte_s=2 / gpu.memory_bytes_s,  # read and written
        exchange_s=EXCHANGE_S,
    )
