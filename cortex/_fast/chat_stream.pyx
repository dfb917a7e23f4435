"""Encoder of inference events to the SSE events of an OpenAI chat stream; a batch of events in, one ``bytes`` out.

Everything of a chunk but its text is known when the stream begins, so a text delta is three copies: the bytes before
the text, the escaped text, the bytes after it.
"""

cimport cython
from cpython.object cimport PyObject

from cortex._fast.buffer cimport Buffer, put_bytes, put_literal
from cortex._fast.event_fields cimport (
    FAILED,
    FINISHED,
    REASONING,
    STARTED,
    TEXT,
    TOOL_CALL,
    Delta,
    put_logprobs,
    put_usage_comment,
    read_event,
)

from cortex.dialects.openai_errors import error_body
from cortex.wire.custom_tools import custom_input


@cython.final
cdef class _Choice:
    cdef bytes head             # of every chunk, up to the value of "delta"
    cdef bytes text_head        # of a text chunk, up to the text
    cdef bytes reasoning_head
    cdef Py_ssize_t num_calls
    cdef dict inputs            # arguments so far of calls that carry an input, which is sent once it is whole
    cdef bint ended

    def __init__(self, bytes head):
        self.head = head
        self.text_head = head + b'{"content":"'
        self.inputs = {}
        self.reasoning_head = head + b'{"reasoning_content":"'


