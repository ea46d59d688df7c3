"""A real Slurm cluster of several nodes on this one machine, for as long as a test run needs it.

Every node is a slurmd in its own network namespace, with its own address, host name and two fake
GPUs, on a bridge that only the testbed uses. Needs root, Slurm's daemons, munge and iproute2.

Why it is as it is: slurmd 22.05 refuses to start without a cgroup mount, which `ip netns exec`
hides by remounting /sys, so nodes are entered with nsenter and unshare. Every node claims the
machine's memory and more CPUs than there are (`config_overrides`). `cred_expire` shortens the wait
of a requeued job from 120 s to about 20. Fake GPUs are gres files on ttys, which exist everywhere.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

_PROGRAMS = (
    "slurmctld",
    "slurmd",
    "munged",
    "munge",
    "sbatch",
    "ip",
    "nsenter",
    "unshare",
    "runuser",
)
_UP_WITHIN_S = 20.0
_ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT")
_MAY_BE_REQUEUED_S = 10.0
"""What a job that is being put back into the queue shows for a moment looks like an end."""
_MUNGE_SOCKET = Path("/run/munge/munge.socket.2")


def missing() -> str | None:
    """Why this machine can't carry a testbed; None when it can."""
    if os.geteuid() != 0:
        return "needs root (network namespaces and Slurm's daemons)"
    if not Path("/etc/debian_version").exists():
        return "needs Debian's Slurm packages"
    absent = [name for name in _PROGRAMS if shutil.which(name) is None]
    if absent:
        return f"not installed: {', '.join(absent)} (apt-get install slurm-wlm munge iproute2)"
    return None


