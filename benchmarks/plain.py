"""The SQL for plain psycopg, written by hand with the same conflict handling as the library's."""

from __future__ import annotations

STORE_MESSAGE = """
    INSERT INTO mesh_messages (id, from_node, to_node, content) VALUES (%s, %s, %s, %s)
    ON CONFLICT DO NOTHING RETURNING timestamp, created_at
"""
STORE_MESSAGES = """
    INSERT INTO mesh_messages (id, from_node, to_node, content)
    SELECT * FROM unnest(%b::text[], %b::text[], %b::text[], %b::bytea[]) ON CONFLICT DO NOTHING
"""
GET_MESSAGE = "SELECT id, from_node, to_node, content, timestamp, created_at FROM mesh_messages WHERE id = %s"
STREAM_MESSAGES = """
    SELECT id, from_node, to_node, content, timestamp, created_at FROM mesh_messages ORDER BY timestamp, id
"""
PUT_STATE = """
    INSERT INTO mesh_state (key, value) VALUES (%s, %s)
    ON CONFLICT (key) DO UPDATE SET value = excluded.value, updated_at = now() RETURNING created_at, updated_at
"""
GET_STATE = "SELECT key, value, created_at, updated_at FROM mesh_state WHERE key = %s"
GET_STATE_AND_VERSION = "SELECT value, version FROM mesh_state WHERE key = %s"
PUT_STATE_IF_VERSION = """
    UPDATE mesh_state SET value = %s, updated_at = now() WHERE key = %s AND version = %s RETURNING version
"""
PUT_NODE_STATE = """
    INSERT INTO mesh_node_state (node_id, state) VALUES (%s, %s)
    ON CONFLICT (node_id) DO UPDATE SET state = excluded.state, updated_at = now() RETURNING created_at, updated_at
"""
PUT_NODE_STATES = """
    INSERT INTO mesh_node_state (node_id, state) SELECT * FROM unnest(%b::text[], %b::text[]::jsonb[])
    ON CONFLICT (node_id) DO UPDATE SET state = excluded.state, updated_at = now()
    RETURNING node_id, created_at, updated_at
"""
APPEND_ENTRY = """
    INSERT INTO mesh_consensus_log (term, index, entry)
    SELECT %s::bigint, %s::bigint, %s::jsonb
    FROM (SELECT term, index FROM mesh_consensus_log ORDER BY index DESC LIMIT 1) AS last
    WHERE last.index = %s::bigint AND last.term <= %s::bigint
    ON CONFLICT DO NOTHING RETURNING created_at
"""
APPEND_ENTRIES = """
    INSERT INTO mesh_consensus_log (term, index, entry)
    SELECT * FROM unnest(%b::bigint[], %b::bigint[], %b::text[]::jsonb[])
    WHERE EXISTS (
        SELECT FROM (SELECT term, index FROM mesh_consensus_log ORDER BY index DESC LIMIT 1) AS last
        WHERE last.index = %s::bigint AND last.term <= %s::bigint
    )
    ON CONFLICT DO NOTHING
"""
LOG_RANGE = """
    SELECT term, index, entry, created_at FROM mesh_consensus_log WHERE index BETWEEN %s AND %s ORDER BY index
"""
GET_ROUTE = "SELECT destination, route, created_at, updated_at FROM mesh_routing_table WHERE destination = %s"
COPY_NODES = "COPY nodes (node_id, node_name, ip_address, port) FROM STDIN"
COPY_ROUTES = "COPY routes (route_id, source_node_id, target_node_id, route_cost) FROM STDIN"
