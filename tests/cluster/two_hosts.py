"""Two network namespaces joined by a bridge: two hosts on one machine, between which the link can be cut. Needs
root."""

import os
import shutil
import subprocess

NETWORK = "10.78.0"
BRIDGE = "dkdbr1"


def missing():
    """Why there can be none here, or None."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    absent = [command for command in ("ip", "unshare", "nsenter") if shutil.which(command) is None]
    if absent:
        return f"{', '.join(absent)} not installed; make test-cluster installs Debian's packages"
    trial = subprocess.run(["unshare", "--net", "true"], capture_output=True, text=True)
    return None if trial.returncode == 0 else f"network namespaces cannot be made: {trial.stderr.strip()}"


class TwoHosts:
    """Hosts 0 and 1, at `address(0)` and `address(1)`, with host names of their own that both know.

    Args:
        folder: for their /etc/hosts.
    """

    def __init__(self, folder):
        self._hosts = folder / "hosts"
        self._hosts.write_text(
            "127.0.0.1 localhost\n" + "".join(f"{self.address(host)} {self.name(host)}\n" for host in (0, 1))
        )

    def __enter__(self):
        self.__exit__()  # what a run that was killed has left
        try:
            self._ip("link", "add", BRIDGE, "type", "bridge")
            self._ip("link", "set", BRIDGE, "up")
            for host in (0, 1):
                space = self._space(host)
                self._ip("netns", "add", space)
                self._ip("link", "add", f"dkdh{host}", "type", "veth", "peer", "name", "eth0", "netns", space)
                self._ip("link", "set", f"dkdh{host}", "master", BRIDGE, "up")
                self._ip("-n", space, "link", "set", "lo", "up")
                self._ip("-n", space, "addr", "add", f"{self.address(host)}/24", "dev", "eth0")
                self._ip("-n", space, "link", "set", "eth0", "up")
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *error):
        for host in (0, 1):
            subprocess.run(["ip", "link", "del", f"dkdh{host}"], capture_output=True)
            subprocess.run(["ip", "netns", "del", self._space(host)], capture_output=True)
        subprocess.run(["ip", "link", "del", BRIDGE], capture_output=True)

    @staticmethod
    def address(host):
        return f"{NETWORK}.{host + 1}"

    @staticmethod
    def name(host):
        return f"host{host}"

    def on(self, host, *command):
        """The command that runs `command` on a host."""
        script = 'hostname "$0"; mount --bind "$1" /etc/hosts; shift; exec "$@"'
        named = [
            "unshare",
            "--uts",
            "--mount",
            "--propagation",
            "private",
            "bash",
            "-c",
            script,
            self.name(host),
            str(self._hosts),
        ]
        return ["nsenter", f"--net=/run/netns/{self._space(host)}", *named, *command]

    def cut(self):
        """Whatever one host sends is lost on its way."""
        self._ip("link", "set", "dkdh1", "down")

    def join(self):
        self._ip("link", "set", "dkdh1", "up")

    @staticmethod
    def _space(host):
        return f"dkd-host{host}"

    @staticmethod
    def _ip(*words):
        result = subprocess.run(["ip", *words], capture_output=True, text=True)
        assert result.returncode == 0, f"ip {' '.join(words)}: {result.stderr}"
