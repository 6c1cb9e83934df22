"""Certificates in Kubernetes Secrets: one for each role, with the keys that cert-manager gives its own, so either may fill them;
and the secret that join tokens are made with, which cert-manager does not make.

The Secrets are there already, empty, as the manifests make them: whoever fills them needs neither to create nor to list any.
"""

from __future__ import annotations

import base64
import binascii
import http.client
import json
import os
import ssl
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

from shardlane.certificates import JOIN_SECRET, Authority, unfit
from shardlane.errors import UnreachableError, UserError
from shardlane.secret_file import CHARACTERS_MIN, new_secret
from shardlane.tls import ROLES, name_of

ACCOUNT = Path("/var/run/secrets/kubernetes.io/serviceaccount")
CA, CERTIFICATE, KEY = "ca.crt", "tls.crt", "tls.key"
TIMEOUT_SECONDS = 10.0
ANSWER_BYTES_MAX = 4 << 20  # a Secret has 1 MiB at most; its bookkeeping comes on top
ATTEMPTS_MAX = 5  # when another writes the same Secret at the same time


class ConflictError(UserError):
    """The Secret has changed since it was read."""


@dataclass(frozen=True, slots=True)
class Secret:
    name: str
    version: str
    """Kubernetes' resourceVersion: what an update is an update of."""
    data: Mapping[str, bytes]


@dataclass(frozen=True)
class SecretStore:
    """The Secrets of one namespace, as an API server has them."""

    host: str
    port: int
    namespace: str
    token: str
    tls: ssl.SSLContext

    @classmethod
    def of_pod(cls, environment: Mapping[str, str] = os.environ, account: Path = ACCOUNT) -> SecretStore:
        """As a pod finds its cluster. Raises `UserError`."""
        host, port = environment.get("KUBERNETES_SERVICE_HOST", ""), environment.get("KUBERNETES_SERVICE_PORT", "443")
        if not host or not port.isdecimal():
            raise UserError("KUBERNETES_SERVICE_HOST and _PORT name no API server; expected to run in a pod, or name a folder")
        try:
            namespace, token = ((account / name).read_text(encoding="utf-8").strip() for name in ("namespace", "token"))
            tls = ssl.create_default_context(cafile=str(account / "ca.crt"))
        except OSError as error:  # an SSLError is one
            reason = "mount the token of a ServiceAccount (automountServiceAccountToken)"
            raise UserError(f"cannot read {account}: {error.strerror or error}; {reason}") from error
        return cls(host, int(port), namespace, token, tls)

    def read(self, name: str) -> Secret:
        """Raises `UserError`."""
        return self._call("GET", name)

    def update(self, secret: Secret, data: Mapping[str, bytes]) -> Secret:
        """Other keys stay as they are. Raises `ConflictError` if the Secret is not as it was read, `UserError`."""
        encoded = {key: base64.b64encode(value).decode() for key, value in data.items()}
        return self._call("PATCH", secret.name, {"metadata": {"resourceVersion": secret.version}, "data": encoded})

    def _call(self, method: str, name: str, body: dict[str, Any] | None = None) -> Secret:
        headers = {"Authorization": f"Bearer {self.token}", "Accept": "application/json"}
        if body is not None:
            headers["Content-Type"] = "application/merge-patch+json"
        where = f"the API server at {self.host}:{self.port}"
        connection = http.client.HTTPSConnection(self.host, self.port, timeout=TIMEOUT_SECONDS, context=self.tls)
        try:
            path = f"/api/v1/namespaces/{self.namespace}/secrets/{name}"
            connection.request(method, path, None if body is None else json.dumps(body), headers)
            response = connection.getresponse()
            status, answer = response.status, response.read(ANSWER_BYTES_MAX + 1)
        except (OSError, http.client.HTTPException) as error:
            raise UnreachableError(f"{where} does not answer: {error}; is there a NetworkPolicy in between?") from error
        finally:
            connection.close()
        if status != http.HTTPStatus.OK:
            raise self._refusal(f"{where} refused to {method} the Secret {name}", status, answer)
        return _secret(answer, where)

    def _refusal(self, what: str, status: int, answer: bytes) -> UserError:
        advice = {
            401: "is the ServiceAccount still there?",
            403: "give the ServiceAccount a Role with get and patch of this Secret",
            404: "apply the manifests first: they bring the Secret, empty",
        }.get(status, "try again later")
        kind = ConflictError if status == http.HTTPStatus.CONFLICT else UserError
        return kind(f"{what} ({status}): {_message(answer)}; {advice}")


