"""Access control: keys, and the limits of each principal."""
