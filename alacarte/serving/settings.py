"""The settings of `serve`: conf/serve, conf/feedback, and environment variables for secrets."""

import os
import secrets
from collections.abc import Mapping
from ipaddress import ip_address
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from alacarte.errors import UserError

SECRETS = {
    "predict_token": "SERVE_PREDICT_TOKEN",
    "feedback_token": "SERVE_FEEDBACK_TOKEN",
    "admin_token": "SERVE_ADMIN_TOKEN",
    "webhook_secret": "SERVE_WEBHOOK_SECRET",
    "verdict_key": "SERVE_VERDICT_KEY",
}

PositiveFloat = Annotated[float, Field(gt=0, allow_inf_nan=False)]
PositiveInt = Annotated[int, Field(gt=0)]
Text = Annotated[str, Field(min_length=1)]
Share = Annotated[float, Field(ge=0, le=1)]
Secret = Annotated[str | None, Field(repr=False)]


class FeedbackSettings(BaseModel):
    """conf/feedback/default.yaml explains each key."""

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid")
    url: str | None
    review: Literal["auto", "manual"]
    audit_share: Share
    sample: Share
    redact: Annotated[list[str], AfterValidator(tuple)]
    keep_days: PositiveFloat
    keep_gb: PositiveFloat


class Settings(BaseModel):
    """conf/serve/default.yaml explains each key; the secrets come from the environment."""

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid")
    registered_model_name: str
    host: Text
    port: Annotated[int, Field(ge=0, lt=65536)]
    poll_seconds: PositiveFloat
    webhook: bool
    webhook_url: str | None
    cache: Text
    trust_code: bool
    require_verdict: bool
    timeout: PositiveFloat
    max_body: PositiveInt
    max_rows: PositiveInt
    max_connections: PositiveInt
    idle_seconds: PositiveFloat
    feedback_per_minute: PositiveInt
    feedback: FeedbackSettings
    predict_token: Secret = None
    feedback_token: Secret = None
    admin_token: Secret = None
    webhook_secret: Secret = None
    verdict_key: Secret = None

    @property
    def on_loopback(self) -> bool:
        try:
            return ip_address(self.host).is_loopback
        except ValueError:
            return self.host == "localhost"

    @classmethod
    def make(cls, *, feedback: Mapping[str, Any], **serve: Any) -> "Settings":
        """From plain configuration and the environment. Raises UserError for a value that is not allowed."""
        from_environment: dict[str, Any] = {key: os.environ.get(variable) or None for key, variable in SECRETS.items()}
        if serve.get("webhook") and not from_environment["webhook_secret"]:
            from_environment["webhook_secret"] = secrets.token_urlsafe(32)
        try:
            settings = cls(**serve, feedback=feedback, **from_environment)  # type: ignore[arg-type]
        except ValidationError as error:
            raise UserError(_one_line(error)) from None
        settings._check_address()
        settings._check_secrets()
        return settings

    def _check_address(self) -> None:
        missing = [variable for key, variable in SECRETS.items() if key.endswith("_token") and not getattr(self, key)]
        if not self.on_loopback and missing:
            raise UserError(
                f"serve.host={self.host} is open to others: set {', '.join(missing)}, or serve.host=127.0.0.1"
            )
        if self.webhook and not self.webhook_url and self.host in ("0.0.0.0", "::"):
            raise UserError(
                f"serve.webhook_url=null: with serve.host={self.host} it must be the address at which the registry reaches "
                "this server, such as serve.webhook_url=http://this-machine:8080/events"
            )

    def _check_secrets(self) -> None:
        if self.require_verdict and not self.verdict_key:
            raise UserError(
                "serve.require_verdict=true: set SERVE_VERDICT_KEY to the key with which evaluate and retrain sign, such as the "
                "output of openssl rand -hex 32"
            )
        tokens = [token for _, token in named_tokens(self.feedback_token)]
        values = [(SECRETS["feedback_token"], token) for token in tokens]
        values += [(name, getattr(self, key)) for key, name in SECRETS.items() if key != "feedback_token"]
        variables: dict[str, str] = {}  # secret -> the variable that contains it
        for variable, secret in values:
            if secret and variables.setdefault(secret, variable) != variable:
                raise UserError(
                    f"{variables[secret]} and {variable} are equal: give each right a value of its own, such as the output of "
                    "openssl rand -hex 32"
                )


def _one_line(error: ValidationError) -> str:
    """The first error as `serve.port=70000: must be less than 65536; ...`."""
    first = error.errors(include_url=False)[0]
    path = [str(part) for part in first["loc"] if isinstance(part, str)]
    group = "feedback" if path[0] == "feedback" else "serve"
    advice = f"conf/{group}/default.yaml explains each key"
    if first["type"] == "extra_forbidden":
        return f"{group}.{path[-1]}: there is no such key; {advice}"
    if first["type"] == "missing":
        return f"{group}.{path[-1]}: the key is missing; {advice}"
    return f"{group}.{path[-1]}={first['input']}: {first['msg'].replace('Input should', 'must')}; {advice}"


def named_tokens(text: str | None) -> list[tuple[str | None, str]]:
    """SERVE_FEEDBACK_TOKEN as (name, token) pairs: `alice:TOKEN,bob:TOKEN`; a token alone has no name.

    UserError, which repeats no token, for a name or a token that is empty, or one token under two names.
    """
    pairs: list[tuple[str | None, str]] = []
    for entry in text.split(",") if text else ():
        name, colon, token = entry.strip().rpartition(":")
        if not token or (colon and not name):
            raise UserError(
                "SERVE_FEEDBACK_TOKEN: a name or a token in it is empty: write TOKEN, or NAME:TOKEN,NAME:TOKEN"
            )
        pairs.append((name or None, token))
    if len({token for _, token in pairs}) < len(pairs):
        raise UserError("SERVE_FEEDBACK_TOKEN: one token stands in it twice: give each name its own")
    return pairs
