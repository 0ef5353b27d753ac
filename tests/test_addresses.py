from __future__ import annotations

import socket
import subprocess
import sys

import pytest

from app.addresses import Forbidden, Guard, is_own, is_public
from tests.app_server import ROOT

PUBLIC = ["1.1.1.1", "8.8.8.8", "93.184.215.14", "172.15.0.1", "2606:4700:4700::1111", "2a00::1"]
FORBIDDEN = [
    *("0.0.0.0", "127.0.0.1", "127.255.255.254", "10.1.2.3", "172.16.0.1", "172.31.255.255"),
    *("192.168.1.1", "169.254.169.254", "168.63.129.16", "100.64.0.1", "100.100.100.200"),
    *("192.0.0.192", "192.0.2.1", "192.88.99.1", "198.18.0.1", "198.51.100.7", "203.0.113.9"),
    *("224.0.0.1", "239.255.255.250", "240.0.0.1", "255.255.255.255"),
    *("::", "::1", "fe80::1", "fe80::1%lo", "fc00::1", "fd00:ec2::254", "fec0::1", "ff02::1"),
    *("::ffff:127.0.0.1", "::ffff:8.8.8.8", "::127.0.0.1", "64:ff9b::7f00:1", "64:ff9b:1::1"),
    *("2002:7f00:1::", "2002:808:808::1", "2001::1", "2001:db8::1", "3fff::1", "100::1"),
    *("2130706433", "0x7f.1", "0x7f000001", "0177.0.0.1", "127.1", "localhost", "", "8.8.8.8 "),
]


@pytest.mark.parametrize("address", PUBLIC)
def test_public_addresses_are_allowed_on_the_ports_of_the_web(address: str) -> None:
    assert is_public(address)
    Guard().check((address, 443))
    for port in (0, 22, 25, 6379):
        with pytest.raises(Forbidden):
            Guard().check((address, port))


@pytest.mark.parametrize("address", FORBIDDEN)
def test_all_others_are_refused_in_every_notation(address: str) -> None:
    assert not is_public(address)
    guard = Guard()
    with pytest.raises(Forbidden):
        guard.check((address, 80))
    assert guard.refused


@pytest.mark.parametrize("address", ["/run/docker.sock", b"\0abstract", None, (), ("8.8.8.8",)])
def test_what_is_no_address_of_the_internet_is_refused(address: object) -> None:
    with pytest.raises(Forbidden):
        Guard().check(address)


def test_the_allowance_of_a_test_is_one_address_and_one_port() -> None:
    guard = Guard(allow=("127.0.0.1", 5000))
    guard.check(("127.0.0.1", 5000))
    for other in (("127.0.0.1", 5001), ("127.0.0.2", 5000), ("::ffff:127.0.0.1", 5000)):
        with pytest.raises(Forbidden):
            guard.check(other)


@pytest.mark.parametrize(
    "name", ["localhost", "127.0.0.1", "2130706433", "0x7f.1", "0x7f000001", "0177.0.0.1", "127.1"]
)
def test_names_and_odd_notations_are_judged_by_what_they_lead_to(name: str) -> None:
    with pytest.raises(Forbidden):
        Guard().look_up(name, 80)


def test_a_name_is_resolved_once() -> None:
    answers = iter([["1.1.1.1"], ["127.0.0.1"]])
    guard = Guard(resolve=lambda name: next(answers))
    first = guard.look_up("rebinding.test", 80, 0, socket.SOCK_STREAM)
    assert first == guard.look_up(b"rebinding.test", "80")
    assert first == [(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP, "", ("1.1.1.1", 80))]


def test_one_forbidden_address_among_others_spoils_a_name() -> None:
    with pytest.raises(Forbidden):
        Guard(resolve=lambda name: ["1.1.1.1", "10.0.0.1"]).look_up("both.test", 443)


def test_names_that_do_not_exist_are_an_ordinary_error() -> None:
    for name in ("a..b", "x" * 300, "no-such-name.invalid"):
        with pytest.raises(OSError):
            Guard().look_up(name, 80)


def test_the_machines_own_addresses_are_known() -> None:
    assert is_own("127.0.0.1")
    assert not is_own("8.8.8.8")


ATTEMPTS = """
import os, socket, subprocess, sys
from app.addresses import Forbidden, Guard

port, folder = int(sys.argv[1]), sys.argv[2]
guard = Guard()
guard.install()
udp = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
unix = socket.socket(socket.AF_UNIX)
attempts = {
    "connect": lambda: socket.socket().connect(("127.0.0.1", port)),
    "connect_ex": lambda: socket.socket().connect_ex(("127.0.0.1", port)),
    "by name": lambda: socket.socket().connect(("localhost", port)),
    "as a number": lambda: socket.socket().connect(("2130706433", port)),
    "mapped": lambda: socket.socket(socket.AF_INET6).connect(("::ffff:127.0.0.1", port)),
    "create_connection": lambda: socket.create_connection(("localhost", port)),
    "datagram": lambda: udp.sendto(b"x", ("127.0.0.1", port)),
    "connected datagram": lambda: udp.connect(("127.0.0.1", port)),
    "unix": lambda: unix.connect("/run/some.sock"),
    "other look-up": lambda: socket.gethostbyname("localhost"),
    "program": lambda: subprocess.run(["true"]),
    "shell": lambda: os.system("true"),
    "fork": lambda: os.fork(),
}
for name, attempt in attempts.items():
    try:
        attempt()
    except Forbidden:
        continue
    raise SystemExit(f"{name} was not refused")
print(subprocess.run([os.path.join(folder, "deno")], capture_output=True, text=True).stdout)
"""


def test_an_installed_guard_cannot_be_walked_around(tmp_path) -> None:
    solver = tmp_path / "deno"
    solver.write_text("#!/bin/sh\necho solved\n")
    solver.chmod(0o755)
    with socket.create_server(("127.0.0.1", 0)) as forbidden:
        port = str(forbidden.getsockname()[1])
        done = subprocess.run(
            [sys.executable, "-c", ATTEMPTS, port, str(tmp_path)],
            cwd=ROOT,
            capture_output=True,
            text=True,
        )
        forbidden.setblocking(False)
        with pytest.raises(BlockingIOError):
            forbidden.accept()
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "solved"
