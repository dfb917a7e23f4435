"""neuron: the daemon on a host that loads models and runs inference on its own devices."""

from cortex.wire import VERSION as __version__

__all__ = ["__version__"]
