"""Compiled byte work of the request path: framing, peeking and projecting events."""
