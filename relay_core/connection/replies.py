"""What an error of redis-py means: was the command executed, and is it worth repeating?

Told apart by class where redis-py has one, and by the first word of the reply where it has none.
"""

from __future__ import annotations

import asyncio
import enum
import ssl
from typing import NamedTuple, TypeGuard

from redis import exceptions as redis_errors

from relay_core.errors import AuthError, LayoutError, PermissionDenied, RelayError, StoreError


class Verdict(enum.Enum):
    """What to do with a command after an error."""

    NOT_EXECUTED = "repeat it: nothing was done"
    UNKNOWN = "repeat it as re-sent: it may have run"
    PERMANENT = "raise: repeating cannot help"
    NO_SCRIPT = "load the script there and repeat"
    MOVED = "another node has the slot"
    ASK = "another node has the slot for this one command"


class Partly(redis_errors.ResponseError):
    """The error of one command of a transaction that was executed: the others were."""

    def __init__(self, error: Exception) -> None:
        super().__init__(str(error))
        self.error = error


class Judgement(NamedTuple):
    """:ivar text: what the server said, or what the system said of the connection
    :ivar code: first word of an error reply, e.g. `OOM`; empty for the connection itself
    :ivar error: what to raise if nothing else can be done; always there for PERMANENT
    :ivar slot: number and owner of a slot, only for MOVED and ASK; the host is empty for "this same host"
    """

    verdict: Verdict
    text: str
    code: str = ""
    error: RelayError | None = None
    slot: tuple[int, str, int] | None = None


# redis-py takes the first word off the text of replies for which it has a class. Subclasses come first.
_CODES: tuple[tuple[type[Exception], str], ...] = (
    (redis_errors.NoScriptError, "NOSCRIPT"),
    (redis_errors.ReadOnlyError, "READONLY"),
    (redis_errors.OutOfMemoryError, "OOM"),
    (redis_errors.BusyLoadingError, "LOADING"),
    (redis_errors.MovedError, "MOVED"),
    (redis_errors.AskError, "ASK"),
    (redis_errors.TryAgainError, "TRYAGAIN"),
    (redis_errors.MasterDownError, "MASTERDOWN"),
    (redis_errors.ClusterDownError, "CLUSTERDOWN"),
    (redis_errors.ClusterCrossSlotError, "CROSSSLOT"),
    (redis_errors.NoPermissionError, "NOPERM"),
    (redis_errors.AuthenticationWrongNumberOfArgsError, "NOAUTH"),
)
AWAY = (redis_errors.ConnectionError, redis_errors.TimeoutError)
"""What redis-py raises where a server is away. For those who also meet it from other users of redis-py."""
_CLOSED = (ConnectionResetError, BrokenPipeError, EOFError, ssl.SSLEOFError)
"""What the end of a connection is called by the system, asyncio and TLS."""

_NOT_EXECUTED = frozenset(
    (
        "LOADING",
        "READONLY",
        "MASTERDOWN",
        "CLUSTERDOWN",
        "NOREPLICAS",
        "BUSY",
        "OOM",
        "TRYAGAIN",
        "MISCONF",
        "UNBLOCKED",
    )
)
ELSEWHERE = frozenset(("READONLY", "MASTERDOWN", "CLUSTERDOWN", "UNBLOCKED"))
"""Answers of a server that is, or may be, no longer the one to ask."""

_AUTH: tuple[type[Exception], ...] = (
    redis_errors.AuthenticationError,
    redis_errors.AuthorizationError,
    *((redis_errors.ExternalAuthProviderError,) if hasattr(redis_errors, "ExternalAuthProviderError") else ()),
)
# The server's answers, although redis-py files some of them under the connection.
_REPLIES: tuple[type[Exception], ...] = (redis_errors.ResponseError, redis_errors.BusyLoadingError, *_AUTH)
_TOO_MANY = "max number of clients reached"
_DISCARDED = "Transaction discarded because of: "
# What Redis before 7.2, and those after it and Valkey, say where a script does what its user may not.
_NOT_IN_A_SCRIPT = ("The user executing the script can't run this", "ACL failure in script")

_TIMED_OUT: tuple[type[Exception], ...] = (TimeoutError, asyncio.TimeoutError)  # the same from Python 3.11 on

LOST: tuple[type[Exception], ...] = (redis_errors.RedisError, OSError, *_TIMED_OUT)
"""What a network and a protocol raise. Anything else comes from elsewhere, such as the soft time limit of a task, which
a handler of signals raises wherever the thread happens to be: it is for the caller, and the connection is closed."""

NOT_OPENED: tuple[type[Exception], ...] = (*LOST, UnicodeError)
"""The same while a connection opens. UnicodeError is for a host name that cannot be one."""


def is_reply(error: BaseException) -> TypeGuard[Exception]:
    """Whether the server said it, so that the connection is still in step."""
    return isinstance(error, _REPLIES)


def was_closed(error: BaseException) -> bool:
    """Whether the connection was closed, as opposed to a reply that did not come in time."""
    return isinstance(error, (redis_errors.ConnectionError, OSError)) and not isinstance(error, TimeoutError)


