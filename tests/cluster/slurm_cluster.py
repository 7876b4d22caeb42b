"""A real Slurm cluster of two virtual nodes on this machine: slurmctld, munge, and two slurmd, each in network, host
name and mount namespaces of its own, joined by a bridge. Needs root and Debian's packages slurmctld, slurmd,
slurm-client and munge. Nothing outlives `down`.
"""

import os
import shutil
import subprocess
import time
from pathlib import Path

from launched import child_environment

NODES = ("node1", "node2")
NETWORK = "10.77.0"
BRIDGE = "dkdbr0"
COMMANDS = ("slurmctld", "slurmd", "sbatch", "munged", "ip", "nsenter", "unshare")


def missing():
    """Why there can be no cluster here, or None."""
    if os.geteuid() != 0:
        return "a Slurm cluster of virtual nodes needs root"
    absent = [
        command for command in COMMANDS if shutil.which(command, path=f"{os.environ['PATH']}:/usr/sbin:/sbin") is None
    ]
    if absent:
        return f"{', '.join(absent)} not installed; make test-cluster installs Debian's packages"
    trial = subprocess.run(["unshare", "--net", "--uts", "--mount", "true"], capture_output=True, text=True)
    return None if trial.returncode == 0 else f"namespaces cannot be made: {trial.stderr.strip()}"


def can_freeze():
    """Whether proctrack/cgroup can work: a freezer of cgroup v1 that can be written."""
    return os.path.ismount("/sys/fs/cgroup/freezer") and os.access("/sys/fs/cgroup/freezer", os.W_OK)


