"""The way of an inference request: read, routed, sent to a node, answered or streamed, recorded."""
