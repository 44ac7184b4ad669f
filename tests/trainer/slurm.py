"""A SLURM of two nodes on this machine, for the tests: a controller and two daemons, run by whoever runs the tests."""

import getpass
import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

PROGRAMS = ("slurmctld", "slurmd", "sbatch", "srun", "scontrol")
NODES = ("n1", "n2")
CONFIG = """\
ClusterName=tests
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
AuthType=auth/none
CredType=cred/none
SlurmUser={user}
SlurmdUser={user}
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
ReturnToService=2
SlurmdParameters=config_overrides
AuthInfo=cred_expire=1
MailProg=/bin/true
SchedulerParameters=batch_sched_delay=0,sched_interval=1
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=4 State=UNKNOWN
NodeName=n2 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs=4 State=UNKNOWN
PartitionName=all Nodes=ALL Default=YES State=UP
"""


def why_not() -> str | None:
    """Why there can be no SLURM here; None if there can."""
    missing = [program for program in PROGRAMS if find(program) is None]
    return f"needs {', '.join(missing)}: apt-get install slurmctld slurmd slurm-client" if missing else None


def find(program: str) -> str | None:
    """The path of a program, also of one that only an administrator finds."""
    return shutil.which(program, path=f"{os.environ['PATH']}:/usr/sbin:/sbin")


@contextmanager
def running(folder: Path) -> Iterator[Path]:
    """The configuration file of a SLURM that runs inside."""
    config = folder / "slurm.conf"
    for name in ("state", *(f"spool-{node}" for node in NODES)):
        (folder / name).mkdir()
    host, user = socket.gethostname().split(".")[0], getpass.getuser()
    config.write_text(CONFIG.format(host=host, user=user, folder=folder, ports=free_ports(3)))
    environment = {**os.environ, "SLURM_CONF": str(config)}
    commands = [[find("slurmctld"), "-D", "-i"], *([find("slurmd"), "-D", "-N", node] for node in NODES)]
    with (folder / "daemons.log").open("w") as log:
        daemons = [
            subprocess.Popen(command, env=environment, stdout=log, stderr=log, cwd=folder, start_new_session=True)
            for command in commands
            if command[0] is not None
        ]
    try:
        deadline = time.monotonic() + 60
        while idle(environment) < len(NODES):
            told = (folder / "daemons.log").read_text() + (folder / "slurmctld.log").read_text()
            assert time.monotonic() < deadline, told
            assert all(daemon.poll() is None for daemon in daemons), told
            time.sleep(0.2)
        yield config
    finally:
        subprocess.run(["scancel", "--user", user], env=environment, check=False, timeout=30)
        deadline = time.monotonic() + 30
        while idle(environment) < len(NODES) and time.monotonic() < deadline:  # jobs that were cancelled come to an end
            time.sleep(0.2)
        for daemon in daemons:
            daemon.kill()  # what they would still write is of no use
            daemon.wait()


def idle(environment: dict[str, str]) -> int:
    """How many nodes wait for work."""
    asked = subprocess.run(
        ["sinfo", "--Node", "--noheader", "--format=%T"], env=environment, capture_output=True, text=True, check=False
    )
    return asked.stdout.split().count("idle")


def free_ports(count: int) -> list[int]:
    """Ports that nobody uses at this moment."""
    probes = [socket.socket() for _ in range(count)]
    for probe in probes:
        probe.bind(("127.0.0.1", 0))
    ports = [probe.getsockname()[1] for probe in probes]
    for probe in probes:
        probe.close()
    return ports
