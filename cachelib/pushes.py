"""What a server says without being asked, on a connection of its own: the parser, and how its messages look."""

from typing import Any

from redis.connection import DefaultParser


class PushParser(DefaultParser):  # type: ignore[misc, valid-type]  # which of its parsers it is, redis-py decides
    """redis-py's parser, that returns what the server pushes instead of keeping it for a handler."""

    def handle_push_response(self, response: Any, **_: Any) -> Any:
        return response


def listening_connection(client: Any, name: str, answer_s: float) -> Any:
    """A connection to the server of a client, not yet connected, for one that listens.

    Arguments:
        client: a ``ThreadClient``.
        name: what CLIENT LIST shows.
        answer_s: how long connecting, and a reply, may take.
    """
    pool = client.connection_pool
    return pool.connection_class(
        **{
            **pool.connection_kwargs,
            "parser_class": PushParser,
            "client_name": name,
            "socket_timeout": answer_s,
            "health_check_interval": 0,  # its PING would take the replies to ours
            "maint_notifications_config": None,
        }
    )


def is_pong(message: object) -> bool:
    """Whether this answers a PING: a subscriber of RESP2 gets a list."""
    return message == b"PONG" or (isinstance(message, list) and message[:1] == [b"pong"])
