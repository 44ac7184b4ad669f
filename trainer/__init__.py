"""Data, engines, the training loop, checkpoints, metrics, launch and the command line.

Imports no torch by itself, so that `twohop --help` answers at once.
"""
