"""A load on servers that are disturbed in every way, and what is left of it."""
