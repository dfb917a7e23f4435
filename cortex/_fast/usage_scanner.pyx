"""Scanner of a stream that the gateway forwards unchanged: finds its first token, usage and end.

It recognizes the three dialects by their marks and builds no event. The marks are searched where each dialect has them
(the top level of the data, the choices, the response object), so that the same words in generated text, tool schemas or
metadata are not mistaken for them.

Most SSE events are one more delta. The scanner keeps the bytes before the text of the first one; an event with the same
bytes in the same place costs one comparison and one search for ``"usage"`` instead of a walk.
"""

cimport cython
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize
from libc.stdint cimport uint8_t
from libc.string cimport memcmp, memcpy

from cortex._fast.buffer cimport Buffer, put
from cortex._fast.sse cimport sse_field, sse_event_length, sse_next_line, scan_line_end

from cortex._fast import sse

cdef extern from "json_walk.h":
    const uint8_t* json_space(const uint8_t* p, const uint8_t* end) nogil
    const uint8_t* json_open(const uint8_t* p, const uint8_t* end, uint8_t bracket) nogil
    const uint8_t* json_skip_value(const uint8_t* p, const uint8_t* end) nogil
    const uint8_t* json_next_member(const uint8_t* p, const uint8_t* end, json_member* member) nogil
    const uint8_t* json_next_element(const uint8_t* p, const uint8_t* end, const uint8_t** element) nogil
    bint json_key_is(const json_member* member, const char* name) nogil
    const uint8_t* scan_usage_key(const uint8_t* p, const uint8_t* end) nogil

