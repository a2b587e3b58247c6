"""Sums over the processes of one host, through memory that they share.

The memory has a row for each process, and a row for the sum. In each step

1. each process writes its own row, and all meet;
2. each adds up its part of the columns, in the order of the ranks, into the row of the sum, and all
   meet again;
3. each copies the whole sum into its own row.

One process adds up each number, so all processes get the same bits. One buffer is enough: nobody
reads the row of another process after the second meeting, and the first meeting of the next step
waits until all have copied the sum.

**To meet**, each process sends a byte to the first one, which answers when it has all of them. The
system closes the sockets of a process that dies, so the others learn it at once. Nobody waits in a
loop, which would take the core that another process needs. Sockets also order the writes to memory,
on every kind of CPU.

**The memory has no name** (``memfd_create``), and the first process sends it through the sockets.
So it really is the same memory, and nothing is left of it when the processes end, however they
end. All of it is reserved at the start: if there is too little, this is an error at the start, and
not a crash at a later step. The size of ``/dev/shm`` does not limit it.

The processes find each other by an abstract socket with a random name, which belongs to one Linux
kernel. So processes on several machines do not connect, whatever their names are. Then all of them
use the all-reduce of torch.distributed.
"""

import mmap
import os
import secrets
import socket
from collections.abc import Callable
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from pyro_vae.pairs.processes import Team
from pyro_vae.pairs.waiting import AT_ONCE, wait

T = TypeVar("T")

START_SECONDS = 60.0
"""How long processes that all run wait for each other's sockets."""

KEY = 32
"""The bytes of the key by which the processes know each other."""

LINE = 64
"""The bytes of a cache line. Each row starts at one, so that no two processes write to one."""


class SharedSum:
    """Adds up a vector of each process; every process gets the sum.

    Arguments:
        rows: the shared memory, (processes + 1, columns).
        rank: the place of this process.
        links: the sockets to the first process; those to all others in the first process.
    """

    def __init__(self, rows: Tensor, rank: int, links: list[socket.socket]) -> None:
        self.own, self.total = rows[rank], rows[-1]
        self._parts = [row.tensor_split(len(rows) - 1)[rank] for row in rows]
        self._links, self._first = links, rank == 0

    @torch.no_grad()
    def __call__(self) -> None:
        """Replace ``own`` by the sum over all processes.

        Raises `LostError` if another process has ended or does not answer. The others learn it too,
        because the sockets are closed.
        """
        first, second, *others, total = self._parts
        self._meet()
        torch.add(first, second, out=total)
        for part in others:
            total += part
        self._meet()
        self.own.copy_(self.total)

    def _meet(self) -> None:
        """Wait until all processes are here."""
        try:
            wait(self._tell, self._heard)
        except BaseException:
            self.close()
            raise

    def _tell(self) -> list[socket.socket]:
        """Tell the first process that this one is here. Return the links that have to answer."""
        if not self._first:
            self._links[0].send(b".")
        return list(self._links)

    def _heard(self, left: list[socket.socket]) -> bool:
        """Whether all of these have answered within about a second; those that have are removed.

        Then the first process answers all others.
        """
        try:
            while left:
                if not left[-1].recv(1):
                    raise ConnectionError("its connection is closed")
                left.pop()
            if self._first:
                for link in self._links:
                    link.send(b".")
        except TimeoutError:
            return False
        except OSError:
            self.close()  # so that the others learn it now, and tell the lost process from this one
            raise
        return True

    def close(self) -> None:
        """Tell the other processes that this one takes no more part."""
        _close(self._links)


def shared_sum(like: Tensor, team: Team) -> SharedSum | None:
    """Sums of vectors of this size and type; None if these processes cannot share memory.

    All processes call this, and all get the same answer.
    """
    width = -(-like.nbytes // LINE) * LINE
    able = like.device.type == "cpu" and hasattr(os, "memfd_create")
    links: list[socket.socket] = []
    with ExitStack() as opened:
        opened.callback(_close, links)
        memory = _memory(width * (team.count + 1), team, able, links)
        if memory is None:
            return None
        for link in links:
            link.settimeout(AT_ONCE)
        rows = torch.frombuffer(memory, dtype=like.dtype).view(team.count + 1, -1)
        opened.pop_all()
    return SharedSum(rows[:, : len(like)], team.rank, links)


def _memory(size: int, team: Team, able: bool, links: list[socket.socket]) -> mmap.mmap | None:
    """The memory, if all processes of the team can share it. Adds the open sockets to ``links``."""
    with ExitStack() as opened:
        offer = _tried(lambda: _offer(size, opened)) if able and team.first else None
        words = None if offer is None else (offer.name, offer.key)
        told = team.gather(lambda: (able, words))
        if told[0][1] is None or not all(each for each, _ in told):
            return None
        name, key = told[0][1]
        if not team.first and (link := _tried(lambda: _link(name, key))) is not None:
            links.append(link)
        if not all(team.gather(lambda: team.first or bool(links))):
            return None
        if offer is not None:
            memory = _tried(lambda: _invite(offer, team.count - 1, links))
        else:
            memory = _tried(lambda: _received(links[0], size, key))
        return memory if all(team.gather(lambda: memory is not None)) else None


def _tried(work: Callable[[], T]) -> T | None:
    """The result, or None if the system does not give what it needs."""
    try:
        return work()
    except OSError:
        return None


@dataclass(frozen=True)
class _Offer:
    """What the first process offers to the others."""

    listener: socket.socket
    name: bytes
    key: bytes
    """Tells a process of the team from any other one that connects."""
    file: int
    memory: mmap.mmap


def _offer(size: int, opened: ExitStack) -> _Offer:
    file = os.memfd_create("pyro_vae")
    opened.callback(os.close, file)
    os.posix_fallocate(file, 0, size)
    memory = mmap.mmap(file, size)
    listener = opened.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET))
    name, key = b"\0pyro-vae-" + secrets.token_hex(16).encode(), secrets.token_bytes(KEY)
    listener.bind(name)
    listener.listen(128)
    listener.settimeout(START_SECONDS)
    memory[:KEY] = key
    return _Offer(listener, name, key, file, memory)


def _link(name: bytes, key: bytes) -> socket.socket:
    """Connect to the first process."""
    link = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    try:
        link.settimeout(START_SECONDS)
        link.connect(name)
        link.send(key)
    except OSError:
        link.close()
        raise
    return link


def _invite(offer: _Offer, count: int, links: list[socket.socket]) -> mmap.mmap:
    """Send the memory to so many processes, which have connected."""
    while len(links) < count:
        link, _ = offer.listener.accept()
        link.settimeout(START_SECONDS)
        links.append(link)
        if not secrets.compare_digest(link.recv(KEY), offer.key):
            raise ConnectionError("a process that is not of the team")
        socket.send_fds(link, [b"."], [offer.file])
    return offer.memory


def _received(link: socket.socket, size: int, key: bytes) -> mmap.mmap:
    """The memory that the first process sends."""
    _, files, _, _ = socket.recv_fds(link, 1, 1, socket.MSG_CMSG_CLOEXEC)
    if not files:
        raise ConnectionError("the first process sent no memory")
    try:
        memory = mmap.mmap(files[0], size)
    finally:
        os.close(files[0])
    if memory[:KEY] != key:
        raise ConnectionError("this is other memory")
    return memory


def _close(links: list[socket.socket]) -> None:
    for link in links:
        with suppress(OSError):  # it is closed already
            link.shutdown(socket.SHUT_RDWR)  # also for workers of a loader, which inherited it
        link.close()
