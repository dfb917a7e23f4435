"""The OpenAI error envelope, by status."""

import orjson
import pytest

from cortex.dialects.openai_errors import error_body, error_object, error_type, response_error_code
from cortex.wire.errors import ErrorInfo


@pytest.mark.parametrize(
    ("status", "code", "type", "response_code"),
    [
        (400, "context_length_exceeded", "invalid_request_error", "context_length_exceeded"),
        (400, "invalid_value", "invalid_request_error", "invalid_prompt"),
        (401, "invalid_api_key", "authentication_error", "invalid_prompt"),
        (403, "forbidden", "permission_error", "invalid_prompt"),
        (404, "model_not_found", "invalid_request_error", "invalid_prompt"),
        (413, "request_too_large", "invalid_request_error", "invalid_prompt"),
        (422, "unprocessable", "invalid_request_error", "invalid_prompt"),
        (429, "rate_limit_exceeded", "rate_limit_error", "rate_limit_exceeded"),
        (429, "queue_full", "rate_limit_error", "rate_limit_exceeded"),
        (429, "insufficient_quota", "insufficient_quota", "rate_limit_exceeded"),
        (500, "internal_error", "server_error", "server_error"),
        (503, "service_unavailable", "server_error", "server_error"),
    ],
)
def test_by_status(status: int, code: str, type: str, response_code: str) -> None:
    error = ErrorInfo(status, code, "what happened")
    assert error_type(error) == type
    assert response_error_code(error) == response_code
    assert orjson.loads(error_body(error)) == {
        "error": {"message": "what happened", "type": type, "param": None, "code": code}
    }


def test_the_parameter_at_fault() -> None:
    error = ErrorInfo(400, "invalid_value", 'say "what"', param="messages[0]")
    assert orjson.loads(error_object(error))["param"] == "messages[0]"
    assert orjson.loads(error_body(error))["error"] == orjson.loads(error_object(error))