@cython.final
cdef class UsageScanner:
    """Scanner that returns whole SSE events and keeps first token, usage and end of the stream."""

    def __init__(self, size_t max_event_bytes=sse.MAX_EVENT_BYTES, bint checks=False):
        self.held = Buffer()
        self.joined = Buffer()
        self.max_event_bytes = max_event_bytes
        self.checks = checks

    @property
    def tail(self):
        """Bytes held back: the beginning of an unfinished SSE event, empty between events."""
        return self.held.slice(0, self.held.size)

    cpdef bytes feed(self, bytes data):
        """Return the bytes of the SSE events that ``data`` completes, unchanged.

        Returns ``data`` itself where it is whole events, and ``b""`` where it completes none. A CR at the very end
        waits for the next byte, which may make it a CRLF. Raises :exc:`SseEventTooLarge` as soon as an event, its blank
        line included, is longer than the limit.

        With ``checks`` an event is ``malformed``, and held back with everything after it, if a line of it is no field
        of an SSE event, or its data is neither a JSON object, by its first and last byte, nor the terminator.
        """
        cdef const uint8_t* p
        cdef Py_ssize_t length, whole
        cdef bytes passed
        if self.held.size == 0:
            p = <const uint8_t*>PyBytes_AS_STRING(data)
            length = len(data)
            whole = self.read(p, length)
            if whole == length:
                return data
            put(self.held, <const char*>p + whole, length - whole)
            return PyBytes_FromStringAndSize(<const char*>p, whole)
        self.held.append(data)
        whole = self.read(<const uint8_t*>self.held.data, self.held.size)
        passed = self.held.slice(0, whole)
        if whole:
            self.held.drop(whole)
        return passed

    cdef Py_ssize_t read(self, const uint8_t* p, Py_ssize_t length) except -1:
        """Scan the whole SSE events at ``p``; return how many bytes they are."""
        cdef Py_ssize_t used = 0
        cdef size_t event_bytes
        while used < length and not self.malformed:
            event_bytes = sse_event_length(p + used, length - used, &self.resume, False)
            if (event_bytes or <size_t>(length - used)) > self.max_event_bytes:
                raise sse.SseEventTooLarge(self.max_event_bytes)
            if event_bytes == 0:
                break
            self.resume = 0
            self.scan_event(p + used, p + used + event_bytes)
            if self.malformed:
                break
            used += event_bytes
        return used

    cdef int scan_event(self, const uint8_t* line, const uint8_t* end) except -1:
        cdef const uint8_t* line_end
        cdef const uint8_t* value
        cdef const uint8_t* data = NULL
        cdef const uint8_t* data_end = NULL
        cdef Kind kind = UNNAMED
        cdef bint several = False
        if not self.started:
            self.started = True
            if end - line >= 3 and memcmp(line, b"\xef\xbb\xbf", 3) == 0:
                line += 3
        while line < end:
            line_end = scan_line_end(line, end)
            value = sse_field(line, line_end, b"data", 4)
            if value != NULL:
                if data != NULL:
                    if not several:
                        several = True
                        self.joined.size = 0
                        put(self.joined, <const char*>data, data_end - data)
                    put(self.joined, b"\n", 1)
                    put(self.joined, <const char*>value, line_end - value)
                data = value
                data_end = line_end
            else:
                value = sse_field(line, line_end, b"event", 5)
                if value != NULL:
                    kind = kind_of(value, line_end)
                elif line != line_end and line[0] == c":":
                    if line_end - line > 8 and memcmp(line, b": usage {", 9) == 0:
                        self.keep_usage(line + 8, line_end)
                elif self.checks and line != line_end and not is_field(line, line_end):
                    self.malformed = True
                    return 0
            line = sse_next_line(line_end, end)
        if several:
            data = <const uint8_t*>self.joined.data
            data_end = data + self.joined.size
        if data != NULL and data != data_end:
            if not self.checks or is_object(data, data_end) or (data_end - data >= 6 and memcmp(data, b"[DONE]", 6) == 0):
                self.scan_data(data, data_end, kind)
            else:
                self.malformed = True
        return 0

    cdef int scan_data(self, const uint8_t* data, const uint8_t* end, Kind kind) except -1:
        cdef const uint8_t* key
        if kind == UNNAMED:
            if self.matches_probe(data, end):
                self.num_token_events += 1
                # A server may put running usage, or null in its place, into every chunk.
                key = scan_usage_key(data, end)
                while key != end:
                    if is_object_after(key + 7, end):
                        self.scan_usage(data, end)
                        break
                    key = scan_usage_key(key + 7, end)
                return 0
            if end - data >= 6 and memcmp(data, b"[DONE]", 6) == 0:
                self.terminated = True
                return 0
            return self.scan_object(data, end)
        return self.scan_kind(data, end, kind)

    cdef int scan_kind(self, const uint8_t* data, const uint8_t* end, Kind kind) except -1:
        if kind == TOKEN:
            self.first_token = True
            self.num_token_events += 1
        elif kind == MESSAGE:
            self.scan_usage(data, end)
        elif kind == COMPLETED or kind == FAILED:
            self.terminated = True
            self.failed |= kind == FAILED
            self.scan_usage(data, end)
        elif kind == STOP:
            self.terminated = True
        elif kind == ERROR:
            self.failed = True
        return 0

    cdef int scan_object(self, const uint8_t* data, const uint8_t* end) except -1:
        """Scan the top level of data whose event name gives no kind."""
        cdef json_member member
        cdef const uint8_t* at = json_open(json_space(data, end), end, c"{")
        cdef const uint8_t* usage = NULL
        cdef const uint8_t* usage_end = NULL
        cdef Kind kind
        cdef bint token = False
        while True:
            at = json_next_member(at, end, &member)
            if at == NULL:
                break
            if json_key_is(&member, b"type") and member.value[0] == c'"':
                kind = kind_of(member.value + 1, member.value_end - 1)
                if kind != UNNAMED:
                    return self.scan_kind(data, end, kind)
            elif json_key_is(&member, b"choices"):
                token = self.find_token(member.value, member.value_end, data)
            elif json_key_is(&member, b"usage") and member.value[0] == c"{":
                usage = member.value
                usage_end = member.value_end
            elif json_key_is(&member, b"error") and member.value[0] != c"n":
                self.failed = True
        if token:
            self.first_token = True
            self.num_token_events += 1
        if usage != NULL:
            self.keep_usage(usage, usage_end)
        return 0

    cdef bint find_token(self, const uint8_t* choices, const uint8_t* end, const uint8_t* data) noexcept:
        """Return whether one of ``choices`` carries content, and keep its place."""
        cdef const uint8_t* at = json_open(choices, end, c"[")
        cdef const uint8_t* choice
        cdef const uint8_t* inner
        cdef json_member member
        while True:
            at = json_next_element(at, end, &choice)
            if at == NULL:
                return False
            inner = json_open(choice, at, c"{")
            while True:
                inner = json_next_member(inner, at, &member)
                if inner == NULL:
                    break
                if json_key_is(&member, b"text"):
                    if is_filled(&member):
                        self.remember(member.key - 1, member.value + 1, data)
                        return True
                elif json_key_is(&member, b"delta") and self.find_delta(&member, data):
                    return True

    cdef bint find_delta(self, json_member* delta, const uint8_t* data) noexcept:
        cdef const uint8_t* at = json_open(delta.value, delta.value_end, c"{")
        cdef json_member member
        while True:
            at = json_next_member(at, delta.value_end, &member)
            if at == NULL:
                return False
            if not is_filled(&member):
                continue
            if (
                json_key_is(&member, b"content")
                or json_key_is(&member, b"reasoning_content")
                or json_key_is(&member, b"reasoning")
                or json_key_is(&member, b"tool_calls")
                or json_key_is(&member, b"function_call")
                or json_key_is(&member, b"refusal")
            ):
                self.remember(delta.key - 1, member.value + 1, data)
                return True

    cdef void remember(self, const uint8_t* start, const uint8_t* end, const uint8_t* data) noexcept:
        """Keep the bytes from the key's quote up to the first of the content, and their place."""
        if end - start > PROBE_BYTES:
            self.probe_length = 0
            return
        memcpy(self.probe, start, end - start)
        self.probe_length = end - start
        self.probe_offset = start - data

    cdef bint matches_probe(self, const uint8_t* data, const uint8_t* end) noexcept:
        cdef const uint8_t* at = data + self.probe_offset
        cdef uint8_t first
        if self.probe_length == 0 or end - data <= self.probe_offset + self.probe_length:
            return False
        if memcmp(at, self.probe, self.probe_length):
            return False
        first = at[self.probe_length]
        return first != c'"' and first != c"]" and first != c"}"

    cdef int scan_usage(self, const uint8_t* data, const uint8_t* end) except -1:
        """Keep the usage at the top level, or within the ``response`` or ``message`` there."""
        cdef json_member member
        cdef json_member inner
        cdef const uint8_t* at = json_open(json_space(data, end), end, c"{")
        cdef const uint8_t* within
        while True:
            at = json_next_member(at, end, &member)
            if at == NULL:
                return 0
            if member.value[0] != c"{":
                continue
            if json_key_is(&member, b"usage"):
                return self.keep_usage(member.value, member.value_end)
            if not (json_key_is(&member, b"response") or json_key_is(&member, b"message")):
                continue
            within = json_open(member.value, member.value_end, c"{")
            while True:
                within = json_next_member(within, member.value_end, &inner)
                if within == NULL:
                    break
                if json_key_is(&inner, b"usage") and inner.value[0] == c"{":
                    return self.keep_usage(inner.value, inner.value_end)

    cdef int keep_usage(self, const uint8_t* start, const uint8_t* end) except -1:
        self.usage = PyBytes_FromStringAndSize(<const char*>start, end - start)
        return 0


