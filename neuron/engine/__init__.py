"""The engine inside a device worker: scheduling, execution and sampling of every step."""
