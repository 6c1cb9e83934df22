"""Join tokens: what is signed is what is read, and nothing else passes."""

from __future__ import annotations

import time
from argparse import Namespace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardlane.credentials import VALID_SECONDS, Credential
from shardlane.errors import UserError
from shardlane.join_token import CHARACTERS_MAX, is_readmission, mint, parse, readmission, seconds_of
from shardlane.secret_file import ensure_secret, read_secret

SECRET, NONCE = b"s" * 32, "0123456789abcdef" * 2


def test_a_token_is_read_as_it_was_made() -> None:
    token = mint(SECRET, role="worker", expires_seconds=1_800_000_000, nonce=NONCE)
    assert str(token).startswith(f"shardlane-join.1.worker.1800000000.{NONCE}.") and len(str(token)) <= CHARACTERS_MAX
    assert parse(str(token)) == token and token.is_signed_with(SECRET) and not token.is_signed_with(b"t" * 32)


@given(position=st.integers(0, 140), other=st.characters(codec="ascii"))
def test_no_changed_character_passes(position: int, other: str) -> None:
    text = str(mint(SECRET, role="shard", expires_seconds=1_800_000_000, nonce=NONCE))
    position %= len(text)
    changed = text[:position] + other + text[position + 1 :]
    found = parse(changed)
    assert changed == text or found is None or not found.is_signed_with(SECRET)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "shardlane-join.1.worker",
        "shardlane-join.2.worker.1800000000." + NONCE + "." + "0" * 64,
        "shardlane-join.1.operator.1800000000." + NONCE + "." + "0" * 64,
        "shardlane-join.1.worker.01800000000." + NONCE + "." + "0" * 64,
        "shardlane-join.1.worker.1800000000." + NONCE.upper() + "." + "0" * 64,
        "shardlane-join.1.worker.1800000000." + NONCE + "." + "0" * 64 + "\n",
        "shardlane-join.1.worker.١٨٠٠." + NONCE + "." + "0" * 64,
        "x" * (1 << 20),
    ],
)
def test_what_is_no_token_is_none(text: str) -> None:
    assert parse(text) is None


def test_a_readmission_is_of_one_process() -> None:
    who = {"role": "worker", "incarnation": "worker-01", "address": "a:1"}
    text = readmission(SECRET, **who)  # type: ignore[arg-type]
    assert is_readmission(text, SECRET, **who)  # type: ignore[arg-type]
    for change in ({"role": "shard"}, {"incarnation": "worker-02"}, {"address": "b:1"}):
        assert not is_readmission(text, SECRET, **{**who, **change})  # type: ignore[arg-type]
    assert not is_readmission(text, b"t" * 32, **who) and not is_readmission("é", SECRET, **who)  # type: ignore[arg-type]


def test_times_are_read_with_their_units() -> None:
    assert [seconds_of(text) for text in ("90s", "10m", "2h", "7d")] == [90, 600, 7200, 604_800]
    for text in ("", "10", "m", "1.5h", "-1m", "0s", "8d", "٣m", "99999999999s"):
        with pytest.raises(UserError, match="found the time"):
            seconds_of(text)


def flags(**given: str) -> Namespace:
    return Namespace(**{"join_token": "", "join_token_file": "", "join_secret_file": "", **given})


def test_who_has_the_secret_makes_a_fresh_token_each_time(tmp_path: Path) -> None:
    ensure_secret(tmp_path / "secret")
    secret = read_secret(tmp_path / "secret")
    ensure_secret(tmp_path / "secret")
    assert read_secret(tmp_path / "secret") == secret and (tmp_path / "secret").stat().st_mode & 0o077 == 0
    credential = Credential.of(flags(join_secret_file=str(tmp_path / "secret")))
    first, second = (parse(credential.present("worker", readmission="of before")) for _ in range(2))
    assert first is not None and second is not None and first.nonce != second.nonce
    assert first.is_signed_with(secret) and 0 < first.expires_seconds - time.time() <= VALID_SECONDS


def test_a_given_token_gives_way_to_the_readmission(tmp_path: Path) -> None:
    (tmp_path / "token").write_text("a-token\n")
    for credential in (Credential.of(flags(join_token="a-token")), Credential.of(flags(join_token_file=str(tmp_path / "token")))):
        assert (credential.present("shard", ""), credential.present("shard", "again")) == ("a-token", "again")
    assert Credential.of(flags()).present("shard", "") == ""


def test_mistakes_are_said(tmp_path: Path) -> None:
    (tmp_path / "short").write_text("secret\n")
    for flawed, says in (
        (flags(join_token="a", join_secret_file="b"), "--join-token and --join-secret-file are given"),
        (flags(join_secret_file=str(tmp_path / "none")), "cannot read the secret"),
        (flags(join_secret_file=str(tmp_path / "short")), "has 6 bytes; expected 32 to 4096"),
        (flags(join_token_file=str(tmp_path / "none")), "cannot read the join token"),
    ):
        with pytest.raises(UserError, match=says):
            Credential.of(flawed)
