"""Event-stream frames: payloads out, whole frames in from any split of the bytes.

Follows the HTML standard, section 9.2.6 (server-sent events): lines end with LF, CRLF or CR, ``data`` lines of a frame
are joined with LF, comments are skipped. ``id`` and ``retry`` serve reconnection, which no dialect here has: ignored.
"""

cimport cython
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize
from libc.stdint cimport uint8_t
from libc.string cimport memcmp, memcpy

from cortex._fast.buffer cimport Buffer, put

MAX_FRAME_BYTES = 8 * 1024 * 1024


class FrameTooLarge(ValueError):
    """A frame is longer than the reader accepts. The stream cannot be read further."""

    def __init__(self, max_frame_bytes):
        super().__init__(f"an event-stream frame is longer than {max_frame_bytes} bytes")
        self.max_frame_bytes = max_frame_bytes


def encode(bytes data not None, bytes event=None):
    """Return a frame that carries ``data``, under an ``event`` name if one is given.

    A line end within ``data`` starts another ``data`` line and arrives as LF. Raises ``ValueError`` for a line end in
    ``event``.
    """
    cdef const uint8_t* text = <const uint8_t*>PyBytes_AS_STRING(data)
    cdef Py_ssize_t length = len(data)
    cdef Py_ssize_t name_bytes = 0
    cdef bytes frame
    cdef char* out
    if event is not None:
        _check_one_line(event)
        name_bytes = len(event) + 8
    if scan_line_end(text, text + length) != text + length:
        return _encode_lines(b"data: ", data, event)
    frame = PyBytes_FromStringAndSize(NULL, name_bytes + length + 8)
    out = PyBytes_AS_STRING(frame)
    if event is not None:
        memcpy(out, b"event: ", 7)
        memcpy(out + 7, PyBytes_AS_STRING(event), name_bytes - 8)
        out[name_bytes - 1] = c"\n"
        out += name_bytes
    memcpy(out, b"data: ", 6)
    memcpy(out + 6, text, length)
    memcpy(out + 6 + length, b"\n\n", 2)
    return frame


def comment(bytes text not None):
    """Return a frame that every client skips: what keeps an idle connection open on the OpenAI dialects."""
    return _encode_lines(b": ", text, None)


cdef int _check_one_line(bytes name) except -1:
    cdef const uint8_t* text = <const uint8_t*>PyBytes_AS_STRING(name)
    if scan_line_end(text, text + len(name)) != text + len(name):
        raise ValueError(f"an event name is one line, not {name!r}")
    return 0


cdef bytes _encode_lines(bytes field, bytes text, bytes event):
    cdef Buffer frame = Buffer()
    cdef const uint8_t* line = <const uint8_t*>PyBytes_AS_STRING(text)
    cdef const uint8_t* end = line + len(text)
    cdef const uint8_t* line_end
    if event is not None:
        frame.append(b"event: " + event + b"\n")
    while True:
        line_end = scan_line_end(line, end)
        frame.append(field)
        put(frame, <const char*>line, line_end - line)
        frame.append(b"\n")
        if line_end == end:
            frame.append(b"\n")
            return frame.cut()
        line = frame_next_line(line_end, end)


@cython.final
@cython.freelist(64)
cdef class Frame:
    """One event: its name (``None`` if it has none) and its data."""

    cdef readonly bytes event
    cdef readonly bytes data

    def __init__(self, bytes event, bytes data not None):
        self.event = event
        self.data = data

    def __eq__(self, other):
        if not isinstance(other, Frame):
            return NotImplemented
        return self.event == (<Frame>other).event and self.data == (<Frame>other).data

    def __hash__(self):
        return hash((self.event, self.data))

    def __repr__(self):
        return f"Frame(event={self.event!r}, data={self.data!r})"


