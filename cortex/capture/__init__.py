"""Capture of one key's requests, whole: off until an administrator begins it, for a bounded time and size."""
