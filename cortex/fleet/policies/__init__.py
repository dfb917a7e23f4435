"""Routing policies: how a request's node is chosen among the ready replicas of its model."""
