"""Access: one token for predicting, one for feedback and one for administration, and a limit on labels per minute."""

import hmac
import time
from collections.abc import Callable
from typing import NamedTuple

from starlette.datastructures import Headers

from alacarte.serving.rows import RequestError
from alacarte.serving.settings import Settings, named_tokens

LOCAL = ("127.0.0.1", "localhost", "[::1]")


class Caller(NamedTuple):
    """Whoever holds a token: `key` tells apart, `name` is what the operator called this one, if anything."""

    kind: str
    key: str
    name: str | None = None


ANYBODY = Caller("anybody", "anybody")


class Access:
    """Checks requests against the tokens of `settings`. A kind without a token is open, which settings allow on loopback only."""

    def __init__(self, settings: Settings) -> None:
        self._tokens = [
            (Caller("feedback", f"feedback {i}", name), token.encode())
            for i, (name, token) in enumerate(named_tokens(settings.feedback_token))
        ]
        for kind, token in (("predict", settings.predict_token), ("admin", settings.admin_token)):
            if token:
                self._tokens.append((Caller(kind, kind), token.encode()))
        self._kinds = {caller.kind for caller, _ in self._tokens}
        self._hosts = {*LOCAL, settings.host}

    def check(self, headers: Headers, *kinds: str) -> Caller:
        """Let a request pass that has the token of one of `kinds` (the administrator's opens all); return whose it is.

        Raises RequestError 401, or 403 for a Host that is not this machine: a web page anywhere could otherwise reach an
        open server on loopback through a name of its own that resolves to it.
        """
        if not self._kinds.intersection(kinds):
            host = headers.get("host", "").lower()
            name = host if host.endswith("]") else host.rpartition(":")[0] or host
            if name and name not in self._hosts:
                raise RequestError(403, "this server answers to 127.0.0.1 and localhost; set tokens to use other names")
            return ANYBODY
        scheme, _, token = headers.get("authorization", "").partition(" ")
        given = token.strip().encode() if scheme.lower() == "bearer" else b""
        allowed = {*kinds, "admin"}
        # Each is compared, to its end, whether or not one before it fitted: the time tells nothing.
        matches = [
            caller for caller, right in self._tokens if caller.kind in allowed and hmac.compare_digest(given, right)
        ]
        if not matches:
            raise RequestError(401, f"send the header Authorization: Bearer <token for {' or '.join(kinds)}>")
        return matches[0]


def rate_key(caller: Caller, client: tuple[str, int] | None) -> str:
    """The party whose labels count together: a token, or a client's address where there are no tokens."""
    return caller.key if caller != ANYBODY else str(client and client[0])


class Rate:
    """At most `per_minute` per key, as a bucket that fills evenly."""

    def __init__(self, per_minute: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._per_minute, self._clock = per_minute, clock
        self._buckets: dict[str, tuple[float, float]] = {}  # key -> (left, when)

    def check(self, key: str) -> None:
        """Raises RequestError 429 where nothing is left, so that no work is done for a request that will be refused."""
        self._left(key, 1, self._clock())

    def take(self, key: str, count: int) -> None:
        """Raises RequestError 429, and takes nothing, where `count` is more than is left."""
        now = self._clock()
        left = self._left(key, count, now)
        if len(self._buckets) > 10_000:  # full buckets need no remembering
            self._buckets = {k: v for k, v in self._buckets.items() if now - v[1] < 60}
        self._buckets[key] = (left - count, now)

    def _left(self, key: str, count: int, now: float) -> float:
        left, when = self._buckets.get(key, (float(self._per_minute), now))
        left = min(self._per_minute, left + (now - when) * self._per_minute / 60)
        if count > left:
            wait = (
                "less at a time" if count > self._per_minute else f"wait {(count - left) * 60 / self._per_minute:.0f} s"
            )
            raise RequestError(429, f"at most {self._per_minute} labels a minute are taken: {wait}, none was stored")
        return left
