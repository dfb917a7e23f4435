"""LangChain's models of OpenAI (chat and Responses) and Anthropic: text, streams, and a tool bound to each."""

import sys

from langchain_anthropic import ChatAnthropic
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI

url = sys.argv[1]


@tool
def weather(city: str) -> str:
    """Say the weather."""
    return f"rain in {city}"


models = [
    ChatOpenAI(model="m", base_url=f"{url}/v1", api_key="none"),
    ChatOpenAI(model="m", base_url=f"{url}/v1", api_key="none", use_responses_api=True),
    ChatAnthropic(model="m", base_url=url, api_key="none"),
]
for model in models:
    assert model.invoke("hi").text == "Hello", model
    assert "".join(chunk.text for chunk in model.stream("hi")) == "Hello", model
    able = model.bind_tools([weather])
    called = able.invoke("call it")
    assert called.tool_calls[0]["args"] == {"city": "Paris"}, called
    result = weather.invoke(called.tool_calls[0])
    answer = able.invoke([("user", "call it"), called, result])
    assert answer.text == "It says rain in Paris", answer
print("ok")
