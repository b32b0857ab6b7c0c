"""How a unit of work of the asyncio side reaches the server."""