@cython.final
cdef class FrameDecoder:
    """Turns the bytes of an event stream, however they were cut, into frames."""

    cdef Buffer held
    cdef Buffer joined
    cdef size_t max_frame_bytes
    cdef size_t resume
    cdef bint started
    cdef bint drop_line_feed

    def __init__(self, size_t max_frame_bytes=MAX_FRAME_BYTES):
        self.held = Buffer()
        self.joined = Buffer()
        self.max_frame_bytes = max_frame_bytes

    def feed(self, bytes data not None):
        """Return the frames that ``data`` completes.

        Raises :exc:`FrameTooLarge` as soon as a frame, its blank line included, is longer than the limit; frames that
        the same bytes completed before it are lost with the stream.
        """
        cdef list frames = []
        cdef const uint8_t* p
        cdef Py_ssize_t length, used
        if self.drop_line_feed and len(data):
            self.drop_line_feed = False
            if PyBytes_AS_STRING(data)[0] == c"\n":
                data = data[1:]
        if self.held.size == 0:
            # The common case: the bytes are read where they lie.
            p = <const uint8_t*>PyBytes_AS_STRING(data)
            length = len(data)
            used = self.read(p, length, frames)
            if used < length:
                put(self.held, <const char*>p + used, length - used)
        else:
            self.held.append(data)
            used = self.read(<const uint8_t*>self.held.data, self.held.size, frames)
            if used:
                self.held.drop(used)
        return frames

    def close(self):
        """Return the bytes of a frame that the end of the stream cut off, and start anew; empty after a clean end."""
        self.resume = 0
        self.started = False
        self.drop_line_feed = False
        return self.held.cut()

    cdef Py_ssize_t read(self, const uint8_t* p, Py_ssize_t length, list frames) except -1:
        """Append the whole frames at ``p`` to ``frames``; return how many bytes they were."""
        cdef Py_ssize_t used = 0
        cdef size_t frame_bytes
        cdef Frame frame
        while used < length:
            frame_bytes = frame_length(p + used, length - used, &self.resume, True)
            if (frame_bytes or <size_t>(length - used)) > self.max_frame_bytes:
                raise FrameTooLarge(self.max_frame_bytes)
            if frame_bytes == 0:
                return used
            self.resume = 0
            frame = self.parse(p + used, p + used + frame_bytes)
            if frame is not None:
                frames.append(frame)
            used += frame_bytes
            if used == length and p[used - 1] == c"\r":
                self.drop_line_feed = True
        return used

    cdef Frame parse(self, const uint8_t* line, const uint8_t* end):
        cdef const uint8_t* line_end
        cdef const uint8_t* value
        cdef const uint8_t* data = NULL
        cdef const uint8_t* data_end = NULL
        cdef const uint8_t* name = NULL
        cdef const uint8_t* name_end = NULL
        cdef bint several = False
        cdef Frame frame
        if not self.started:
            self.started = True
            if end - line >= 3 and memcmp(line, b"\xef\xbb\xbf", 3) == 0:
                line += 3
        while line < end:
            line_end = scan_line_end(line, end)
            value = frame_field(line, line_end, b"data", 4)
            if value != NULL:
                if several:
                    put(self.joined, b"\n", 1)
                    put(self.joined, <const char*>value, line_end - value)
                elif data != NULL:
                    several = True
                    self.joined.size = 0
                    put(self.joined, <const char*>data, data_end - data)
                    put(self.joined, b"\n", 1)
                    put(self.joined, <const char*>value, line_end - value)
                else:
                    data = value
                    data_end = line_end
            else:
                value = frame_field(line, line_end, b"event", 5)
                if value != NULL:
                    name = value
                    name_end = line_end
            line = frame_next_line(line_end, end)
        if data == NULL:
            return None
        frame = Frame.__new__(Frame)
        frame.event = None
        if name != name_end:
            frame.event = PyBytes_FromStringAndSize(<const char*>name, name_end - name)
        if several:
            frame.data = self.joined.cut()
        else:
            frame.data = PyBytes_FromStringAndSize(<const char*>data, data_end - data)
        return frame
