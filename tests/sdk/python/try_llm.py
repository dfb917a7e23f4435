"""The ``llm`` library: its OpenAI models with another address, streamed and not, and a tool."""

import sys

import llm
from llm.default_plugins.openai_models import Chat

model = Chat("m", api_base=f"{sys.argv[1]}/v1", key="none", supports_tools=True)
assert model.prompt("hi", stream=False).text() == "Hello"
assert "".join(model.prompt("hi", stream=True)) == "Hello"


def weather(city: str) -> str:
    """Say the weather."""
    return f"rain in {city}"


for stream in (False, True):
    chain = model.chain("call it", tools=[weather], stream=stream)
    assert "It says rain in Paris" in chain.text(), chain
assert llm
print("ok")
