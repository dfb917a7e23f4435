"""The fleet: what is known of the nodes, and where a request goes."""
