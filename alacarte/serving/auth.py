"""Access: one token for predicting, one or more for feedback, and one for administration."""

import hmac
from typing import NamedTuple

from starlette.datastructures import Headers

from alacarte.serving.rows import RequestError
from alacarte.serving.settings import Settings, named_tokens

LOCAL = ("127.0.0.1", "localhost", "[::1]")


class Caller(NamedTuple):
    """The sender of a request. `annotator` is stored with each label; labels with the same `rate_key` count together."""

    annotator: str
    rate_key: str


class Access:
    """Checks the tokens of requests. A right without a token is open, which settings allow on loopback only."""

    def __init__(self, settings: Settings) -> None:
        pairs = [("feedback", name, token) for name, token in named_tokens(settings.feedback_token)]
        pairs += [("predict", None, settings.predict_token or ""), ("admin", None, settings.admin_token or "")]
        self._tokens = [
            (right, token.encode(), Caller(f"token:{name or ''}", f"token {i}"))
            for i, (right, name, token) in enumerate(pairs)
            if token
        ]
        self._rights = {right for right, _, _ in self._tokens}
        self._hosts = {*LOCAL, settings.host}

    def check(self, headers: Headers, client: tuple[str, int] | None, *rights: str) -> Caller:
        """The sender of a request with a token for one of `rights`. The token of the administrator gives every right.

        Raises RequestError 401, or 403 for a Host that is not this machine: a web page anywhere could otherwise reach an
        open server on loopback through a name of its own that resolves to it.
        """
        if not self._rights.intersection(rights):
            host = headers.get("host", "").lower()
            name = host if host.endswith("]") else host.rpartition(":")[0] or host
            if name and name not in self._hosts:
                raise RequestError(403, "this server answers to 127.0.0.1 and localhost; set tokens to use other names")
            address = client[0] if client else ""
            return Caller(f"address:{address}", address)
        scheme, _, token = headers.get("authorization", "").partition(" ")
        sent = token.strip().encode() if scheme.lower() == "bearer" else b""
        # Every token is compared to its end, so that the time of an answer tells nothing about a token.
        matches = [
            caller
            for right, expected, caller in self._tokens
            if hmac.compare_digest(sent, expected) and (right in rights or right == "admin")
        ]
        if not matches:
            raise RequestError(401, f"send the header Authorization: Bearer <token for {' or '.join(rights)}>")
        return matches[0]
