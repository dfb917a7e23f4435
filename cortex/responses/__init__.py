"""Stored responses and conversations, which clients refer to instead of sending their items again."""
