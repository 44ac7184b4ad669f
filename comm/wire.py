"""Wire formats: how a row of numbers is encoded on a hop.

A new format is one pair of functions here and one line in `FORMATS`. Encoded rows are [R, B] of any dtype that the
backend moves; gloo and older NCCL refuse float8, so 8-bit formats travel as uint8, with their fp32 scales behind.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch

from twohop.comm.wiring import Direction, Wires

FP8_MAX = 448.0  # largest finite e4m3 number
INT8_MAX = 127.0


@dataclass(frozen=True)
class WireFormat:
    """`encode` makes [R, B] out of rows [R, D]; `decode` makes rows of the wanted dtype again.

    `error` bounds |decode(encode(x)) - x| as a fraction of the largest |x| that shares a scale (of |x| itself for
    bf16), for values far from the format's underflow.
    """

    encode: Callable[[torch.Tensor], torch.Tensor]
    decode: Callable[[torch.Tensor, torch.dtype], torch.Tensor]
    error: float

    def row_bytes(self, d: int, dtype: torch.dtype) -> int:
        """Bytes of an encoded row of `d` numbers."""
        wire_1B = self.encode(torch.zeros(1, d, dtype=dtype))
        return wire_1B.numel() * wire_1B.element_size()


def _scaled(columns: int | None, largest: float, to_byte: Callable, from_byte: Callable, error: float) -> WireFormat:
    """One byte for each number and one fp32 scale for each `columns` numbers (None: for the row)."""

    def encode(rows_RD: torch.Tensor) -> torch.Tensor:
        blocks_RGC = _blocks(rows_RD.float(), columns)
        scale_RG1 = (blocks_RGC.abs().amax(-1, keepdim=True) / largest).clamp(min=torch.finfo(torch.float32).tiny)
        byte_RD = to_byte(blocks_RGC / scale_RG1).flatten(1)[:, : rows_RD.shape[1]]
        return torch.cat([byte_RD, scale_RG1.flatten(1).view(torch.uint8)], dim=1)

    def decode(wire_RB: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        d = _width(wire_RB.shape[1], columns)
        # A view as wider numbers needs memory of its own that begins at a multiple of their width.
        scale_RG1 = wire_RB[:, d:].clone(memory_format=torch.contiguous_format).view(torch.float32).unsqueeze(-1)
        blocks_RGC = _blocks(from_byte(wire_RB[:, :d].contiguous()), columns)
        return (blocks_RGC * scale_RG1).flatten(1)[:, :d].to(dtype)

    return WireFormat(encode, decode, error)


def _blocks(rows_RD: torch.Tensor, columns: int | None) -> torch.Tensor:
    """[R, D] -> [R, G, C], zeros behind the last column."""
    d = rows_RD.shape[1]
    c = columns or d
    return torch.nn.functional.pad(rows_RD, (0, -d % c)).unflatten(1, (-1, c))


def _width(wire_bytes: int, columns: int | None) -> int:
    """D, from D + 4 * ceil(D / columns) bytes."""
    if columns is None:
        return wire_bytes - 4
    blocks = -(-wire_bytes // (columns + 4))
    return wire_bytes - 4 * blocks


def _to_fp8(x: torch.Tensor) -> torch.Tensor:
    return x.to(torch.float8_e4m3fn).view(torch.uint8)


def _from_fp8(byte: torch.Tensor) -> torch.Tensor:
    return byte.view(torch.float8_e4m3fn).float()


def _to_int8(x: torch.Tensor) -> torch.Tensor:
    return x.round().to(torch.int8).view(torch.uint8)


def _from_int8(byte: torch.Tensor) -> torch.Tensor:
    return byte.view(torch.int8).float()


FORMATS: dict[str, WireFormat] = {
    # Rows travel as they are: exact, also for fp64 and for models that run in bf16.
    "fp32": WireFormat(lambda rows: rows, lambda wire, dtype: wire.to(dtype), 0.0),
    "bf16": WireFormat(lambda rows: rows.bfloat16(), lambda wire, dtype: wire.to(dtype), 2**-8),
    "fp8": _scaled(None, FP8_MAX, _to_fp8, _from_fp8, 2**-4),
    "fp8_128": _scaled(128, FP8_MAX, _to_fp8, _from_fp8, 2**-4),
    "int8": _scaled(None, INT8_MAX, _to_int8, _from_int8, 0.5 / INT8_MAX),
}


def format_of(wires: Wires, direction: Direction, crosses_nodes: bool) -> WireFormat:
    """The format of one hop."""
    hop = wires.of(direction)
    return FORMATS[hop.between if crosses_nodes else hop.inside]


def check_wires(wires: Wires) -> None:
    """Raise a ValueError that names direction, hop and the known formats, unless all are known."""
    for direction in Direction:
        for kind, name in asdict(wires.of(direction)).items():
            if name not in FORMATS:
                raise ValueError(
                    f"unknown wire format {direction.name}.{kind}={name!r}: use one of {', '.join(FORMATS)}"
                )
