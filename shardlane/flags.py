"""The flags that all services share. Each may be given as a variable, `SHARDLANE_` and its name; a flag beats the variable."""

from __future__ import annotations

import argparse
import ipaddress
from collections.abc import Mapping
from typing import NoReturn

from shardlane.errors import UserError

DRAIN_SECONDS = 20.0
_TRUE = ("1", "true", "yes", "on")


class ServiceParser:
    """An argument parser whose defaults come from the environment it is given."""

    def __init__(self, prog: str, description: str, environment: Mapping[str, str], epilog: str = "") -> None:
        epilog = f"Each flag may be given as a variable, such as SHARDLANE_BIND. {epilog}"
        self._parser = _Parser(prog=prog, description=description, epilog=epilog, allow_abbrev=False)
        self._environment = environment

    def text(self, flag: str, default: str, help: str) -> None:
        self._parser.add_argument(flag, default=self._environment.get(_variable(flag), default), help=help)

    def seconds(self, flag: str, default: float, help: str) -> None:
        self._parser.add_argument(flag, type=float, default=self._environment.get(_variable(flag), default), help=help)

    def switch(self, flag: str, help: str) -> None:
        default = self._environment.get(_variable(flag), "").lower() in _TRUE
        self._parser.add_argument(flag, action="store_true", default=default, help=help)

    def add_serving(self) -> None:
        """Where the service is reached, and how it ends."""
        self.text("--bind", "127.0.0.1:0", "host:port to serve on; port 0 takes any free one")
        self.text("--advertise", "", "host, or host:port, under which others reach it; default: as bound")
        self.text("--metrics-bind", "127.0.0.1:0", "host:port of /metrics; empty: none")
        self.text("--ready-file", "", "written as JSON (address, metrics_address, pid) once it serves")
        self.switch("--stay", "keep serving after the run has ended")
        self.seconds("--drain-seconds", DRAIN_SECONDS, "on SIGTERM: at most so long for others to take over, or to have left")
        self.switch("--insecure", "serve in plain text on an address that other machines can reach")
        self.text("--ssl-ca-certfile", "", "PEM: the authority that signs all certificates of the cluster (`shardlane certs`)")
        self.text("--ssl-certfile", "", "PEM: this process's certificate, of its role")
        self.text("--ssl-keyfile", "", "PEM: the certificate's key")

    def add_joining(self) -> None:
        """Which run a member joins."""
        self.text("--coordinator", "", "host:port of the coordinator")
        self.text("--run-id", "", "the run to join; default: whichever the coordinator runs")
        self.text("--join-token", "", "of `shardlane join-token`, where the run asks for one; it lets one process in, once")
        self.text("--join-token-file", "", "the same in a file, where other users do not see it")
        self.text("--join-secret-file", "", "the run's secret, with which this process makes itself a token: it may start again")

    def parse(self, arguments: list[str], *, required: tuple[str, ...]) -> argparse.Namespace:
        """Raises `UserError` for an unknown or a missing flag, an address that is none, or an open plain-text bind."""
        flags = self._parser.parse_args(arguments)
        return self._checked(flags, required)

    def parse_with_overrides(self, arguments: list[str], *, required: tuple[str, ...]) -> tuple[argparse.Namespace, list[str]]:
        """As `parse`, leaving `--section.key value` to the config."""
        flags, rest = self._parser.parse_known_args(arguments)
        return self._checked(flags, required), rest

    def _checked(self, flags: argparse.Namespace, required: tuple[str, ...]) -> argparse.Namespace:
        for flag in required:
            if not getattr(flags, flag.removeprefix("--").replace("-", "_")):
                raise UserError(f"{flag} is missing, and so is {_variable(flag)}; give one of them")
        if (coordinator := getattr(flags, "coordinator", "")) and not _is_address(coordinator):
            raise UserError(f"--coordinator is {coordinator!r}; expected host:port")
        has_tls = bool(flags.ssl_ca_certfile or flags.ssl_certfile or flags.ssl_keyfile)
        if not flags.insecure and not has_tls and not is_loopback(flags.bind):
            raise UserError(
                f"--bind {flags.bind} can be reached from other machines, in plain text; give --ssl-ca-certfile, --ssl-certfile"
                " and --ssl-keyfile, add --insecure, or bind 127.0.0.1"
            )
        return flags


class _Parser(argparse.ArgumentParser):
    """A mistake is one line, as everywhere, and not the usage of every flag."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see --help")


def _variable(flag: str) -> str:
    return f"SHARDLANE_{flag.removeprefix('--').replace('-', '_').upper()}"


def _is_address(text: str) -> bool:
    host, _, port = text.rpartition(":")
    return bool(host) and port.isdecimal()


def is_loopback(bind: str) -> bool:
    """Whether only this machine reaches host:port."""
    host = bind.rpartition(":")[0].strip("[]")
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
