"""The bundled PostgreSQL behind `embedded:` and `memory:`."""
