"""Process group with a watchdog: gathers small values and ends all processes when one is lost.

Each other process has two connections to process 0: one for the calls of the main thread, one for a thread on
both sides that sends a pulse. When a process ends, its connections close, and the others end within seconds,
where a sum over devices would wait for minutes or for ever. A backend carries one text from process 0 to all.
"""

import contextlib
import json
import multiprocessing
import multiprocessing.connection as connections
import os
import queue
import socket
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

PULSE_SECONDS = 5.0
SILENCE_SECONDS = 30.0  # after so long without a pulse a process counts as lost: its machine, or the network
JOIN_SECONDS = 120.0
EXIT_CODE = 75  # EX_TEMPFAIL of sysexits.h: the same command may succeed

_PULSE, _BYE = "pulse", "bye"  # of a process that is lost they say [its rank, what happened to it]


class Group(contextlib.AbstractContextManager):
    """The processes of a run, as one of them sees them, by names as "process 1 (host, 4711)".

    Every method but `is_writer` is called by all processes, in the same order. A thread ends this process
    when another one is lost.
    """

    def __init__(
        self, rank: int, names: Sequence[str], calls: Mapping[int, Any], pulses: Mapping[int, Any] | None
    ) -> None:
        self.rank, self.names = rank, tuple(names)
        self._calls, self._pulses = calls, dict(pulses or {})
        self._advice: Callable[[], str] = str
        self._lock, self._sending = threading.Lock(), threading.Lock()
        self._has_left = False
        self._heard = dict.fromkeys(self._pulses, time.monotonic())
        self._thread = threading.Thread(target=self._watch, name="keras_convnext-processes", daemon=True)
        self._thread.start()

    def __len__(self) -> int:
        return len(self.names)

    @property
    def is_writer(self) -> bool:
        """Whether this is the process that writes files and prints."""
        return self.rank == 0

    def set_advice(self, advice: Callable[[], str]) -> None:
        """Sets what makes the sentence that is printed after the name of a lost process."""
        self._advice = advice

    def gathered(self, value: Any) -> list[Any]:
        """Returns the JSON values of all processes, in their order."""
        return [json.loads(content) for content in self._gathered(json.dumps(value).encode())]

    def gathered_arrays(self, array: np.ndarray) -> list[np.ndarray]:
        """Returns the arrays of all processes, in their order; they may differ in shape."""
        return [_unpacked(content) for content in self._gathered(_packed(array))]

    def shared_arrays(self, arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Returns the arrays of process 0; what the others give does not count."""
        if len(self) == 1:
            return dict(arrays)
        names = self.gathered(list(arrays))[0]
        contents = (_packed(arrays[name]) if self.is_writer else b"" for name in names)
        return {
            name: _unpacked(self._gathered(content)[0]) for name, content in zip(names, contents, strict=True)
        }

    def close(self, failure: str = "") -> None:
        """Leaves the group, which is no loss to the others; with a failure, which is told, they end too."""
        if self._leave():
            self._advice = str  # the other is a run's, with all its arrays
            self._send([self.rank, f"stopped: {failure[:2000]}"] if failure else _BYE)

    def __exit__(self, kind: Any, error: BaseException | None, traceback: Any) -> None:
        """Leaves the group, and tells the others why where this process fails."""
        if error is not None:
            # The backends raise errors of their own about connections; news of a lost process ends this one.
            self._wait_for_end(3.0)
        self.close("" if error is None else f"{type(error).__name__}: {error}")

    def _gathered(self, content: bytes) -> list[bytes]:
        try:
            if self.is_writer:
                contents = [content, *(call.recv_bytes() for call in self._calls.values())]
                for call in self._calls.values():
                    for part in contents:
                        call.send_bytes(part)
                return contents
            self._calls[0].send_bytes(content)
            return [self._calls[0].recv_bytes() for _ in self.names]
        except (EOFError, OSError):  # a connection is closed: the thread that watches has the last word
            self._wait_for_end(SILENCE_SECONDS + 2 * PULSE_SECONDS)
            raise

    def _wait_for_end(self, seconds: float) -> None:
        if not self._has_left:
            self._thread.join(seconds)

    def _leave(self) -> bool:
        """Notes that this process leaves; False where it has left already."""
        with self._lock:
            had_left, self._has_left = self._has_left, True
        return not had_left

    def _send(self, words: str | list) -> None:
        with self._sending:
            for end in list(self._pulses.values()):
                with contextlib.suppress(OSError, ValueError):
                    end.send_bytes(json.dumps(words).encode())

    def _watch(self) -> None:
        sent = 0.0
        while self._pulses and not self._has_left:
            if time.monotonic() - sent >= PULSE_SECONDS:
                self._send(_PULSE)
                sent = time.monotonic()
            ready = connections.wait(list(self._pulses.values()), timeout=1.0)
            for number, end in list(self._pulses.items()):
                if end in ready:
                    self._hear(number, end)
                elif time.monotonic() - self._heard[number] > SILENCE_SECONDS:
                    self._end(number, f"has been silent for {SILENCE_SECONDS:.0f} s")

    def _hear(self, number: int, end: Any) -> None:
        try:
            words = json.loads(end.recv_bytes())
        except (EOFError, OSError):
            self._end(number, "has ended")
            return
        self._heard[number] = time.monotonic()
        if words == _BYE:
            del self._pulses[number]
        elif words != _PULSE:
            self._end(*words)

    def _end(self, number: int, what: str) -> None:
        """Ends this process, with the reason; the main thread may be in a call that never returns."""
        if not self._leave():
            return
        self._send([number, what])
        text = f"{self.names[number]} of {len(self)} {what}"
        with contextlib.suppress(Exception):  # whatever happens, the process ends
            text = f"{text.rstrip('.')}. {self._advice()}"
        with contextlib.suppress(OSError, ValueError):
            print(f"\n{text.rstrip()}", file=sys.stderr, flush=True)
            sys.stdout.flush()
        os._exit(EXIT_CODE)


def alone() -> Group:
    """The group of a run of one process."""
    return Group(0, [_name(0)], {}, None)


def join(rank: int, world_size: int, tell: Callable[[str], str]) -> Group:
    """Connects the processes of a run.

    All call `tell` once, the others than process 0 with "", which returns the text of process 0, at most 480
    ASCII characters. ConnectionError: some did not connect within `JOIN_SECONDS`.
    """
    if world_size == 1:
        return alone()
    if rank == 0:
        key = os.urandom(16)
        with connections.Listener(("", 0), backlog=4 * world_size) as listener:
            tell(json.dumps({"hosts": _own_hosts(), "port": listener.address[1], "key": key.hex()}))
            calls, pulses = _accepted(listener, world_size, key)
    else:
        told = json.loads(tell(""))
        calls, pulses = ({0: _connected(told, [kind, rank])} for kind in ("call", "pulse"))
    group = Group(rank, [f"process {number}" for number in range(world_size)], calls, pulses)
    group.names = tuple(group.gathered(_name(rank)))
    return group


def _name(rank: int) -> str:
    return f"process {rank} ({socket.gethostname()}, {os.getpid()})"


def _own_hosts() -> list[str]:
    """Names and addresses under which others may reach this machine, the likeliest first."""
    hosts = [socket.gethostname()]
    with contextlib.suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect(("192.0.2.1", 9))  # sends nothing; chooses the address of the way out
        hosts.insert(0, probe.getsockname()[0])
    return [host[:100] for host in (*hosts, "127.0.0.1")]


def _accepted(listener: connections.Listener, world_size: int, key: bytes) -> Sequence[dict[int, Any]]:
    """Waits for both connections of each other process; returns those of calls and of pulses, by rank."""
    ends: dict[str, dict[int, Any]] = {"call": {}, "pulse": {}}
    arrived: queue.Queue[Any] = queue.Queue()
    is_complete = threading.Event()

    def greet(end: Any) -> None:
        # A stranger, or one that only looks whether somebody is there, is passed over.
        with contextlib.suppress(multiprocessing.AuthenticationError, OSError, EOFError, ValueError):
            connections.deliver_challenge(end, key)  # as `Client` expects it
            connections.answer_challenge(end, key)
            arrived.put((end, *json.loads(end.recv_bytes())))

    def accept() -> None:
        while not is_complete.is_set():
            with contextlib.suppress(OSError):
                # In a thread of its own, since one that says nothing would hold up the others.
                threading.Thread(target=greet, args=[listener.accept()], daemon=True).start()

    threading.Thread(target=accept, daemon=True).start()
    deadline = time.monotonic() + JOIN_SECONDS
    others = set(range(1, world_size))
    try:
        while missing := sorted(others - (ends["call"].keys() & ends["pulse"].keys())):
            end, kind, number = arrived.get(timeout=max(0.0, deadline - time.monotonic()))
            ends[kind][number] = end
    except queue.Empty:
        raise ConnectionError(
            f"Expected {len(others)} other processes to connect to {_name(0)} within {JOIN_SECONDS:.0f} s, "
            f"but {', '.join(map(str, missing))} did not. Allow connections between the machines on all "
            "ports, and see what the missing ones print."
        ) from None
    finally:
        is_complete.set()
    return [dict(sorted(each.items())) for each in ends.values()]


def _connected(told: Mapping[str, Any], greeting: list) -> Any:
    deadline = time.monotonic() + JOIN_SECONDS
    hosts, port = told["hosts"], told["port"]
    while True:
        for host in hosts:
            with contextlib.suppress(OSError, EOFError, multiprocessing.AuthenticationError):
                with socket.create_connection((host, port), timeout=5):
                    pass  # a host that does not answer would hold up the client for minutes
                end = connections.Client((host, port), authkey=bytes.fromhex(told["key"]))
                end.send_bytes(json.dumps(greeting).encode())
                return end
        if time.monotonic() > deadline:
            raise ConnectionError(
                f"Expected process 0 at port {port} of {' or '.join(hosts)}, but it does not answer. Allow "
                "connections between the machines on all ports."
            )
        time.sleep(0.2)


def _packed(array: np.ndarray) -> bytes:
    array = np.asarray(array, order="C")  # not `ascontiguousarray`, which gives a scalar an axis
    header = json.dumps([array.dtype.name, array.shape]).encode()
    return len(header).to_bytes(4, "little") + header + array.tobytes()


def _unpacked(content: bytes) -> np.ndarray:
    size = int.from_bytes(content[:4], "little")
    name, shape = json.loads(content[4 : 4 + size])
    return np.frombuffer(content, name, offset=4 + size).reshape(shape).copy()
