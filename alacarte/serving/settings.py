"""What `serve` is told: conf/serve, conf/feedback and, for secrets, the environment."""

import math
import os
import secrets
from collections.abc import Mapping
from dataclasses import dataclass, field
from ipaddress import ip_address
from typing import Any

from alacarte.errors import UserError

SECRETS = {
    "predict_token": "SERVE_PREDICT_TOKEN",
    "feedback_token": "SERVE_FEEDBACK_TOKEN",
    "admin_token": "SERVE_ADMIN_TOKEN",
    "webhook_secret": "SERVE_WEBHOOK_SECRET",
}


@dataclass(frozen=True)
class FeedbackSettings:
    """conf/feedback/default.yaml explains each."""

    url: str | None
    review: str
    audit_share: float
    sample: float
    redact: tuple[str, ...]
    keep_days: float
    keep_gb: float

    def __post_init__(self) -> None:
        if self.review not in ("auto", "manual"):
            raise UserError(f"feedback.review={self.review}: allowed are auto and manual")
        for name in ("audit_share", "sample"):
            if not 0 <= getattr(self, name) <= 1:
                raise UserError(f"feedback.{name}={getattr(self, name)}: allowed is a share from 0 to 1")
        for name in ("keep_days", "keep_gb"):
            if not getattr(self, name) > 0:
                raise UserError(f"feedback.{name}={getattr(self, name)}: allowed are numbers above 0")


@dataclass(frozen=True)
class Settings:
    """conf/serve/default.yaml explains each; the four secrets come from the environment."""

    registered_model_name: str
    host: str
    port: int
    poll_seconds: float
    webhook: bool
    webhook_url: str | None
    cache: str
    trust_code: bool
    timeout: float
    max_body: int
    max_rows: int
    max_connections: int
    idle_seconds: float
    feedback_per_minute: int
    feedback: FeedbackSettings
    predict_token: str | None = field(default=None, repr=False)
    feedback_token: str | None = field(default=None, repr=False)
    admin_token: str | None = field(default=None, repr=False)
    webhook_secret: str | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        for name in ("host", "cache"):
            if not isinstance(getattr(self, name), str) or not getattr(self, name):
                raise UserError(f"serve.{name}={getattr(self, name)}: a text is due, such as the default of conf/serve")
        for name in ("port", "max_body", "max_rows", "max_connections", "feedback_per_minute"):
            if type(getattr(self, name)) is not int:
                raise UserError(f"serve.{name}={getattr(self, name)}: allowed are whole numbers")
        for name in ("poll_seconds", "timeout", "max_body", "max_rows", "max_connections", "idle_seconds",
                     "feedback_per_minute"):  # fmt: skip
            if not 0 < getattr(self, name) < math.inf:
                raise UserError(f"serve.{name}={getattr(self, name)}: allowed are numbers above 0")
        if not 0 <= self.port < 65536:
            raise UserError(f"serve.port={self.port}: allowed are 0 (any free one) to 65535")
        missing = [variable for key, variable in SECRETS.items() if key.endswith("_token") and not getattr(self, key)]
        if not self.on_loopback and missing:
            raise UserError(
                f"serve.host={self.host} is open to others: set {', '.join(missing)}, or serve.host=127.0.0.1"
            )

        givers = {token for _, token in named_tokens(self.feedback_token)}
        if self.admin_token in givers:
            raise UserError(
                "SERVE_ADMIN_TOKEN stands in SERVE_FEEDBACK_TOKEN too: who gives feedback would also review it"
            )
        if self.webhook and not self.webhook_url and self.host in ("0.0.0.0", "::"):
            raise UserError(
                f"serve.webhook_url=null: name where the registry reaches this server, as serve.host={self.host} is no address"
            )

    @property
    def on_loopback(self) -> bool:
        try:
            return ip_address(self.host).is_loopback
        except ValueError:
            return self.host == "localhost"

    @classmethod
    def make(cls, *, feedback: Mapping[str, Any], **serve: Any) -> "Settings":
        """From plain configuration and the environment. Raises UserError for a value that is not allowed."""
        from_environment: dict[str, Any] = {key: os.environ.get(variable) for key, variable in SECRETS.items()}
        if serve["webhook"] and not from_environment["webhook_secret"]:
            from_environment["webhook_secret"] = secrets.token_urlsafe(32)
        if isinstance(feedback["redact"], str):
            raise UserError(
                f"feedback.redact={feedback['redact']}: a list is due, such as feedback.redact=[name,birthday]"
            )
        stored = FeedbackSettings(**{**feedback, "redact": tuple(feedback["redact"])})
        return cls(**serve, feedback=stored, **from_environment)


def named_tokens(text: str | None) -> list[tuple[str | None, str]]:
    """SERVE_FEEDBACK_TOKEN as (name, token) pairs: `alice:TOKEN,bob:TOKEN`; a token alone has no name.

    UserError, which repeats no token, for a name or a token that is empty, or one token under two names.
    """
    pairs: list[tuple[str | None, str]] = []
    for one in (text or "").split(",") if text else ():
        name, colon, token = one.strip().rpartition(":")
        if not token or (colon and not name):
            raise UserError(
                "SERVE_FEEDBACK_TOKEN: a name or a token in it is empty: write TOKEN, or NAME:TOKEN,NAME:TOKEN"
            )
        pairs.append((name or None, token))
    if len({token for _, token in pairs}) < len(pairs):
        raise UserError("SERVE_FEEDBACK_TOKEN: one token stands in it twice: give each name its own")
    return pairs
