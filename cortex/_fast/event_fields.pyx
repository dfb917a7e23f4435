"""Code that the stream encoders share: the kind and fields of an event, token probabilities, the usage comment.

The fields of the two deltas that a stream consists of are read from their slots; rarer ones go by name.
"""

from cpython.object cimport Py_TYPE, PyObject
from libc.math cimport isfinite

from cortex._fast.buffer cimport Buffer, put_literal

from cortex.wire import events

cdef extern from "slots.h":
    Py_ssize_t slot_offset(object type, const char* name) except -1
    PyObject* slot_get(object event, Py_ssize_t offset)

# What OpenAI writes for a token that cannot be: JSON has no infinity.
cdef double IMPOSSIBLE = -9999.0

cdef object _Started = events.Started
cdef object _TextDelta = events.TextDelta
cdef object _ReasoningDelta = events.ReasoningDelta
cdef object _ToolCallDelta = events.ToolCallDelta
cdef object _Finished = events.Finished
cdef object _Failed = events.Failed

cdef Py_ssize_t _TEXT = slot_offset(_TextDelta, b"text")
cdef Py_ssize_t _TEXT_CHOICE = slot_offset(_TextDelta, b"choice")
cdef Py_ssize_t _TEXT_LOGPROBS = slot_offset(_TextDelta, b"logprobs")
cdef Py_ssize_t _REASONING = slot_offset(_ReasoningDelta, b"text")
cdef Py_ssize_t _REASONING_CHOICE = slot_offset(_ReasoningDelta, b"choice")


cdef int read_event(object event, Delta* delta) except -1:
    """Return the kind of an event; for text and reasoning, fill ``delta``. Raises ``TypeError`` for anything else."""
    cdef PyObject* kind = <PyObject*>Py_TYPE(event)
    if kind == <PyObject*>_TextDelta:
        delta.text = slot_get(event, _TEXT)
        delta.logprobs = slot_get(event, _TEXT_LOGPROBS)
        delta.choice = <object>slot_get(event, _TEXT_CHOICE)
        return TEXT
    if kind == <PyObject*>_ReasoningDelta:
        delta.text = slot_get(event, _REASONING)
        delta.choice = <object>slot_get(event, _REASONING_CHOICE)
        return REASONING
    if kind == <PyObject*>_ToolCallDelta:
        return TOOL_CALL
    if kind == <PyObject*>_Finished:
        return FINISHED
    if kind == <PyObject*>_Started:
        return STARTED
    if kind == <PyObject*>_Failed:
        return FAILED
    raise TypeError(f"not an inference event: {event!r}")


cdef int put_logprobs(Buffer out, tuple logprobs) except -1:
    """Append a list of token probabilities, in the form that both OpenAI dialects read."""
    cdef bint first = True
    put_literal(out, b"[")
    for logprob in logprobs:
        if not first:
            put_literal(out, b",")
        first = False
        _put_token(out, logprob)
        put_literal(out, b',"top_logprobs":[')
        _put_top(out, logprob.top)
        put_literal(out, b"]}")
    put_literal(out, b"]")
    return 0


cdef int _put_top(Buffer out, tuple top) except -1:
    cdef bint first = True
    for logprob in top:
        if not first:
            put_literal(out, b",")
        first = False
        _put_token(out, logprob)
        put_literal(out, b"}")
    return 0


cdef int _put_token(Buffer out, object token) except -1:
    cdef double logprob = token.logprob
    cdef bytes utf8 = token.utf8
    cdef Py_ssize_t i
    put_literal(out, b'{"token":"')
    out.put_text(token.token)
    put_literal(out, b'","bytes":[')
    for i in range(len(utf8)):
        if i:
            put_literal(out, b",")
        out.put_integer(<unsigned char>utf8[i])
    put_literal(out, b'],"logprob":')
    out.put_number(logprob if isfinite(logprob) else IMPOSSIBLE)
    return 0


cdef int put_usage_comment(
    Buffer out, Py_ssize_t prompt_tokens, Py_ssize_t completion_tokens, Py_ssize_t cached_tokens
) except -1:
    """Append the comment by which a gateway meters a stream whose client asked for no usage."""
    put_literal(out, b': usage {"prompt_tokens":')
    out.put_integer(prompt_tokens)
    put_literal(out, b',"completion_tokens":')
    out.put_integer(completion_tokens)
    put_literal(out, b',"cached_tokens":')
    out.put_integer(cached_tokens)
    put_literal(out, b"}\n\n")
    return 0
