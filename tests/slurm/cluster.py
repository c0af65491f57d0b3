# SPDX-License-Identifier: Apache-2.0
"""A private Slurm: real daemons in a temporary folder, and two nodes on this machine.

Nothing outside the folder is touched. Parts of Slurm that need control groups are switched off:
processes are tracked by their parents, and not bound to CPUs. Job numbers start at random, because
the port of a job depends on its number, and jobs of two such clusters must not share one.
"""

import getpass
import os
import shutil
import socket
import subprocess
import tempfile
import time
from pathlib import Path

BINARIES = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "squeue", "scancel")
NODES = ("one", "two")

CONFIGURATION = """
ClusterName=throwaway
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool.%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
FirstJobId={ports[0]}
MailProg=/bin/true
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SwitchType=switch/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerParameters=batch_sched_delay=0,sched_interval=1,sched_min_interval=0
BatchStartTimeout=1
KillWait=5
ReturnToService=2
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
NodeName=one NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=2
NodeName=two NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs=2
PartitionName=batch Nodes=ALL Default=YES MaxTime=INFINITE State=UP PriorityTier=1
PartitionName=urgent Nodes=ALL MaxTime=INFINITE State=UP PriorityTier=2
"""


def missing():
    """Programs of Slurm that are not installed."""
    return [name for name in BINARIES if _find(name) is None]


class Cluster:
    """Use it as a context manager.

    Attributes:
        environment: For commands of Slurm.
    """

    def __init__(self):
        self.folder = Path(tempfile.mkdtemp(prefix="slurm-"))  # a socket's path must be short
        self.environment = os.environ | {"SLURM_CONF": str(self.folder / "slurm.conf")}
        self._daemons = []

    def __enter__(self):
        try:
            self._start()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_):
        if len(self._daemons) > 1:
            subprocess.run(
                ["scancel", "--user", getpass.getuser()], env=self.environment, timeout=30
            )
            self._until(lambda: not self.squeue(), 30, "all jobs have ended")
        for daemon in reversed(self._daemons):
            daemon.terminate()
        for daemon in self._daemons:
            try:
                daemon.wait(20)
            except subprocess.TimeoutExpired:
                daemon.kill()
        shutil.rmtree(self.folder, ignore_errors=True)

    def _start(self):
        folder, host = self.folder, socket.gethostname().split(".")[0]
        folder.chmod(0o755)
        (folder / "state").mkdir()
        key = folder / "munge.key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o600)
        text = CONFIGURATION.format(
            host=host, user=getpass.getuser(), folder=folder, ports=_free_ports(3)
        )
        (folder / "slurm.conf").write_text(text)
        at = {name: f"--{name}-file={folder / 'munged'}.{name}" for name in ("pid", "log", "seed")}
        munged = ["--foreground", "--force", f"--key-file={key}", *at.values()]
        self._daemon("munged", *munged, f"--socket={folder}/munge.socket")
        self._until((folder / "munge.socket").exists, 10, "munged is there")
        self._daemon("slurmctld", "-D")
        for node in NODES:
            self._daemon("slurmd", "-D", "-N", node)
        idle = ["sinfo", "--noheader", "--format=%D %t", "--partition=batch"]
        self._until(lambda: self.ask(*idle, check=False) == "2 idle", 30, "both nodes are idle")

    def _daemon(self, name, *arguments):
        log = (self.folder / f"{name}{len(self._daemons)}.out").open("w")
        command = [_find(name), *arguments]
        self._daemons.append(
            subprocess.Popen(
                command, stdout=log, stderr=log, env=self.environment, start_new_session=True
            )
        )

    def _until(self, holds, seconds, what):
        end = time.monotonic() + seconds
        while not holds():
            if time.monotonic() > end:
                logs = "".join(path.read_text()[-2000:] for path in self.folder.glob("*.out"))
                raise TimeoutError(f"not within {seconds} s: {what}\n{logs}")
            time.sleep(0.1)

    def ask(self, *command, check=True, **options):
        """Output of a command of Slurm."""
        options = {"env": self.environment, "timeout": 60} | options
        done = subprocess.run(command, capture_output=True, text=True, **options)
        if check and done.returncode:
            raise RuntimeError(f"{' '.join(map(str, command))}: {done.stderr}")
        return done.stdout.strip()

    def squeue(self):
        """Numbers of the jobs that wait or run."""
        return self.ask("squeue", "--noheader", "--format=%A", check=False).split()

    def submit(self, script, *arguments, options=(), cwd=None, **variables):
        """Number of a new job."""
        environment = self.environment | {k: str(v) for k, v in variables.items()}
        command = ["sbatch", "--parsable", *options, script, *arguments]
        return self.ask(*map(str, command), env=environment, cwd=cwd)

    def show(self, job):
        """Slurm's record of a job: ``JobState``, ``Restarts``, ``ExitCode`` and so on."""
        answer = self.ask("scontrol", "--oneliner", "show", "job", job)
        return dict(entry.split("=", 1) for entry in answer.split() if "=" in entry)

    def start_now(self, job):
        """Start a requeued job; Slurm would hold it for two minutes.

        The nodes must be idle first: what is left of one turn would be taken for the end of the
        next.
        """
        idle = lambda: set(self.ask("sinfo", "-h", "-N", "-o", "%T").split()) == {"idle"}  # noqa: E731
        self._until(idle, 120, "nodes are idle")
        time.sleep(5)
        self.ask("scontrol", "update", f"JobId={job}", "StartTime=now")

    def await_state(self, job, *states, seconds=120):
        """Wait until a job is in one of some states; Slurm's record of it then."""
        self._until(lambda: self.show(job)["JobState"] in states, seconds, f"{job} in {states}")
        return self.show(job)

    def await_end(self, job, seconds=180):
        """Wait until a job will not run again."""
        ends = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")
        return self.await_state(job, *ends, seconds=seconds)


def _find(name):
    return shutil.which(name) or shutil.which(name, path="/usr/local/sbin:/usr/sbin:/sbin")


def _free_ports(count):
    probes = [socket.socket() for _ in range(count)]
    for probe in probes:
        probe.bind(("127.0.0.1", 0))
    ports = [probe.getsockname()[1] for probe in probes]
    for probe in probes:
        probe.close()
    return ports
