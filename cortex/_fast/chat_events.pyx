"""Decoder of an OpenAI chat stream to inference events, for its translation into another dialect.

Most SSE events carry one more piece of text and differ only in it. The bytes around the text of the last one are kept,
and an event with the same bytes is decoded by unescaping the rest; any other is decoded by
:mod:`cortex.dialects.chat.chunks`. Only the first choice is read: the dialects of the translation have one.
"""

cimport cython
from cpython.bytes cimport PyBytes_AS_STRING
from cpython.unicode cimport PyUnicode_DecodeUTF8
from libc.string cimport memchr, memcmp

import orjson

from cortex._fast.sse import SseDecoder
from cortex.dialects.chat.chunks import ChunkReader
from cortex.wire.events import ReasoningDelta, TextDelta

cdef object _TextDelta = TextDelta
cdef object _ReasoningDelta = ReasoningDelta


@cython.final
cdef class ChatEvents:
    """Decoder of one chat stream, for any split of its bytes."""

    cdef object decoder
    cdef object reader
    cdef object kind            # of the SSE events that the bytes below surround
    cdef bytes prefix
    cdef bytes suffix

    def __cinit__(self):
        self.decoder = SseDecoder()
        self.reader = ChunkReader()

    @property
    def ended(self):
        """Whether the stream has come to its end, well or not."""
        return self.reader.ended

    def feed(self, bytes data not None):
        """Return the events that ``data`` completes. Raises :exc:`SseEventTooLarge`, :exc:`UpstreamError`."""
        cdef list events = []
        cdef bytes chunk
        for sse_event in self.decoder.feed(data):
            chunk = sse_event.data
            text = self.read_known(chunk)
            if text is None:
                events += self.reader.read(chunk)
                self.learn(chunk)
            else:
                events.append(self.kind(text))
        return events

    def close(self):
        """Return the events that the end of the stream implies, if no terminator came."""
        return self.reader.close()

    cdef object read_known(self, bytes chunk):
        """Return the text of an SSE event like the one before; ``None`` for any other."""
        cdef Py_ssize_t before, after, length
        cdef const char* start
        if self.prefix is None or self.reader.ended:
            return None
        before = len(self.prefix)
        after = len(self.suffix)
        length = len(chunk) - before - after
        if length <= 0:
            return None
        start = PyBytes_AS_STRING(chunk)
        if memcmp(start, PyBytes_AS_STRING(self.prefix), before):
            return None
        start += before
        if memcmp(start + length, PyBytes_AS_STRING(self.suffix), after) or memchr(start, c'"', length) != NULL:
            return None
        if memchr(start, c"\\", length) == NULL:
            return PyUnicode_DecodeUTF8(start, length, "replace")
        try:
            return orjson.loads(b'"' + start[:length] + b'"')
        except orjson.JSONDecodeError:
            return None  # half a surrogate pair, for instance: the full decoder decides

    cdef int learn(self, bytes chunk) except -1:
        """Keep what surrounds the text of an SSE event that carried nothing else."""
        cdef Py_ssize_t at, end
        plain = self.reader.plain
        if plain is None:
            return 0
        self.prefix = None
        kind, text = plain
        written = b'"' + text.encode("utf-8", "replace") + b'"'
        # Only where it is written as it reads, once, and where text belongs.
        at = chunk.find(written)
        if at < 0 or chunk.find(written, at + 1) >= 0:
            return 0
        if not chunk[:at].rstrip(b" :").endswith((b'content"', b'reasoning"')):
            return 0
        end = at + len(written) - 1
        self.prefix = chunk[: at + 1]
        self.suffix = chunk[end:]
        self.kind = _TextDelta if kind == "text" else _ReasoningDelta
        return 0
