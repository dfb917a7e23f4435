"""Channel over every boundary of its fragments, and every way in which its other end can close."""

import os
import random
import resource
import select
import signal
import socket
import threading
import time
from collections.abc import Iterator

import pytest

from neuron.device.channel import (
    MAX_MESSAGE_BYTES,
    Channel,
    ChannelClosed,
    ChannelCorrupt,
    MessageTooLong,
    live_blocks,
    socket_pair,
)

PAYLOAD = 65535  # of a full packet


@pytest.fixture
def ends() -> Iterator[tuple[Channel, Channel]]:
    left, right = (Channel(fd) for fd in socket_pair())
    yield left, right
    left.close()
    right.close()


@pytest.fixture
def raw() -> Iterator[tuple[socket.socket, Channel]]:
    """Socket that can send anything, and the channel that receives it."""
    left, right = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    channel = Channel(right.detach())
    yield left, channel
    left.close()
    channel.close()


def transfer(source: Channel, target: Channel, count: int) -> list[bytes]:
    """Flush ``source`` and read ``target`` alternately, on one thread, until ``count`` messages are here."""
    messages: list[bytes] = []
    while len(messages) < count:
        source.flush()
        messages += target.receive_ready()
    return messages


@pytest.mark.parametrize(
    "size", [0, 1, 2, *(n * PAYLOAD + d for n in (1, 2, 3, 7) for d in (-1, 0, 1)), 65536, 131072, 1 << 20]
)
def test_every_size_arrives_whole(ends: tuple[Channel, Channel], size: int) -> None:
    left, right = ends
    message = random.Random(size).randbytes(size)
    left.send(message)
    left.send(b"after")
    assert transfer(left, right, 2) == [message, b"after"]
    assert (left.pending_bytes, left.wants_write) == (0, False)


def test_fragments_are_as_documented(raw: tuple[socket.socket, Channel]) -> None:
    peer, channel = raw
    message = bytes(range(256)) * 512
    channel.send(message)
    packets = [peer.recv(1 << 17) for _ in range(3)]
    assert [(packet[0], len(packet)) for packet in packets] == [(1, 65536), (1, 65536), (0, 3)]
    assert b"".join(packet[1:] for packet in packets) == message


@pytest.mark.parametrize("cut", range(8))
def test_fragments_of_any_size_are_taken(raw: tuple[socket.socket, Channel], cut: int) -> None:
    peer, channel = raw
    assert channel.receive_ready() == []
    peer.send(b"\x01" + b"message"[:cut])
    assert channel.receive_ready() == []
    peer.send(b"\x00" + b"message"[cut:])
    assert channel.receive_ready() == [b"message"]


def test_ten_megabytes_both_ways_at_once(ends: tuple[Channel, Channel]) -> None:
    left, right = ends
    there, back = (random.Random(seed).randbytes(10_000_000) for seed in (1, 2))
    left.send(there)
    right.send(back)
    assert 0 < left.pending_bytes < len(there), "the socket takes some of it and not all"
    arrived: dict[Channel, list[bytes]] = {left: [], right: []}
    while not (arrived[left] and arrived[right]):
        for end in ends:
            end.flush()
            arrived[end] += end.receive_ready()
    assert arrived == {left: [back], right: [there]}


def test_order_is_kept_through_the_queue(ends: tuple[Channel, Channel]) -> None:
    left, right = ends
    sent = [b"%d " % i * (i * 37 % 5000) for i in range(1000)]
    for message in sent:
        left.send(message)
    assert left.wants_write
    assert left.pending_bytes <= sum(map(len, sent))
    assert transfer(left, right, len(sent)) == sent


def test_one_iteration_is_bounded(ends: tuple[Channel, Channel]) -> None:
    left, right = ends
    for _ in range(100):
        left.send(b"x")
    assert [len(right.receive_ready()) for _ in range(3)] == [64, 36, 0]


def test_wants_write_follows_the_selector(ends: tuple[Channel, Channel]) -> None:
    left, right = ends
    while not left.wants_write:
        left.send(bytes(30_000))
    assert select.select([], [left.fileno()], [], 0)[1] == []
    assert not left.flush()
    while right.receive_ready():
        pass
    assert select.select([], [left.fileno()], [], 0)[1] == [left.fileno()]
    assert left.flush()


def test_blocking_receive(ends: tuple[Channel, Channel]) -> None:
    left, right = ends
    with pytest.raises(TimeoutError):
        right.recv(0.001)
    message = bytes(3_000_000)

    def send() -> None:
        left.send(message)
        left.flush(30)

    sender = threading.Thread(target=send)
    sender.start()
    assert right.recv(30) == message
    sender.join()