@dataclass(frozen=True, kw_only=True)
class Testbed:
    """A cluster that is up."""

    __test__ = False

    directory: Path
    prefix: str
    subnet: str
    """The first three numbers of its addresses."""
    num_nodes: int

    @property
    def config(self) -> Path:
        return self.directory / "slurm.conf"

    @property
    def environment(self) -> dict[str, str]:
        """What Slurm's commands need to find this cluster and no other."""
        return {"SLURM_CONF": str(self.config)}

    def address(self, node: int) -> str:
        return f"{self.subnet}.{node + 1}"

    def address6(self, node: int) -> str:
        return f"fd77::{node + 1}"

    def run(
        self,
        *command: str | Path,
        check: bool = True,
        timeout_s: float = 60.0,
        environment: Mapping[str, str] | None = None,
        cwd: Path | None = None,
    ) -> subprocess.CompletedProcess[str]:
        """Run a command of Slurm's as a user of the cluster would, on its controller's machine."""
        done = subprocess.run(
            [str(word) for word in command],
            env={**os.environ, **self.environment, **(environment or {})},
            capture_output=True,
            text=True,
            timeout=timeout_s,
            check=False,
            cwd=cwd,
        )
        if check and done.returncode != 0:
            said = f"{done.stdout}{done.stderr}"
            raise AssertionError(f"{command} left with {done.returncode}:\n{said}")
        return done

    def popen_on(self, node: int, *command: str | Path, cwd: Path) -> subprocess.Popen[str]:
        """A command on a node, as somebody types it there; both outputs in one pipe."""
        hosts = self.directory / "hosts"
        words = " ".join(shlex.quote(str(word)) for word in command)
        script = f"hostname node{node}; mount --bind {hosts} /etc/hosts; exec {words}"
        namespace = f"--net=/run/netns/{self.prefix}-node{node}"
        return subprocess.Popen(
            ["nsenter", namespace, "unshare", "--uts", "--mount", "bash", "-c", script],
            cwd=cwd,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def job(self, job_id: str) -> dict[str, str]:
        """What the controller knows of a job, by its names."""
        text = self.run("scontrol", "show", "job", "--oneliner", job_id).stdout
        return dict(word.split("=", 1) for word in text.split() if "=" in word)

    def wait_for(self, job_id: str, *states: str, timeout_s: float = 60.0) -> dict[str, str]:
        """The job, once it is in one of `states`; not waited for when it has ended in another."""
        limit = time.monotonic() + timeout_s
        while (job := self.job(job_id))["JobState"] not in states:
            if job["JobState"] in _ENDED and job.get("EndTime", "Unknown") != "Unknown":
                limit = min(limit, time.monotonic() + _MAY_BE_REQUEUED_S)
            if time.monotonic() > limit:
                raise AssertionError(f"job {job_id} is {job['JobState']}, not {states}: {job}")
            time.sleep(0.2)
        return job

    def set_link(self, node: int, *, up: bool) -> None:
        """Plug a node's network cable in or out."""
        namespace = f"{self.prefix}-node{node}"
        _call("ip", "-n", namespace, "link", "set", "eth0", "up" if up else "down")

    def kill_daemon(self, node: int) -> None:
        """End a node's slurmd and what watches its tasks, as a crash of the machine does."""
        for pid in self._pids(f"/run/netns/{self.prefix}-node{node}"):
            name = _read(f"/proc/{pid}/comm").strip()
            if name in ("slurmd", "slurmstepd"):
                _kill(pid, signal.SIGKILL)

    def _pids(self, namespace: str) -> list[int]:
        """Processes in a network namespace of ours."""
        wanted = Path(namespace).stat().st_ino
        found = []
        for entry in Path("/proc").iterdir():
            with contextlib.suppress(OSError):
                if entry.name.isdigit() and (entry / "ns/net").stat().st_ino == wanted:
                    found.append(int(entry.name))
        return found

    def _up(self) -> None:
        for name in ("state", "log"):
            (self.directory / name).mkdir()
        self._write_config()
        _call("ip", "link", "add", self.prefix, "type", "bridge")
        _call("ip", "addr", "add", f"{self.subnet}.254/24", "dev", self.prefix)
        _call("ip", "link", "set", self.prefix, "up")
        _start_munge()
        _call("unshare", "--uts", "bash", "-c", f"hostname ctl; exec slurmctld -f {self.config}")
        for node in range(self.num_nodes):
            self._start_node(node)
        self.wait_until_idle()

    def _start_node(self, node: int) -> None:
        namespace, cable = f"{self.prefix}-node{node}", f"{self.prefix}{node}"
        _call("ip", "netns", "add", namespace)
        _call(*f"ip link add {cable} type veth peer name eth0 netns {namespace}".split())
        _call("ip", "link", "set", cable, "master", self.prefix, "up")
        _call("ip", "-n", namespace, "addr", "add", f"{self.address(node)}/24", "dev", "eth0")
        # Without the wait for another machine that may have it: there is none.
        _call("ip", "-n", namespace, "addr", "add", f"{self.address6(node)}/64", "dev", "eth0",
              "nodad", check=False)  # fmt: skip
        for device in ("eth0", "lo"):
            _call("ip", "-n", namespace, "link", "set", device, "up")
        (self.directory / f"spool.node{node}").mkdir()
        self.start_daemon(node)

    def start_daemon(self, node: int) -> None:
        """Start a node's slurmd; its own /etc/hosts names every node."""
        script = (
            f"hostname node{node}; mount --bind {self.directory}/hosts /etc/hosts; "
            f"exec slurmd -N node{node} -f {self.config}"
        )
        namespace = f"--net=/run/netns/{self.prefix}-node{node}"
        _call("nsenter", namespace, "unshare", "--uts", "--mount", "bash", "-c", script)

    def _write_config(self) -> None:
        hosts = ["127.0.0.1 localhost", f"{self.subnet}.254 ctl"]
        hosts += [f"{self.address(k)} node{k}" for k in range(self.num_nodes)]
        (self.directory / "hosts").write_text("\n".join(hosts) + "\n")
        gres = "Name=gpu File=/dev/tty1\nName=gpu File=/dev/tty2\n"
        (self.directory / "gres.conf").write_text(gres)
        nodes = [
            f"NodeName=node{k} NodeAddr={self.address(k)} NodeHostname=node{k}"
            for k in range(self.num_nodes)
        ]
        text = _CONFIG.format(
            directory=self.directory,
            subnet=self.subnet,
            prefix=self.prefix,
            port=_free_port(),
        )
        partition = "PartitionName=debug Nodes=ALL Default=YES MaxTime=INFINITE State=UP"
        self.config.write_text("\n".join([text, *nodes, partition]) + "\n")

    def wait_until_idle(self) -> None:
        """Until every node can take a job."""
        limit = time.monotonic() + _UP_WITHIN_S
        idle = ""
        while time.monotonic() < limit:
            idle = self.run("sinfo", "-h", "-t", "idle", "-o", "%D", check=False).stdout.strip()
            if idle == str(self.num_nodes):
                return
            time.sleep(0.1)
        logs = [_read(path)[-2000:] for path in sorted((self.directory / "log").iterdir())]
        raise AssertionError("\n".join([f"only {idle or 'no'} nodes became idle", *logs]))

    def _down(self) -> None:
        """End everything that is in the testbed's namespaces or reads its configuration."""
        namespaces = sorted(Path("/run/netns").glob(f"{self.prefix}-node*"))
        for path in self.directory.glob("slurm*.pid"):
            _kill(int(_read(path) or 0), signal.SIGTERM)
        time.sleep(0.3)
        for namespace in namespaces:
            for pid in self._pids(str(namespace)):
                _kill(pid, signal.SIGKILL)
        for path in self.directory.glob("slurm*.pid"):
            _kill(int(_read(path) or 0), signal.SIGKILL)
        for node in range(self.num_nodes):  # the kernel itself would take its time
            _call("ip", "link", "del", f"{self.prefix}{node}", check=False)
        for namespace in namespaces:
            _call("ip", "netns", "del", namespace.name, check=False)
        _call("ip", "link", "del", self.prefix, check=False)
        shutil.rmtree(self.directory, ignore_errors=True)


@contextlib.contextmanager
def testbed(num_nodes: int) -> Iterator[Testbed]:
    """A cluster whose names, addresses and files no other one on this machine has."""
    mark = secrets.token_hex(2)
    bed = Testbed(
        directory=Path(tempfile.mkdtemp(prefix=f"bt{mark}-", dir="/tmp")),
        prefix=f"bt{mark}",
        subnet=_free_subnet(),
        num_nodes=num_nodes,
    )
    guard = _start_guard(bed)
    try:
        bed._up()
        yield bed
    finally:
        assert guard.stdin is not None
        guard.stdin.close()
        guard.wait(timeout=60)


testbed.__test__ = False  # type: ignore[attr-defined]


def _start_guard(bed: Testbed) -> subprocess.Popen[bytes]:
    """A process that tears the testbed down when this one closes the pipe, or dies: a test run
    that is killed leaves no cluster behind."""
    words = (str(bed.directory), bed.prefix, bed.subnet, str(bed.num_nodes))
    return subprocess.Popen(
        [sys.executable, __file__, *words], stdin=subprocess.PIPE, start_new_session=True
    )


def _guard(directory: str, prefix: str, subnet: str, num_nodes: str) -> None:
    bed = Testbed(directory=Path(directory), prefix=prefix, subnet=subnet, num_nodes=int(num_nodes))
    sys.stdin.buffer.read()
    bed._down()


def _free_subnet() -> str:
    taken = subprocess.run(["ip", "-4", "addr"], capture_output=True, text=True, check=True).stdout
    while True:
        subnet = f"10.{64 + secrets.randbelow(128)}.{secrets.randbelow(256)}"
        if f" {subnet}." not in taken:
            return subnet


def _free_port() -> int:
    """For the controller, which listens at all addresses of the machine: two clusters with the
    same port would be one controller for both."""
    with socket.create_server(("", 0)) as probe:
        return int(probe.getsockname()[1])


def _start_munge() -> None:
    """The machine's own munge, which authenticates for every cluster on it; left running.

    A munge that was killed leaves its socket, at which Slurm's daemons then wait for ever: asking
    it for a credential is what tells.
    """
    if _munge_answers():
        return
    _MUNGE_SOCKET.parent.mkdir(parents=True, exist_ok=True)
    shutil.chown(_MUNGE_SOCKET.parent, "munge", "munge")
    _call("runuser", "-u", "munge", "--", "/usr/sbin/munged")


def _munge_answers() -> bool:
    try:
        asked = subprocess.run(["munge", "--no-input"], capture_output=True, timeout=10)
    except subprocess.TimeoutExpired:
        return False
    return asked.returncode == 0


def _call(*command: str, check: bool = True) -> None:
    # Daemons inherit the output: a pipe would never end.
    with tempfile.TemporaryFile() as output:
        done = subprocess.run(command, stdout=output, stderr=output, check=False, timeout=30)
        if check and done.returncode != 0:
            output.seek(0)
            raise AssertionError(f"{' '.join(command)}: {output.read().decode(errors='replace')}")


def _kill(pid: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        if pid > 1:
            os.kill(pid, number)


def _read(path: str | Path) -> str:
    try:
        return Path(path).read_text(errors="replace")
    except OSError:
        return ""


_CONFIG = """\
ClusterName={prefix}
SlurmctldHost=ctl({subnet}.254)
SlurmctldPort={port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=cred_expire=5
StateSaveLocation={directory}/state
SlurmdSpoolDir={directory}/spool.%n
SlurmctldPidFile={directory}/slurmctld.pid
SlurmdPidFile={directory}/slurmd.%n.pid
SlurmctldLogFile={directory}/log/slurmctld.log
SlurmdLogFile={directory}/log/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
GresTypes=gpu
SlurmdParameters=config_overrides
SchedulerParameters=sched_min_interval=100000,batch_sched_delay=0
ReturnToService=2
SlurmctldTimeout=10
SlurmdTimeout=15
KillWait=10
InactiveLimit=0
MpiDefault=none
SwitchType=switch/none
JobRequeue=1
MinJobAge=3600
NodeName=DEFAULT CPUs=8 RealMemory=16000 Gres=gpu:2"""


if __name__ == "__main__":
    _guard(*sys.argv[1:])
