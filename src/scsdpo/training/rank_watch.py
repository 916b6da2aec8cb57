"""Notices that another rank is gone, and ends this process with its name instead of waiting."""

import os
import secrets
import socket
import sys
import threading
import warnings
from collections.abc import Callable
from selectors import EVENT_READ, DefaultSelector

import lightning as L

from scsdpo.errors import first_line
from scsdpo.interrupt import RankLost, rank_lost
from scsdpo.private.lightning import disarm_child_observers

GRACE = 20.0
"""Seconds in which the main thread may end by itself, by the collective's own error."""
_CONNECT = 60.0
_KEEPALIVE = {"TCP_KEEPIDLE": 10, "TCP_KEEPINTVL": 5, "TCP_KEEPCNT": 4}
"""A machine that stops answering is noticed after 10 + 4 * 5 s."""


class RankWatch:
    """TCP connections between rank 0 and each other rank, which the kernel closes with a process.

    A rank that ends sends one line, `bye` or `failed` and why. A connection that closes without a
    line means that the rank is lost, and rank 0 tells the others. A rank that learns of a failure
    or loss has `GRACE` seconds to end by itself; then its process is ended.

    Args:
        trainer: the run's Trainer; its strategy broadcasts the address.
        report: (rank, what became of it) -> the message with which this process ends.
    """

    def __init__(self, trainer: L.Trainer, report: Callable[[int, str], str]) -> None:
        self.rank, self.report = trainer.global_rank, report
        self._lost: tuple[int, str] | None = None
        self._known, self._ended = threading.Event(), threading.Event()
        self._peers: dict[int, socket.socket] = {}
        try:
            self._peers = _connections(trainer)
        except OSError as error:  # a firewall, say
            warnings.warn(
                f"rank {self.rank} cannot watch the other ranks ({first_line(error)}): a lost rank "
                "is noticed only after a collective's own timeout",
                stacklevel=2,
            )
        os.register_at_fork(after_in_child=self._close)
        disarm_child_observers()
        threading.Thread(target=self._watch, name="rank-watch", daemon=True).start()

    def lost(self, seconds: float) -> tuple[int, str] | None:
        """Number of a lost rank and what became of it; waits for so many seconds. None: no news."""
        self._known.wait(seconds)
        return self._lost

    def end(self, said: str) -> None:
        """Tell the other ranks that this one ends by itself: `bye`, or `failed ...`."""
        if not self._ended.is_set():
            self._ended.set()
            self._tell(said)

    def _tell(self, said: str) -> None:
        for peer in self._peers.values():
            try:
                peer.sendall(f"{self.rank} {said}\n".encode())
            except OSError:  # gone too; `_watch` notices
                continue

    def _watch(self) -> None:
        with DefaultSelector() as selector:
            for rank, peer in self._peers.items():
                selector.register(peer, EVENT_READ, rank)
            while selector.get_map():
                for key, _ in selector.select():
                    self._hear(key.data, self._read(key.data))
                    selector.unregister(key.fileobj)

    def _read(self, rank: int) -> str:
        """Read a peer's one line, `RANK WORDS`; '' if its connection closes without one."""
        said = b""
        try:
            while not said.endswith(b"\n") and (part := self._peers[rank].recv(4096)):
                said += part
        except OSError:  # the connection was reset, or keep-alive failed
            return ""
        return said.decode(errors="replace").strip()

    def _hear(self, peer: int, line: str) -> None:
        rank, _, said = line.partition(" ")
        if said == "bye" or self._ended.is_set() or self._lost is not None:
            return
        self._lost = (
            (int(rank), said) if said else (peer, "was lost: its process or machine is gone")
        )
        self._known.set()
        rank_lost()
        if self.rank == 0:
            self._forward(*self._lost)
        threading.Thread(target=self._insist, daemon=True).start()

    def _forward(self, lost: int, said: str) -> None:
        for rank, peer in self._peers.items():
            if rank != lost:
                try:
                    peer.sendall(f"{lost} {said}\n".encode())
                except OSError:
                    continue

    def _insist(self) -> None:
        """End a process whose main thread waits in a collective for ever; a thread runs this."""
        if not self._ended.wait(GRACE) and self._lost is not None:
            print(f"scsdpo: error: {self.report(*self._lost)}", file=sys.stderr, flush=True)
            os._exit(3)

    def _close(self) -> None:
        """Close a forked child's copies, which would keep the connections open after our end."""
        for peer in self._peers.values():
            peer.close()


def broke_off(error: BaseException) -> bool:
    """True if a collective failed in the way it does when another rank is gone."""
    words = ("gloo", "NCCL", "onnection", "TCPStore", "Broken pipe", "Socket")
    told = isinstance(error, RuntimeError) and any(word in str(error) for word in words)
    return told or isinstance(error, RankLost)


def _connections(trainer: L.Trainer) -> dict[int, socket.socket]:
    """Rank -> connection: on rank 0 to all other ranks, elsewhere to rank 0."""
    rank, ranks = trainer.global_rank, trainer.world_size
    host = "127.0.0.1" if trainer.num_nodes == 1 else os.environ["MASTER_ADDR"]
    if rank == 0:
        server = socket.create_server(("127.0.0.1" if trainer.num_nodes == 1 else "", 0))
        token = secrets.token_hex(16)
        trainer.strategy.broadcast((host, server.getsockname()[1], token))
        with server:
            return _accepted(server, ranks - 1, token)
    host, port, token = trainer.strategy.broadcast(("", 0, ""))
    peer = socket.create_connection((host, port), timeout=_CONNECT)
    peer.settimeout(None)
    peer.sendall(f"{token} {rank:08d}".encode())
    return {0: _kept_alive(peer)}


def _accepted(server: socket.socket, count: int, token: str) -> dict[int, socket.socket]:
    server.settimeout(_CONNECT)
    peers: dict[int, socket.socket] = {}
    while len(peers) < count:
        peer, _ = server.accept()
        peer.settimeout(_CONNECT)
        said = peer.recv(len(token) + 9, socket.MSG_WAITALL).decode(errors="replace")
        came, _, rank = said.partition(" ")
        if came != token:  # not a rank of this run
            peer.close()
            continue
        peer.settimeout(None)
        peers[int(rank)] = _kept_alive(peer)
    return peers


def _kept_alive(peer: socket.socket) -> socket.socket:
    peer.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in _KEEPALIVE.items():
        if hasattr(socket, name):
            peer.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
    return peer
