"""The repositories of the infrastructure layer: what administrators configure."""
