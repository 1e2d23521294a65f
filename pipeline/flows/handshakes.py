"""WebSocket handshakes that are none get a plain HTTP error, as other malformed requests do.

uvicorn's protocol answers nothing where the request does not parse (a body, another method, a header of ten thousand
bytes) and leaves the connection open; where a header of the handshake is not ASCII it fails with a traceback.
"""

from __future__ import annotations

from uvicorn.protocols.websockets.websockets_sansio_impl import WebSocketsSansIOProtocol
from websockets.http11 import Request

_ANSWER = b"Invalid WebSocket handshake received."
_REFUSAL = (
    b"HTTP/1.1 400 Bad Request\r\nContent-Type: text/plain; charset=utf-8\r\n"
    b"Content-Length: %d\r\nConnection: close\r\n\r\n%s" % (len(_ANSWER), _ANSWER)
)


class CheckedHandshake(WebSocketsSansIOProtocol):
    """A WebSocket of the server, whose handshake was one."""

    def data_received(self, data: bytes) -> None:
        """Take bytes of the client: first the whole handshake."""
        super().data_received(data)
        if not self.close_sent and self.conn.handshake_exc is not None:
            self._refuse()

    def handle_connect(self, event: Request) -> None:
        """Answer a handshake that parsed."""
        about_it = [
            value
            for name, value in event.headers.raw_items()
            if name.lower() in ("connection", "upgrade") or name.lower().startswith("sec-websocket-")
        ]
        if all(value.isascii() for value in about_it):
            super().handle_connect(event)
        else:
            self._refuse()

    def _refuse(self) -> None:
        self.handshake_complete = self.close_sent = True
        self.transport.write(_REFUSAL)
        self.transport.close()
