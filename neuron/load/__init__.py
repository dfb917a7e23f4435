"""From a model's name to a loaded model: sources, preflight, the table of models."""
