"""`python -m twohop.trainer [command] [key=value …]`: the same as `twohop`, for torchrun. The default is train."""

import sys

from twohop.trainer.cli import main

if __name__ == "__main__":
    args = sys.argv[1:]
    named = bool(args) and not args[0].startswith("-") and "=" not in args[0]
    main(args if named else ["train", *args])
