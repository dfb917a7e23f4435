"""OpenAI Chat Completions, the dialect that others are translated to."""
