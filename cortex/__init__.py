"""cortex: a gateway in front of a fleet of hosts that run open-weight models.

The name of the distribution is ``helexa-cortex``; it also installs :mod:`neuron`, the daemon on each host.
"""

from cortex.wire import VERSION as __version__

__all__ = ["__version__"]
