"""Which addresses of the internet may be contacted, and a guard that holds a process to them."""

from __future__ import annotations

import ipaddress
import os
import socket
import sys
from collections.abc import Callable, Container, Sequence
from dataclasses import dataclass, field
from typing import Any

Resolver = Callable[[str], Sequence[str]]

WEB_PORTS = frozenset({80, 443, 8080, 8443})

# Written out, because what Python calls global differs between its versions.
_FORBIDDEN_IPV4 = tuple(
    map(
        ipaddress.IPv4Network,
        (
            "0.0.0.0/8",  # unspecified, this network
            "10.0.0.0/8",  # private
            "100.64.0.0/10",  # between a provider and its customers; one cloud's metadata
            "127.0.0.0/8",  # loopback
            "168.63.129.16/32",  # a public address that one cloud gives its host services
            "169.254.0.0/16",  # link-local; most clouds' metadata
            "172.16.0.0/12",  # private
            "192.0.0.0/24",  # protocol assignments; one cloud's metadata
            "192.0.2.0/24",  # documentation
            "192.31.196.0/24",  # private name servers
            "192.52.193.0/24",  # multicast tunnels
            "192.88.99.0/24",  # 6to4 relays
            "192.168.0.0/16",  # private
            "192.175.48.0/24",  # private name servers
            "198.18.0.0/15",  # benchmarks
            "198.51.100.0/24",  # documentation
            "203.0.113.0/24",  # documentation
            "224.0.0.0/4",  # multicast
            "240.0.0.0/4",  # reserved, broadcast
        ),
    )
)
# All that is not handed out to networks is forbidden: loopback, link-local, private and multicast
# addresses, and those with an IPv4 address inside (mapped, compatible, NAT64).
_PUBLIC_IPV6 = ipaddress.IPv6Network("2000::/3")
_FORBIDDEN_IPV6 = tuple(
    map(
        ipaddress.IPv6Network,
        (
            "2001::/23",  # Teredo (an IPv4 address inside), benchmarks, protocol assignments
            "2001:db8::/32",  # documentation
            "2002::/16",  # 6to4 (an IPv4 address inside)
            "2620:4f:8000::/48",  # private name servers
            "3fff::/20",  # documentation
        ),
    )
)

# What a process that fetches has no need of: other ways to look names up, to send, to run.
_CLOSED_EVENTS = frozenset(
    {
        "os.exec",
        "os.fork",
        "os.forkpty",
        "os.posix_spawn",
        "os.system",
        "pty.spawn",
        "socket.gethostbyaddr",
        "socket.gethostbyname",
        "socket.getnameinfo",
        "socket.sendmsg",
        "socket.sendto",
    }
)

_getaddrinfo = socket.getaddrinfo  # the real one, whatever a guard puts in its place


class Forbidden(PermissionError):
    """A connection or a program that the guard refused."""


def is_public(text: str) -> bool:
    """Whether `text` is an IP address, in its usual notation, that belongs to the open internet."""
    try:
        address = ipaddress.ip_address(text)
    except ValueError:
        return False
    if isinstance(address, ipaddress.IPv4Address):
        return not any(address in network for network in _FORBIDDEN_IPV4)
    if address.scope_id is not None or address not in _PUBLIC_IPV6:
        return False
    return not any(address in network for network in _FORBIDDEN_IPV6)


def is_own(text: str) -> bool:
    """Whether this machine has the address: only then can a socket be bound to it."""
    family = socket.AF_INET6 if ":" in text else socket.AF_INET
    try:
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.bind((text, 0))
    except OSError:
        return False
    return True


def resolve(name: str) -> tuple[str, ...]:
    """Ask the system for the addresses of a name; raises `OSError` when there are none."""
    found = _getaddrinfo(name, None, type=socket.SOCK_STREAM)
    return tuple(dict.fromkeys(str(entry[4][0]) for entry in found))


@dataclass
class Guard:
    """Lets a process connect to public web servers and to nothing else.

    A name is resolved once and every connection goes to an address that was checked, so it does
    not help to answer the second look-up differently. `allow` is for tests: the one address and
    port that may be contacted although it is not public. No setting leads to it.
    """

    resolve: Resolver = resolve
    allow: tuple[str, int] | None = None
    ports: Container[int] = WEB_PORTS
    refused: bool = field(default=False, init=False)  # whether an address was refused so far
    _known: dict[str, tuple[str, ...]] = field(default_factory=dict, init=False)

    def install(self) -> None:
        """Hold this process to the guard until it ends.

        The interpreter itself calls `_watch` before it connects a socket or starts a program, and
        there is no way back: only for a process that fetches one video.
        """
        socket.getaddrinfo = self.look_up
        sys.addaudithook(self._watch)

    def look_up(
        self, host: str | bytes | None, port: str | int | None, *_: Any, **__: Any
    ) -> list[tuple[Any, ...]]:
        """Stand in for `socket.getaddrinfo`: one look-up for each name, every address checked."""
        try:
            name = (
                host.decode() if isinstance(host, bytes) else (host or "").encode("idna").decode()
            )
        except UnicodeError as error:  # a name that cannot exist
            raise socket.gaierror(socket.EAI_NONAME, "no such name") from error
        if name not in self._known:
            self._known[name] = tuple(self.resolve(name))
        number = int(port or 0)
        for address in self._known[name]:
            self.check((address, number))
        return [
            (socket.AF_INET6, socket.SOCK_STREAM, socket.IPPROTO_TCP, "", (address, number, 0, 0))
            if ":" in address
            else (socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP, "", (address, number))
            for address in self._known[name]
        ]

    def check(self, address: Any) -> None:
        """Raise `Forbidden` unless a socket may be connected to `address`."""
        match address:
            case (str(host), int(port), *_):
                if (host, port) == self.allow:
                    return
                # A name is not public either: what it stands for would be looked up unseen.
                if port in self.ports and is_public(host) and not is_own(host):
                    return
        self.refused = True
        raise Forbidden("Only public web servers may be contacted.")

    def _watch(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event == "socket.connect":
            self.check(arguments[1])
        elif event in _CLOSED_EVENTS or (
            event == "subprocess.Popen" and not _is_deno(arguments[0])
        ):
            raise Forbidden(f"{event} is closed while a video is fetched.")


def _is_deno(program: Any) -> bool:
    # Solves the puzzles of some sites. It runs their scripts without any right to files or network.
    return os.path.basename(os.fsdecode(program)) == "deno"
