"""The repositories of the runtime layer: what the mesh is doing now."""
