"""Dialect for tests, made as CONTRIBUTING says: a text in, a text out."""
