"""The tool runner of Anthropic's SDK, and a thread that cannot be held: ``try_tool_runner.py URL``."""

import sys

import anthropic
from anthropic import beta_tool

client = anthropic.Anthropic(base_url=sys.argv[1], api_key="none", max_retries=0)


@beta_tool
def weather(city: str) -> str:
    """Tell the weather of a city."""
    assert city == "Paris"
    return "rain"


for stream in (False, True):
    runner = client.beta.messages.tool_runner(
        model="m", max_tokens=99, messages=[{"role": "user", "content": "call it"}], tools=[weather], stream=stream
    )
    assert runner.until_done().content[-1].text == "It says rain"

thread = client.beta.messages.thread(model="m", max_tokens=99)
try:
    thread.send({"role": "user", "content": "hi"})
except anthropic.BadRequestError as error:
    assert error.details.error_code == "thread_unsupported_request", error.body  # type: ignore[attr-defined]
else:
    raise AssertionError("an unknown thread was accepted")
print("ok")
