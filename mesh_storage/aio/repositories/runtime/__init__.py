"""The repositories of the runtime layer: the current state of the mesh."""
