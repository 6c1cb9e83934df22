"""The files of a certificate while Kubernetes replaces them: all at once, by a symbolic link."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.serialization import load_pem_private_key

from shardlane.certificates import Authority
from shardlane.tls import Tls, name_of

FILES = ("ca.crt", "tls.crt", "tls.key")
AUTHORITY = Authority.new()


class Mount:
    """A folder as the kubelet keeps it: `tls.crt` is a link into `..data`, which is a link to the folder of the newest."""

    def __init__(self, folder: Path) -> None:
        self.folder, self._generation = folder, 0
        self.renew()
        for name in FILES:
            (folder / name).symlink_to(Path("..data") / name)

    def renew(self) -> None:
        self._generation += 1
        made = self.folder / f"..{self._generation}"
        made.mkdir()
        certificate, key = AUTHORITY.issue([name_of("shard")], days=1)
        for name, content in zip(FILES, (AUTHORITY.pem, certificate, key), strict=True):
            (made / name).write_bytes(content)
        link = self.folder / "..data_tmp"
        link.symlink_to(made.name)
        link.replace(self.folder / "..data")


class Watched(type(Path())):  # type: ignore[misc]  # the class that Path makes here
    """A file of which somebody hears whenever it has been read."""

    on_read: Callable[[], None]

    def read_bytes(self) -> bytes:
        content: bytes = super().read_bytes()
        self.on_read()
        return content


def is_whole(tls: Tls) -> bool:
    files = tls._read()
    certificate = x509.load_pem_x509_certificate(files.certificate)
    return certificate.public_key() == load_pem_private_key(files.key, password=None).public_key()


@pytest.mark.parametrize("num_swaps", [1, 2, 3])
def test_a_certificate_and_its_key_are_of_one_time(tmp_path: Path, num_swaps: int) -> None:
    mount, left = Mount(tmp_path), [num_swaps]

    def swap() -> None:
        if left[0]:
            left[0] -= 1
            mount.renew()

    certificate = Watched(tmp_path / "tls.crt")
    certificate.on_read = swap
    assert is_whole(Tls(tmp_path / "ca.crt", certificate, tmp_path / "tls.key"))
    assert left == [0], "it was replaced while it was read"


def test_a_server_takes_up_what_a_mount_was_renewed_with(tmp_path: Path) -> None:
    mount = Mount(tmp_path)
    tls = Tls(*(tmp_path / name for name in FILES))
    tls.server_credentials()
    assert tls._renewed() is None
    mount.renew()
    assert tls._renewed() is not None and tls._renewed() is None
