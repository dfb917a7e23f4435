"""Errors as Anthropic's SDK reads them: status, type, words."""

import anthropic
import httpx2 as httpx
import orjson
import pytest
from anthropic.types import ErrorResponse
from pydantic import TypeAdapter

from cortex.dialects.messages.errors import error_body, error_status
from cortex.wire import errors
from cortex.wire.errors import ContextLengthError, ErrorInfo, RemoteError

ERROR = TypeAdapter(ErrorResponse)


@pytest.mark.parametrize(
    ("status", "code", "sent", "kind", "exception"),
    [
        (400, "invalid_value", 400, "invalid_request_error", anthropic.BadRequestError),
        (401, "x", 401, "authentication_error", anthropic.AuthenticationError),
        (403, "x", 403, "permission_error", anthropic.PermissionDeniedError),
        (404, "model_not_found", 404, "not_found_error", anthropic.NotFoundError),
        (405, "method_not_allowed", 405, "invalid_request_error", anthropic.APIStatusError),
        (413, "request_too_large", 413, "request_too_large", anthropic.APIStatusError),
        (422, "unprocessable", 422, "invalid_request_error", anthropic.UnprocessableEntityError),
        (429, "insufficient_quota", 429, "rate_limit_error", anthropic.RateLimitError),
        (429, errors.OverloadedError.code, 529, "overloaded_error", anthropic.InternalServerError),
        (500, "internal_error", 500, "api_error", anthropic.InternalServerError),
        (502, "upstream_error", 502, "api_error", anthropic.InternalServerError),
        (503, "no_node", 529, "overloaded_error", anthropic.InternalServerError),
        (504, "upstream_timeout", 504, "timeout_error", anthropic.InternalServerError),
    ],
)
def test_status_and_type(
    status: int, code: str, sent: int, kind: str, exception: type[anthropic.APIStatusError]
) -> None:
    error = ErrorInfo(status, code, "what happened")
    body = error_body(error, "req_1")
    assert error_status(error) == sent
    assert orjson.loads(body) == {
        "type": "error",
        "error": {"type": kind, "message": "what happened", "details": {"error_code": code}},
        "request_id": "req_1",
    }

    def reply(request: httpx.Request) -> httpx.Response:
        return httpx.Response(sent, content=body, headers={"content-type": "application/json", "request-id": "req_1"})

    client = anthropic.Anthropic(
        api_key="none", max_retries=0, http_client=httpx.Client(transport=httpx.MockTransport(reply))
    )
    with pytest.raises(exception, match="what happened") as caught:
        client.messages.create(model="m", max_tokens=1, messages=[{"role": "user", "content": "hi"}])
    assert caught.value.request_id == "req_1"
    assert caught.value.status_code == sent


@pytest.mark.parametrize("status", [400, 401, 402, 403, 404, 429, 500, 503, 504])
def test_the_envelope_is_of_the_sdks_type(status: int) -> None:
    ERROR.validate_json(error_body(ErrorInfo(status, "c", "m")), strict=True)


def test_a_prompt_that_is_too_long_has_the_message_that_agents_match() -> None:
    for error in (ContextLengthError(100, 150), RemoteError(ContextLengthError(100, 150).info())):
        message = orjson.loads(error_body(error.info()))["error"]["message"]
        assert message == "prompt is too long: 150 tokens > 100 maximum"
    assert "maximum context length is 100 tokens" in ContextLengthError(100, 150).info().message


def test_an_error_without_a_request() -> None:
    assert "request_id" not in orjson.loads(error_body(ErrorInfo(500, "c", "m")))
