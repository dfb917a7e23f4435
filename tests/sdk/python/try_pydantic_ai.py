"""pydantic-ai's agents over chat, Responses and Messages, run and streamed, with a tool."""

import asyncio
import sys

from pydantic_ai import Agent
from pydantic_ai.models.anthropic import AnthropicModel
from pydantic_ai.models.openai import OpenAIChatModel, OpenAIResponsesModel
from pydantic_ai.providers.anthropic import AnthropicProvider
from pydantic_ai.providers.openai import OpenAIProvider

url = sys.argv[1]
openai = OpenAIProvider(base_url=f"{url}/v1", api_key="none")
anthropic = AnthropicProvider(base_url=url, api_key="none")


async def main() -> None:
    """Run every model."""
    for model in (
        OpenAIChatModel("m", provider=openai),
        OpenAIResponsesModel("m", provider=openai),
        AnthropicModel("m", provider=anthropic),
    ):
        agent = Agent(model)

        @agent.tool_plain
        def weather(city: str) -> str:
            """Say the weather."""
            return f"rain in {city}"

        assert (await agent.run("call it")).output == "It says rain in Paris", model
        async with agent.run_stream("hi") as streamed:
            assert await streamed.get_output() == "Hello", model


asyncio.run(main())
print("ok")
