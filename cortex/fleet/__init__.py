"""The fleet: the state of the nodes, routing, loads and dispatch."""
