"""Layers of decoders: each declares its tensors, its cache and its work once."""
