"""Signatures of the gate, so that a server with serve.require_verdict=true refuses a version that the gate did not promote.

A signature is an HMAC with the key in SERVE_VERDICT_KEY over the name, the number and the source of a version, the verdict, and
the files that were judged. The process that runs the gate needs the key, and so does the server. A user of the registry or of
the artifact store without the key cannot make a signature.
"""

import hashlib
import hmac
import json
import os
from pathlib import Path

KEY = "SERVE_VERDICT_KEY"  # environment variable
TAG = "gate.signature"
NOT_SIGNED = "none"
# Names of files and folders that the same model has in one place and lacks in another.
VARYING = {"__pycache__", "registered_model_meta"}


def sign(name: str, number: str, source: str, verdict: str, folder: Path) -> str:
    """The signature of a verdict on a version with the files in `folder`, or NOT_SIGNED where the environment has no key."""
    key = os.environ.get(KEY)
    if not key:
        return NOT_SIGNED
    signed = json.dumps([name, number, source, verdict, digest(folder)]).encode()
    return hmac.digest(key.encode(), signed, "sha256").hex()


def is_signed(name: str, number: str, source: str, folder: Path, signature: str) -> bool:
    """Whether the gate signed PROMOTE for exactly this version and these files with the key of this environment."""
    expected = sign(name, number, source, "PROMOTE", folder)
    return expected != NOT_SIGNED and hmac.compare_digest(signature.encode(), expected.encode())


def digest(folder: Path) -> str:
    """The SHA-256 of the names and contents of the files in a model folder."""
    total = hashlib.sha256()
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        name = path.relative_to(folder)
        if VARYING.isdisjoint(name.parts):
            with path.open("rb") as file:
                content = hashlib.file_digest(file, "sha256").hexdigest()
            total.update(f"{name.as_posix()}\0{content}\n".encode())
    return total.hexdigest()
