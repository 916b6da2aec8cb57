"""A key for all endpoints of a vLLM server; vLLM's own does not protect those that load weights."""

import hmac
import os
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

KEY_VARIABLE = "VLLM_API_KEY"
"""Environment variable with the key; vLLM reads it too."""

_Scope = MutableMapping[str, Any]
_Receive = Callable[[], Awaitable[_Scope]]
_Send = Callable[[_Scope], Awaitable[None]]


class RequireKey:
    """ASGI middleware that answers 401 to requests without the key in `VLLM_API_KEY`.

    vLLM imports it by name (`--middleware scsdpo.rollout.RequireKey`). Clients send the key as a
    bearer token, as for vLLM's own check. Only `/health` needs no key.

    Raises:
        ValueError: if there is no key; the server then does not start.
    """

    def __init__(self, app: Callable[[_Scope, _Receive, _Send], Awaitable[None]]) -> None:
        key = os.environ.get(KEY_VARIABLE, "").strip()
        if not key:
            raise ValueError(
                f"`RequireKey` needs a key: set the environment variable {KEY_VARIABLE}"
            )
        self.app = app
        self._expected = f"Bearer {key}".encode()

    async def __call__(self, scope: _Scope, receive: _Receive, send: _Send) -> None:
        if scope["type"] == "lifespan" or scope["path"] == "/health" or self._has_key(scope):
            await self.app(scope, receive, send)
        elif scope["type"] == "http":
            await send({"type": "http.response.start", "status": 401, "headers": []})
            await send({"type": "http.response.body", "body": b'{"error": "Unauthorized"}'})
        else:
            await send({"type": "websocket.close", "code": 1008})

    def _has_key(self, scope: _Scope) -> bool:
        sent = dict(scope["headers"]).get(b"authorization", b"")
        return hmac.compare_digest(sent, self._expected)
