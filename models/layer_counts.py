"""How many experts each MoE layer has, in one line: `[32]*10 + [64]*2`, or `pyramid(32, 64, last=2)`.

PR-MoE (Rajbhandari 2022) gives later layers more experts. This reads lists, sums and repetitions of lists, and the
pyramid; nothing else, and nothing is evaluated. Imports no torch, like the configuration that uses it.
"""

import re
from typing import Any

KEY = "model.moe.experts"
FORMS = 'a number, a list as [4,4,8], or a text as "[4]*2 + [8]" or "pyramid(4, 8, last=1)"'
_NUMBER = r"\s*\d{1,6}\s*"
_PART = re.compile(rf"\s*\[({_NUMBER}(?:,{_NUMBER})*)\]\s*(?:\*\s*([1-9]\d{{0,5}})\s*)?")
_PYRAMID = re.compile(rf"\s*pyramid\(({_NUMBER}),({_NUMBER}),\s*last\s*=({_NUMBER})\)\s*")


def expert_counts(written: Any, num_layers: int = 0) -> list[int]:
    """The numbers that `written` stands for; `num_layers` is the number of MoE layers, which only a pyramid asks for.

    Raises:
        ValueError: it is none of the forms, or a pyramid whose upper layers are not some, but not all, of them.
    """
    if not isinstance(written, str):
        counts = list(written) if isinstance(written, (list, tuple)) else [written]
        if not all(isinstance(count, int) and not isinstance(count, bool) for count in counts):
            raise ValueError(f"{KEY}={written}: use {FORMS}")
        return counts
    if pyramid := _PYRAMID.fullmatch(written):
        low, high, last = map(int, pyramid.groups())
        if not 1 <= last < num_layers:
            raise ValueError(
                f"{KEY}={written}: the model has {num_layers} MoE layers: "
                + (f"use last=1 to last={num_layers - 1}" if num_layers > 1 else "a pyramid needs 2 or more")
            )
        return [low] * (num_layers - last) + [high] * last
    parts = [_PART.fullmatch(part) for part in written.split("+")]
    counts = []
    for part in parts:
        if part is None:
            raise ValueError(f"{KEY}={written}: use {FORMS}")
        counts += [int(count) for count in part[1].split(",")] * int(part[2] or 1)
    return counts
