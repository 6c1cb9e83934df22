"""Mutual TLS: who this process is, and whom it lets call what.

A certificate's role is one of its DNS names: `worker.shardlane.internal`, and likewise for coordinator, shard and operator.
Addresses are in no certificate, since pods and spot machines change theirs: a client asks for the role that it means to reach,
and gRPC refuses a server whose certificate has not that name. A server takes its caller's role from the caller's certificate.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
from cryptography import x509

from shardlane.errors import ForbiddenError, UserError

DOMAIN = "shardlane.internal"
ROLES = ("coordinator", "shard", "worker", "operator")
_READS_MAX = 8
_NAMES_KEY, _TRANSPORT_KEY = "x509_subject_alternative_name", "transport_security_type"


def name_of(role: str) -> str:
    """The DNS name of a role's certificates."""
    return f"{role}.{DOMAIN}"


@dataclass(frozen=True, slots=True)
class _Files:
    """What was read at one time, to see that it has changed."""

    ca: bytes
    certificate: bytes
    key: bytes


@dataclass(frozen=True)
class Tls:
    """Three PEM files: the authority's certificate, this process's own with what leads to the authority, and its key.

    They are read again for every connection that is made or taken, so that certificates are renewed without a restart.
    """

    ca: Path
    certificate: Path
    key: Path
    _last: list[_Files] = field(default_factory=list, repr=False, compare=False)

    @classmethod
    def in_folder(cls, folder: Path, role: str) -> Tls:
        """As `shardlane certs` lays them out. Raises `UserError`."""
        tls = cls(folder / "ca.pem", folder / f"{role}.pem", folder / f"{role}.key")
        tls._read()
        return tls

    @classmethod
    def of(cls, ca: str, certificate: str, key: str) -> Tls | None:
        """None: plain text. Raises `UserError` if only some are given, or one cannot be read."""
        given = {"--ssl-ca-certfile": ca, "--ssl-certfile": certificate, "--ssl-keyfile": key}
        if not any(given.values()):
            return None
        if missing := [flag for flag, value in given.items() if not value]:
            raise UserError(f"{', '.join(missing)} is missing; TLS needs all of {', '.join(given)}")
        tls = cls(Path(ca), Path(certificate), Path(key))
        tls._read()
        return tls

    def channel_credentials(self) -> grpc.ChannelCredentials:
        files = self._read()
        return grpc.ssl_channel_credentials(files.ca, files.key, files.certificate)

    def server_credentials(self) -> grpc.ServerCredentials:
        """A client without a certificate of the same authority is refused while it shakes hands."""
        first = self._read()
        self._last[:] = [first]
        renewed: Any = self._renewed  # the stubs know no None, which gRPC takes for "as before"
        return grpc.dynamic_ssl_server_credentials(_configuration(first), renewed, require_client_authentication=True)

    def expiry(self) -> float:
        """When the files, as they lie there now, are not good any more, as Unix time; NaN if they cannot be read. Of several
        authorities, as there are while one succeeds another, the last counts.
        """
        try:
            files = self._read()
            own, authorities = (x509.load_pem_x509_certificates(each) for each in (files.certificate, files.ca))
        except (UserError, ValueError):
            return math.nan
        ends = [each.not_valid_after_utc.timestamp() for each in own]
        return min(*ends, max(each.not_valid_after_utc.timestamp() for each in authorities))

    def _renewed(self) -> grpc.ServerCertificateConfiguration | None:
        """None: as before. What cannot be read, in the midst of being replaced, stays as it was."""
        try:
            files = self._read()
        except UserError:
            return None
        if self._last == [files]:
            return None
        self._last[:] = [files]
        return _configuration(files)

    def _read(self) -> _Files:
        """Of one and the same time: a certificate read before they are replaced, and a key read after, would not fit. Kubernetes
        replaces all at once, by a symbolic link.
        """
        found = self._read_once()
        for _ in range(_READS_MAX):
            before, found = found, self._read_once()
            if found == before:
                break
        return found

    def _read_once(self) -> _Files:
        found = []
        for what, file in (("authority", self.ca), ("certificate", self.certificate), ("key", self.key)):
            try:
                content = file.read_bytes()
            except OSError as error:
                raise UserError(f"cannot read the {what} {file}: {error.strerror}; `shardlane certs` makes some") from error
            if b"-----BEGIN" not in content:
                raise UserError(f"{file} is not a PEM file; expected the {what}")
            found.append(content)
        return _Files(*found)


def _configuration(files: _Files) -> grpc.ServerCertificateConfiguration:
    return grpc.ssl_server_certificate_configuration([(files.key, files.certificate)], root_certificates=files.ca)


def caller_roles(context: grpc.ServicerContext) -> frozenset[str] | None:
    """The roles in the caller's certificate; None: it has none, for this is plain text."""
    found: Any = context.auth_context()
    if found.get(_TRANSPORT_KEY) != [b"ssl"]:
        return None
    said = {bytes(name).decode(errors="replace") for name in found.get(_NAMES_KEY, ())}
    return frozenset(role for role in ROLES if name_of(role) in said)


def check_caller(context: grpc.ServicerContext, *, method: str, allowed: Collection[str]) -> None:
    """Raises `ForbiddenError` if the caller's certificate has none of the `allowed` roles. In plain text everybody may call."""
    roles = caller_roles(context)
    if roles is not None and not roles & set(allowed):
        said = f"a certificate of role {', '.join(sorted(roles))}" if roles else "a certificate without a role"
        raise ForbiddenError(f"{method} is for {' and '.join(sorted(allowed))}; the caller has {said}")
