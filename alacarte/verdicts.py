"""Signatures of the gate, so that a server with serve.require_verdict=true refuses an alias that somebody moved by hand.

A signature is an HMAC with the key in SERVE_VERDICT_KEY over the name, the number and the source of a version, and its verdict.
The source is part of it because a model that is deleted and made again has the same numbers. The process that runs the gate
needs the key, and so does the server. A user of the registry without the key cannot make a signature.
"""

import hmac
import json
import os

from mlflow.entities.model_registry import ModelVersion

KEY = "SERVE_VERDICT_KEY"  # environment variable
TAG = "gate.signature"


def sign(version: ModelVersion, verdict: str) -> str:
    """The signature of a verdict on a version, or "none" where the environment has no key."""
    key = os.environ.get(KEY)
    signed = json.dumps([version.name, str(version.version), version.source, verdict]).encode()
    return hmac.digest(key.encode(), signed, "sha256").hex() if key else "none"


def is_signed(version: ModelVersion) -> bool:
    """Whether the gate signed PROMOTE for exactly this version with the key of this environment."""
    expected = sign(version, "PROMOTE")
    return expected != "none" and hmac.compare_digest(version.tags.get(TAG, "").encode(), expected.encode())