class SlurmCluster:
    """Two nodes of 4 CPUs each in partitions `main` and `high`, whose jobs preempt those of `main` by requeueing them.

    Args:
        folder: for its files; short, since it holds a socket.
        proctrack: linuxproc or cgroup.
    """

    def __init__(self, folder, proctrack):
        self.folder, self.proctrack = Path(folder), proctrack
        self.environment = child_environment(SLURM_CONF=self.folder / "etc" / "slurm.conf")
        self.environment["PATH"] += ":/usr/sbin:/sbin"

    def __enter__(self):
        try:
            self.up()
        except BaseException:
            self.down()
            raise
        return self

    def __exit__(self, *error):
        self.down()

    def up(self):
        for name in ("etc", "munge", "ctld", "log", *NODES):
            (self.folder / name).mkdir(parents=True, exist_ok=True)
        # munged refuses a socket under folders that others cannot enter, and a key that they can read.
        for path in (self.folder, *self.folder.parents):
            if path != Path("/"):
                path.chmod(path.stat().st_mode | 0o111)
        self.folder.chmod(0o755)
        (self.folder / "munge").chmod(0o700)
        self._lay_network()
        self._write_configuration()
        munge = self.folder / "munge"
        (munge / "key").write_bytes(os.urandom(1024))
        (munge / "key").chmod(0o400)
        self._run(
            "munged",
            f"--key-file={munge}/key",
            f"--socket={self.folder}/munge.sock",
            f"--pid-file={munge}/pid",
            f"--seed-file={munge}/seed",
            f"--log-file={munge}/log",
            "--num-threads=2",
        )
        # The controller must know the nodes' names, too.
        self._run(
            "unshare",
            "--mount",
            "--propagation",
            "private",
            "bash",
            "-c",
            'mount --bind "$0" /etc/hosts; exec slurmctld -i',
            self._hosts,
        )
        for node in NODES:
            self._run(*self._inside(node), "slurmd", "-N", node)
        self.until_idle(60)

    def down(self):
        try:
            subprocess.run(["scancel", "--full", "-u", "root"], env=self.environment, capture_output=True, timeout=20)
            end = (
                time.monotonic() + 40
            )  # longer than KillWait: what a node's daemon leaves behind when it ends would go on
            while self._run("squeue", "-h", check=False).strip() and time.monotonic() < end:
                time.sleep(0.5)
        except subprocess.TimeoutExpired:
            pass  # the controller did not come up, and there are no jobs
        for pid_file in (
            *(self.folder / f"{node}.pid" for node in NODES),
            self.folder / "ctld.pid",
            self.folder / "munge" / "pid",
        ):
            self._stop(pid_file)
        for number, node in enumerate(NODES):
            subprocess.run(["ip", "link", "del", f"dkdv{number}"], capture_output=True)
            subprocess.run(["ip", "netns", "del", f"dkd-{node}"], capture_output=True)
            for folder, _, _ in os.walk(f"/sys/fs/cgroup/freezer/slurm_{node}", topdown=False):
                try:
                    os.rmdir(folder)
                except OSError:
                    continue  # something in it is still ending
        subprocess.run(["ip", "link", "del", BRIDGE], capture_output=True)
        shutil.rmtree(self.folder, ignore_errors=True)

    def submit(self, *words, **variables):
        """The job's number. Variables become parameters of the script."""
        exported = ",".join(["ALL", *(f"{key}={value}" for key, value in variables.items())])
        return int(self._run("sbatch", "--parsable", f"--export={exported}", *words).split(";")[0])

    def scontrol(self, *words):
        return self._run("scontrol", *words)

    def bring_back(self, node):
        """A node that was set down. It may have come back by itself, which Slurm calls an invalid state for this."""
        self._run("scontrol", "update", f"nodename={node}", "state=resume", check=False)

    def cancel(self, job):
        self._run("scancel", job)

    def state(self, job):
        """Such as RUNNING, PENDING, COMPLETED; and how often it was started again."""
        words = self.scontrol("show", "job", job, "-o").split()
        values = dict(word.split("=", 1) for word in words if "=" in word)
        return values["JobState"], int(values["Restarts"])

    def seconds(self, job):
        """That it has run, this time."""
        words = self.scontrol("show", "job", job, "-o").split()
        hours, minutes, seconds = (
            next(word for word in words if word.startswith("RunTime=")).removeprefix("RunTime=").split(":")
        )
        return 3600 * int(hours) + 60 * int(minutes) + int(seconds)

    def until_idle(self, seconds):
        end = time.monotonic() + seconds
        while (seen := self._run("sinfo", "-h", "-o", "%D", "-t", "idle", check=False).strip()) != str(len(NODES)):
            assert time.monotonic() < end, (
                f"{seen} nodes idle: {self._run('sinfo', '-N', '-l', check=False)} {self.logs()}"
            )
            time.sleep(0.2)

    def logs(self):
        return "\n".join(path.read_text(errors="replace")[-2000:] for path in (self.folder / "log").glob("*.log"))

    def _run(self, *command, check=True):
        result = subprocess.run(
            list(map(str, command)), env=self.environment, capture_output=True, text=True, timeout=60
        )
        assert not check or result.returncode == 0, f"{command}: {result.stdout}{result.stderr}"
        return result.stdout

    @property
    def _hosts(self):
        return self.folder / "etc" / "hosts"

    def _inside(self, node):
        """A command's beginning that runs the rest inside a virtual node. Not `ip netns exec`, whose new /sys slurmd
        refuses."""
        mounts = 'mount --bind "$1/hosts" /etc/hosts; mount --bind "$1/nsswitch.conf" /etc/nsswitch.conf'
        script = f'hostname "$0"; {mounts}; shift; exec "$@"'
        namespaces = [
            "nsenter",
            f"--net=/run/netns/dkd-{node}",
            "unshare",
            "--uts",
            "--mount",
            "--propagation",
            "private",
        ]
        return [*namespaces, "bash", "-c", script, node, str(self.folder / "etc")]

    def _lay_network(self):
        for left in (["link", "del", BRIDGE], *(["netns", "del", f"dkd-{node}"] for node in NODES)):
            self._run("ip", *left, check=False)  # by a run that was killed
        self._run("ip", "link", "add", BRIDGE, "type", "bridge")
        self._run("ip", "addr", "add", f"{NETWORK}.254/24", "dev", BRIDGE)
        self._run("ip", "link", "set", BRIDGE, "up")
        for number, node in enumerate(NODES):
            space = f"dkd-{node}"
            self._run("ip", "netns", "add", space)
            self._run("ip", "link", "add", f"dkdv{number}", "type", "veth", "peer", "name", "eth0", "netns", space)
            self._run("ip", "link", "set", f"dkdv{number}", "master", BRIDGE, "up")
            self._run("ip", "-n", space, "link", "set", "lo", "up")
            self._run("ip", "-n", space, "addr", "add", f"{NETWORK}.{number + 1}/24", "dev", "eth0")
            self._run("ip", "-n", space, "link", "set", "eth0", "up")

    def _write_configuration(self):
        etc, folder, host = self.folder / "etc", self.folder, os.uname().nodename.split(".")[0]
        addresses = [f"{NETWORK}.{number + 1} {node}" for number, node in enumerate(NODES)]
        self._hosts.write_text("\n".join(["127.0.0.1 localhost", f"{NETWORK}.254 {host}", *addresses]) + "\n")
        # Without this, reverse look-ups wait for name servers that know nothing of the nodes.
        (etc / "nsswitch.conf").write_text("passwd: files\ngroup: files\nhosts: files\n")
        (etc / "cgroup.conf").write_text(
            "CgroupPlugin=cgroup/v1\nCgroupAutomount=no\nCgroupMountpoint=/sys/fs/cgroup\nConstrainCores=no\n"
        )
        (etc / "slurm.conf").write_text(f"""
ClusterName=dkd
SlurmctldHost={host}({NETWORK}.254)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={folder}/munge.sock,cred_expire=10
StateSaveLocation={folder}/ctld
SlurmdSpoolDir={folder}/%n
SlurmctldPidFile={folder}/ctld.pid
SlurmdPidFile={folder}/%n.pid
SlurmctldLogFile={folder}/log/ctld.log
SlurmdLogFile={folder}/log/%n.log
ProctrackType=proctrack/{self.proctrack}
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
SwitchType=switch/none
SchedulerType=sched/backfill
SchedulerParameters=bf_interval=3,sched_interval=3
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
ReturnToService=2
KillWait=30
SlurmctldTimeout=60
SlurmdTimeout=120
MinJobAge=600
NodeName={NODES[0][:-1]}[1-{len(NODES)}] CPUs=4 RealMemory=8000 State=UNKNOWN
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmctldParameters=preempt_send_user_signal
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE PriorityTier=1 GraceTime=40 State=UP
PartitionName=high Nodes=ALL MaxTime=INFINITE PriorityTier=10 PreemptMode=OFF State=UP
""")

    def _stop(self, pid_file):
        try:
            pid = int(pid_file.read_text())
            os.kill(pid, 15)
        except (OSError, ValueError):
            return  # it was never started
        for _ in range(100):
            if not Path(f"/proc/{pid}").exists():
                return
            time.sleep(0.1)
        os.kill(pid, 9)
