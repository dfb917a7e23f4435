"""OpenAI's older text completions."""