cdef inline bint is_field(const uint8_t* line, const uint8_t* end) noexcept nogil:
    """Say whether a line is one of the fields that no dialect here has a use for."""
    return sse_field(line, end, b"id", 2) != NULL or sse_field(line, end, b"retry", 5) != NULL


cdef inline bint is_object(const uint8_t* data, const uint8_t* end) noexcept nogil:
    """Say whether some data begins and ends as a JSON object does; nothing in between is looked at."""
    data = json_space(data, end)
    while end > data and ((end - 1)[0] == c" " or (end - 1)[0] == c"\t"):
        end -= 1
    return end - data >= 2 and data[0] == c"{" and (end - 1)[0] == c"}"


cdef inline bint is_filled(const json_member* member) noexcept nogil:
    """Say whether a value is a string, an array or an object with something in it."""
    cdef uint8_t first = member.value[0]
    return (first == c'"' or first == c"[" or first == c"{") and member.value_end - member.value > 2


cdef inline bint is_object_after(const uint8_t* p, const uint8_t* end) noexcept nogil:
    p = json_space(p, end)
    if p == end or p[0] != c":":
        return False
    p = json_space(p + 1, end)
    return p < end and p[0] == c"{"


cdef inline bint is_name(const uint8_t* name, size_t length, const char* other, size_t other_length) noexcept nogil:
    return length == other_length and memcmp(name, other, length) == 0


cdef Kind kind_of(const uint8_t* name, const uint8_t* end) noexcept nogil:
    """Return what the dialects mean by an event name."""
    cdef size_t length = end - name
    if length > 9 and memcmp(name, b"response.", 9) == 0:
        if length > 15 and memcmp(end - 6, b".delta", 6) == 0:
            return TOKEN
        if is_name(name, length, b"response.completed", 18) or is_name(name, length, b"response.incomplete", 19):
            return COMPLETED
        if is_name(name, length, b"response.failed", 15):
            return FAILED
        return OTHER
    if is_name(name, length, b"content_block_delta", 19):
        return TOKEN
    if is_name(name, length, b"message_delta", 13) or is_name(name, length, b"message_start", 13):
        return MESSAGE
    if is_name(name, length, b"message_stop", 12):
        return STOP
    if is_name(name, length, b"error", 5):
        return ERROR
    if length > 14 and memcmp(name, b"content_block_", 14) == 0 or is_name(name, length, b"ping", 4):
        return OTHER
    return UNNAMED
