"""Imported by the fork server before anything else (see `prefork`): to import it anywhere else is a mistake."""

import ctypes
import gc
import signal
import sys

PR_SET_PDEATHSIG = 1  # of Linux's prctl.h

# The server dies with who started it, however that ends; its workers then get SIGINT, by torch's own doing. Without
# this it would wait for the workers first.
ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)

# An interpreter that was started with -c would take modules from the current folder.
sys.path[:] = [folder for folder in sys.path if folder]

# Nothing that an import makes is garbage, and looking for some takes a sixth of the time. Workers collect again.
gc.disable()