def fill_secrets(store: SecretStore, prefix: str, *, days: int, now: datetime | None = None) -> list[str]:
    """Certificates of every role into PREFIX-ROLE-tls, by the authority in PREFIX-authority, which is made if it is not there.

    What is good stays; returns a line for each Secret that was filled, and why. Raises `UserError`.
    """
    now, lines = now or datetime.now(UTC), []
    authority, line = _authority_in(store, f"{prefix}-authority")
    lines += [line] if line else []
    for role in ROLES:
        lines += _fill(store, f"{prefix}-{role}-tls", partial(_certificate, authority, name_of(role), days, now))
    return lines


def fill_join_secret(store: SecretStore, prefix: str) -> list[str]:
    """A secret for join tokens into PREFIX-join, unless it has one; a line if it was filled. Raises `UserError`."""
    return _fill(store, f"{prefix}-join", _join_secret)


def _fill(store: SecretStore, name: str, missing: Callable[[Secret], tuple[dict[str, bytes], str] | None]) -> list[str]:
    """`missing`: what to put into the Secret, and what to say of it; None if nothing is."""
    for attempt in range(ATTEMPTS_MAX):
        secret = store.read(name)
        if (found := missing(secret)) is None:
            break
        data, line = found
        try:
            store.update(secret, data)
        except ConflictError:
            if attempt == ATTEMPTS_MAX - 1:
                raise
            continue  # another has filled it meanwhile: perhaps there is nothing left to do
        return [f"{name}: {line}"]
    return []


def _certificate(
    authority: Authority, dns_name: str, days: int, now: datetime, secret: Secret
) -> tuple[dict[str, bytes], str] | None:
    found = {key: secret.data.get(key, b"") for key in (CA, CERTIFICATE, KEY)}
    reason = unfit(found[CERTIFICATE], found[KEY], authority, [dns_name], now=now)
    if reason is None and found[CA] == authority.pem:
        return None
    certificate, key = authority.issue([dns_name], days=days, now=now)
    line = f"a certificate good for {days} days, for {reason or f'{CA} was another one'}"
    return {CA: authority.pem, CERTIFICATE: certificate, KEY: key}, line


def _join_secret(secret: Secret) -> tuple[dict[str, bytes], str] | None:
    found = secret.data.get(JOIN_SECRET, b"").strip()
    if not found:
        return {JOIN_SECRET: new_secret()}, "a new secret for join tokens"
    if len(found) < CHARACTERS_MIN:  # a person's, so it is not thrown away; but no process would start with it
        what = f"{JOIN_SECRET} of the Secret {secret.name} has {len(found)} bytes; expected {CHARACTERS_MIN} at least"
        raise UserError(f"{what}; empty it to get a new one")
    return None


def _authority_in(store: SecretStore, name: str) -> tuple[Authority, str]:
    """The authority, and a line if it was made just now. Of several that make one at the same time, the first one's stays."""
    secret = store.read(name)
    if not secret.data.get(CERTIFICATE) and not secret.data.get(KEY):
        made = Authority.new()
        try:
            store.update(secret, {CA: made.pem, CERTIFICATE: made.pem, KEY: made.key_pem})
            return made, f"{name}: a new authority"
        except ConflictError:
            secret = store.read(name)
    what = f"the Secret {name} has no whole authority in {CERTIFICATE} and {KEY}"
    return Authority.of(secret.data.get(CERTIFICATE, b""), secret.data.get(KEY, b""), f"{what}; empty it to get a new one"), ""


def _secret(answer: bytes, where: str) -> Secret:
    try:
        if len(answer) > ANSWER_BYTES_MAX:
            raise ValueError(f"it is over {ANSWER_BYTES_MAX} bytes")
        read = json.loads(answer)
        metadata, data = read["metadata"], read.get("data") or {}
        decoded = {str(key): base64.b64decode(value, validate=True) for key, value in data.items()}
        return Secret(str(metadata["name"]), str(metadata["resourceVersion"]), decoded)
    except (ValueError, KeyError, TypeError, AttributeError, binascii.Error) as error:
        raise UserError(f"the answer of {where} is not a Secret: {error!r}; is something else listening there?") from error


def _message(answer: bytes) -> str:
    """What a Kubernetes Status says, or the beginning of what came instead."""
    try:
        return str(json.loads(answer)["message"])[:500]
    except (ValueError, KeyError, TypeError):
        return answer[:200].decode(errors="replace") or "without a reason"
