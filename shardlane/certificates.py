"""An authority of one's own and a certificate for each role: for development, and for clusters that have no other authority."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric.ec import SECP256R1, EllipticCurvePrivateKey, generate_private_key
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
)
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from shardlane.errors import UserError
from shardlane.files import replace_file
from shardlane.secret_file import ensure_secret
from shardlane.tls import ROLES, name_of

AUTHORITY_DAYS = 3650
JOIN_SECRET = "join.secret"
CLOCKS_DIFFER = timedelta(minutes=5)
RENEWED_WITH_LEFT = 1 / 3  # of a certificate's life, as cert-manager does by itself


class Authority:
    """Signs certificates of roles. Its files are `ca.pem` and `ca.key` in a folder."""

    def __init__(self, certificate: x509.Certificate, key: EllipticCurvePrivateKey) -> None:
        self.certificate, self._key = certificate, key

    @classmethod
    def new(cls) -> Authority:
        key, name = generate_private_key(SECP256R1()), _name("authority")
        builder = _builder(name, name, key, now=datetime.now(UTC), days=AUTHORITY_DAYS)
        usage = x509.KeyUsage(
            digital_signature=True, key_cert_sign=True, crl_sign=True, content_commitment=False, key_encipherment=False,
            data_encipherment=False, key_agreement=False, encipher_only=False, decipher_only=False,
        )  # fmt: skip
        builder = builder.add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        return cls(builder.add_extension(usage, critical=True).sign(key, hashes.SHA256()), key)

    @classmethod
    def in_folder(cls, folder: Path) -> Authority:
        """The one whose files are there, or a new one. Raises `UserError` for files that are none."""
        certificate, key = folder / "ca.pem", folder / "ca.key"
        if not certificate.exists() and not key.exists():
            made = cls.new()
            replace_file(key, made.key_pem, mode=0o600)
            replace_file(certificate, made.pem)
            return made
        fault = f"{folder} has no whole authority in ca.pem and ca.key; name an empty folder"
        try:
            return cls.of(certificate.read_bytes(), key.read_bytes(), fault)
        except OSError as error:
            raise UserError(f"{fault} ({error.strerror})") from error

    @classmethod
    def of(cls, certificate: bytes, key: bytes, fault: str) -> Authority:
        """From PEM. Raises `UserError`, which says `fault` and the reason, for what is none."""
        try:
            found, loaded = x509.load_pem_x509_certificate(certificate), load_pem_private_key(key, password=None)
        except (ValueError, TypeError) as error:
            raise UserError(f"{fault} ({error})") from error
        if not isinstance(loaded, EllipticCurvePrivateKey):
            raise UserError(f"{fault} (the key is not of an elliptic curve)")
        if found.public_key() != loaded.public_key():
            raise UserError(f"{fault} (the key is not the certificate's)")
        return cls(found, loaded)

    @property
    def pem(self) -> bytes:
        return self.certificate.public_bytes(Encoding.PEM)

    @property
    def key_pem(self) -> bytes:
        return _pem_of(self._key)

    def issue(self, names: list[str], *, days: float, now: datetime | None = None) -> tuple[bytes, bytes]:
        """(certificate, key), PEM, for DNS names; good for `days` from `now`."""
        key = generate_private_key(SECP256R1())
        builder = _builder(_name(names[0]), self.certificate.subject, key, now=now or datetime.now(UTC), days=days)
        usages = [ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]
        builder = (
            builder.add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(x509.SubjectAlternativeName([x509.DNSName(name) for name in names]), critical=False)
            .add_extension(x509.ExtendedKeyUsage(usages), critical=False)
        )
        return builder.sign(self._key, hashes.SHA256()).public_bytes(Encoding.PEM), _pem_of(key)


def write_certificates(folder: Path, *, days: int) -> None:
    """`ROLE.pem` and `ROLE.key` of every role, signed by the folder's authority; a secret for join tokens. Raises `UserError`."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        authority = Authority.in_folder(folder)
        for role in ROLES:
            certificate, key = authority.issue([name_of(role)], days=days)
            replace_file(folder / f"{role}.key", key, mode=0o600)
            replace_file(folder / f"{role}.pem", certificate)
        ensure_secret(folder / JOIN_SECRET)
    except OSError as error:
        raise UserError(f"cannot write certificates to {folder}: {error.strerror}") from error


def unfit(certificate: bytes, key: bytes, authority: Authority, names: list[str], *, now: datetime) -> str | None:
    """Why a certificate and its key (PEM; empty: none) should be made anew; None: they are good, for a while yet."""
    if not certificate or not key:
        return "there was none"
    try:
        found, loaded = x509.load_pem_x509_certificate(certificate), load_pem_private_key(key, password=None)
        said = found.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except (ValueError, TypeError, x509.ExtensionNotFound):
        return "what was there is no certificate with names, or no key"
    if found.public_key() != loaded.public_key():
        return "the key was another one's"
    try:
        found.verify_directly_issued_by(authority.certificate)
    except (ValueError, TypeError, InvalidSignature):
        return "the old one was of another authority"
    if said.get_values_for_type(x509.DNSName) != names:
        return f"the old one was not for {', '.join(names)}"
    begin, end = found.not_valid_before_utc, found.not_valid_after_utc
    return "the old one ends soon" if end - now < (end - begin) * RENEWED_WITH_LEFT else None


def _builder(
    subject: x509.Name, issuer: x509.Name, key: EllipticCurvePrivateKey, *, now: datetime, days: float
) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - CLOCKS_DIFFER)
        .not_valid_after(now + timedelta(days=days))
    )


def _name(text: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, f"Shardlane {text}"[:64])])


def _pem_of(key: EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