def test_flush_gives_up_in_time(ends: tuple[Channel, Channel]) -> None:
    left, _ = ends
    left.send(bytes(1 << 20))
    assert not left.flush(0.01)


@pytest.mark.parametrize("unread", [False, True])
def test_messages_sent_before_the_end_are_read(raw: tuple[socket.socket, Channel], unread: bool) -> None:
    peer, channel = raw
    if unread:  # closing over unread input makes the kernel report a reset before the packets
        channel.send(b"never read")
    peer.send(b"\x00one")
    peer.send(b"\x00two")
    peer.close()
    assert channel.receive_ready() == [b"one", b"two"]
    for _ in range(2):
        with pytest.raises(ChannelClosed, match="gone"):
            channel.receive_ready()
    assert channel.closed


def test_the_end_in_the_middle_of_a_message(raw: tuple[socket.socket, Channel]) -> None:
    peer, channel = raw
    peer.send(b"\x00whole")
    peer.send(b"\x01half of it")
    peer.close()
    assert channel.receive_ready() == [b"whole"]
    with pytest.raises(ChannelClosed, match="10 bytes of an unfinished message"):
        channel.recv(1)


def test_sending_to_a_closed_channel(ends: tuple[Channel, Channel]) -> None:
    left, right = ends
    left.send(bytes(1 << 20))
    right.close()
    for _ in range(2):
        with pytest.raises(ChannelClosed):
            left.flush()
        with pytest.raises(ChannelClosed):
            left.send(b"x")
    assert left.pending_bytes == 0


def test_sending_to_a_closed_channel_raises_no_signal() -> None:
    before = signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # would end this process
    try:
        left, right = (Channel(fd) for fd in socket_pair())
        right.close()
        with pytest.raises(ChannelClosed):
            left.send(b"x")
        left.close()
    finally:
        signal.signal(signal.SIGPIPE, before)


@pytest.mark.parametrize("packet", [b"\x02x", b"\xffx", b"\x00" + bytes(70_000)])
def test_a_packet_that_no_channel_sends(raw: tuple[socket.socket, Channel], packet: bytes) -> None:
    peer, channel = raw
    peer.send(b"\x00good")
    peer.send(packet)
    assert channel.receive_ready() == [b"good"]
    for _ in range(2):
        with pytest.raises(ChannelCorrupt):
            channel.receive_ready()


def test_the_bound_holds_on_both_sides() -> None:
    left, right = socket_pair()
    small, large = Channel(left, max_message_bytes=100_000), Channel(right)
    with pytest.raises(MessageTooLong, match="100000"):
        small.send(bytes(100_001))
    small.send(bytes(100_000))
    assert large.recv(1) == bytes(100_000)
    large.send(bytes(100_001))
    for _ in range(2):
        with pytest.raises(MessageTooLong):
            small.recv(1)
    assert large.max_message_bytes == MAX_MESSAGE_BYTES
    small.close()
    large.close()


def test_an_interrupted_wait_goes_on(ends: tuple[Channel, Channel]) -> None:
    left, right = ends
    seen: list[int] = []
    before = signal.signal(signal.SIGUSR1, lambda number, frame: seen.append(number))
    main = threading.main_thread().ident
    assert main is not None

    def interrupt() -> None:
        # Again and again: one that comes just before the wait does not interrupt it.
        for _ in range(1000):
            signal.pthread_kill(main, signal.SIGUSR1)
            if len(seen) >= 3:
                break
            time.sleep(0.01)
        left.send(b"at last")

    thread = threading.Thread(target=interrupt)
    thread.start()
    assert right.recv(30) == b"at last"
    thread.join()
    signal.signal(signal.SIGUSR1, before)
    assert len(seen) >= 3


def test_use_after_close(ends: tuple[Channel, Channel]) -> None:
    left, _ = ends
    left.send(bytes(1 << 20))
    assert live_blocks()
    left.close()
    left.close()
    for use in (left.fileno, left.receive_ready, left.flush, left.recv, lambda: left.send(b"")):
        with pytest.raises(ChannelClosed, match="this end is closed"):
            use()


def test_a_descriptor_that_is_not_a_socket() -> None:
    with pytest.raises(OSError, match="descriptor"):
        Channel(resource.getrlimit(resource.RLIMIT_NOFILE)[0] - 1)
    reader, writer = os.pipe()
    channel = Channel(reader)
    with pytest.raises(OSError, match="ocket"):
        channel.receive_ready()
    channel.close()
    os.close(writer)
