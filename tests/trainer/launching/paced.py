"""`twohop train` for tests that do something to it meanwhile. torchrun starts this file as a script.

Before each step all ranks wait for as many seconds as the file `pause` of the current folder says, and rank 0 adds
the number of the step and the number of ranks to `taken`.
"""

import os
import sys
import time
from pathlib import Path
from typing import Any

from twohop.trainer import cli
from twohop.trainer.data import loader

PAUSE, TAKEN = Path("pause"), Path("taken")


def pace() -> None:
    read = loader.step_numbers

    def read_slowly(order: Any, seed: int, step: int, *sizes: int) -> list[int]:
        time.sleep(float(PAUSE.read_text()))
        if os.environ["RANK"] == "0":
            with TAKEN.open("a") as file:
                file.write(f"{step + 1} {os.environ['WORLD_SIZE']}\n")
        return read(order, seed, step, *sizes)

    loader.step_numbers = read_slowly


if __name__ == "__main__":
    pace()
    sys.exit(cli.run(["train", *sys.argv[1:]]))
