"""The error tree. Each error says whose fault it is, what was found, what was expected and what to do next.

A `UserError` reaches a person as one line on stderr and exit status 2; a `RequestError` reaches a peer as a gRPC status
with its reason (the table is in `shardlane.rpc`). Anything else is a bug and keeps its traceback.
"""

from __future__ import annotations


class ShardlaneError(Exception):
    """Base of everything that this project raises on purpose."""


class UserError(ShardlaneError):
    """The person at the keyboard can mend this: a config, a file, an address."""


class ConfigError(UserError):
    """A setting is unknown, out of range, or contradicts another one."""


class DataError(UserError):
    """A token file, its index or a tokenizer is missing, truncated or does not belong to this config."""


class CheckpointError(UserError):
    """A checkpoint is missing, incomplete, corrupt, or of another run than the one that wants it."""


class UnreachableError(UserError):
    """A service did not answer within its deadline."""


class RequestError(ShardlaneError):
    """A peer asked for something that it must not get; nothing was changed."""


class MalformedError(RequestError):
    """A message breaks the wire contract: a bad offset, length, dtype, shape or field."""


class TooLargeError(RequestError):
    """A message, or what it announces, is over a bound; no memory was taken for it."""


class StaleError(RequestError):
    """A message of another run, timeline or epoch than the receiver's."""


class NotReadyError(RequestError):
    """What was asked for is not there yet; asking again later is right."""


class ForbiddenError(RequestError):
    """The caller's certificate is of a role that may not do this, or its join token does not let it in."""


class IncompatibleError(RequestError):
    """The peer speaks another protocol version, or is of another numerics class under `determinism = "strict"`."""
