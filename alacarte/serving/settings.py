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
}


Above0 = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Whole = Annotated[int, Field(gt=0)]
Text = Annotated[str, Field(min_length=1)]
Share = Annotated[float, Field(ge=0, le=1)]

# Allowed values in words, for errors of pydantic by their type; `{...}` is what the error says beside.
ALLOWED = {
    "int_type": "allowed are whole numbers",
    "float_type": "allowed are numbers",
    "finite_number": "allowed are numbers above 0",
    "greater_than": "allowed are numbers above {gt}",
    "string_type": "a text is needed, such as the default in conf",
    "string_too_short": "a text is needed, such as the default in conf",
    "bool_type": "allowed are true and false",
    "literal_error": "allowed are {expected}",
    "list_type": "a list is needed, such as [name,birthday]",
    "extra_forbidden": "there is no such key; conf/{group}/default.yaml names all",
}


class FeedbackSettings(BaseModel):
    """conf/feedback/default.yaml explains each key."""

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid")
    url: str | None
    review: Literal["auto", "manual"]
    audit_share: Share
    sample: Share
    redact: Annotated[list[str], AfterValidator(tuple)]
    keep_days: Above0
    keep_gb: Above0


class Settings(BaseModel):
    """conf/serve/default.yaml explains each key; the four secrets come from the environment."""

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid")
    registered_model_name: str
    host: Text
    port: Annotated[int, Field(ge=0, lt=65536)]
    poll_seconds: Above0
    webhook: bool
    webhook_url: str | None
    cache: Text
    trust_code: bool
    timeout: Above0
    max_body: Whole
    max_rows: Whole
    max_connections: Whole
    idle_seconds: Above0
    feedback_per_minute: Whole
    feedback: FeedbackSettings
    predict_token: str | None = Field(None, repr=False)
    feedback_token: str | None = Field(None, repr=False)
    admin_token: str | None = Field(None, repr=False)
    webhook_secret: str | None = Field(None, repr=False)

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
        settings._check_together()
        return settings

    def _check_together(self) -> None:
        missing = [variable for key, variable in SECRETS.items() if key.endswith("_token") and not getattr(self, key)]
        if not self.on_loopback and missing:
            raise UserError(
                f"serve.host={self.host} is open to others: set {', '.join(missing)}, or serve.host=127.0.0.1"
            )
        variables: dict[str, str] = {}  # secret -> the variable that it is in
        for variable, secret in [
            *((SECRETS["feedback_token"], token) for _, token in named_tokens(self.feedback_token)),
            *((variable, getattr(self, key)) for key, variable in SECRETS.items() if key != "feedback_token"),
        ]:
            if secret and variables.setdefault(secret, variable) != variable:
                raise UserError(
                    f"{variables[secret]} and {variable} are equal: give each right a value of its own, such as the output of "
                    "openssl rand -hex 32"
                )
        if self.webhook and not self.webhook_url and self.host in ("0.0.0.0", "::"):
            raise UserError(
                f"serve.webhook_url=null: name where the registry reaches this server, as serve.host={self.host} is no address"
            )


def _one_line(error: ValidationError) -> str:
    """The first error as `serve.port=70000: allowed are ...`."""
    first = error.errors(include_url=False)[0]
    path = [str(part) for part in first["loc"] if isinstance(part, str)]
    group = "feedback" if path[0] == "feedback" else "serve"
    key = f"{group}.{path[-1]}"
    allowed = ALLOWED.get(first["type"], first["msg"]).format(**first.get("ctx", {}), group=group)
    if key == "serve.port":
        allowed = "allowed are 0 (any free one) to 65535"
    elif path[-1] in ("audit_share", "sample"):
        allowed = "allowed is a share from 0 to 1"
    if first["type"] == "missing":
        return f"{key} is missing: conf/{group}/default.yaml has it"
    return f"{key}={first['input']}: {allowed}"


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
