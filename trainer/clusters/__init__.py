"""Where a run's workers come from: this machine, several nodes that start them together, or a batch system.

`step` understands the SLURM step that this process is a task of, `nodes` which nodes start workers together; `sbatch`
and `kubernetes` write what those systems want to read. Imports no torch.
"""
