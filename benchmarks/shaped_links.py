"""Join two network namespaces of this machine by a link of a given speed and delay. Needs root."""

from __future__ import annotations

import fcntl
import os
import queue
import struct
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

_TUNSETIFF, _IFF_TUN, _IFF_NO_PI = 0x400454CA, 0x0001, 0x1000
_MTU = 60000  # large packets: a program that forwards them one by one is to be no bottleneck
_IN_FLIGHT = 64  # packets that wait in a direction, at most

Side = tuple[list[str], str, str]
"""The prefix of commands that run in a namespace, its interface, and the address of the first namespace."""


@contextmanager
def two_namespaces(bytes_a_second: float, delay: float) -> Iterator[list[Side]]:
    """Make two namespaces and a link between them.

    Args:
        bytes_a_second: what the link lets through in each direction.
        delay: seconds in each direction; above 0 a thread of this process forwards the packets, since not every kernel
            can delay them.

    Raises:
        CalledProcessError, OSError: this machine has no namespaces, or no such links.
    """
    names = [f"dkd{os.getpid()}{side}" for side in "ab"]
    devices: list[int] = []
    try:
        for name in names:
            subprocess.run(["ip", "netns", "add", name], check=True)
        if delay:
            devices += [_make_tunnel(f"lnk{i}", name) for i, name in enumerate(names)]
        else:
            peers = ["lnk0", "netns", names[0], "type", "veth", "peer", "name", "lnk1", "netns", names[1]]
            subprocess.run(["ip", "link", "add", *peers], check=True)
        for i, name in enumerate(names):
            inside = ["ip", "-n", name]
            subprocess.run([*inside, "link", "set", "lo", "up"], check=True)
            subprocess.run([*inside, "address", "add", f"10.77.0.{i + 1}/24", "dev", f"lnk{i}"], check=True)
            subprocess.run([*inside, "link", "set", f"lnk{i}", "up"], check=True)
            if not delay:
                shape = ["tbf", "rate", f"{bytes_a_second * 8:.0f}bit", "burst", "64kb", "latency", "200ms"]
                subprocess.run(["tc", "-n", name, "qdisc", "add", "dev", f"lnk{i}", "root", *shape], check=True)
        for source, target in zip(devices, reversed(devices), strict=True):
            _forward(source, target, bytes_a_second, delay)
        yield [(["nsenter", f"--net=/var/run/netns/{name}"], f"lnk{i}", "10.77.0.1") for i, name in enumerate(names)]
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "delete", name], stderr=subprocess.DEVNULL, check=False)
        for device in devices:
            os.close(device)


def _make_tunnel(name: str, namespace: str) -> int:
    """Return the descriptor of a new interface, which has been moved to a namespace."""
    device = os.open("/dev/net/tun", os.O_RDWR)
    fcntl.ioctl(device, _TUNSETIFF, struct.pack("16sH22x", name.encode(), _IFF_TUN | _IFF_NO_PI))
    subprocess.run(["ip", "link", "set", name, "mtu", str(_MTU), "netns", namespace], check=True)
    return device


def _forward(source: int, target: int, bytes_a_second: float, delay: float) -> None:
    """Start to forward packets from one interface to another."""
    waiting: queue.Queue[tuple[float, bytes]] = queue.Queue(_IN_FLIGHT)

    def read() -> None:
        free = 0.0
        while True:
            try:
                packet = os.read(source, _MTU + 100)
            except OSError:  # closed at the end
                return
            free = max(free, time.monotonic()) + len(packet) / bytes_a_second
            waiting.put((free + delay, packet))

    def write() -> None:
        while True:
            due, packet = waiting.get()
            time.sleep(max(0.0, due - time.monotonic()))
            try:
                os.write(target, packet)
            except OSError:  # closed at the end
                return

    for work in (read, write):
        threading.Thread(target=work, daemon=True).start()
