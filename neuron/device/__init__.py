"""Devices and their workers: what is here, the channel to a worker, the native loop."""
