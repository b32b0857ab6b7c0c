"""How a unit of work reaches the server: engine, pool, connection, statements, and what travels over them."""