@cython.final
cdef class ChatStream:
    """Encoder of one chat stream.

    The role is sent when the inference starts; a start is inserted if the first event is a delta. Events of a finished
    choice, and events after the end of the stream, are dropped: a worker may still fail behind its last token.
    ``custom_tools`` are names of tools whose calls carry an input, which is sent in one piece.
    """

    cdef readonly bint finished
    cdef Buffer out
    cdef list choices
    cdef frozenset custom_tools
    cdef bytes usage_head
    cdef bint include_usage
    cdef bint report_usage
    cdef bint begun
    cdef Py_ssize_t num_open
    cdef Py_ssize_t prompt_tokens
    cdef Py_ssize_t cached_tokens
    cdef Py_ssize_t output_tokens
    cdef Py_ssize_t reasoning_tokens

    def __init__(
        self,
        str id not None,
        str model not None,
        long long created,
        Py_ssize_t num_choices=1,
        bint include_usage=False,
        bint report_usage=False,
        frozenset custom_tools=frozenset(),
    ):
        cdef Buffer head = Buffer()
        cdef bytes common
        if num_choices < 1:
            raise ValueError(f"a chat stream has at least one choice, not {num_choices}")
        head.append(b'data: {"id":')
        head.append_json(id)
        head.append(b',"object":"chat.completion.chunk","created":')
        head.put_integer(created)
        head.append(b',"model":')
        head.append_json(model)
        head.append(b',"choices":[')
        common = head.take()
        self.usage_head = common + b'],"usage":'
        self.choices = [_Choice(common + b'{"index":%d,"delta":' % index) for index in range(num_choices)]
        self.custom_tools = custom_tools
        self.num_open = num_choices
        self.include_usage = include_usage
        self.report_usage = report_usage
        self.out = Buffer()

    def sse_events(self, events not None):
        """Return the SSE events of a batch of events, ``b""`` if they make none.

        Raises ``ValueError`` for a choice that the stream does not have and for a tool call that does not begin with
        its id and name.
        """
        for event in events:
            if self.finished:
                break
            self.add(event)
        return self.out.cut()

    cdef int add(self, object event) except -1:
        cdef Delta delta
        cdef int kind = read_event(event, &delta)
        if kind == TEXT:
            return self.put_delta(&delta)
        if kind == REASONING:
            return self.put_reasoning(&delta)
        if kind == TOOL_CALL:
            return self.put_tool_call(event)
        if kind == FINISHED:
            return self.put_finish(event)
        if kind == STARTED:
            self.prompt_tokens = event.prompt_tokens
            self.cached_tokens = event.cached_tokens
            return self.begin()
        put_literal(self.out, b"data: ")
        put_bytes(self.out, error_body(event.error))
        put_literal(self.out, b"\n\n")
        self.finished = True
        return 0

    cdef int begin(self) except -1:
        cdef _Choice choice
        if self.begun:
            return 0
        self.begun = True
        for choice in self.choices:
            put_bytes(self.out, choice.head)
            put_literal(self.out, b'{"role":"assistant","content":""},"finish_reason":null}]}\n\n')
        return 0

    cdef _Choice choice(self, Py_ssize_t index):
        """Return a choice, or ``None`` if it has ended."""
        cdef _Choice choice
        if not 0 <= index < len(self.choices):
            raise ValueError(f"an event of choice {index} in a stream of {len(self.choices)}")
        if not self.begun:
            self.begin()
        choice = <_Choice>self.choices[index]
        return None if choice.ended else choice

    cdef int put_delta(self, Delta* delta) except -1:
        cdef _Choice choice = self.choice(delta.choice)
        cdef str text = <object>delta.text
        cdef tuple logprobs = <object>delta.logprobs
        if choice is None or not text and not logprobs:
            return 0
        put_bytes(self.out, choice.text_head)
        self.out.put_text(text)
        if not logprobs:
            return put_literal(self.out, b'"},"finish_reason":null}]}\n\n')
        put_literal(self.out, b'"},"logprobs":{"content":')
        put_logprobs(self.out, logprobs)
        return put_literal(self.out, b',"refusal":null},"finish_reason":null}]}\n\n')

    cdef int put_reasoning(self, Delta* delta) except -1:
        cdef _Choice choice = self.choice(delta.choice)
        cdef str text = <object>delta.text
        if choice is None or not text:
            return 0
        # By both of its names, as servers of open-weight models have written it: each client reads one of them.
        put_bytes(self.out, choice.reasoning_head)
        self.out.put_text(text)
        put_literal(self.out, b'","reasoning":"')
        self.out.put_text(text)
        return put_literal(self.out, b'"},"finish_reason":null}]}\n\n')

    cdef int put_tool_call(self, object event) except -1:
        cdef _Choice choice = self.choice(event.choice)
        cdef Py_ssize_t call = event.call
        cdef str arguments = event.arguments
        if choice is None:
            return 0
        if call < choice.num_calls and not arguments:
            return 0
        if call > choice.num_calls or call == choice.num_calls and not (event.id and event.name):
            raise ValueError(f"tool call {call} does not begin with its id and name, or begins out of turn")
        if call in choice.inputs:
            choice.inputs[call].append(arguments)
            return 0
        if call == choice.num_calls and event.name in self.custom_tools:
            choice.inputs[call] = [arguments]
        put_bytes(self.out, choice.head)
        put_literal(self.out, b'{"tool_calls":[{"index":')
        self.out.put_integer(call)
        if call == choice.num_calls:
            choice.num_calls += 1
            put_literal(self.out, b',"id":"')
            self.out.put_text(event.id)
            if call in choice.inputs:
                put_literal(self.out, b'","type":"custom","custom":{"name":"')
                self.out.put_text(event.name)
                return put_literal(self.out, b'","input":""}}]},"finish_reason":null}]}\n\n')
            put_literal(self.out, b'","type":"function","function":{"name":"')
            self.out.put_text(event.name)
            put_literal(self.out, b'","arguments":"')
        else:
            put_literal(self.out, b',"function":{"arguments":"')
        self.out.put_text(arguments)
        return put_literal(self.out, b'"}}]},"finish_reason":null}]}\n\n')

    cdef int put_finish(self, object event) except -1:
        cdef _Choice choice = self.choice(event.choice)
        if choice is None:
            return 0
        choice.ended = True
        for call, pieces in choice.inputs.items():
            put_bytes(self.out, choice.head)
            put_literal(self.out, b'{"tool_calls":[{"index":')
            self.out.put_integer(call)
            put_literal(self.out, b',"custom":{"input":"')
            self.out.put_text(custom_input("".join(pieces)))
            put_literal(self.out, b'"}}]},"finish_reason":null}]}\n\n')
        self.output_tokens += event.output_tokens
        self.reasoning_tokens += event.reasoning_tokens
        put_bytes(self.out, choice.head)
        put_literal(self.out, b'{},"finish_reason":"')
        self.out.put_text(event.reason.value)
        put_literal(self.out, b'"')
        if event.stop_string is not None:
            # Beside OpenAI's own fields, under other servers' name: another dialect needs it.
            put_literal(self.out, b',"stop_reason":')
            self.out.append_json(event.stop_string)
        put_literal(self.out, b"}]}\n\n")
        self.num_open -= 1
        if self.num_open:
            return 0
        if self.include_usage:
            self.put_usage()
        if self.report_usage:
            put_usage_comment(self.out, self.prompt_tokens, self.output_tokens, self.cached_tokens)
        put_literal(self.out, b"data: [DONE]\n\n")
        self.finished = True
        return 0

    cdef int put_usage(self) except -1:
        put_bytes(self.out, self.usage_head)
        put_literal(self.out, b'{"prompt_tokens":')
        self.out.put_integer(self.prompt_tokens)
        put_literal(self.out, b',"completion_tokens":')
        self.out.put_integer(self.output_tokens)
        put_literal(self.out, b',"total_tokens":')
        self.out.put_integer(self.prompt_tokens + self.output_tokens)
        put_literal(self.out, b',"prompt_tokens_details":{"cached_tokens":')
        self.out.put_integer(self.cached_tokens)
        put_literal(self.out, b'},"completion_tokens_details":{"reasoning_tokens":')
        self.out.put_integer(self.reasoning_tokens)
        return put_literal(self.out, b"}}}\n\n")
