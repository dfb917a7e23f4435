"""Values that cortex and neuron exchange: requests, events, errors and the state of a node.

Everything here is an immutable value. This package imports nothing of ours and neither a server nor torch.
"""

VERSION = "0.1.0"
