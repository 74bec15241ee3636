"""A certificate of an audit: a signed record of digests, dates, policy and verdict, with no name in it.

Signed with Ed25519 (RFC 8032) over the JSON of everything but the signature, keys sorted, no spaces, UTF-8. Who holds
the certificate checks it against the public key that the auditor has made known elsewhere:

    python -m kif_cli.certificate CERTIFICATE [RESULTS.json]
"""

import hashlib
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kif_runtime.errors import KifError
from kif_runtime.files import atomic_write, reason, shown

KIND = "kif-audit-certificate-1"
MISSING = "certificates need the package cryptography; install it with: pip install 'kif-runtime[certificate]'"


def certificate(
    results: Mapping[str, Any], results_bytes: bytes, models: Mapping[str, str], key: Path
) -> dict[str, Any]:
    """The signed record. models: digest of each state. key: a PEM file with an Ed25519 private key; made if missing.

    Raises KifError where the package is missing or the key cannot be read or made.
    """
    private = _private_key(key)
    policy = results["policy"]
    record: dict[str, Any] = {
        "kind": KIND,
        "kif": results["kif"],
        "date": results["date"],
        "models": dict(models),
        "erasure": [capsule["digest"] for capsule in results["capsules"]],
        "results": hashlib.sha256(results_bytes).hexdigest(),
        "suites": results["suites"],
        "profile": results["profile"],
        "seed": results["seed"],
        "facts_known": results["kept"]["facts"],
        "verdict": {part: results["verdict"][part] for part in ("verdict", "how", "confidence")},
        "figures": {name: figure["after"] for name, figure in results["figures"].items()},
        "policy": policy and {"digest": policy["digest"], "passed": policy["passed"]},
        "public_key": private.public_key().public_bytes_raw().hex(),
    }
    return record | {"signature": private.sign(_signed_bytes(record)).hex()}


def check(record: Mapping[str, Any], results_bytes: bytes | None = None) -> None:
    """Raise KifError unless the signature fits the record and the results, where they are given, are those it names."""
    try:
        from cryptography.exceptions import InvalidSignature
        from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
    except ImportError:
        raise KifError(MISSING) from None
    signed = {name: value for name, value in record.items() if name != "signature"}
    try:
        public = Ed25519PublicKey.from_public_bytes(bytes.fromhex(record["public_key"]))
        public.verify(bytes.fromhex(record["signature"]), _signed_bytes(signed))
    except InvalidSignature:
        raise KifError("the signature does not fit: the certificate was altered, or another key signed it") from None
    except (KeyError, TypeError, ValueError):
        raise KifError("this is no certificate of kif eval; it lacks a readable public_key or signature") from None
    if results_bytes is not None and hashlib.sha256(results_bytes).hexdigest() != record["results"]:
        raise KifError("the certificate is about other results than these")


def _signed_bytes(record: Mapping[str, Any]) -> bytes:
    return json.dumps(record, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()


def _private_key(path: Path) -> Any:
    try:
        from cryptography.hazmat.primitives import serialization
        from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
    except ImportError:
        raise KifError(MISSING) from None
    if not path.exists():
        new = Ed25519PrivateKey.generate()
        plain = serialization.NoEncryption()
        pem = new.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, plain)
        atomic_write(path, pem)
        return new
    try:
        found = serialization.load_pem_private_key(path.read_bytes(), password=None)
    except OSError as failure:
        raise KifError(f"cannot read the key {shown(path)}: {reason(failure)}") from None
    except (ValueError, TypeError):
        raise KifError(f"{shown(path)} holds no readable private key; give an unencrypted PEM file") from None
    if not isinstance(found, Ed25519PrivateKey):
        raise KifError(f"the key in {shown(path)} is not of Ed25519; give one that is, or a new file name")
    return found


def main(arguments: list[str]) -> int:
    """Exit code 0 where the certificate holds, 1 where it does not, 2 for wrong usage."""
    if len(arguments) not in (1, 2):
        print("usage: python -m kif_cli.certificate CERTIFICATE [RESULTS.json]", file=sys.stderr)
        return 2
    try:
        files = [Path(argument).read_bytes() for argument in arguments]
        record = json.loads(files[0])
        if not isinstance(record, dict):
            raise ValueError
    except (OSError, ValueError):
        print("kif: cannot read the certificate or the results; check the paths", file=sys.stderr)
        return 2
    try:
        check(record, *files[1:])
    except KifError as problem:
        print(f"kif: {problem}", file=sys.stderr)
        return 1
    print(f"the certificate holds: signed by {record['public_key']} on {record['date']}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