def tls_hint(error: BaseException, tls: bool, kind: str = "") -> str:
    """What to look at where the first connection to a TCP port came to nothing, as it does when only one side speaks
    TLS: a server that speaks none waits for more, one that does hangs up on what is none.

    :param kind: what follows the first word of the URL's scheme, such as `+cluster`
    """
    causes = (error, error.__context__)
    if tls and any(isinstance(one, _TIMED_OUT) or "WRONG_VERSION" in str(one) for one in causes):
        return f"; if the server speaks no TLS there, use relay{kind}:// in place of relays{kind}://"
    told = "closed by server" in str(error) or "CERTIFICATE_REQUIRED" in str(error)
    if told or any(isinstance(one, _CLOSED) for one in causes):
        if tls:
            return "; if the server asks for a client's certificate, name it with ssl_certfile and ssl_keyfile"
        return f"; if the server speaks TLS there, use relays{kind}:// in place of relay{kind}://"
    return ""


def judge_reply(error: Exception, at: str) -> Judgement:
    """Judge an error that the server at `at` gave as the reply to a command."""
    if partly := isinstance(error, Partly):
        error = error.error
    code, text = _code_and_text(error)
    if code == "NOSCRIPT":
        return Judgement(Verdict.NO_SCRIPT, text, code, error=_permanent(code, text, at))
    if code in ("MOVED", "ASK"):
        verdict = Verdict.MOVED if code == "MOVED" else Verdict.ASK
        _code, slot, owner = text.split(" ")
        host, _colon, port = owner.rpartition(":")
        return Judgement(verdict, text, code, error=_permanent(code, text, at), slot=(int(slot), host, int(port)))
    # A call inside a script that was refused may come after others that were not.
    began = " script: " in text and "@user_script" in text
    if code in _NOT_EXECUTED:
        return Judgement(Verdict.UNKNOWN if began else Verdict.NOT_EXECUTED, text, code)
    refused = _permanent(code, text, at)
    # A script of relay's own says so before it does anything, and then the rest of its transaction does nothing, too.
    refused.maybe_executed = began or (partly and not code.startswith("RELAY_"))
    return Judgement(Verdict.PERMANENT, text, code, error=refused)


def judge_connect(error: BaseException, at: str) -> Judgement:
    """Judge why a connection to `at` could not be opened: the command was not sent."""
    # redis-py's asyncio makes a ConnectionError of what the server said to SELECT and the like
    said = error if error.__cause__ is None or is_reply(error) else error.__cause__
    if is_reply(said):
        judged = judge_reply(said, at)
        return judged if judged.verdict is Verdict.PERMANENT else judged._replace(verdict=Verdict.NOT_EXECUTED)
    cause = error.__context__
    if isinstance(cause, ssl.SSLCertVerificationError):
        problem = StoreError(
            f"{at}: the server's certificate is not trusted: {cause.verify_message}; name the authority that "
            "signed it with ssl_ca_certs, or the right host name in the URL"
        )
        return Judgement(Verdict.PERMANENT, str(error), error=problem)
    if isinstance(cause, (FileNotFoundError, PermissionError)) and not at.startswith("unix:"):
        problem = StoreError(f"{at}: a file named by an ssl_ option cannot be read: {cause}")
        return Judgement(Verdict.PERMANENT, str(error), error=problem)
    if isinstance(error, (redis_errors.ConnectionError, redis_errors.TimeoutError, OSError, *_TIMED_OUT)):
        return Judgement(Verdict.NOT_EXECUTED, _words(error))
    problem = StoreError(f"{at}: cannot connect: {type(error).__name__}: {error}")
    return Judgement(Verdict.PERMANENT, str(error), error=problem)


def judge_cut(error: BaseException, at: str) -> Judgement:
    """Judge an error of the connection after the send: the command may have run."""
    verdict = Verdict.NOT_EXECUTED if _TOO_MANY in str(error) else Verdict.UNKNOWN
    return Judgement(verdict, _words(error))


def _words(error: BaseException) -> str:
    return str(error) or type(error).__name__


def _code_and_text(error: Exception) -> tuple[str, str]:
    text = str(error)
    if isinstance(error, redis_errors.ExecAbortError) and _DISCARDED in text:
        text = text.partition(_DISCARDED)[2]  # its parts were taken, but no longer the whole: why is what counts
        return text.partition(" ")[0], text
    if isinstance(error, _AUTH):
        return "NOAUTH", text
    for kind, code in _CODES:
        if isinstance(error, kind):
            return code, f"{code} {text}"
    return text.partition(" ")[0], text


def _permanent(code: str, text: str, at: str) -> StoreError:
    if code == "NOAUTH":
        return AuthError(f"{at}: wrong or missing user name or password ({text}); check the URL's user:password@")
    if code == "NOPERM" or any(told in text for told in _NOT_IN_A_SCRIPT):
        return PermissionDenied(f"{at}: {text}; allow it in the user's ACL")
    if code == "RELAY_LAYOUT":
        return LayoutError(f"{at}: {text.partition(' ')[2]}; upgrade relay here")
    if code == "MOVED":
        return StoreError(f"{at}: {text}; this server belongs to a cluster, use relay+cluster://")
    if "cluster support disabled" in text:
        return StoreError(f"{at}: {text}; this is a single server, use relay://")
    if "DB index is out of range" in text:
        return StoreError(f"{at}: it has no database of this number, the one at the URL's end ({text})")
    return StoreError(f"{at}: {text}")
