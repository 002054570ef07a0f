#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
# SPDX-FileCopyrightText: claude_oauth contributors
#
# /// script
# requires-python = ">=3.8"
# dependencies = ["requests>=2.20"]
# ///
"""Sign a program in to Claude, and never let that login lapse.

    python claude_oauth.py login        a person signs in, by browser or by paste
    python claude_oauth.py token        a token that works, for scripts
    requests.get(url, auth=BearerAuth(OAuthService()))        the same, for programs

Copy this file into your tree, unchanged; it needs `requests`, and that only when it
talks to a server.  Every section uses only the sections above it:

    Constants     endpoints, scopes, lifetimes and limits, each with its unit and source
    Errors        ClaudeOAuthError and its subclasses: a class for each thing to do next
    Values        OAuthConfig, Credentials, Profile: frozen, and silent about secrets
    PKCE          code verifier, code challenge, state
    Messages      build and parse what goes over the wire and what a person pastes; pure
    Client        OAuthClient: the HTTP requests
    Storage       where a credential is kept; the lock that processes share
    Sign-in       AuthCodeListener, the paste prompt, and the race between them
    Refresh       the one place that spends a stored refresh token
    Service       OAuthService: login, access_token, profile, logout, status; BearerAuth
    Sandbox       a loopback authorization server, for demos and for tests
    Command line  main(argv=None) -> int

Not affiliated with Anthropic.  There is no default client id: bring your program's.
"""

from __future__ import annotations

import binascii
import errno
import io
import os
import sys
import time
import types

# Shell loops run `token`: slow modules are imported where needed, and `typing` never.
TYPE_CHECKING = False
if TYPE_CHECKING:
    import argparse
    import socket
    import threading
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
    from contextlib import suppress as Suppress
    from typing import Any, ClassVar, ContextManager, Final, NoReturn, Protocol, TypeVar

    import requests
    from typing_extensions import Self, dataclass_transform

    Clock = Callable[[], float]  # seconds since the epoch
    Record = Mapping[str, object]  # a JSON object
    _T = TypeVar("_T")
    _Error = TypeVar("_Error", bound="ClaudeOAuthError")
else:
    Protocol = object

    def dataclass_transform(**_options: bool) -> Callable[[type], type]:
        return lambda cls: cls


__all__ = [
    "ALLOWED_SCOPE_EXPANSIONS", "ALL_SCOPES", "AuthCodeListener", "BadAnswer",
    "BearerAuth", "CLAUDE_AI_SCOPES", "CONSOLE_SCOPES", "ClaudeOAuthError",
    "ConfigError", "Credentials", "DPAPICipher", "FernetCipher", "FileStorage",
    "KeychainStorage", "KeyringStorage", "LoginCancelled", "LoginDenied", "LoginError",
    "LoginTimeout", "MemoryStorage", "NotLoggedIn", "OAuthClient", "OAuthConfig",
    "OAuthService", "Profile", "REFRESH_BUFFER", "SCOPE_ORG_CREATE_API_KEY",
    "SCOPE_USER_FILE_UPLOAD", "SCOPE_USER_INFERENCE", "SCOPE_USER_MCP_SERVERS",
    "SCOPE_USER_PROFILE", "SCOPE_USER_SESSIONS_CLAUDE_CODE", "SECURITY",
    "SUBSCRIPTION_TYPES", "Sandbox", "Storage", "StorageCorrupt", "StorageError",
    "StorageLocked", "TokenRefused", "Unavailable", "code_challenge", "default_storage",
    "generate_code_verifier", "generate_state", "main", "make_parser", "merge_record",
]

__version__ = "0.2.0"


# -- Constants -------------------------------------------------------------------------

# Source of the endpoints: the public client's traffic.
CLAUDE_AI_AUTHORIZE_URL: Final = "https://claude.com/cai/oauth/authorize"
CONSOLE_AUTHORIZE_URL: Final = "https://platform.claude.com/oauth/authorize"
TOKEN_URL: Final = "https://platform.claude.com/v1/oauth/token"
PROFILE_URL: Final = "https://api.anthropic.com/api/oauth/profile"
API_KEY_URL: Final = "https://api.anthropic.com/api/oauth/claude_cli/create_api_key"
# Seen at logout.  Source: six independent public programs.
REVOKE_URL: Final = "https://platform.claude.com/v1/oauth/token/revoke"
# Shows ``code#state`` to copy, where the browser cannot reach the loopback.
MANUAL_REDIRECT_URI: Final = "https://platform.claude.com/oauth/code/callback"

SCOPE_ORG_CREATE_API_KEY: Final = "org:create_api_key"
SCOPE_USER_PROFILE: Final = "user:profile"
SCOPE_USER_INFERENCE: Final = "user:inference"
SCOPE_USER_SESSIONS_CLAUDE_CODE: Final = "user:sessions:claude_code"
SCOPE_USER_MCP_SERVERS: Final = "user:mcp_servers"
SCOPE_USER_FILE_UPLOAD: Final = "user:file_upload"

# Every login, Claude.ai or Console, asks for these; the server grants what fits.
ALL_SCOPES: Final = (
    SCOPE_ORG_CREATE_API_KEY, SCOPE_USER_PROFILE, SCOPE_USER_INFERENCE,
    SCOPE_USER_SESSIONS_CLAUDE_CODE, SCOPE_USER_MCP_SERVERS, SCOPE_USER_FILE_UPLOAD,
)
CONSOLE_SCOPES: Final = ALL_SCOPES[:2]
CLAUDE_AI_SCOPES: Final = ALL_SCOPES[1:]  # all but the one for Console API keys
ALLOWED_SCOPE_EXPANSIONS: Final = ALL_SCOPES[3:]  # a refresh may add to an older login

# The credential's subscription type for each organization_type of the profile.
SUBSCRIPTION_TYPES: Final = {
    "claude_" + plan: plan for plan in ("max", "pro", "team", "enterprise")
}

# Error codes against which another login does not help, and what to do instead.
_LASTING: Final[list[str]] = ["invalid_client", "unauthorized_client", "invalid_scope"]
_CURES: Final = dict.fromkeys(_LASTING, "check the client id and the scopes")

# The anthropic-beta header that the API requires with an OAuth token.
OAUTH_BETA: Final = "oauth-2025-04-20"
# The service's CDN refuses an empty User-Agent, and those of scripting libraries.
USER_AGENT: Final = "claude-oauth-py/" + __version__

# Seconds.
REFRESH_BUFFER: Final = 300  # before expiry: a token is refreshed, and still served
DEFAULT_LIFETIME: Final = 3600.0  # of a token, if the answer has no usable expires_in
MAX_LIFETIME: Final = 366 * 86400.0  # a longer one in an answer counts as malformed
LOGIN_END_WARNING: Final = 3 * 86400.0  # before the login itself ends: `status` warns
LOGIN_TIMEOUT: Final = 300.0  # for a person to sign in
REQUEST_TIMEOUT: Final = 30.0  # to connect, and to answer; under 15, slow proxies fail
MAX_REQUEST_TIMEOUT: Final = 86400.0  # far longer ones exceed the system's own limits
LOOK_INTERVAL: Final = 0.5  # a token is served this long without checking the store
SLOW_FAILURE: Final = 0.1  # a store that takes longer to fail is left alone for a time
LOCK_TIMEOUT: Final = 3 * REQUEST_TIMEOUT  # as long as one request may take elsewhere
REFRESH_RETRY_DELAY: Final = 30.0  # until the next try, if the token is still valid
SHORT_WAIT: Final = 2.0  # once the token has expired, a pause up to this is waited out
WAIT_FLOOR: Final = 1.0  # at least, after a 5xx; doubles each time without Retry-After
RATE_LIMIT_FLOOR: Final = 30.0  # after a bare 429; asking again too soon prolongs it
WAIT_CEILING: Final = 3600.0  # a longer Retry-After counts as this
FLUSH_TIMEOUT: Final = 5.0  # for telemetry at a logout, and again for the revocation

MAX_ANSWER_BYTES: Final = 1 << 20  # far more than any answer; the rest is not read
MAX_FILE_BYTES: Final = 1 << 20  # no credential file is larger
MAX_PASTE_CHARS: Final = 4096  # no code or address is longer


# -- Errors ----------------------------------------------------------------------------


class ClaudeOAuthError(Exception):
    """Any error of this module; ``str()`` says what is wrong and what to do.

    No secret, request or response is in it or its chain; it survives pickle and copy.
    """


class ConfigError(ClaudeOAuthError):
    """A setting is missing or unsafe: fix the call."""


class NotLoggedIn(ClaudeOAuthError):
    """There is no credential: log in."""

    def __init__(self, message: str = "not logged in; run `claude-oauth login`"):
        super().__init__(message)


class LoginError(ClaudeOAuthError):
    """This attempt to log in failed: try again."""


class LoginDenied(LoginError):
    """The server answered the callback with an error.

    ``code`` is for programs (``access_denied``), ``description`` for people.
    Source: RFC 6749 section 4.1.2.1.
    """

    def __init__(self, code: str, description: str | None = None) -> None:
        super().__init__(code, description)
        self.code, self.description = code, description

    def __str__(self) -> str:
        reason = ": ".join(filter(None, (self.code, self.description)))
        return f"the login was denied ({reason}); {_CURES.get(self.code, 'try again')}"


class LoginTimeout(LoginError):
    """Nobody finished the login in time."""


class LoginCancelled(LoginError):
    """The person gave up, or no way to answer is left."""


class TokenRefused(ClaudeOAuthError):
    """The server refused the grant or the token: log in again.

    ``code`` is for programs (``invalid_grant``), ``description`` for people, ``status``
    is HTTP's.  Source: RFC 6749 section 5.2.
    """

    def __init__(
        self, code: str, description: str | None = None, status: int | None = None
    ) -> None:
        super().__init__(code, description, status)
        self.code, self.description, self.status = code, description, status

    def __str__(self) -> str:
        reason = ": ".join(filter(None, (self.code, self.description)))
        if self.status in (402, 403):
            return f"this is not allowed ({reason}); change scope, account or network"
        cure = _CURES.get(self.code, "log in again")
        return f"the server refused the login ({reason}); {cure}"


class Unavailable(ClaudeOAuthError):
    """No usable answer, for a reason that may pass: try later.

    ``retry_after`` is in seconds, ``status`` is HTTP's; each is None if unknown.
    """

    def __init__(
        self, message: str, retry_after: float | None = None, status: int | None = None
    ) -> None:
        super().__init__(message, retry_after, status)
        self.retry_after, self.status = retry_after, status

    def __str__(self) -> str:
        return str(self.args[0])


class BadAnswer(ClaudeOAuthError):
    """The server's answer is not what it should be; ``field`` says where."""

    def __init__(self, field: str, problem: str = "is missing or malformed") -> None:
        super().__init__(field, problem)
        self.field = field

    def __str__(self) -> str:
        return "the server's answer is wrong: {} {}; try later".format(*self.args)


class StorageError(ClaudeOAuthError):
    """The credential could not be read or written."""


class StorageLocked(StorageError):
    """The keychain is locked or asks for a person; the text says how to unlock it."""


class StorageCorrupt(StorageError):
    """The stored record is unreadable; it is left as it was."""


def outcome_of(function: Callable[..., Any], *args: Any) -> tuple[Any, Any]:
    """Call a function; return its result and its exception, whatever that is."""
    try:
        return function(*args), None
    except BaseException as error:
        return None, error


def raise_error(error: BaseException) -> None:
    """Raise an exception, without the frames that it has come through so far."""
    raise error.with_traceback(None)


def hides_locals(subject: _T) -> _T:
    """Keep secrets out of tracebacks: of a function, or a class's public methods.

    Error trackers record the local variables of each frame.  When an exception leaves,
    the call's arguments and the frames below are cleared; those of its causes, too.
    """
    found: Any = subject
    if isinstance(found, type):
        for name, member in list(vars(found).items()):
            if name in _SPECIAL or not name.startswith(_UNGUARDED):
                setattr(found, name, hides_locals(member))
        return subject
    decorated: _T = _clearing_frames(found)
    return decorated


_SPECIAL: Final = ("__init__", "__call__", "__enter__", "__setattr__", "__delattr__")
_UNGUARDED: Final = ("_", "access_token", "auth_headers")  # the latter two clear theirs


def _clearing_frames(function: Any) -> Any:
    if isinstance(function, classmethod):
        return classmethod(_clearing_frames(function.__func__))
    if not isinstance(function, types.FunctionType):
        return function

    def call(*args: Any, **options: Any) -> Any:
        try:
            return function(*args, **options)
        except BaseException as error:  # a Ctrl-C has frames as well
            args, options = (), {}
            _clear_frames(error)
            raise

    wrapper: Any = call
    wrapper.__name__, wrapper.__qualname__ = function.__name__, function.__qualname__
    wrapper.__doc__, wrapper.__wrapped__ = function.__doc__, function
    return wrapper


def _clear_frames(error: BaseException) -> None:
    """Clear the frames of an exception that leaves, and of those behind it."""
    # Not traceback.clear_frames: without a free descriptor its import fails.
    chain = [error]
    for failure in chain:  # grows in the loop
        step = failure.__traceback__
        if step and failure is not error and outcome_of(step.tb_frame.clear)[1]:
            continue  # the caller is handling it: those frames are the caller's
        while step:
            outcome_of(step.tb_frame.clear)  # a RuntimeError: it is still running
            step = step.tb_next
        others = (failure.__cause__, failure.__context__)
        chain += [other for other in filter(None, others) if other not in chain]


# -- Values ----------------------------------------------------------------------------


def setting(name: str, environ: Mapping[str, str] | None = None) -> str:
    """Return an environment variable without surrounding blanks, "" if it is unset."""
    return (os.environ if environ is None else environ).get(name, "").strip()


def printable(text: object, *, secrets: Iterable[str] = (), limit: int = 200) -> str:
    """Return untrusted text as one printable line, without ``secrets`` and tokens."""
    import re

    line = "".join(filter(str.isprintable, " ".join(str(text).split())))
    for secret in secrets:
        if len(secret) > 3:
            line = line.replace(secret, "…")
    line = re.sub(r"(?<=sk-ant-)[\w-]+|(?<=//)\S+(?=@)", "…", line[:4096])
    return line if len(line) <= limit else line[: limit - 1] + "…"


def suppress(*kinds: type[BaseException]) -> Suppress:
    """Return contextlib's context manager of this name, which is slow to import."""
    import contextlib

    return contextlib.suppress(*kinds)


def import_package(name: str, cure: str = "") -> Any:
    """Import a module that may be missing or broken; ConfigError if that fails."""
    from importlib import import_module

    package = name.partition(".")[0]
    try:
        import_module(package)
        return import_module(name)
    except BaseException as error:  # whatever its code runs into, a Rust panic too
        if not isinstance(error, Exception) and "Panic" not in type(error).__name__:
            raise
        is_missing = isinstance(error, ModuleNotFoundError) and error.name == package
        found = f"{error} {sys.modules.get(package, '')}"  # a script of that name
        problem = "is missing" if is_missing else f"is broken: {printable(found)}"
        kind = class_of_fault(error)
        again = "--upgrade --force-reinstall " * (not is_missing)
        again += '"urllib3<2" ' * ("urllib3 v2 only" in problem)  # OpenSSL 1.0.2
    known = f"`apt install python3-{package}`, `dnf install python3-{package}`"
    cure = cure or f"install it: {known} or pip install {again}{package}"
    raise kind(f"the package `{package}` {problem}; {cure}")


def class_of_fault(error: BaseException) -> Any:
    """Return ConfigError; Unavailable for a system without descriptors or memory."""
    passing = (errno.EMFILE, errno.ENFILE, errno.ENOMEM, MemoryError)
    kind: Any = getattr(error, "errno", type(error))
    return dict.fromkeys(passing, Unavailable).get(kind, ConfigError)


@hides_locals
@dataclass_transform(frozen_default=True)
class _Value:
    """A frozen record with its annotations as fields, in order: a small dataclass."""

    # Importing `dataclasses` takes longer than starting Python.
    _secret: ClassVar[tuple[str, ...]] = ()  # the fields that repr does not show

    def __init__(self, *values: Any, **named: Any) -> None:
        cls, names = type(self), type(self).__annotations__
        fields = {**vars(cls), **(given := {**dict(zip(names, values)), **named})}
        is_whole = given.keys() <= names.keys() <= fields.keys()
        if len(given) < len(values) + len(named) or not is_whole:
            got = f"it got {len(values)} values and {sorted(named)}"
            raise TypeError(f"{cls.__name__} takes {', '.join(names)}; {got}")
        for name in names:
            value = fields[name]
            self.__dict__[name] = tuple(value) if isinstance(value, list) else value
        self._validate()

    def _validate(self) -> None:
        """Raise if the values are not valid; for subclasses."""

    def replace(self, **changes: Any) -> Self:
        """Return a copy with these fields changed."""
        return type(self)(**{**self.__dict__, **changes})

    def __setattr__(self, name: str, value: object = None) -> NoReturn:
        raise AttributeError(f"{type(self).__name__} is frozen; use replace()")

    __delattr__ = __setattr__

    def __eq__(self, other: object) -> bool:
        return type(other) is type(self) and self.__dict__ == other.__dict__

    def __hash__(self) -> int:
        return hash(tuple(self.__dict__.values()))

    def __repr__(self) -> str:
        shown = (
            f"{name}={'…' if value and name in self._secret else repr(value)}"
            for name, value in self.__dict__.items()
        )
        return f"{type(self).__name__}({', '.join(shown)})"


@hides_locals
class OAuthConfig(_Value):
    """The client id, the endpoints, the scopes and how requests are sent.

    ``client_id`` is the one that the program was issued; only a login needs it.
    ``revoke_url`` may be None: then a logout revokes nothing.  ``user_agent`` may name
    the program; this module's name is appended.  ``timeout`` is the limit in seconds,
    to connect and again to answer.  Raises ConfigError if a setting is unusable, or an
    endpoint is neither https nor on loopback.
    """

    client_id: str
    claude_ai_authorize_url: str = CLAUDE_AI_AUTHORIZE_URL
    console_authorize_url: str = CONSOLE_AUTHORIZE_URL
    token_url: str = TOKEN_URL
    profile_url: str = PROFILE_URL
    api_key_url: str = API_KEY_URL
    manual_redirect_uri: str = MANUAL_REDIRECT_URI
    revoke_url: str | None = REVOKE_URL
    scopes: tuple[str, ...] = ALL_SCOPES
    user_agent: str = USER_AGENT
    timeout: float = REQUEST_TIMEOUT

    def __init__(self, client_id: str, **settings: Any) -> None:
        super().__init__(client_id, **settings)

    @classmethod
    def for_server(cls, origin: str, *, client_id: str, **settings: Any) -> OAuthConfig:
        """Return the settings for a server that has every endpoint at one origin."""
        scheme, _, host = origin.rstrip("/").partition(":")
        origin = f"{scheme.lower()}:{host}"
        if not may_carry_token(_text(origin, "[^/]+//[^/?#@]+")):
            text = "the server (CLAUDE_OAUTH_SERVER) must be like https://host:port"
            raise ConfigError(f"{text}, with no path; plain http is for loopback alone")
        endpoints = {
            name: f"{origin}/{url.split('/', 3)[3]}"
            for name, (url, *_left_out) in _KNOWN_ENDPOINTS.items()
        }
        endpoints["claude_ai_authorize_url"] = endpoints["console_authorize_url"]
        return cls(client_id, **{**endpoints, **settings})

    @classmethod
    def from_env(cls, environ: Mapping[str, str] | None = None) -> OAuthConfig:
        """Return the settings from CLAUDE_OAUTH_CLIENT_ID and CLAUDE_OAUTH_SERVER."""
        client_id = setting("CLAUDE_OAUTH_CLIENT_ID", environ)
        server = setting("CLAUDE_OAUTH_SERVER", environ)
        return cls.for_server(server, client_id=client_id) if server else cls(client_id)

    def _validate(self) -> None:
        agent, timeout = self.user_agent, self.timeout
        scopes = self.scopes if isinstance(self.scopes, tuple) else ()
        client_id = _text(self.client_id or "", rf"\s*{_NAME}\s*")
        is_number = isinstance(timeout, (int, float))
        name = "the client id (--client-id, CLAUDE_OAUTH_CLIENT_ID)"
        rules = {
            "scopes must be a list of ASCII names without blank, comma or quote": scopes
            and all(_text(scope, rf"(?!.*[,\s]){_NAME}") for scope in scopes),
            f"{name} must be given alone, in ASCII, unquoted": client_id is not None,
            "timeout must be above 0 seconds and at most a day": is_number
            and 0 < timeout <= MAX_REQUEST_TIMEOUT,
            "user_agent must be printable ASCII": _text(agent, "[ -~]*") is not None,
        }
        for name, known in _KNOWN_ENDPOINTS.items():
            url, rule = vars(self)[name], f"{name} must be a URL like https://host/path"
            rule += ", with no password (plain http is for loopback alone)"
            rules[rule] = url in known or may_carry_token(_text(url, "[^@]+"))
        for rule, holds in rules.items():
            if not holds:
                raise ConfigError(rule)
        words = agent.replace(USER_AGENT, "").split()
        self.__dict__["user_agent"] = " ".join((*words, USER_AGENT))
        self.__dict__["client_id"] = str(client_id).strip()


_NULL: Final = r"(?i:null|nil|none|undefined|false|no|off|%\w+%)$"  # stands for none
# A client id or scope: ASCII, without the syntax of shells, templates and env files.
_NAME: Final = rf"(?!\w+=+[^=]|[A-Z_]+=|sk-ant-|{_NULL})[ !%&()+-;=?-_a-z|~]*"
# No backslash: some programs read it as a slash, and so connect to another host.
_URL: Final = (
    r"(?i)https?://(?:[!$&-.0-;=_~%a-z]*@)?(?:\[[0-9a-f:.]+\]|[a-z0-9_-]{1,63}"
    r"(?:\.[a-z0-9_-]{1,63})*\.?)(?::[0-9]*)?(?:[/?#][!-\[\]-~]*)?"
)
# The values of each endpoint that need not be parsed: importing urllib is slow.
_KNOWN_ENDPOINTS: Final[dict[str, list[Any]]] = {
    n: [url] for n, url in vars(OAuthConfig).items() if n.endswith(("_url", "_uri"))
}
_KNOWN_ENDPOINTS["revoke_url"] += (None, "")


def may_carry_token(url: str | None) -> bool:
    """Tell whether a token may go to a URL: https, or plain http on this machine."""
    from urllib.parse import urlsplit

    try:
        parts = urlsplit(str(_text(url, _URL)))  # "None" has no scheme and no host
        is_safe = parts.scheme == "https" or is_loopback(parts.hostname or "")
        return is_safe and parts.port != 0
    except ValueError:  # a port that is no number, brackets that do not match
        return False


def is_loopback(host: str) -> bool:
    """Tell whether a host name or address can only mean this machine."""
    import ipaddress

    try:  # not ``localhost.``: a resolver may send a name with a final dot elsewhere
        return host.lower() == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _text(value: object, pattern: str = r"(?s).*\S.*") -> str | None:
    """Return a str that matches as a whole, by default a non-blank one; else None."""
    import re

    return value if isinstance(value, str) and re.fullmatch(pattern, value) else None


def _field(name: str, value: object) -> str | bool | None:
    if name.startswith("has_"):
        return value if isinstance(value, bool) else None
    return _text(value)


def _header_text(value: object) -> str | None:
    # Printable ASCII without a blank, and not what a template or a shell left unfilled.
    return _text(value, rf"(?![\"'$<{{*\[]|[A-Z_]+=|{_NULL})[!-~]+")


def _object(value: object) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _number(value: object, low: float = -1e15, high: float = 1e15) -> float | None:
    digits = _text(value, "[0-9]+")
    number: Any = float(digits) if digits else value
    is_number = type(number) in (int, float)  # bool is an int, but not a number here
    return number if is_number and low <= number <= high else None


def _moment(value: object) -> float | None:
    milliseconds = _number(value)
    return None if milliseconds is None else max(milliseconds, 0) / 1000


def _milliseconds(moment: float) -> int:
    return int(moment * 1000)


def _lifetime(value: object) -> float | None:
    # Less than a millisecond is useless, and could be lost when added to a timestamp.
    return _number(value, 0.001, MAX_LIFETIME)


def _scopes(value: object) -> tuple[str, ...]:
    if isinstance(value, str):
        value = value.replace(",", " ").split()
    return tuple(filter(_text, value)) if isinstance(value, (list, tuple)) else ()


# The keys of a stored record that are this module's.
RECORD_KEYS: Final = ("claudeAiOauth", "consoleApiKey")

# The credential's fields: the key in the stored record, its reader and its writer.
_RECORD_FIELDS: Final[Mapping[str, tuple[str, Callable[[object], Any], Any]]] = {
    "access_token": ("accessToken", _header_text, str),
    "refresh_token": ("refreshToken", _text, str),
    "api_key": ("consoleApiKey", _header_text, str),
    "expires_at": ("expiresAt", _moment, _milliseconds),
    "refresh_token_expires_at": ("refreshTokenExpiresAt", _moment, _milliseconds),
    "scopes": ("scopes", _scopes, list),
    "subscription_type": ("subscriptionType", _text, str),
    "rate_limit_tier": ("rateLimitTier", _text, str),
    "client_id": ("clientId", _text, str),
}
_TOKEN_KEYS: Final = {key for key, *_ in _RECORD_FIELDS.values()}

# The profile's fields: the key in the answer, and in account.json ("": not there).
_ACCOUNT_FIELDS: Final = {
    "account_uuid": ("uuid", "accountUuid"),
    "email": ("email", "emailAddress"),
    "display_name": ("display_name", "displayName"),
    "account_created_at": ("created_at", "accountCreatedAt"),
}
_ORGANIZATION_FIELDS: Final = {
    "organization_uuid": ("uuid", "organizationUuid"),
    "organization_name": ("name", "organizationName"),
    "subscription_type": ("organization_type", ""),
    "rate_limit_tier": ("rate_limit_tier", ""),
    "billing_type": ("billing_type", "billingType"),
    "subscription_created_at": ("subscription_created_at", "subscriptionCreatedAt"),
    "has_extra_usage_enabled": ("has_extra_usage_enabled", "hasExtraUsageEnabled"),
}
_PROFILE_FIELDS: Final = {**_ACCOUNT_FIELDS, **_ORGANIZATION_FIELDS}


def _read(source: object, fields: Mapping[str, Any], column: int) -> dict[str, Any]:
    found = _object(source)
    return {name: _field(name, found.get(row[column])) for name, row in fields.items()}


@hides_locals
class Credentials(_Value):
    """The result of a login, and the ``scopes`` that were granted.

    Times are seconds since the epoch by this machine's clock, None if unknown; at
    ``refresh_token_expires_at`` the login itself ends.  ``refresh_token`` works once,
    for the program ``client_id``; ``api_key`` is the organization's permanent one.
    """

    _secret = ("access_token", "refresh_token", "api_key")

    access_token: str
    refresh_token: str | None = None
    expires_at: float | None = None
    scopes: tuple[str, ...] = ()
    subscription_type: str | None = None
    rate_limit_tier: str | None = None
    refresh_token_expires_at: float | None = None
    client_id: str | None = None
    api_key: str | None = None

    @property
    def is_claude_ai(self) -> bool:
        """Whether this is a Claude.ai subscriber's login rather than the Console's."""
        return SCOPE_USER_INFERENCE in self.scopes

    def to_record(self) -> dict[str, object]:
        """Return the JSON object to store, without the fields that are None."""
        tokens: dict[str, object] = {}
        for name, (key, _, write) in _RECORD_FIELDS.items():
            if (value := getattr(self, name)) is not None:
                tokens[key] = write(value)
        top: dict[str, object] = {k: tokens.pop(k) for k in tokens.keys() & RECORD_KEYS}
        return {"claudeAiOauth": tokens, **top}

    @classmethod
    def from_record(cls, record: Record) -> Credentials:
        """Read a stored JSON object; a malformed field other than a token is ignored.

        Raises StorageCorrupt if a token has the wrong type, or cannot go into a header.
        """
        api_key = record.get("consoleApiKey")
        stored = {**_object(record.get("claudeAiOauth")), "consoleApiKey": api_key}
        found: dict[str, Any] = {}
        for name, (key, read, _) in _RECORD_FIELDS.items():
            found[name] = read(stored.get(key))
            is_needed = name == "access_token" or stored.get(key) not in (None, "")
            if name.endswith("_token") and is_needed and found[name] is None:
                text = f"{key} in claudeAiOauth is missing or malformed"
                raise StorageCorrupt(f"{text}; log out, then log in again")
        return cls(**found)

    @classmethod
    def from_answer(
        cls, answer: object, *, received_at: float, previous: Credentials | None = None
    ) -> Credentials:
        """Read a token endpoint's answer, merged over the previous credential.

        Raises BadAnswer if no access token is usable.  Another field may be missing or
        malformed, since the refresh token is spent.  Source: RFC 6749 section 5.1.
        """
        if not isinstance(answer, dict):
            raise BadAnswer("the answer", "is not a JSON object")
        if (access_token := _header_text(answer.get("access_token"))) is None:
            raise BadAnswer("access_token")
        # A type that is absent, blank or not a string counts as bearer.
        if _text(answer.get("token_type"), r"(?is)\s*(?!bearer\s*$)\S.*"):
            raise BadAnswer("token_type", "is not bearer")
        base = previous or cls(access_token)
        lifetime = _lifetime(answer.get("expires_in")) or DEFAULT_LIFETIME
        left = _lifetime(answer.get("refresh_token_expires_in"))
        ends_at = received_at + left if left else base.refresh_token_expires_at
        return base.replace(
            access_token=access_token,
            refresh_token=_text(answer.get("refresh_token")) or base.refresh_token,
            expires_at=received_at + lifetime,
            scopes=_scopes(answer.get("scope")) or base.scopes,
            refresh_token_expires_at=ends_at,
        )


@hides_locals
class Profile(_Value):
    """The account and organization of a login.  Times are ISO 8601, as received."""

    account_uuid: str
    email: str | None = None
    display_name: str | None = None
    account_created_at: str | None = None
    organization_uuid: str | None = None
    organization_name: str | None = None
    subscription_type: str | None = None
    rate_limit_tier: str | None = None
    billing_type: str | None = None
    subscription_created_at: str | None = None
    has_extra_usage_enabled: bool | None = None

    @classmethod
    def from_answer(cls, answer: Record) -> Profile:
        """Read the profile endpoint's answer; BadAnswer if it names no account."""
        found = _read(answer.get("account"), _ACCOUNT_FIELDS, 0)
        found.update(_read(answer.get("organization"), _ORGANIZATION_FIELDS, 0))
        if found["account_uuid"] is None:
            raise BadAnswer("account.uuid")
        plan = SUBSCRIPTION_TYPES.get(found["subscription_type"])
        return cls(**{**found, "subscription_type": plan})

    def to_record(self) -> dict[str, object]:
        """Return the part for account.json; plan and tier stay with the credential."""
        return {k: getattr(self, n) for n, (_, k) in _PROFILE_FIELDS.items() if k}

    @classmethod
    def from_record(
        cls, record: Record, credentials: Credentials | None = None
    ) -> Profile | None:
        """Read the part from account.json, with plan and tier from the credential."""
        found = _read(record, _PROFILE_FIELDS, 1)
        found["subscription_type"] = getattr(credentials, "subscription_type", None)
        found["rate_limit_tier"] = getattr(credentials, "rate_limit_tier", None)
        return cls(**found) if found["account_uuid"] else None


# -- PKCE ------------------------------------------------------------------------------


def generate_code_verifier() -> str:
    """Return a code verifier for one login: 43 characters.  Source: RFC 7636, 4.1."""
    import base64

    # As secrets.token_urlsafe does; a script's own secrets.py would hide that module.
    return base64.urlsafe_b64encode(os.urandom(32)).rstrip(b"=").decode("ascii")


def code_challenge(verifier: str) -> str:
    """Return the S256 code challenge of a verifier.  Source: RFC 7636 section 4.2."""
    import base64
    import hashlib

    digest = hashlib.sha256(verifier.encode("ascii")).digest()
    return base64.urlsafe_b64encode(digest).rstrip(b"=").decode("ascii")


def generate_state() -> str:
    """Return a new state: 32 random bytes.  Source: RFC 6749 section 10.12."""
    return generate_code_verifier()


# -- Messages --------------------------------------------------------------------------


def parse_json_object(data: bytes, *, lenient: bool = False) -> dict[str, Any] | None:
    """Return the JSON object in data, if need be with broken characters, else None."""
    import json

    try:  # a JSONDecodeError carries the whole text, tokens included
        encoding = json.detect_encoding(data)
        text = data.decode(encoding, "replace" if lenient else "surrogatepass")
        found = json.loads(text.rstrip("\0"), strict=not lenient)  # a crash adds NULs
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


def dump_json(obj: object) -> str:
    """Return obj as compact ASCII JSON, keys in the order given."""
    import json

    return json.dumps(obj, separators=(",", ":"))


def read_answer(
    status: int, content: bytes, *, field: str, secrets: Iterable[str] = ()
) -> dict[str, object]:
    """Return the JSON object of a 2xx answer, as far as it can be read.

    The grant is spent, so a defect elsewhere must not lose the tokens.  If ``field`` is
    missing, an ``error`` in the answer is raised as it would be with a 4xx status.
    """
    if (answer := parse_json_object(content, lenient=True)) is None:
        answer = _fields_of(content)
    if answer is None and parse_json_object(b'{"":%s}' % content, lenient=True):
        raise BadAnswer("the answer", "is not a JSON object")  # JSON, but a list, say
    found = (known := _object(answer)).get(field)
    is_granted = isinstance(found, dict) or _header_text(found)
    if known.get("error", answer is None) and not is_granted:  # or cannot be read
        raise error_of_answer(status, content, secrets=secrets)
    return known


def _fields_of(content: bytes) -> dict[str, object] | None:
    """Return the fields of a token answer that is truncated or damaged."""
    import re

    names = b"access_token|refresh_token|token_type|scope|expires_in|raw_key|error"
    text = rb'"(?:[ !#-\[\]-~]|\\(?:["/\\]|u[\da-fA-F]{4}))*"'
    value = rb"(?:%s|(?:0|[1-9]\d{0,8})(?=[\s,}]))" % text
    fields = re.findall(rb'"(?:%s)"\s*:\s*%s' % (names, value), content)
    found = _object(parse_json_object(b"{%s}" % b",".join(fields)))
    # A truncated answer may lack the refresh token, and is useless without it.
    is_cut = not content.rstrip().endswith(b"}")
    needed = {"access_token", "refresh_token"} if is_cut else {"access_token"}
    is_useful = needed <= found.keys() or found.keys() & {"raw_key", "error"}
    is_object = content.lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"{")
    return found if is_useful and is_object else None


def scopes_to_refresh(granted: Iterable[str], wanted: Iterable[str]) -> tuple[str, ...]:
    """Return the granted scopes, and the wanted ones that a refresh may add."""
    granted = tuple(granted)
    added = set(wanted).intersection(ALLOWED_SCOPE_EXPANSIONS).difference(granted)
    # If the granted scopes are unknown, a guess could narrow the token.
    return (*granted, *sorted(added)) if granted else ()


def parse_retry_after(value: str | None, *, now: float) -> float | None:
    """Return the seconds that a Retry-After header asks for, None if there are none."""
    from email.utils import parsedate_to_datetime

    try:
        if digits := _text(value, r"\s*[0-9]+\s*"):
            seconds = float(digits)
        else:
            seconds = parsedate_to_datetime(str(value)).timestamp() - now
    except (TypeError, ValueError, IndexError, OverflowError):
        return None
    return min(seconds, WAIT_CEILING) if seconds > 0 else None


def seconds_to_wait(
    status: int, asked_for: float | None, *, failures: int, chance: float
) -> float:
    """Return the seconds to pause after a 429 or a 5xx; each failure doubles them."""
    # `chance` is random, 0 to 1: it keeps many machines from returning at once.
    floor = RATE_LIMIT_FLOOR if status == 429 else WAIT_FLOOR
    seconds = asked_for or floor * 2 ** min(max(failures - 1, 0), 12)
    return min(max(seconds, WAIT_FLOOR) * (1 + chance / 4), WAIT_CEILING)


def error_of_answer(
    status: int,
    body: bytes,
    *,
    retry_after: float | None = None,
    request_id: str | None = None,
    secrets: Iterable[str] = (),
) -> ClaudeOAuthError:
    """Return the error for an answer, without the secrets that it may quote."""
    if status == 403 and b"error code: 1010" in body:
        problem = "the edge refuses this User-Agent"
        return ConfigError(f"{problem}; set user_agent to name your program")
    status = (status, 401)[is_token_refused(status, body)]
    # RFC 6749 section 5.2 and the API have an envelope each; some answers mix them.
    answer = _object(parse_json_object(body, lenient=True) or _fields_of(body))
    error = _object(answer.get("error"))

    def first(limit: int, *found: object) -> str:
        return printable(next(filter(_text, found), ""), secrets=secrets, limit=limit)

    code = first(60, answer.get("error"), error.get("type"), error.get("code"))
    message, request = answer.get("message"), first(80, request_id)
    told = first(200, answer.get("error_description"), error.get("message"), message)
    details = "; ".join(filter(None, (told, request and f"request {request}")))
    if status == 429:
        text = "the server is limiting requests"
    elif status >= 500:
        text = f"the server is out of order ({status})"
    elif _text(f"{status} {code}", _PASSING_CODES):
        text = f"the answer ({status}) is not the service's; a proxy may stand between"
    else:
        return TokenRefused(code, details or None, status)
    text += f" ({details})" if details else ""
    return Unavailable(f"{text}; try again later", retry_after, status)


# Not an access token: a refresh token, a name, a path, `null`, in base64, cut.
_NO_TOKEN: Final = (
    r"sk-ant-(ort|sid|admin|([a-z]+\d*-?)?$)|[A-Z_]+=|\w*(?i:token|key)=|[.~]+/|kv/"
    r"|.*(\.{3}|\.(txt|json|env|key|pem)$)|/([a-z]{2,}|Users|Volumes)/|projects/"
    r"|(process\.)?(env|vars?|secrets?|inputs|github|steps|needs)[./]|_*[A-Z]+_[A-Z_]+$"
    r"|.+sk-ant-|System\.|c2stYW50|7b(22|0a)|(ey[AJ]|ew[k0o])(?!.*\.)"  # a JWT has dots
    rf"|__omit_|{_NULL}|(?i:true|yes|[01x]+|bearer|todo|redacted|change.?me|your.+)$"
)
# Statuses and codes that say nothing about the grant; HTTP's own phrases (`Not Found`).
_PASSING_CODES: Final = (
    r"4(0[5-9]|[1-9]\d) (?!invalid_[gcs]|unauth).*|\d+ ((temporarily_\w+|api_error"
    r"|server_error|rate_limit_\w+|overloaded_error|timeout_error)?|[A-Z].*[a-z].*)"
)


def is_token_refused(status: int, body: bytes) -> bool:
    """Tell whether a token is refused: by a 401, or a 403 (seen in public reports)."""
    return status == 401 or (status == 403 and b"token has been revoked" in body)


@hides_locals
def merge_record(stored: Mapping[str, Any], ours: Mapping[str, Any]) -> dict[str, Any]:
    """Return a stored record with our part replaced; keys of other programs stay."""
    foreign = without(_object(stored.get("claudeAiOauth")), _TOKEN_KEYS)
    kept = without(stored, RECORD_KEYS)
    return {**kept, **ours, "claudeAiOauth": {**foreign, **ours["claudeAiOauth"]}}


def without(record: Mapping[str, Any], keys: Iterable[str]) -> dict[str, Any]:
    """Return a record without some of its keys."""
    return {key: value for key, value in record.items() if key not in keys}


@hides_locals
def clean_token(value: str) -> str:
    """Return a b64token (RFC 6750 section 2.1) without blanks; ConfigError if none."""
    if not _text(token := value.strip(), rf"(?a)(?!{_NO_TOKEN})[\w.~+/-]+=*"):
        raise ConfigError("CLAUDE_OAUTH_TOKEN is no access token; set it to the token")
    return token


def fingerprint(secret: str, *, client_id: str = "", token_url: str = "") -> str:
    """Return a hash that identifies a token or key without revealing it."""
    import hashlib

    # Another client or server may judge the token differently.
    data = "\0".join(("claude-oauth refused", token_url, client_id, secret))
    return hashlib.sha256(data.encode(errors="backslashreplace")).hexdigest()


def describe_seconds(seconds: float) -> str:
    """Return a duration as text: ``90 s``, ``12 min``, ``3 h 12 min``, ``29 d 4 h``."""
    if (whole := max(int(min(seconds, 1e15)), 0)) >= 86400:
        return f"{whole // 86400} d {whole // 3600 % 24} h"
    if whole >= 3600:
        return f"{whole // 3600} h {whole // 60 % 60} min"
    return f"{whole // 60} min" if whole >= 120 else f"{whole} s"


def describe_moment(moment: float | None) -> str | None:
    """Return a moment as ISO 8601 in UTC.  Source: RFC 3339 section 5.6."""
    if moment is None:
        return None
    known = max(0, min(moment, 32_535_215_999))  # Windows knows the years 1970 to 3000
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(known))


# The loopback redirect's path; the server takes any port, but no other path.
CALLBACK_PATH: Final = "/callback"
PASTE_REFUSALS: Final = (
    ("^$", "nothing was pasted"),
    ("[\0-\x1f\x7f-\x9f\ud800-\udfff]", "that has control characters in it"),
    (
        "(?i)sk-ant-|(^|code:?)((gh.|github|hf|npm|[rsp]k|gsk|r8|dckr|dop|shp..|ntn|"
        "whsec|lin_api|figd|sbp|nfp)_|(sk|glp..?|pypi|xox.|xai|nvapi|pplx|tvly|tskey|"
        "pmak|nrak)-|(hvs|ya29|sg)[.]|akia|aiza|(vv|cc)cccc(?=[b-lnrt-v]{38}$))[^#]*$",
        "that is a token or an API key, not a code: keep it safe",
    ),
)
# Source: RFC 6749 appendix A.11 (VSCHAR); not what a page shows that has no code.
_CODE: Final = f"(?!{_NULL})[!-~]{{1,{MAX_PASTE_CHARS}}}"
# A terminal breaks a code into long pieces: none is a word, a number, a date or a path.
# PM has no vowel, and is a word behind a time alone: a code may begin with it.
_WORD: Final = (
    r"(?<!\S)(?:[-/.~+=]|(?<![^\W_])(?:\d+|(?<=:\d\d )PM(?!\S)"
    r"|(?=[^\W\d_]*[aeiouyAEIOUY\x80-\uffff])"
    r"(?:[^\W\d_][^\W\d_A-Z]{0,24}|[A-Z]{2,15}))(?![^\W_]))+(?!\S)"
)
_PROSE: Final = r"(?<!\S)(?:\S*[^\s\w.~+/=-]|/[A-Za-z][a-z]+/|(?!\S{32})\S*[./])\S*"
_NO_PIECE: Final = f"(?:{_PROSE}|{_WORD})"
_CODE_WITH_STATE: Final = (
    rf"(?s:(?!.*(?<!\S)(?!{_NO_PIECE})\S{{24,}}\s.*{_NO_PIECE}\s).*{_NO_PIECE}\s)?"
    rf"((?:(?!{_NO_PIECE})(?:[^\s=]{{16,}}|(?=\S*[^\sA-Za-z])[^\s=]{{8,15}})\s"
    rf"(?!(?=\S{{3}}|\W){_WORD}))*[^#&?:=\s]+=*)"
)
# Too long to guess (RFC 6749 section 10.10), as in a URL; no name, file, UUID, hash.
_NAMES: Final = rf"{_WORD.replace('=]', '=_]')}|[a-z]*(?:[A-Z]+[a-z]{{2,}})+|eyJ\S*"
_OTHER: Final = rf"(?:{_NAMES}|[\da-fA-F-]{{36,40}}|\S*\.[a-z]{{2,5}})(?!\S)|req_|msg_"
_BARE_CODE: Final = (
    rf"(?s:.*(?i:code):?\s(?:.*{_NO_PIECE}\s)?)?"
    rf"((?!{_OTHER})[\w.~+=-]{{16,}}(?:\n(?!{_WORD})[\w.~+=-]+){{0,2}})"
)


class GrantedCode(_Value):
    """An authorization code, and the redirect_uri that the exchange must repeat."""

    code: str
    redirect_uri: str

    _secret = ("code",)


def parse_callback(query: str, *, state: str) -> str:
    """Return a callback's code; LoginDenied for ``error=``, else ValueError says why.

    Source: RFC 6749 sections 4.1.2 and 3.1 (no parameter more than once).
    """
    import hmac
    from urllib.parse import parse_qsl

    pairs = parse_qsl(query, keep_blank_values=True)
    if len(fields := dict(pairs)) < len(pairs):
        raise ValueError("the address has a parameter twice")
    given = fields.get("state", "").encode("utf-8", "replace")
    if not hmac.compare_digest(given, state.encode()):
        raise ValueError("that belongs to another sign-in (its state differs, if any)")
    if "error" in fields:
        secrets = (state, fields.get("code", ""))  # a server may quote them
        description = printable(fields.get("error_description", ""), secrets=secrets)
        code = printable(fields["error"], secrets=secrets, limit=64)
        raise LoginDenied(code or "error", description or None)
    if not _text(fields.get("code"), _CODE):
        raise ValueError("the address has no code")
    return fields["code"]


def parse_paste(text: str, *, state: str, manual_redirect_uri: str) -> GrantedCode:
    """Return the code in what a person pasted: `code#state`, a code, or the address.

    A code without a state has to look like one.  Raises what `parse_callback` does.
    """
    import re

    if len(text) > MAX_PASTE_CHARS:
        raise ValueError(f"that is longer than any code ({MAX_PASTE_CHARS} characters)")
    cleaned = _clean_paste(text, state)
    # The address to open may have been copied along.
    opened = rf"https?://\S*code_challenge=\S*{re.escape(state)}\S*\s*"
    cleaned = re.sub(opened, "", cleaned) or cleaned
    for pattern, reason in PASTE_REFUSALS:
        if re.search(pattern, re.sub("[ \n]", "", cleaned)):
            raise ValueError(reason)
    # With only one of the two bracketed-paste marks, more of the paste is to come.
    if ("\x1b[200~" in text) != ("\x1b[201~" in text) and state not in cleaned:
        raise ValueError("that is not a code")
    # The whole screen may have been copied: then the state stands behind the code.
    if "#" + state not in cleaned:
        if "code_challenge=" in "".join(cleaned.split()):
            raise ValueError("that is the address to open, not the one after sign-in")
        if re.search(r"://|[?&]\w+=", cleaned):
            return _parse_pasted_address(cleaned, state, manual_redirect_uri)
    return GrantedCode(_parse_pasted_code(cleaned, state), manual_redirect_uri)


def _clean_paste(text: str, state: str) -> str:
    """Return the words of a paste, and the state behind a ``#`` or as a parameter."""
    import html
    import re
    import unicodedata
    from urllib.parse import unquote

    text = unicodedata.normalize("NFKC", html.unescape(html.unescape(text)))
    # Bracketed paste, focus events, a shell's escapes, zero-width and direction marks.
    hidden = "\xad\u200b-\u200f\u202a-\u202e\u2060-\u206f\ufeff"
    text = re.sub(r"(?:\x1b|\^\[)?\[20[01]~|\x1b\[[IO]|\^(?=[&\"])", "", text)
    text = re.sub(rf"\\(?![nrt])|[{hidden}]", "", text.replace("\\u0026", "&"))
    text = re.sub("[\u2010-\u2015\u2212]", "-", text.replace("\u2014", "--"))
    text = re.sub("^([^=?]*)&state=", r"\1#", text)  # the end of an address
    if re.search("(?i)^[^=]*%3d[^=]*$|[?&](?:url|q)=https?%3a", text):  # or in a link
        text = unquote(text)
    # Quotes, brackets and the lines of a box stand around an address or a code.
    quotes = "\"'`<>(){}|\u2018-\u201f\xab\xbb\u2039\u203a\u2500-\u257f\u3008-\u3011"
    blank = r"[^\S\n\r\x0b\x0c\x1c-\x1f\u2028\u2029]|\\[nrt]"
    text = re.sub(f"[{quotes}]|{blank}", " ", text)
    text = re.sub(r" *[\n\r\u2028\u2029][ \n\r\u2028\u2029]*", "\n", text)
    text = re.sub(r"(?<!\S)(~~|[*\[])+|(~~|(?<!\.)\.(?!\.)|[,;!*\]])+(?!\S)", "", text)
    text = re.sub(" +", " ", text).strip(" \n").rstrip("?\u3001\u3002")
    text = re.sub("[ \n]*".join(map(re.escape, state)), state, text)
    label = "[ \n]*(?:#|%23)|(?<![=:?&,; \n])[ \n,;]+(?i:state\\b *[:=]?)?"
    text = re.sub(f"(?:{label})[ \n]*{re.escape(state)}", f"#{state}", text)
    # The same once more: Ctrl-V was pressed twice.
    return re.sub(r"(?<!\S)(?!(\S)\1*(?!\S))(\S{16,}?)(?:\s*\2)+(?!\S)", r"\2", text)


def _parse_pasted_code(text: str, state: str) -> str:
    import re

    text = re.sub(r"(?<!\S)(?=\S*?(?:://|\?\w+=))\S+\s", ": ", text.replace("%23", "#"))
    # A terminal of some 75 columns breaks a code in the line of our prompt.
    text = re.sub(r"(\bEnter [^\n]* left *: \S{1,15})\n", r"\1", text)
    text = re.sub(r"[:=]+ ?(?=[\w.~+/-]{8})", ": ", text)
    text = re.sub(r"(?i)(?<!\S)[\w-]*code(?!\S)", "code", text)  # `auth_code`
    text = re.sub(rf"^(?i:state)\W+{re.escape(state)}(?:[^\w-]|-+(?!\S))*", "", text)
    pattern, mark = _BARE_CODE, text.find("#")
    if found := re.search(rf"(?a)#{re.escape(state)}(?![\w#-])", text):
        pattern, text = _CODE_WITH_STATE, text[: found.start()]
    elif mark >= 0 and state.startswith("".join(text[mark + 1 :].split())):
        raise ValueError("the end of the code is missing")
    elif re.search(r"(?i)#|\bstate\b", text):
        raise ValueError("that code belongs to another sign-in (its state differs)")
    pieces = re.split(r"\s", "".join(re.findall(rf"\A{pattern}\Z", text)))
    joined = "".join(pieces)
    faults = (
        # Two codes have the same length; the halves of one broken code hardly ever do.
        len(joined) == 2 * len(pieces[0]) >= 64,
        re.match(r"((.)(?!\2{15}).{15}).*\1", joined),  # a code, behind part of it
        # One of the pieces is of the state, without a #.
        any(map(state.count, re.findall(r"(?<!\S)\S{8}", " ".join(pieces)))),
        not re.fullmatch(rf"(?!.*(?:{re.escape(state)}|\.\.)){_CODE}", joined),
    )
    if any(faults):
        raise ValueError("that is not a code")
    return joined


def _parse_pasted_address(text: str, state: str, manual_uri: str) -> GrantedCode:
    import re

    text = re.sub("(?=https?://)", " ", text)
    near = "(?:(?!://).)*?"  # a line break may be in it
    name = r"\b(?:code|error|state)="
    found = re.search(rf"(?s)(?:https?://{near}|\S*){name}{near}{name}\s*\S*", text)
    start, end = found.span() if found else (0, len(text))
    address = "".join(text[start:end].split())
    behind = text[start:].partition("code=")[2]
    if re.search("[?&]code=[^&]*$", address) and re.search(r"\s", behind):
        raise ValueError("the code in that address is cut: copy the address alone")
    page, _, query = address.rpartition("?")
    # Browsers hide the scheme; some leave it out of what is copied.
    manual = re.escape(re.sub("(?i)^https?://", "", manual_uri))
    loopback = rf"(?:localhost|127\.0\.0\.1|\[::1\])(:\d{{1,5}})?{CALLBACK_PATH}"
    whole = rf"(?i)^\w+=|(?<![\w.@-])(?:{manual}|({loopback}))$"
    if not (known := re.search(whole, [page, query][not page])):
        raise ValueError("that is the address of another page, or a part of one")
    if known[1]:  # a browser leaves out port 80
        manual_uri = f"http://localhost{known[2] or ':80'}{CALLBACK_PATH}"
    return GrantedCode(parse_callback(query.partition("#")[0], state=state), manual_uri)


def success_page(account: str | None) -> str:
    """Return the page after a login; `account` is a name for the person, or None."""
    who = f" as {printable(account)}" if account else ""
    text = f"You are signed in{who}.\nYou can close this window."
    return result_page("\u2713", "Signed in", text)


def failure_page(reason: str) -> str:
    """Return the page after a login that failed: what happened, and what to do."""
    reason = printable(reason, limit=400)
    text = f"{reason[:1].upper()}{reason[1:]}.\nClose this window and see the terminal."
    return result_page("!", "Sign-in failed", text)


def denied_page() -> str:
    """Return the page for a login that was denied."""
    text = "Nothing was stored.\nIf it was a mistake, close this window and try again."
    return result_page("\u2715", "Access was not granted", text)


def stray_page(reason: str) -> str:
    """Return the page for a request that is not what the login waits for, and why."""
    text = f"A sign-in is waiting here for something else: {reason}.\n"
    text += "Go back to the terminal, and open the address that it shows."
    return result_page("!", "Nothing to see here", text)


def result_page(mark: str, title: str, text: str) -> str:
    """Return a whole HTML page without script or outside resource; text is escaped."""
    import html

    return f"""<!doctype html>
<html lang="en"><meta charset="utf-8"><link rel="icon" href="data:,">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{html.escape(title)}</title><style>{_STYLE}</style>
<main><p class="mark" aria-hidden="true">{mark}</p><h1>{html.escape(title)}</h1>
<p>{html.escape(text)}</p></main>
"""


_STYLE: Final = """
:root { color-scheme: light dark; } .mark { font-size: 2.5rem; margin: 0; }
main { background: Canvas; font: 1.0625rem/1.55 system-ui; text-align: center;
  max-width: 30rem; margin: 25vh auto; }
p { white-space: pre-line; overflow-wrap: anywhere; }
"""


# -- Client ----------------------------------------------------------------------------


class Deadline:
    """One time limit for several waits in a row, by the monotonic clock."""

    def __init__(self, seconds: float) -> None:
        self._ends = time.monotonic() + seconds

    def left(self) -> float:
        """Return the seconds that are left, 0 when it has passed."""
        return max(self._ends - time.monotonic(), 0.0)


def start_thread(
    name: str, function: Callable[..., object], *args: object
) -> threading.Thread | None:
    """Start a daemon thread, whose errors nobody handles; None if it cannot start."""
    import threading

    run: Any = {"target": outcome_of, "args": (function, *args), "daemon": True}
    with suppress(RuntimeError):  # a sub-interpreter may refuse even to make one
        thread = threading.Thread(name=f"claude-oauth-{name}", **run)
        thread.start()
        return thread
    return None


def call_with_limit(
    function: Callable[[], _T], seconds: float
) -> tuple[_T | None, BaseException | None]:
    """Call a function; return its result and its exception, TimeoutError if it is late.

    A late call goes on in a daemon thread.  If no thread can start, there is no limit.
    """
    import threading

    outcome: list[tuple[Any, Any]] = [(None, TimeoutError())]
    deadline = Deadline(seconds)

    def run() -> None:
        outcome.append(outcome_of(function))

    def wait() -> None:
        if thread := start_thread("call", run):
            thread.join(seconds / 2)  # in two parts: SIGSTOP may outlast the first
            thread.join(seconds / 2)
        else:
            run()

    if interrupt := outcome_of(wait)[1]:
        keep = _INTERRUPTS.get(threading.get_ident())  # None outside a refresh
        # Not join: once interrupted, it may not return any more (bpo-45274).
        while all((keep, deadline.left(), not outcome[1:])):
            interrupt = outcome_of(time.sleep, 0.01)[1] or interrupt
        (keep or raise_error)(interrupt)
    return outcome.pop()


# By thread, in a refresh: keeps what is thrown into it until the login is saved.
_INTERRUPTS: Final[dict[int, Callable[[BaseException], object]]] = {}


@hides_locals
class OAuthClient:
    """The requests to the service, each with a time limit and a size limit.

    Without a session, each request makes its own.  Thread-safe if the session is.
    """

    def __init__(
        self,
        config: OAuthConfig,
        *,
        session: requests.Session | None = None,
        clock: Clock = time.time,
    ) -> None:
        self.config, self._session, self._clock = config, session, clock

    def check(self) -> None:
        """Raise ConfigError if no request could be sent, without sending one."""
        self.client_id_for(None)
        session = self._session or import_requests().Session()
        check_route(self.config.token_url, session)
        check_route(self.config.profile_url, session)

    def client_id_for(self, credentials: Credentials | None) -> str:
        """Return the client id that a grant was issued to; ConfigError if unknown."""
        client_id = getattr(credentials, "client_id", "") or self.config.client_id
        if not client_id:
            cure = "pass client_id=, --client-id or CLAUDE_OAUTH_CLIENT_ID"
            raise ConfigError(f"no client id: {cure} (the one issued to your program)")
        return client_id

    def authorize_url(
        self,
        *,
        redirect_uri: str,
        challenge: str,
        state: str,
        console: bool = False,
        extra: Mapping[str, str] | None = None,
    ) -> str:
        """Return the address where a person approves the login.

        Source: RFC 6749 section 4.1.1 and RFC 7636 section 4.3; ``code=true`` makes the
        service's manual page show the code (seen in the public client's traffic).
        """
        from urllib.parse import urlencode

        config = self.config
        page = (config.claude_ai_authorize_url, config.console_authorize_url)[console]
        query = {
            "code": "true",
            "client_id": self.client_id_for(None),
            "response_type": "code",
            "redirect_uri": redirect_uri,
            "scope": " ".join(config.scopes),
            "code_challenge": challenge,
            "code_challenge_method": "S256",
            "state": state,
            **(extra or {}),
        }
        return f"{page}{'?&'['?' in page]}{urlencode(query, errors='replace')}"

    def exchange_code(
        self, code: str, *, verifier: str, redirect_uri: str, state: str
    ) -> Credentials:
        """Trade an authorization code for tokens; it works once.

        Raises TokenRefused if it is wrong, used or too old; Unavailable or BadAnswer if
        the answer is not usable, and the code may be spent.  Source: RFC 6749 section
        4.1.3; the service refuses a request without ``state``.
        """
        body = {"grant_type": "authorization_code", "code": code, "state": state}
        body.update(redirect_uri=redirect_uri, code_verifier=verifier)
        body["client_id"] = self.client_id_for(None)
        answer = self._send(self.config.token_url, body, "access_token")
        # RFC 6749 section 5.1: an answer without scope grants what was asked for.
        base = Credentials("", scopes=self.config.scopes, client_id=body["client_id"])
        return Credentials.from_answer(answer, received_at=self._clock(), previous=base)

    def refresh(
        self, credentials: Credentials, *, scopes: Iterable[str] | None = None
    ) -> Credentials:
        """Spend the refresh token for new tokens, merged over the given ones.

        Save the result before you use it: the token that was sent is dead.  Raises
        NotLoggedIn if there is none to send; TokenRefused if it is dead, or a scope is
        not allowed; Unavailable if no answer is usable: it may be spent all the same.
        """
        answer, now = self.request_refresh(credentials, scopes or ()), self._clock()
        renewed = Credentials.from_answer(answer, received_at=now, previous=credentials)
        return renewed.replace(client_id=self.client_id_for(credentials))

    def request_refresh(
        self, credentials: Credentials, scopes: Iterable[str] = ()
    ) -> dict[str, object]:
        """Do what `refresh` does, but return the server's answer itself.

        Without scopes the server keeps those granted.  Source: RFC 6749 section 6.
        """
        if not (token := credentials.refresh_token):
            raise NotLoggedIn("there is no refresh token; run `claude-oauth login`")
        body = {"grant_type": "refresh_token", "refresh_token": token}
        body["client_id"] = self.client_id_for(credentials)
        if scopes := tuple(scopes):
            body["scope"] = " ".join(scopes)
        return self._send(self.config.token_url, body, "access_token")

    def fetch_profile(self, access_token: str) -> Profile:
        """Return the profile; TokenRefused if the token is dead or too narrow."""
        answer = self._send(self.config.profile_url, None, "account", access_token)
        return Profile.from_answer(answer)

    def create_api_key(self, access_token: str) -> str:
        """Create another permanent Console API key; TokenRefused if not allowed."""
        answer = self._send(self.config.api_key_url, {}, "raw_key", access_token)
        if key := _header_text(answer.get("raw_key")):
            return key
        raise BadAnswer("raw_key")

    def revoke(self, token: str) -> None:
        """End the grant behind a refresh token.  Source: RFC 7009 section 2.1."""
        if not self.config.revoke_url:
            raise ConfigError("no revoke_url is set; set one, or log out without it")
        body = {"token": token, "token_type_hint": "refresh_token"}
        body["client_id"] = self.client_id_for(None)
        self._send(self.config.revoke_url, body)

    def _send(
        self, url: str, body: Mapping[str, str] | None, field: str = "", token: str = ""
    ) -> dict[str, object]:
        """Send a request; return the answer's JSON object, {} without a field."""
        status, headers, content = self._fetch(url, body, token)
        names = ("code", "code_verifier", "state", "refresh_token", "token")
        secrets = [token, *((body or {}).get(name, "") for name in names)]
        if not 200 <= status < 300:
            wait = parse_retry_after(headers.get("Retry-After"), now=self._clock())
            known: Any = {"retry_after": wait, "request_id": headers.get("request-id")}
            raise error_of_answer(status, content, secrets=secrets, **known)
        if not (field or _object(parse_json_object(content)).get("error")):
            return {}
        return read_answer(status, content, field=field, secrets=secrets)

    def _fetch(
        self, url: str, body: Mapping[str, str] | None, token: str
    ) -> tuple[int, Mapping[str, str], bytes]:
        """Send a request; return status, headers and content of any answer."""
        from contextlib import ExitStack

        # Not compressed: a proxy that unpacks an answer may leave its Content-Encoding.
        headers = {"Accept": "application/json", "Accept-Encoding": "identity"}
        headers["Cache-Control"] = "no-store"  # else requests-cache may keep it
        headers["User-Agent"] = self.config.user_agent
        if token:
            headers["Authorization"] = f"Bearer {token}"
            headers["anthropic-beta"] = OAUTH_BETA
        answers: list[requests.Response] = []
        content, route = bytearray(), url.split("/")[2]

        def request() -> None:
            nonlocal route
            with ExitStack() as stack:
                requests = import_requests()
                session = self._session or stack.enter_context(requests.Session())
                route, proxies = check_route(url, session)
                try:
                    response = session.request(
                        ("POST", "GET")[body is None],
                        url,
                        json=body,
                        headers=headers,
                        # Without an auth= of ours, a netrc entry replaces the token.
                        auth=_without_redirect,
                        proxies=proxies,
                        timeout=self.config.timeout,
                        # A token must not follow a redirect to wherever it points.
                        allow_redirects=False,
                        stream=True,
                    )
                except requests.HTTPError as error:  # of a hook in the session
                    response = error.response
                answers.append(stack.enter_context(response))
                # Byte by byte: urllib3 2 drops the last piece if it is incomplete.
                for piece in response.iter_content(1):
                    content.extend(piece)
                    if len(content) >= MAX_ANSWER_BYTES:
                        break

        # `requests` limits the wait for each packet, not a resolver or slow headers.
        deadline, error = Deadline(3 * self.config.timeout), None
        # Retry a dropped connection: a later call would send the same token anyway.
        for _ in range(1 + (body is None or "refresh_token" in body)):
            _nothing, failure = call_with_limit(request, deadline.left())
            error = _error_of_failure(failure, route)
            # Once an answer has begun, the token is spent.
            if answers or str(error) != _DROPPED.format(route=route):
                break
        data = bytes(content[:MAX_ANSWER_BYTES])
        # A complete answer counts, whatever follows.  The error holds text, no request.
        if error and not (parse_json_object(data) or _fields_of(data)):
            raise error
        return answers[0].status_code, answers[0].headers, data


def _without_redirect(request: Any) -> Any:
    # `requests` parses a Location that it does not follow, and may fail on it.
    request.register_hook("response", lambda got, **_: got.headers.update(Location=""))
    return request


# A proxy's URL that every `requests` takes; groups: `https://`, and the host and port.
_PROXY_URL: Final = (
    rf"(?i)\A(?!{_NULL}|(?:\d+|yes|on|true|direct)\Z|(?:https?|socks[45]\w?):(?!//))"
    r"(?:(?:(https://)|(?:http|socks(?:4a?|5h?))://)(?:[^\s/?#\\\[\]]*@)?)?"
    r"((?:[\w-]{1,63}(?:\.[\w-]{1,63})*\.?|\[[\da-f:.]+\])(?::(?!0)[0-6]?\d{0,4})?)/?\Z"
)
_DROPPED: Final = "{route} dropped the connection; try again later"

# The text for an exception of a class, or with one inside; the first match counts.
_FAILURES: Final = {
    "SSLError": "TLS to {route} failed ({why}); check the clock and the address, and if"
    " a proxy inspects TLS here, set REQUESTS_CA_BUNDLE to its certificate's file",
    "ProxyError SOCKS5 0x02:": "no connection to {route}: the proxy refused or did not"
    " answer ({why}); check HTTPS_PROXY, its user and password, and what it allows",
    "ConnectionResetError ConnectionAbortedError BrokenPipeError": _DROPPED,
    "Timeout TimeoutError": "no answer from {route} in time; try again later",
    "ValueError TypeError AttributeError ImportError LookupError FileNotFoundError"
    " PermissionError OSErrorNone RecursionError": "no request to {route}"
    " can be made ({kind}); check the address, the proxy and the certificates' files",
    "ConnectionError": "no connection to {route}; check the network and try again",
    "Exception": "no usable answer from {route} ({kind}); try again later",
}


def _error_of_failure(error: BaseException | None, route: str) -> BaseException | None:
    import re

    if isinstance(error, ClaudeOAuthError) or not isinstance(error, Exception):
        return error
    # `requests` wraps urllib3's error, and that the socket's; they nest by args.
    causes: list[object] = [error]
    for cause in causes:
        causes += getattr(cause, "args", ())
    kinds = {kind.__name__ for cause in causes for kind in type(cause).__mro__}
    kind = type(error).__name__
    version = getattr(sys.modules.get("urllib3"), "__version__", "")
    old = r"1\.26\.[0-7] .*proxy https:.*(wrong version|check_hostname)"  # says less
    if _text(f"{version} {route} {error}", f"(?is)({old}|.*only use HTTP).*"):
        kinds, kind = {"ValueError"}, "HTTPS_PROXY and ALL_PROXY take http:// alone"
    kinds |= {"SOCKS5", "0x02:"}.intersection(str(error).split())  # PySocks: a refusal
    # What `requests` itself says of a missing file is an OSError without a number.
    kinds.add(f"{kind}{getattr(error, 'errno', '')}")
    row = next(names for names in _FAILURES if kinds.intersection(names.split()))
    why = str(error).partition("[SSL")[2].partition("] ")[2].partition(" (_ssl")[0]
    why += str(error).partition("Tunnel connection failed: ")[2][:3]  # HTTP's status
    why += "hostname mismatch" * ("doesn't match" in str(error))  # urllib3 1.26
    text = _FAILURES[row].format(route=route, kind=kind, why=printable(f"{kind} {why}"))
    retried = re.findall(r"too many (\d{3}) error responses'", str(error))  # by Retry
    status = [*map(int, retried), None][0]
    return ConfigError(text) if "ValueError" in row else Unavailable(text, None, status)


def import_requests() -> Any:
    """Return the package `requests`; raises ConfigError if it is missing or broken."""
    try:
        import_package("requests.sessions")  # a stray requests.py has none
    except ConfigError:
        _check_tls_files(False, None)  # `requests` 2.32.3 uses TLS at its import
        raise
    return sys.modules["requests"]


def check_route(url: str, session: requests.Session) -> tuple[str, Any]:
    """Return a text that names the host and its proxy, and the proxies to ask for.

    Raises ConfigError if the proxy's URL (which is not shown) or a TLS file is wrong.
    """
    import re
    from urllib.parse import urlsplit

    requests, parts = import_requests(), urlsplit(url)
    merge = getattr(session, "merge_environment_settings", None)
    if parts.scheme == "http" or not merge:  # not a session of `requests`
        # It stays on this machine: the key with the host outranks any HTTP_PROXY.
        return parts.netloc, {f"http://{parts.hostname}": ""}
    settings = merge(url, {}, True, None, None)
    _check_tls_files(settings["verify"], settings["cert"])
    if not (proxy := requests.utils.select_proxy(url, settings["proxies"])):
        return parts.netloc, None  # None: a session may choose its own
    try:
        [found] = re.findall(_PROXY_URL, proxy)  # else a ValueError
        proxy_url = requests.utils.prepend_scheme_if_needed(proxy, "http")
        requests.adapters.HTTPAdapter().proxy_manager_for(proxy_url)
        return f"{parts.netloc} through the proxy {''.join(found)}", None
    except (ValueError, AssertionError, AttributeError) as error:
        kind = type(error).__name__
    problem = (
        "names a SOCKS proxy; get PySocks: pip install PySocks"
        if kind in ("InvalidSchema", "AttributeError")
        else "is no usable proxy URL like http://host:port or socks5h://host:port; a"
        " password is Latin-1, with blanks # ? / [ @ \\ as %20 %23 %3F %2F %5B %40 %5C"
    )
    name = _variable_or("the session or OS proxy", proxy, ("HTTPS_PROXY", "ALL_PROXY"))
    raise ConfigError(f"{name} {problem}")


def _check_tls_files(bundle: Any, cert: Any) -> None:
    from glob import escape, glob

    ssl = import_package("ssl", "this Python has no TLS: install OpenSSL for it")
    name, path = "OpenSSL (OPENSSL_CONF)", os.environ.get("OPENSSL_CONF", "openssl.cnf")
    try:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        name, path = "SSLKEYLOGFILE", os.environ.get("SSLKEYLOGFILE", "")
        if path:
            open(os.path.expandvars(path), "ab").close()
        if bundle is True:
            name, path = "`certifi` (reinstall it)", import_requests().certs.where()
            context.load_verify_locations(path)
        elif isinstance(bundle, (str, os.PathLike)):
            variables, path = ("REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE"), str(bundle)
            name = _variable_or("the session's verify", path, variables)
            # In a directory, OpenSSL finds certificates by their hash alone.
            if not glob(os.path.join(escape(path), "????????.[0-9]*")):
                context.load_verify_locations(path)
        name, path = "the session's cert", "a file"  # not its name, which may be a key
        for each in [cert] if isinstance(cert, str) else cert or ():
            open(each, "rb").close()  # to load it may ask for a passphrase
    except (OSError, TypeError, ValueError) as error:
        shown = printable(repr(path).replace("\\\\", "\\"))  # not Windows' doubled
        text = f"{name} names {shown}, which cannot be used ({_reason(error)})"
        raise class_of_fault(error)(f"{text}; correct or unset it") from None


def _reason(error: Exception) -> str:
    return printable(getattr(error, "strerror", "") or type(error).__name__).lower()


def _variable_or(name: str, value: str, variables: Iterable[str]) -> str:
    """Return the name of the variable that has this value, else the given name."""
    known = sorted(os.environ.items(), reverse=True)  # if two have it, the first name
    return {v: n for n, v in known if n.upper() in variables}.get(value, name)


# -- Storage ---------------------------------------------------------------------------


class Storage(Protocol):
    """Where a credential waits between runs.  Safe to share between threads.

    Optional: ``read_only`` (True: another program owns the credential, so its refresh
    token is never spent), ``account_file`` (account and shared notes; None: memory).
    """

    def load(self) -> Credentials | None:
        """Return the stored credential, or None if it is certain that there is none."""

    def save(self, credentials: Credentials) -> None:
        """Write a credential whole; after a StorageError it may be stored, or not."""

    def delete(self) -> bool:
        """Remove this module's own keys; return whether there were any."""
        ...

    def check(self) -> None:
        """Raise StorageError if a save could not succeed now, under the same lock."""

    def lock(self, timeout: float) -> ContextManager[object]:
        """Return an inter-process lock; Unavailable if held too long (0: try once)."""
        ...

    def stamp(self) -> object:
        """Return a cheap value that changes whenever the record does; None: read it."""

    def describe(self) -> str:
        """Say for people where the credential is."""
        ...


def absolute_path(path: str | os.PathLike[str] | None, name: str = "") -> str:
    """Return an absolute path (None: `name` in our directory), or ConfigError."""
    if path is None:
        path = os.path.join(default_directory(), name)
    found = os.fsdecode(path).rstrip("\r\n")
    no_path = {"": _NO_PATH}.get(name, rf"{_NO_PATH}|^\.$")  # Path("") is no file
    if os.environ.get(("HOME", "USERPROFILE")[os.name == "nt"]) != "":  # else: the root
        found = os.path.expanduser(found)
    if _text(found, f"(?s).*({no_path}).*") is not None:
        why = "empty, null, quoted, a variable, a URL, or no home directory is known"
        cure = "give an absolute path (--dir, CLAUDE_OAUTH_DIR, CLAUDE_CONFIG_DIR)"
        raise ConfigError(f"{printable(found)!r} is no path ({why}); {cure}")
    return os.path.abspath(found)


def default_directory(environ: Mapping[str, str] | None = None) -> str:
    """Return where files go: CLAUDE_OAUTH_DIR, or beside Claude's own settings."""
    chosen = setting("CLAUDE_OAUTH_DIR", environ)
    settings = setting("CLAUDE_CONFIG_DIR", environ) or os.path.join("~", ".claude")
    return absolute_path(chosen or os.path.join(settings, "claude-oauth"))


def warn(message: str, *, once: bool = False) -> None:
    """Log a warning; Python prints it to stderr if the program sets up no logging."""
    import logging

    if message not in _WARNED:
        # In a thread: error trackers may record the frames that a log call comes from.
        log = logging.getLogger("claude_oauth").warning
        call_with_limit(lambda: log(message), FLUSH_TIMEOUT)
    _WARNED.update([message] * once)


# Empty, null, quoted, two paths, a variable, a template, a comment, a URL, a drive.
_NO_PATH: Final = (
    "^\\s*$|^['#%~${\ufeff\u2018\u201c\u201e\xab]|[\"`]|\\$[{(]|{{|\\s#\\s|,[~/]|\0|"
    f"^\\w+=|^([Nn]one|null|undefined)($|[/\\\\])|(^|[/\\\\_-])(\\$[A-Z_]+|<|%\\w+%)|"
    f"^\\w+:[\\\\/]{'(?<!^.:.)' if os.name == 'nt' else ''}"
)
_WARNED: Final[set[str]] = set()  # what this process says only once
_READABLE_BY_OTHERS: Final = "others can read it; set its mode to 0600 (folder: 0700)"


def _make_private(target: int | str, mode: int, subject: str) -> bool:
    """Set the mode of a file or directory; warn once where that has no effect."""
    if sys.platform == "win32":
        return False  # the mode is invented there, and access follows from the ACL
    if _quietly(os.chmod, target, mode) and not os.stat(target).st_mode & 0o077:
        return True
    warn(f"{subject}: {_READABLE_BY_OTHERS}", once=True)
    return False


def _make_directory(path: str, subject: str) -> None:
    """Create a directory and those above it, 0700 each; leave existing ones alone."""
    # os.makedirs would apply the mode to the last level only.
    if os.path.isdir(path) or (parent := os.path.dirname(path)) == path:
        return
    _make_directory(parent, subject)
    with suppress(FileExistsError):  # another process was faster
        os.mkdir(path, 0o700)
        _make_private(path, 0o700, subject)  # a umask of 0777 has left 0000


def read_private(
    path: str, *, is_ours: bool = True, any_owner: bool = False
) -> bytes | None:
    """Return a private file's content; None if it is missing, blank or all NULs.

    A file of ours that others can read is set to 0600 with a warning.  Raises
    StorageError if it is not a regular file, or is another user's.
    """
    try:
        # Not after opening it: a named pipe would hold the program up.
        if os.stat(path).st_mode & 0o170000 != 0o100000:  # S_IFMT, S_IFREG
            raise StorageError(f"{path} is not a regular file; name another")
        if not any_owner and _is_replaced(path):
            warn(f"{path}: {_REPLACED}", once=True)
        with _try_for_a_while(open, path, "rb") as file:
            _check_owner_and_mode(file.fileno(), path, is_ours, any_owner)
            data = file.read(MAX_FILE_BYTES + 1)
    except FileNotFoundError:
        return None
    except OSError as error:
        text = f"cannot read {path}: {_reason(error)}; {_cure_of(error)}"
        raise StorageError(text) from None
    if len(data) > MAX_FILE_BYTES:
        raise StorageCorrupt(f"{path} is too large to be a credential; move it away")
    blank = (b"", b"\xef\xbb\xbf", b"\xff\xfe", b"\xfe\xff")
    return None if data.strip(b"\0 \t\r\n\v\f") in blank else data


def _is_replaced(path: str) -> bool:
    """Tell whether a file that is mounted alone was replaced outside the mount."""
    if not os.stat(path).st_nlink:
        time.sleep(0.02)  # perhaps another file is renamed over it just now
    return os.stat(path).st_nlink + (os.name == "nt") == 0


def _check_owner_and_mode(fd: int, path: str, is_ours: bool, any_owner: bool) -> None:
    if sys.platform == "win32":
        return
    if (found := os.fstat(fd)).st_uid not in (os.geteuid(), 0) and not any_owner:
        raise StorageError(f"{path} is another user's; use a directory of your own")
    if not found.st_mode & 0o077 or (any_owner, found.st_mode & 0o777) == (True, 0o440):
        return  # 0440 may be an ACL for this user alone, as systemd sets it
    if not is_ours:
        warn(f"{path}: {_READABLE_BY_OTHERS}", once=True)
    elif _make_private(fd, 0o600, os.path.dirname(os.path.realpath(path))):
        warn(f"others could read {path}; it is set to 0600 now")


def _cure_of(error: OSError) -> str:
    passing = {Unavailable: "try later"}  # no descriptor or memory is left
    cure = passing.get(class_of_fault(error), "choose another directory")
    return "check its owner and mode, or " * isinstance(error, PermissionError) + cure


class _AtomicFile:
    """A replacement for a private file: written beside it, then renamed over it.

    If it reserves space before a refresh, a disk that fills up cannot lose the tokens.
    """

    def __init__(self, path: str, *, reserve: bool = False) -> None:
        # os.replace onto a link would replace the link, and leave the old token there.
        self._path, self._real = path, os.path.realpath(path)
        self._directory, name = os.path.split(self._real)
        unique = f".{name}.{os.urandom(8).hex()}{_TEMPORARY_SUFFIX}"
        self._temporary = os.path.join(self._directory, unique)
        self._file: Any = io.BytesIO()  # until there is one
        try:
            self._file = _open_private(self._temporary, os.O_EXCL)
            if reserve:
                _check_owner_and_mode(self._file.fileno(), path, True, False)
                self._file.write(b" " * (RESERVED_BYTES + self._size_if_replaceable()))
                _sync(self._file, self._directory)
        except OSError as error:
            self.discard()
            raise StorageError(f"cannot write {path}: {_reason(error)}") from None

    def commit(self, data: bytes, *, sync: bool = True) -> None:
        """Write the data, into the reserved space if any, and replace the file."""
        try:
            self._file.seek(0)
            self._file.write(data)
            self._file.truncate()
            if sync:
                _sync(self._file, self._directory)
            self._file.close()
            self._replace(data)
        except OSError as error:
            raise StorageError(f"cannot write {self._path}: {_reason(error)}") from None
        finally:
            self.discard()

    def discard(self) -> None:
        """Remove what was not committed."""
        _quietly(self._file.close)  # a full NFS says so only now
        _quietly(os.unlink, self._temporary)

    def _size_if_replaceable(self) -> int:
        """Return the file's size; raise if it can be neither replaced nor rewritten."""
        try:
            os.close(os.open(self._real, os.O_WRONLY))
        except FileNotFoundError:
            return 0
        except PermissionError:
            os.chmod(self._real, 0o600)  # fails unless it is ours, and can be replaced
            # On Windows, another program may have it open and not share it.
            os.close(_try_for_a_while(os.open, self._real, os.O_WRONLY))
        if _is_replaced(self._real):
            raise OSError(errno.ESTALE, _REPLACED)
        return os.path.getsize(self._real)

    def _replace(self, data: bytes) -> None:
        """Rename over the file; rewrite it in place if that fails, as for a mount."""
        if _quietly(_try_for_a_while, os.replace, self._temporary, self._real):
            return
        # Blanks, which JSON allows, reserve space, and hide the end of an old record.
        with _open_private(self._real, 0) as file:
            size = file.seek(0, os.SEEK_END)
            file.write(b" " * (len(data) - size))
            file.seek(0)
            file.write(data.ljust(size))
            file.truncate(len(data))
            _sync(file, self._directory)


_REPLACED: Final = "it was replaced outside this mount; mount its folder instead"
_DPAPI_MARK: Final = b"dpapi:"
_UNDECRYPTABLE: Final = (
    "the encrypted login cannot be read: it is damaged, was encrypted in another way,"
    " or the passphrase is wrong; set the right one, or move it away and log in again"
)
_ENCRYPTED_KEY: Final = "claudeOauthEncrypted"
_OUR_KEYS: Final = (*RECORD_KEYS, _ENCRYPTED_KEY)
RESERVED_BYTES: Final = 16384  # how much longer a record may get by a refresh
_TEMPORARY_SUFFIX: Final = ".claude-oauth.tmp"
_PAUSES: Final = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0) if os.name == "nt" else ()
# Other errors mean "held": EAGAIN; EACCES or EDEADLK on Windows; any number in Wine.
_LOCK_FAULTS: Final = (
    {errno.EBADF, errno.EINVAL} if os.name == "nt" else {*range(1000)} - {errno.EAGAIN}
)


def _open_private(path: str, flags: int) -> io.BufferedRandom:
    """Open a file of ours to write it; make it, and its directory, if need be."""
    directory = os.path.dirname(path)
    _make_directory(directory, directory)
    flags |= os.O_RDWR | os.O_CREAT | getattr(os, "O_BINARY", 0)
    # A file object, which closes itself if Ctrl-C comes.
    file = os.fdopen(_try_for_a_while(os.open, path, flags, 0o600), "r+b")
    _make_private(file.fileno(), 0o600, directory)  # a umask of 0777 has left 0000
    return file


def _try_for_a_while(function: Callable[..., Any], *arguments: object) -> Any:
    """Call a function again while Windows says that a file is open elsewhere."""
    for pause in _PAUSES:
        try:
            return function(*arguments)
        except PermissionError:
            time.sleep(pause)
    return function(*arguments)


def _sync(file: io.BufferedRandom, directory: str) -> None:
    """Put a file on the disk; warn once where the file system cannot be asked to."""
    file.flush()
    try:
        os.fsync(file.fileno())
    except OSError as error:
        # Not EIO, ENOSPC and the like: those say that it is not on the disk.
        refusals = (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP)
        if error.errno not in (*refusals, errno.EPERM, errno.EACCES, errno.ENOTTY):
            raise
        warn(f"{directory}: no fsync here; a power cut may cost the login", once=True)


def _sync_directory(directory: str) -> None:
    # Impossible on Windows and some mounts; the file itself is on the disk.
    fd = os.open(directory, os.O_RDONLY)
    _quietly(os.fsync, fd)
    os.close(fd)


def _quietly(function: Callable[..., object], *arguments: object) -> bool:
    """Call a function whose failure changes nothing; tell whether it succeeded."""
    try:
        function(*arguments)
    except (OSError, StorageError):
        return False
    return True


def thread_lock(mutexes: dict[int, Any], timeout: float) -> ContextManager[object]:
    """Return a lock between this process's threads, held until its context ends."""
    import threading
    from contextlib import contextmanager

    # By process id: in a forked child, nobody would release the parent's lock.
    mutex = mutexes.setdefault(os.getpid(), threading.RLock())

    @contextmanager
    def hold() -> Iterator[None]:
        problem = "another thread holds the login's lock; try later"
        if mutex._is_owned():  # by this very thread
            raise Unavailable(problem)
        try:  # an exception thrown into the wait may come with the lock, or without
            if not mutex.acquire(timeout=timeout):
                raise Unavailable(problem)
            yield
        finally:
            with suppress(RuntimeError):  # this thread has not got it
                mutex.release()

    return hold()


def file_lock(path: str, timeout: float, held: dict[int, Any]) -> ContextManager[Any]:
    """Return a lock that processes and threads share, held until its context ends.

    The kernel frees it when a process dies.  The file stays: removing it would let two
    processes lock two files of the same name.  While it is locked, *held* has the
    thread's id as a key, for the `_AtomicFile` that `check` makes for the next save.
    """
    import threading
    from contextlib import contextmanager

    @contextmanager
    def hold() -> Iterator[None]:
        deadline = Deadline(timeout)
        patience = Deadline(min(max(timeout / 2, 0.01), STORE_TIMEOUT))
        # The kernel's lock has no time limit, so this polls; a signal arrives at once.
        while (file := _open_locked(path, patience.left())) is None:
            if not (left := deadline.left()):
                raise Unavailable(f"another process holds the lock {path}; try later")
            # Wait longer each time: hundreds of waiters would starve the lock's holder.
            time.sleep(min(0.005 + (timeout - left) / 20, 0.05, left))
        holder = threading.get_native_id()  # another one in a forked child
        with file:
            held[holder] = None
            try:
                yield
            finally:
                if holder == threading.get_native_id():
                    _release(file, path, held.pop(holder, None))

    return hold()


def _open_locked(path: str, patience: float) -> io.BufferedRandom | None:
    """Open a lock file and lock it; return None if somebody else holds the lock."""
    file = None
    try:
        file = _open_private(path, getattr(os, "O_NOFOLLOW", 0))
        if sys.platform == "win32":
            import msvcrt

            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        else:
            import fcntl

            # Not lockf: closing any descriptor of the file loses it, and threads share.
            fcntl.flock(file.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.name == "nt" or os.fstat(file.fileno()).st_nlink:
            return file
    except OSError as error:
        if file:
            _quietly(file.close)
            # On Linux, SMB mounts report EACCES for a lock that is held: wait a little.
            is_held = patience * (error.errno == errno.EACCES)
            if is_held or error.errno not in _LOCK_FAULTS:
                return None
        text = f"cannot lock {path}: {_reason(error)}; {_cure_of(error)}"
        raise StorageError(text) from None
    file.close()  # removed meanwhile: others lock another file of the name
    return None


def _release(file: Any, path: str, left: _AtomicFile | None) -> None:
    """Remove what this and dead processes have left beside a lock, and unlock it."""
    if left:
        left.discard()
    directory = os.path.dirname(path)
    with suppress(OSError):
        for name in os.listdir(directory):
            if name.startswith(".") and name.endswith(_TEMPORARY_SUFFIX):
                _quietly(os.unlink, os.path.join(directory, name))
    if sys.platform != "win32":
        import fcntl

        # A child forked meanwhile has the file open too: closing it would not unlock.
        _quietly(fcntl.flock, file.fileno(), fcntl.LOCK_UN)
    _quietly(file.close)  # a mount that is gone changes nothing any more


@hides_locals
class _RecordStorage:
    """What stores of a JSON object have in common."""

    _read_record: Callable[[], dict[str, object]]
    _write_record: Callable[[dict[str, object]], None]
    _watched: str  # the file that changes when the record does
    _cure: ClassVar[str]  # what helps against a damaged record
    describe: Callable[[], str]

    def load(self) -> Credentials | None:
        """Return the credential, None if there is none; StorageCorrupt if damaged."""
        tokens = (record := self._read_record()).get("claudeAiOauth")
        if isinstance(tokens, dict):  # another program's logout may empty the fields
            tokens = any(map(tokens.get, ("accessToken", "refreshToken")))
        return Credentials.from_record(record) if tokens else None

    def save(self, credentials: Credentials) -> None:
        """Store a credential; keys of other programs stay.  Hold the lock.

        After a StorageError it is not stored, or nobody knows: keep it and try again.
        """
        self._write_record(merge_record(self._read_record(), credentials.to_record()))

    def stamp(self) -> object:
        """Return the file's dates, inode and size, or "absent", from one ``stat``."""
        try:
            found = os.stat(self._watched)
        except FileNotFoundError:
            return "absent"
        except OSError:
            return None
        return found.st_mtime_ns, found.st_ctime_ns, found.st_ino, found.st_size

    def _parse(self, data: bytes | None) -> dict[str, object]:
        record = {} if data is None else parse_json_object(data, lenient=True)
        if record is None:
            text = "is unreadable: it is damaged, or no record"
            raise StorageCorrupt(f"{self.describe()} {text}; {self._cure}")
        return record


@hides_locals
class FileStorage(_RecordStorage):
    """A credential in a file that only this user can read, encrypted if you like.

    Args:
        path: Default: credentials.json in the default directory.  A file of Claude
            Code's own layout will do.
        cipher: Has ``encrypt(bytes) -> bytes`` and ``decrypt(bytes) -> bytes``, whose
            errors are StorageErrors.  A file that DPAPI encrypted needs none.
        read_only: Another program owns the file: hand out what is there, write nothing
            and never spend its refresh token.
    """

    _cure = "move it away and log in again"

    def __init__(
        self,
        path: str | os.PathLike[str] | None = None,
        *,
        cipher: Any = None,
        read_only: bool = False,
    ) -> None:
        self.path = self._watched = absolute_path(path, "credentials.json")
        self.read_only, self._cipher = read_only, cipher
        self._reserved: dict[int, _AtomicFile | None] = {}  # by thread, for its save

    @property
    def account_file(self) -> str | None:
        """Where the account of this file is cached; None for another program's file."""
        if self.read_only:
            return None
        directory, name = os.path.split(os.path.realpath(self.path))
        stem = "" if name == "credentials.json" else f"{name}."
        return os.path.join(directory, f"{stem}account.json")

    def delete(self) -> bool:
        """Remove this module's keys, and the file if nothing else is in it."""
        self._refuse_if_read_only()
        if (kept := without(stored := self._read_stored(), _OUR_KEYS)) == stored:
            return False
        real = os.path.realpath(self.path)
        # A mount of its own cannot be removed, only emptied.
        if kept or not _quietly(_try_for_a_while, os.unlink, real):
            _AtomicFile(real).commit(dump_json(kept).encode("ascii"))
        _quietly(_sync_directory, os.path.dirname(real))
        return True

    def check(self) -> None:
        """Raise StorageError if a save cannot succeed; under a lock, reserve space."""
        self._refuse_if_read_only()
        self._encode(self._read_record())
        if left := self._swap_reserved(_AtomicFile(self.path, reserve=True)):
            left.discard()

    def lock(self, timeout: float) -> ContextManager[object]:
        """Return the lock of the file's folder: a file named ``lock`` in it."""
        self._refuse_if_read_only()
        folder = os.path.dirname(os.path.realpath(self.path))
        return file_lock(os.path.join(folder, "lock"), timeout, self._reserved)

    def describe(self) -> str:
        """Say where the file is, and whether it is encrypted."""
        notes = ["encrypted"] * bool(self._cipher) + ["read only"] * self.read_only
        return f"{self.path} ({', '.join(notes)})" if notes else self.path

    def _refuse_if_read_only(self) -> None:
        if self.read_only:
            raise StorageError(f"{self.path} is another program's; log in or out there")

    def _swap_reserved(self, file: _AtomicFile | None) -> _AtomicFile | None:
        """Keep a file, return the previous one; without the lock, return it unkept."""
        import threading

        if (holder := threading.get_native_id()) in self._reserved:
            file, self._reserved[holder] = self._reserved[holder], file
        return file

    def _read_stored(self) -> dict[str, object]:
        data = read_private(self.path, is_ours=not self.read_only)
        if not (data or b"").rstrip().endswith(b"}") and self.stamp() != "absent":
            time.sleep(0.02)  # another program may be writing it right now
            data = read_private(self.path, is_ours=not self.read_only)
        return self._parse(data)

    def _read_record(self) -> dict[str, object]:
        stored, cipher = self._read_stored(), self._cipher
        if _ENCRYPTED_KEY not in stored:
            return stored
        text: Any = stored[_ENCRYPTED_KEY]
        try:
            sealed = binascii.a2b_base64(text)
        except (ValueError, TypeError):
            raise StorageCorrupt(_UNDECRYPTABLE) from None
        if sys.platform == "win32" and sealed.startswith(_DPAPI_MARK):
            cipher = DPAPICipher()
            self._cipher = self._cipher or cipher
        if cipher is None:
            cures = ("set CLAUDE_OAUTH_PASSPHRASE_FILE", "read it on Windows")
            cure = cures[sealed.startswith(_DPAPI_MARK)]
            raise StorageError(f"{self.path} is encrypted: {cure}")
        return {**without(stored, _OUR_KEYS), **self._parse(cipher.decrypt(sealed))}

    def _encode(self, record: dict[str, object]) -> bytes:
        if self._cipher:
            foreign = without(record, RECORD_KEYS)
            ours = dump_json(without(record, foreign)).encode("ascii")
            text = binascii.b2a_base64(self._cipher.encrypt(ours), newline=False)
            record = {**foreign, _ENCRYPTED_KEY: text.decode()}
        return dump_json(record).encode("ascii")

    def _write_record(self, record: dict[str, object]) -> None:
        self._refuse_if_read_only()
        data = self._encode(record)
        (self._swap_reserved(None) or _AtomicFile(self.path)).commit(data)
        _quietly(_sync_directory, os.path.dirname(os.path.realpath(self.path)))


@hides_locals
class MemoryStorage:
    """A credential that ends with the process; for tests and for guests."""

    account_file: str | None = None

    def __init__(self, credentials: Credentials | None = None) -> None:
        self._stored, self._changes = credentials, 0
        self._mutexes: dict[int, Any] = {}

    def load(self) -> Credentials | None:
        """Return the credential, or None."""
        return self._stored

    def save(self, credentials: Credentials | None) -> None:
        """Keep a credential until the process ends."""
        self._stored = credentials
        self._changes += 1

    def delete(self) -> bool:
        """Forget the credential; return whether there was one."""
        found = self._stored is not None
        self.save(None)
        return found

    def check(self) -> None:
        """Do nothing: memory can be written."""

    def lock(self, timeout: float) -> ContextManager[object]:
        """Return a lock between the threads of this process."""
        return thread_lock(self._mutexes, timeout)

    def stamp(self) -> object:
        """Return how often the credential has changed."""
        return self._changes

    def describe(self) -> str:
        """Say that it is in memory."""
        return "memory"


@hides_locals
class _SecretStorage(_RecordStorage):
    """A record in a system store, which may be locked, slow or gone at any time.

    An empty file beside the lock tells other processes of a save before they refresh.
    """

    _cure = "`claude-oauth logout`, with the same options, removes it"
    # The store's name, and what to do if it cannot be used, or is locked.
    _title = _hint = _unlock = ""
    # Does "get", "set" (with data) or "delete" for an item; None: no such item, surely.
    _call: Callable[..., bytes | None]

    def __init__(
        self,
        service: str = "claude-oauth",
        account: str | None = None,
        *,
        lock_path: str | os.PathLike[str] | None = None,
    ) -> None:
        import hashlib

        self._lock_path = absolute_path(lock_path, "lock")
        directory = os.path.dirname(self._lock_path)
        self._watched = os.path.join(directory, "store.changed")
        self.time_limit = STORE_TIMEOUT  # give more if a person can answer
        # Whoever shares the lock of a directory shares its login.
        path, known = os.path.realpath(directory), outcome_of(default_directory, {})[0]
        digest = hashlib.sha256(os.fsencode(path)).hexdigest()[:16]
        own = {known and os.path.realpath(known): "default"}.get(path, digest)
        self._service, self._account = service, own if account is None else account
        for name in (service, self._account):
            if not name.isprintable() or not 0 < len(name.strip().encode()) <= 200:
                raise ConfigError("service and account take 1 to 200 printable bytes")
        item = (self._service, self._account)  # another one is another login
        stem = f"{fingerprint(str(item))[:16]}." * (item != ("claude-oauth", own))
        self.account_file = os.path.join(directory, f"{stem}account.json")

    def delete(self) -> bool:
        """Remove the record, readable or not; return whether there was one."""
        found = self._call("delete", self._service) is not None
        _quietly(lambda: _AtomicFile(self._watched).commit(b""))
        if self._call("get", self._service) is not None:
            raise StorageError("the deleted login is still there; try again")
        return found

    def check(self) -> None:
        """Raise StorageError if a trial record of the same size cannot be saved now."""
        beside = f"{self._service} check"
        # As many quotes, which `security` needs escaped, plus what a refresh may add.
        record = dump_json(self._read_record()) + '"x' * 128
        self._put(beside, ('"' * record.count('"')).ljust(len(record), "x").encode())
        self._call("delete", beside)

    def lock(self, timeout: float) -> ContextManager[object]:
        """Return the lock of the directory: a file named ``lock`` in it."""
        return file_lock(self._lock_path, timeout, {})

    def describe(self) -> str:
        """Say in a few words where the credential is."""
        return f"{self._title} (service {self._service}, account {self._account})"

    def _read_record(self) -> dict[str, object]:
        return self._parse(self._call("get", self._service))

    def _write_record(self, record: dict[str, object]) -> None:
        try:
            self._put(self._service, dump_json(record).encode("ascii"))
        finally:  # after an error it may be stored all the same
            _quietly(lambda: _AtomicFile(self._watched).commit(b""))

    def _put(self, service: str, data: bytes) -> None:
        # Read it back: "success" may be false, and a failure may come after the change.
        problem = StorageError(f"the {self._title} does not keep records; {_USE_FILE}")
        try:
            self._call("set", service, data)
        except StorageError as error:
            problem = error
        try:
            found = self._call("get", service)
        except StorageError as error:
            text = f"{error}; whether the new login was stored is not known"
            raise type(error)(text) from None
        if found != data:
            raise problem

    def _failure(self, reason: str, *, is_locked: bool = False) -> StorageError:
        kind, text = StorageError, f"could not be used ({reason}); {self._hint}"
        if is_locked:
            kind, text = StorageLocked, f"is locked, or asks a person; {self._unlock}"
        return kind(f"the {self._title} {text}, or {_USE_FILE}")


_USE_FILE: Final = "set CLAUDE_OAUTH_STORE=file (`--store file` for one command)"
STORE_TIMEOUT: Final = 10.0  # seconds: a dialog that nobody sees waits for ever
SECURITY: Final = "/usr/bin/security"  # the first on PATH could be anybody's
# `security -i` cuts longer lines and exits with 0.  Source: SecurityTool, readline.c.
SECURITY_LINE: Final = 4094
# What `security` exits with where a person is needed: an OSStatus, modulo 256.  With
# -U, 45 (-25299) is no duplicate: the update was refused.  Source: Apple's SecBase.h.
_LOCKED: Final = frozenset({29, 36, 45, 51, 128, 152, 155, 227, 234})


class _NoKeychain(ConfigError, StorageError):
    """The setting can never work here, and the record cannot be read."""


class KeychainStorage(_SecretStorage):
    """A credential in the macOS Keychain; any program of this user can have it read.

    Each operation is one process of `security -i` and one line on its stdin: every user
    of the machine can read arguments.  ``account`` names the item beside ``service``
    (default: one for each directory of ``lock_path``).  Source: Apple's SecurityTool.
    """

    _title = "macOS Keychain"
    _hint = "it is not known whether the login is there; check HOME, try again"
    _path = "~/Library/Keychains/login.keychain-db"
    _unlock = f"unlock it in this session with `security unlock-keychain {_path}`"

    def _call(self, action: str, service: str, data: bytes = b"") -> bytes | None:
        # In a word for `security -i`, a backslash escapes in any state.
        account, name, secret = (
            b'"' + word.replace(b"\\", b"\\\\").replace(b'"', b'\\"') + b'"'
            for word in (self._account.encode(), service.encode(), data)
        )
        in_hex = data.hex().encode("ascii")
        # Not -T or -A, which change who may read the item: macOS would ask a person.
        command, *forms = {
            "get": (b"find-generic-password", b" -w"),
            "set": (b"add-generic-password -U", b" -X " + in_hex, b" -w " + secret),
            "delete": (b"delete-generic-password", b""),
        }[action]
        start = b"%s -a %s -s %s" % (command, account, name)
        if not (fitting := [f for f in forms if len(start + f) < SECURITY_LINE]):
            raise StorageError(f"the login is too long for the Keychain; {_USE_FILE}")
        if (output := self._run(start + fitting[0] + b"\n")) is None:
            return None
        # `-w` prints in hex what is not all printable ASCII; a record begins with "{".
        digits = _text(output.decode("latin-1"), "7b([0-9a-f]{2})*\n")
        return bytes.fromhex(digits) if digits else output[:-1]

    def _run(self, line: bytes) -> bytes | None:
        """Return a command's output, which may hold the secret; None: no such item."""
        import re
        import subprocess

        try:
            # In its own session it has no terminal to ask on, and no Ctrl-C ends it.
            done = subprocess.run(
                [SECURITY, "-i"],
                input=line,
                capture_output=True,
                timeout=self.time_limit,
                start_new_session=True,
                check=False,
            )
            output, errors = done.stdout, done.stderr
            # The number that is printed is whole, the exit status modulo 256.
            printed = re.findall(rb"^[^:\n]*: returned (-?\d+)$", errors, re.MULTILINE)
            number = int([*printed, done.returncode][0])
        except subprocess.TimeoutExpired:
            number, output, errors = -128, b"", b""  # likely, a dialog nobody sees
        except FileNotFoundError:
            raise _NoKeychain(f"only macOS has {SECURITY}; {_USE_FILE}") from None
        except OSError as error:
            raise self._failure(f"{SECURITY}: {_reason(error)}") from None
        if number == 0:
            return output
        # -25300 is any failed search; the item is missing if this is the only message.
        own = re.findall(rb"^security: (\w*)", errors, re.MULTILINE)
        if number == -25300 and own == [b"SecKeychainSearchCopyNext"]:
            return None
        raise self._failure(f"status {number}", is_locked=number & 255 in _LOCKED)


class KeyringStorage(_SecretStorage):
    """A credential in the desktop's keyring, through the PyPI package `keyring`.

    It is the Secret Service, KWallet or the Windows Credential Locker (at most 1,280
    characters); any program of the session can read it.  Arguments: KeychainStorage's.
    """

    _title = "keyring"
    _hint = "it needs a desktop session (D-Bus) with an unlocked keyring"
    _unlock = "unlock it, for example by signing in to the desktop"

    def _call(self, action: str, service: str, data: bytes = b"") -> bytes | None:
        if action == "delete" and self._call("get", service) is None:
            return None
        call: Any = getattr(import_package("keyring"), f"{action}_password", None)
        arguments = filter(None, (service, self._account, data.decode("ascii")))
        found, error = call_with_limit(lambda: call(*arguments), self.time_limit)
        if error is None:
            is_there = found is not None or action != "get"
            return str(found).encode(errors="surrogatepass") if is_there else None
        name, is_missing = type(error).__name__, isinstance(error, ImportError)
        # The error of a write may quote the secret.
        reason = name if data else printable(f"{name}: {error}")
        if is_missing:
            raise ConfigError(f"`keyring` has no backend ({reason}); {_USE_FILE}")
        # After a timeout, a dialog that nobody sees is most likely waiting.
        locked = "TimeoutError KeyringLocked LockedException PromptDismissedException"
        raise self._failure(reason, is_locked=name in locked.split())


@hides_locals
class FernetCipher:
    """Encrypts with a passphrase: scrypt, then Fernet (AES-128-CBC and HMAC-SHA256).

    Needs `cryptography`.  Source: RFC 7914; OWASP's password storage cheat sheet.
    """

    _COST = (1 << 15, 8, 3)  # scrypt's n, r and p: 32 MiB and some 0.2 s
    # The text begins with this; a forged record's higher cost could make reading slow.
    _START = b"scrypt:%d:%d:%d" % _COST

    def __init__(self, passphrase: str | bytes) -> None:
        if isinstance(passphrase, str):
            passphrase = passphrase.encode(errors="surrogatepass")
        if not passphrase.strip():
            raise ConfigError("the passphrase is empty")
        self._fernet = import_package("cryptography.fernet")
        self._kdf = import_package("cryptography.hazmat.primitives.kdf.scrypt")
        self._passphrase = passphrase
        self._fernets: dict[bytes, Any] = {}  # by salt: to derive a key is slow

    def encrypt(self, data: bytes) -> bytes:
        """Return ASCII text that carries the cost and the salt along."""
        salt = next(iter(self._fernets), os.urandom(16).hex().encode("ascii"))
        return b"%b:%b:%b" % (self._START, salt, self._fernet_for(salt).encrypt(data))

    def decrypt(self, data: bytes) -> bytes:
        """Return what was encrypted; StorageCorrupt if it cannot be."""
        import re

        # 0.1.0 put a digest of the key before the Fernet token, which has its own.
        form = rb"%b:([0-9a-f]{32}):(?:[0-9a-f]{16}:)?(.+)" % self._START
        found = re.fullmatch(form, data)
        with suppress(self._fernet.InvalidToken):
            if found:
                return bytes(self._fernet_for(found.group(1)).decrypt(found.group(2)))
        raise StorageCorrupt(_UNDECRYPTABLE)

    def _fernet_for(self, salt: bytes) -> Any:
        import base64

        if salt not in self._fernets:
            # Not hashlib's, which PyPy lacks.  Before 3.1, a backend was required.
            backend = import_package("cryptography.hazmat.backends").default_backend()
            raw = bytes.fromhex(salt.decode())
            try:
                scrypt = self._kdf.Scrypt(raw, 32, *self._COST, backend)
            except import_package("cryptography.exceptions").UnsupportedAlgorithm:
                raise ConfigError("no scrypt under FIPS; use another store") from None
            key = base64.urlsafe_b64encode(scrypt.derive(self._passphrase))
            self._fernets[salt] = self._fernet.Fernet(key)
        return self._fernets[salt]


@hides_locals
class DPAPICipher:
    """Encrypts for this Windows user on this machine.  Source: dpapi.h, winerror.h."""

    def encrypt(self, data: bytes) -> bytes:
        """Return what only this user can decrypt."""
        return _DPAPI_MARK + _dpapi("CryptProtectData", data)

    def decrypt(self, data: bytes) -> bytes:
        """Return what was encrypted; a StorageError says why that is impossible."""
        if not data.startswith(_DPAPI_MARK):
            raise StorageCorrupt(_UNDECRYPTABLE)
        return _dpapi("CryptUnprotectData", data[len(_DPAPI_MARK) :])


def _dpapi(function: str, data: bytes) -> bytes:
    """Call CryptProtectData or CryptUnprotectData, never with a dialog."""
    import ctypes

    if sys.platform != "win32":
        raise ConfigError("DPAPI exists only on Windows")

    class Blob(ctypes.Structure):
        _fields_ = [("size", ctypes.c_uint32), ("data", ctypes.c_void_p)]

    given = Blob(len(data), ctypes.cast(ctypes.c_char_p(data), ctypes.c_void_p))
    taken, no, ui_forbidden = Blob(), None, 0x1
    call = getattr(ctypes.WinDLL("crypt32", use_last_error=True), function)
    if not call(ctypes.byref(given), no, no, no, no, ui_forbidden, ctypes.byref(taken)):
        raise _dpapi_error(ctypes.get_last_error())
    try:
        return ctypes.string_at(taken.data, taken.size)
    finally:
        ctypes.WinDLL("kernel32").LocalFree(ctypes.c_void_p(taken.data))


def _dpapi_error(number: int) -> StorageError:
    number &= 0xFFFFFFFF
    if number == 13:  # ERROR_INVALID_DATA
        return StorageCorrupt(_UNDECRYPTABLE)
    if number in (2, 5, 1325, 0x80090345):  # no profile, denied, a dialog, delegation
        text = "Windows refuses the user's key, as over SSH; sign in with a password"
        return StorageLocked(text)
    text = f"Windows cannot use the user's key (error {number:#x})"
    causes = "another user, another machine or a reset password"
    return StorageError(f"{text}: {causes}; move the file away and log in again")


def default_storage() -> Storage:
    """Return the store that the environment chooses, or the platform's own."""
    return make_storage()


@hides_locals
def make_storage(kind: str | None = None, directory: str | None = None) -> Storage:
    """Return a store by its name: auto, file, keychain or keyring.

    None asks CLAUDE_OAUTH_STORE.  auto is the Keychain on macOS, unless
    CLAUDE_OAUTH_PASSPHRASE_FILE asks for an encrypted file, and a file elsewhere.
    """
    kind = (setting("CLAUDE_OAUTH_STORE") or "auto") if kind is None else kind
    directory = absolute_path(directory)
    passphrase_file = setting("CLAUDE_OAUTH_PASSPHRASE_FILE")
    if kind == "auto":
        kind = "file" if sys.platform != "darwin" or passphrase_file else "keychain"
    if kind == "file":
        path = os.path.join(directory, "credentials.json")
        return FileStorage(path, cipher=_cipher_for(passphrase_file))
    if kind in (stores := {"keychain": KeychainStorage, "keyring": KeyringStorage}):
        return stores[kind](lock_path=os.path.join(directory, "lock"))
    names = "auto, file, keychain or keyring"
    raise ConfigError(f"no such store: {printable(kind, limit=40)!r}; use {names}")


def _cipher_for(path: str) -> FernetCipher | DPAPICipher | None:
    """Return the platform's cipher, or one for the passphrase in any owner's file."""
    if not path:
        return DPAPICipher() if sys.platform == "win32" else None
    name = path if os.path.isabs(path) else "(CLAUDE_OAUTH_PASSPHRASE_FILE)"
    try:
        passphrase = read_private(absolute_path(path), is_ours=False, any_owner=True)
    except (ConfigError, StorageError):  # which may quote it
        passphrase = None
    if passphrase is None:  # not shown if relative: it may be the passphrase itself
        why = "is missing, empty, unreadable or a pipe, or is no path"
        raise ConfigError(f"the passphrase file {name} {why}; give an absolute path")
    return FernetCipher(passphrase.rstrip(b"\r\n"))


# -- Sign-in ---------------------------------------------------------------------------

# Seconds.
CONNECTION_TIMEOUT: Final = 5.0  # for a client to send its request; 1 more to close
PAGE_SECONDS: Final = 2.0  # for the browser to fetch the page, once the login has ended
SHORT_PAUSE: Final = 0.05  # until an empty stdin is known, or a descriptor is free
PASTE_PAUSE: Final = 0.5  # without input: then a paste has ended, and `fg` is seen

_TAKEN: Final = (errno.EADDRINUSE, errno.EACCES if os.name == "nt" else -1)  # ports
MAX_CONNECTIONS: Final = 128  # the oldest is dropped to make room
MAX_HEAD_BYTES: Final = 98304  # with the cookies of every server on `localhost`
MAX_PIPED_REFUSALS: Final = 20  # lines of a pipe that are no code; nobody corrects them
# Characters that a terminal takes in one line; the rest is lost.  Source: tty(4).
MAX_TERMINAL_LINE: Final = 1023 if sys.platform == "darwin" else 4095
# epoll refuses files, macOS's poll terminals, select many files; eventlet has no poll.
SELECTOR: Final = "Select" if sys.platform in ("darwin", "win32") else "Poll"
_NEWEST_WRITER: Final[list[socket.socket]] = []  # gets what a thread of any login reads
TOO_LATE: Final = "nobody finished the sign-in in time; try again"
# Commands that are blank, or that would take the terminal for themselves.
TEXT_BROWSERS: Final = (
    r"^\s*$|(?<![\w-])(?:www-browser|lynx|links2?|elinks|w3m|browsh|carbonyl|edbrowse"
    r"|netrik|cha)(?=[\s\"']|$)"
)
# What opens an address, in this order.  Source: `webbrowser`, wslu's manual.
_RUNDLL: Final = "rundll32.exe url.dll,FileProtocolHandler"
DESKTOP_BROWSERS: Final = {
    "darwin": ["open"],
    "win32": [_RUNDLL],
    "wsl": ["wslview", _RUNDLL],
    "linux": ["xdg-open", "gio open", "x-www-browser", "firefox", "google-chrome"],
}


def make_server(
    host: str,
    port: int,
    handle: Callable[[Any], None],
    open_head: Callable[[Any], Any] = lambda request: request.rfile,
) -> Any:
    """Return a bound `http.server`: `open_head` reads each head, `handle` answers."""
    import socket
    import socketserver
    from http.server import BaseHTTPRequestHandler

    class Handler(BaseHTTPRequestHandler):
        timeout = CONNECTION_TIMEOUT
        wbufsize = -1  # an answer goes out in one piece
        default_request_version = "HTTP/1.0"

        def handle_one_request(self) -> None:
            self.rfile = open_head(self)
            self.raw_requestline = self.rfile.readline(MAX_HEAD_BYTES)
            if self.parse_request():  # not if nothing came
                handle(self)
            self.wfile.flush()
            # Read what a client still sends: closing before would reset the connection.
            self.connection.shutdown(socket.SHUT_WR)
            deadline = Deadline(1.0)
            self.connection.settimeout(1.0)
            while self.connection.recv(65536) and deadline.left():
                pass

        def send_error(self, code: int, *_told: object, **_more: object) -> None:
            respond(self, code, stray_page("it is no browser's, or too large"))

        def log_message(self, format: str, *args: object) -> None:
            """Say nothing: the request line may hold a code."""

    # Not HTTPServer, which asks the resolver for this machine's name.
    class Server(socketserver.ThreadingTCPServer):
        address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
        request_queue_size = 1024  # when it overflows, a browser waits for 1 s
        daemon_threads = True
        # Else old connections keep a port for a minute; on Windows, it would be shared.
        allow_reuse_address = sys.platform != "win32"

        def server_bind(self) -> None:
            if sys.platform == "win32":
                self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_EXCLUSIVEADDRUSE, 1)
            super().server_bind()

        def handle_error(self, request: object, client_address: object) -> None:
            """Say nothing: a client went away."""

    return Server((host, port), Handler)


def respond(request: Any, status: int, page: str, **headers: str) -> None:
    """Send a page without a Server header; no cache may keep it, no site embed it."""
    import base64
    import hashlib

    body = page.encode("utf-8", "replace")
    # Source: Content Security Policy Level 3 (style by its hash).
    style = base64.b64encode(hashlib.sha256(_STYLE.encode()).digest()).decode()
    all_headers = {
        "Content-Type": "text/html; charset=utf-8",
        "Content-Length": str(len(body)),
        "Cache-Control": "no-store",
        "Content-Security-Policy": f"default-src 'none'; style-src 'sha256-{style}'; "
        "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
        "Referrer-Policy": "no-referrer",
        "X-Content-Type-Options": "nosniff",
        "Connection": "close",
        **headers,
    }
    request.send_response_only(status)
    for name, value in all_headers.items():
        request.send_header(name, value)
    request.end_headers()
    if request.command != "HEAD":
        request.wfile.write(body)
    request.wfile.flush()


def _open_head(request: Any) -> io.BytesIO:
    """Return a request's head once it is whole; no request line for a broken one.

    `http.server` accepts an incomplete head, and restarts its timeout at each byte.
    """
    import re

    request.rfile.close()
    sock, head, deadline = request.connection, bytearray(), Deadline(CONNECTION_TIMEOUT)
    while b"\n\n" not in head.replace(b"\r", b""):
        sock.settimeout(deadline.left() + 0.001)
        chunk = sock.recv(MAX_HEAD_BYTES - len(head))
        head += chunk
        if not chunk or not head[:1].isalpha():
            # Cut, too long, noise or TLS: one word, which is refused, or nothing.
            return io.BytesIO(b"?" * len(head))
    sock.settimeout(CONNECTION_TIMEOUT)
    # `http.server` refuses a long line, and browsers send all cookies in one.
    return io.BytesIO(re.sub(rb"\n(?i:cookie):[^\n]*", b"", head))


@hides_locals
class AuthCodeListener:
    """Waits on the loopback interface for the browser to bring the code.

    Only a callback with the right state ends the wait.  Its request is held until
    `finish` gives the result of the login.  Entering the context raises OSError if it
    cannot listen; the login can go on by paste.
    """

    def __init__(self, state: str, *, port: int = 0) -> None:
        import contextlib
        import threading
        from weakref import WeakSet

        if not all((state, 0 <= port <= 65535)):
            raise ConfigError("the port must be 0 to 65535, and the state not empty")
        self.port, self.redirect_uri = port, ""
        self.arrived = threading.Event()  # the code, or the server's refusal
        self._is_over = threading.Event()  # there is a page, or there will be none
        self.on_arrival: Callable[[], object] = lambda: None
        self._state, self._is_closed = state, False
        self._changed = threading.Condition()  # guards the next three; held for moments
        self._query = self._page = ""  # of the callback that counts
        self._pages_owed = 0  # callbacks that have not got the page yet
        self._unread: dict[socket.socket, None] = {}  # droppable, the oldest first
        self._threads: WeakSet[threading.Thread] = WeakSet()  # one for each connection
        # The page names the account: nobody else on this machine may find it.
        self._page_path = "/done/" + generate_state()[:16]
        self._cleanup, self._closing = contextlib.ExitStack(), threading.RLock()

    def __enter__(self) -> Self:
        import contextlib
        import socket

        # Imports and a thread's first end need descriptors, or glibc aborts: do it now.
        call_with_limit(lambda: import_package("hmac"), CONNECTION_TIMEOUT)
        with contextlib.ExitStack() as stack:
            self.port = (servers := self._bind(stack))[0].server_address[1]
            stop, stopper = map(stack.enter_context, socket.socketpair())
            if not (thread := start_thread("listener", self._serve, servers, stop)):
                raise OSError(errno.EAGAIN, "no thread can be started")
            stack.callback(self._end_connections)
            stack.callback(thread.join)
            stack.callback(stopper.close)  # the other end is readable then
            self._cleanup = stack.pop_all()
        self.redirect_uri = f"http://localhost:{self.port}{CALLBACK_PATH}"
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def wait(self, timeout: float | None = None) -> str:
        """Return the code; raise LoginDenied for an error, LoginTimeout for neither."""
        if not self.arrived.wait(timeout):
            raise LoginTimeout(TOO_LATE)
        return parse_callback(self._query, state=self._state)

    def finish(self, page: str) -> None:
        """Show the browser this page, for PAGE_SECONDS at most, and stop listening."""
        try:
            with self._changed:
                self._page = page
                self._is_over.set()
                self._changed.wait_for(lambda: self._pages_owed <= 0, PAGE_SECONDS)
        finally:
            self.close()

    def close(self) -> None:
        """Stop listening; nothing of it is left afterwards."""
        self._is_closed = True
        self._is_over.set()
        with self._closing:  # guards the cleanup: a second close waits for the first
            self._cleanup.close()

    def _bind(self, stack: Any, tries: int = 10) -> list[Any]:
        """Listen on 127.0.0.1 and ::1, which browsers try in either order.

        An address that this machine lacks is left out.  A program that has the port on
        one of them would be sent the code: then take another port, or raise.
        """
        servers: list[Any] = []
        port, problem = self.port, OSError(errno.EAFNOSUPPORT, "there is no loopback")
        for host in ("127.0.0.1", "::1"):
            try:
                server = make_server(host, port, self._handle, _open_head)
                servers.append(stack.enter_context(server))
                port = servers[0].server_address[1]
            except OSError as error:
                problem = (error, problem)[error.errno == errno.EAFNOSUPPORT]
                if error.errno in _TAKEN:
                    break
        else:
            if servers:
                return servers
        stack.close()
        if self.port or not tries:
            raise problem
        return self._bind(stack, tries - 1)

    def _serve(self, servers: list[Any], stop: socket.socket) -> None:
        import selectors

        with selectors.DefaultSelector() as selector:
            selector.register(stop, selectors.EVENT_READ, lambda _stop: None)
            for server in servers:
                server.socket.setblocking(False)
                selector.register(server, selectors.EVENT_READ, self._accept)
            while not self._is_closed:
                for key, _ in selector.select():
                    key.data(key.fileobj)

    def _accept(self, server: Any) -> None:
        """Accept one connection, and serve it in a thread of its own."""
        try:
            sock, address = server.socket.accept()
        except OSError:  # no descriptor is left for it, or it has gone again
            self._drop_all_but(len(self._unread) - 1)
            time.sleep(SHORT_PAUSE)
            return
        self._drop_all_but(MAX_CONNECTIONS - 1)
        self._unread[sock] = None
        if thread := start_thread("client", self._serve_client, server, sock, address):
            self._threads.add(thread)
        else:
            self._serve_client(server, sock, address)

    def _drop_all_but(self, count: int) -> None:
        import socket

        for sock in list(self._unread)[::-1][count:]:
            self._unread.pop(sock, None)
            _quietly(sock.shutdown, socket.SHUT_RDWR)  # its thread reads the end

    def _end_connections(self) -> None:
        self._drop_all_but(0)
        for thread in self._threads:
            thread.join(CONNECTION_TIMEOUT + 1)

    def _serve_client(self, server: Any, sock: socket.socket, address: Any) -> None:
        server.process_request_thread(sock, address)
        self._unread.pop(sock, None)

    def _handle(self, request: Any) -> None:
        """Answer a request.  Source: RFC 9112 section 3.2 (one Host, absolute form)."""
        import re

        port = "(:80)?" if self.port == 80 else f":{self.port}"
        ours = rf"(localhost|127\.0\.0\.1|\[::1\]){port}"
        hosts = request.headers.get_all("Host", [])
        target = re.sub(f"(?i)^http://{ours}(?=/)", "", request.requestline.split()[1])
        path, _, query = target.partition("?")
        if len(hosts) != 1:
            request.send_error(400)
        elif not re.fullmatch(ours, hosts[0].strip(), re.IGNORECASE):
            # A foreign name that was made to point here (DNS rebinding) learns nothing.
            respond(request, 421, stray_page("it is for another host or port"))
        elif request.command != "GET":
            respond(request, 405, stray_page("only GET is answered"), Allow="GET")
        elif path == CALLBACK_PATH:
            self._receive(request, query)
        elif path == self._page_path:  # known once there is a page
            respond(request, 200, self._page)
            with self._changed:
                self._pages_owed -= 1
                self._changed.notify_all()
        else:
            respond(request, 404, stray_page("nothing is at this address"))

    def _receive(self, request: Any, query: str) -> None:
        try:
            with suppress(LoginDenied):  # `wait` raises it
                parse_callback(query, state=self._state)
        except ValueError as reason:
            respond(request, 400, stray_page(str(reason)))
            return
        with self._changed:
            if not self.arrived.is_set():
                self._query = query
                self.arrived.set()
                self.on_arrival()
            self._pages_owed += 1
        self._unread.pop(request.connection, None)  # not to be dropped while it is held
        self._is_over.wait(LOGIN_TIMEOUT)
        self._unread[request.connection] = None
        if self._page:
            respond(request, 303, "", Location=self._page_path)


def start_listener(state: str, port: int) -> tuple[AuthCodeListener, str]:
    """Return a listener and "", or one that has no redirect_uri, and why."""
    listener = AuthCodeListener(state, port=port)
    try:
        return listener.__enter__(), ""
    except OSError as error:
        what = f"port {port} cannot be used" if port else "no local port was opened"
        return listener, f"{what} ({_reason(error)})"


def find_browsers() -> list[str]:
    """Return the commands to try, [] if the person would not see a browser."""
    import re
    from itertools import filterfalse

    if named := setting("BROWSER"):
        is_text = re.compile(TEXT_BROWSERS).search
        return list(filterfalse(is_text, re.split(f"[ &]*(?:{os.pathsep}|$)", named)))
    system = "wsl" if setting("WSL_DISTRO_NAME") else sys.platform
    # Over SSH it would open where nobody sits.
    is_remote = any(map(setting, ("SSH_CONNECTION", "SSH_CLIENT", "SSH_TTY")))
    has_screen = any(map(setting, ("DISPLAY", "WAYLAND_DISPLAY")))
    if not has_screen and (is_remote or system not in ("darwin", "win32", "wsl")):
        return []
    return DESKTOP_BROWSERS.get(system, DESKTOP_BROWSERS["linux"])


def own_python() -> str:
    """Return the Python to start; "" in a frozen program, or one that embeds Python."""
    # PyInstaller and Nuitka set `frozen`; of QGIS or Maya, sys.executable is the host.
    python = "" if getattr(sys, "frozen", False) else str(sys.executable)
    return _text(python, r"(?is).*[\\/](python|pypy)[\d.]*(-dbg|[a-z]?)(\.exe)?") or ""


def open_in_browser(url: str) -> bool:
    """Try the browser commands in turn; tell whether one of them succeeded."""
    import shlex
    import subprocess

    environ = without(os.environ, ["TERM", "BROWSER"])  # no text mode, no xdg-open loop
    quiet: Any = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.DEVNULL)
    quiet["creationflags"] = getattr(subprocess, "CREATE_NO_WINDOW", 0)
    for name in ("LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH", "LIBPATH"):
        # Source: PyInstaller's manual, "LD_LIBRARY_PATH"; an AppImage sets APPDIR.
        original = environ.pop(name + "_ORIG", "")
        if any((original, not own_python(), setting("APPDIR"))):
            environ[name] = original
    for browser in find_browsers():
        command = ("{}", '"{}" "%s"')[os.path.isfile(browser)].format(browser)
        command = (command + " %s" * ("%s" not in command)).replace("%s", url)
        # It may fail.  Its own session keeps Ctrl-C and the terminal from it.
        with suppress(subprocess.CalledProcessError, OSError, ValueError):
            words = shlex.split(command) if os.name == "posix" else command
            subprocess.check_call(words, env=environ, start_new_session=True, **quiet)
            return True
    return False


class _PastePrompt:
    """Reads a paste from stdin, without buffering, and only once there is input.

    So later lines are left for the host program.  A daemon thread reads what cannot be
    waited on (a Windows console, a notebook, a StringIO), and may take the host's next
    line unless it polls (Jupyter).  It breaks bpython, IDLE, xeus-python: no paste.
    """

    def __init__(self, state: str, manual_uri: str, *, is_open: bool) -> None:
        import socket
        from functools import partial

        no_paste = str(type(sys.stdin).__module__).startswith(("bpython.", "idlelib."))
        no_paste |= "xeus_python_shell" in sys.modules
        self._state, self.is_open = state, all((is_open, not no_paste))
        self._parse = partial(parse_paste, state=state, manual_redirect_uri=manual_uri)
        self._wake_up, self._waker = socket.socketpair()
        self._wake_up.setblocking(False)
        self._lines, self._writer = socket.socketpair()  # for what a thread reads
        pasted: Any = self._lines.makefile("rb", 0)
        self._source, self._size = pasted, 65536
        self._needs_thread = self._is_idle = self.is_open  # no thread reads yet
        self._is_terminal = self._is_shown = self._is_whole = False  # whole: at a pause
        self._held, self._earlier, self._refusals = b"", "", 0  # earlier: one refused
        asker = str(getattr(input, "__module__", "builtins"))
        self._is_notebook, self._is_polled = asker != "builtins", "ipykernel" in asker
        with suppress(Exception):  # no stdin, or an object that is no file
            self._is_terminal = os.isatty(descriptor := sys.stdin.fileno())
            # In a terminal, `input` may be a prompt's own, which no thread can call.
            self._is_notebook &= self._is_polled or not self._is_terminal
            # In PyCharm's and Thonny's console, the descriptor is not what stdin reads.
            is_usual = type(sys.stdin).__name__ not in ("StdIn", "FakeInputStream")
            if sys.platform != "win32" and all((is_usual, not self._is_notebook)):
                self._source = io.FileIO(descriptor, closefd=False)
                pasted.close()
                self._needs_thread = self._is_idle = False
                self._size = MAX_TERMINAL_LINE + 1 if self._is_terminal else 1
                # Its own, so that no read waits where others read the line first.
                terminal = os.open(os.ttyname(descriptor), os.O_NONBLOCK | os.O_NOCTTY)
                self._source = io.FileIO(terminal)

    def is_readable(self) -> bool:
        """Tell whether to wait for a paste: in the background a read would stop us."""
        if sys.platform != "win32":
            with suppress(OSError):  # no terminal, or not ours, stops nobody
                if os.tcgetpgrp(self._source.fileno()) != os.getpgrp():
                    return False
        return self.is_open

    def _request_line(self) -> None:
        """Have a thread read one line; if none can start, read it after asking."""
        mark = (b"\n", self._state.encode())[self._is_terminal]  # a console splits it
        if self._is_idle and mark not in self._held:
            _NEWEST_WRITER[:] = [self._writer]
            self._is_idle = not start_thread("paste", self._read_line, self._is_polled)
            if all((self._is_shown, self._is_idle, not self._held)):
                self._read_line()

    def _read_line(self, is_polled: bool = False) -> None:
        import builtins

        data, _kept = b"", sys.__stdin__  # if freed first, Python aborts at its exit
        try:
            with suppress(Exception):  # closed, no front end, no text
                # Python's own input() in a daemon thread can abort the process.
                read = builtins.input if self._is_notebook else sys.stdin.readline
                if is_polled:
                    sys.settrace(self._check_open)
                line = read() + "\n" * self._is_notebook
                data = line[-MAX_PASTE_CHARS - 1 :].encode("utf-8", "replace")
        finally:
            if data:
                _quietly(_NEWEST_WRITER[0].sendall, data + b"\n")
            else:
                self._writer.close()

    def _check_open(self, frame: types.FrameType, *_event: object) -> None:
        """End a kernel's poll once the login is over: a thread's trace function."""
        if frame.f_code.co_name == "select" and not self.is_open:
            raise KeyboardInterrupt

    def wake(self) -> None:
        """End the wait: there is news."""
        _quietly(self._waker.send, b"!")  # unless the race is over

    def wait(self, seconds: float) -> None:
        """Wait for news, or that much silence; read what is pasted."""
        import selectors
        from contextlib import ExitStack

        self._request_line()
        with ExitStack() as stack:
            kind = getattr(selectors, f"{SELECTOR}Selector", selectors.SelectSelector)
            waiting = stack.enter_context(kind())
            waiting.register(self._wake_up, selectors.EVENT_READ)
            if self.is_readable():
                waiting.register(self._source, selectors.EVENT_READ)
            waiting.select(seconds)
            _quietly(self._wake_up.recv, 4096)
            self._suspend_line_mode(waiting, stack)
            # Asked again: `fg` and `bg` come between, and what is typed is the shell's.
            ready = [key.fileobj for key, _ in waiting.select(0)]
            self._is_whole = True
            if self._source in ready and self.is_readable():
                self._read()

    def _suspend_line_mode(self, waiting: Any, stack: Any) -> None:
        """If a line is the last so far, let what follows be read before its Enter."""
        is_last = all((self.has_line(), self.is_readable(), not waiting.select(0)))
        if sys.platform != "win32" and is_last:
            import termios

            with suppress(OSError, termios.error):  # no terminal, or it is gone
                fd, now = self._source.fileno(), termios.TCSANOW
                mode = termios.tcgetattr(fd)
                stack.callback(outcome_of, termios.tcsetattr, fd, now, mode[:])
                mode[3] &= ~termios.ICANON
                termios.tcsetattr(fd, now, mode)

    def _read(self) -> None:
        """Take what is there: a line of a terminal, a byte of a pipe, or the end."""
        chunk, self._is_idle = b"", self._needs_thread
        with suppress(OSError):  # it was closed, or the terminal is gone
            chunk = self._source.read(self._size)
        self._is_whole = not chunk
        if chunk:
            self._held += chunk
        elif self._held:
            self._held += b"\n"
        elif chunk is not None:  # None: another thread or program has read it
            self._stop()

    def show(self, seconds_left: float) -> None:
        """Ask, unless that has been done."""
        if self._is_shown or not self.is_readable():
            return
        left = describe_seconds(seconds_left + 0.5) + " left"
        end = " " if self._is_terminal else "\n"
        say(f"Paste the code that the page shows here and press Enter ({left}):", end)
        self._is_shown = True

    def has_line(self) -> bool:
        """Tell whether a line is complete (not half a CRLF) or longer than any code."""
        ends = (b"\n", b"\r")[: 1 + any((self._is_whole, self._is_terminal))]
        is_line = self._held.rstrip(b" \t").endswith(ends)
        return is_line or len(self._held) > 2 * MAX_PASTE_CHARS

    def take(self) -> GrantedCode | None:
        """Return the pasted code, once its state or a pause shows that it is whole."""
        if not self.has_line():
            return None
        text = self._held.decode("utf-8", "replace")
        try:
            found = self._find_code(text)
        except ValueError as reason:
            if any((self._is_whole, not self._is_terminal)):
                self._refuse(text, reason)
            return None
        behind = "".join((self._earlier + text).split()).partition(found.code)[2]
        if not self._is_whole and self._state not in behind:
            return None
        self._is_shown = False  # the person's Enter has ended the line
        return found

    def _find_code(self, text: str) -> GrantedCode:
        longest, most = max(map(len, self._held.splitlines())), MAX_TERMINAL_LINE
        if longest == most or longest * self._is_terminal > most:  # or before a pipe
            limit = f"A terminal takes {most} characters a line, no more"
            raise ValueError(f"the terminal has cut it. {limit}")
        lines = self._earlier.splitlines(keepends=True)
        for first in range(len(lines)):
            with suppress(ValueError):
                return self._parse("".join((*lines[first:], text)))
        return self._parse(text)

    def _refuse(self, text: str, reason: ValueError) -> None:
        say(f"Not taken: {reason}. Copy the whole code that the page shows.")
        # Half a paste is kept, and tried with the rest: alone, that might be accepted.
        pieces = r"(?:\x1b\[200~)?\s*[\w.~+-]{32,}(?:\s+[\w.~+-]+)*\s*\Z"
        pattern = rf"(?s)(?=.*(?:#|%23|://|state=)|{pieces}).{{,{MAX_PASTE_CHARS}}}"
        known = r"(?s).*state=[\w-]{43}.*to open.*|.*(API key|code belongs)[^\n]*"
        known += rf"|(?:.*\s)?(?!eyJ(?!\S*\.eyJ))(?:{_OTHER})\S*\s+that.*"  # a JWT
        is_whole = _text(f"{text}{reason}", known)  # no more of it is to come
        self._earlier = (not is_whole and _text(self._earlier + text, pattern)) or ""
        # A text that is far too long counts as all that are allowed.
        self._refusals += 1 + len(text) // (2 * MAX_PASTE_CHARS) * MAX_PIPED_REFUSALS
        if not self._is_terminal and self._refusals >= MAX_PIPED_REFUSALS:
            self._stop()
        self._held, self._is_shown = b"", False

    def _stop(self, text: str = "\nNo code can be pasted any more.") -> None:
        """Stop asking, and end the line of the prompt."""
        if self._is_shown and self._is_terminal:
            say(text)
        self.is_open = self._is_shown = self._is_idle = False

    def close(self) -> None:
        """Stop asking, and close the sockets."""
        self._stop("")
        self._waker.close()
        self._writer.close()  # before the other end: a write to that is a SIGPIPE
        self._wake_up.close()
        self._lines.close()
        self._source.close()


class _Browser:
    """Opens an address in a thread: that may fail, hang or never return."""

    def __init__(self, opener: Any, wake: Callable[[], object]) -> None:
        self._opener, self._wake, self.is_open = opener, wake, bool(opener)
        self.problem = "no browser was opened"
        if opener is True:
            self._opener, self.is_open = open_in_browser, bool(find_browsers())

    def start(self, url: str) -> None:
        if self.is_open and not start_thread("browser", self._open, url):
            self.is_open = False

    def _open(self, url: str) -> None:
        result, error = outcome_of(self._opener, url)
        if error:  # its text may hold the address
            result, self.problem = False, f"{self.problem} ({type(error).__name__})"
        if result is False:
            self.is_open = False
            self._wake()


def _announce(automatic_url: str, manual_url: str, port: int, can_paste: bool) -> None:
    where, url, other = " on this machine", automatic_url, ""
    if can_paste:
        where, url = ", on any machine", manual_url
        other = f"With the port forwarded, this one needs no paste:\n{automatic_url}\n"
    say(f"To sign in, open this address in a browser{where}:\n{url}")
    if port:
        say(f"{other}  (forwarded by: ssh -L {port}:localhost:{port} HOST)")


@hides_locals
def obtain_code(
    listener: AuthCodeListener,
    *,
    url_for: Callable[[str], str],
    state: str,
    manual_redirect_uri: str,
    open_browser: bool | Callable[[str], object],
    paste: bool,
    port: int,
    problem: str,
    timeout: float,
) -> GrantedCode:
    """Have a person sign in; return the code that the browser or a paste brings first.

    Args:
        listener: Without a redirect_uri it does not listen; `problem` says why.
        port: The port that was asked for, 0 if none: a browser elsewhere may reach it.

    Raises LoginDenied, LoginTimeout, or LoginCancelled if no way to answer is left.
    """
    deadline, manual_url = Deadline(timeout), url_for(manual_redirect_uri)
    automatic_url = url_for(listener.redirect_uri or manual_redirect_uri)
    port *= bool(listener.redirect_uri)
    prompt = _PastePrompt(state, manual_redirect_uri, is_open=paste)
    browser = _Browser(open_browser, prompt.wake)

    def check_that_a_way_is_left() -> None:
        if not deadline.left():
            raise LoginTimeout(TOO_LATE)
        if not (prompt.is_open or port or (browser.is_open and listener.redirect_uri)):
            why = problem or browser.problem
            cure = "log in from a terminal, or give a port that your browser reaches"
            raise LoginCancelled(f"{why} and nothing can be pasted here; {cure}")

    try:
        prompt.wait(SHORT_PAUSE)  # an empty stdin is known before anything is shown
        check_that_a_way_is_left()
        if problem:
            say(f"{problem[0].upper()}{problem[1:]}: paste the code instead.")
        _announce(automatic_url, manual_url, port, can_paste=prompt.is_open)
        if prompt.is_open and not prompt.is_readable():
            ways = "use fg, timeout --foreground, or sudo without a pipe"
            say(f"Running in the background: to paste, {ways}.")
        browser.start(automatic_url)
        listener.on_arrival = prompt.wake
        while not (granted := prompt.take()):
            if listener.arrived.is_set():
                return GrantedCode(listener.wait(0), listener.redirect_uri)
            check_that_a_way_is_left()
            prompt.show(deadline.left())
            prompt.wait(min(PASTE_PAUSE, deadline.left()))
        return granted
    finally:
        prompt.close()


def say(text: str, end: str = "\n") -> None:
    """Write a line for people to stderr, if the program has one that is open."""
    with suppress(AttributeError, OSError, ValueError):
        sys.stderr.write(text + end)
        sys.stderr.flush()


# -- Refresh ---------------------------------------------------------------------------


def time_left(moment: float | None, now: float) -> float:
    """Return how long it is until a token or a login ends; infinity if unknown."""
    return float("inf") if moment is None else moment - now


def wait_left(until: float, now: float, longest: float) -> float:
    """Return the seconds until a moment, 0 once it has passed."""
    # A moment beyond the longest wait was noted before the clock was set back.
    return until - now if now < until <= now + longest else 0.0


def _tokens(credentials: Credentials | None) -> object:
    return credentials and (credentials.access_token, credentials.refresh_token)


def console_key(credentials: Credentials) -> str | None:
    """Return the API key to use; None if there is none, or the token serves."""
    # CLAUDE_OAUTH_TOKEN may hold a key as well.
    if credentials.access_token.startswith("sk-ant-api"):
        return credentials.access_token
    return None if credentials.is_claude_ai else credentials.api_key


def needs_key(login: Credentials) -> bool:
    """Tell whether the API needs a key for this login, and none is stored."""
    return bool(login.scopes) and not (login.is_claude_ai or login.api_key)


def _copy_of(error: _Error) -> _Error:
    """Return a copy of an error without its traceback, whose frames hold tokens."""
    twin = type(error).__new__(type(error), *error.args)  # its __init__ may differ
    twin.__dict__.update(error.__dict__)
    return twin


class AccountFile:
    """account.json: the cached account, and notes about it that processes share.

    The notes, none of them a secret; one that is malformed counts as missing:

        wait_until  no refresh before this: the server asked for a pause, or failed
        failures    the number of such answers in a row
        lifetime    seconds that the last access token had when it was new
        refused     the fingerprint of a dead refresh token, valid until refused_until
        spent       that of a refresh token whose successor could not be saved
        suspect     that of a new token that the API may refuse, until suspect_until
        rejected    that of one that it refused; until rejected_until, all count as such
        account_of  the fingerprints of the login that the cached account belongs to
        key_owner   the fingerprint of the stored API key and its organization together

    A cache: a damaged file is left alone and counts as empty, and changes that cannot
    be written are kept in memory.  Hold the storage's lock to make changes.
    """

    _ACCOUNT: Final = "oauthAccount"
    _NOTES: Final = "claudeOauthMemory"

    def __init__(self, path: str | None, config: OAuthConfig, clock: Clock) -> None:
        self._path = absolute_path(path) if path else ""  # "": in memory alone
        self._config, self._clock = config, clock
        # What could not be written, and the file's content then: newer content wins.
        self._unwritten: tuple[object, dict[str, object]] = (None, {})

    def fingerprint(self, credentials: Credentials) -> str:
        """Return a hash that identifies a login without revealing its token."""
        token = credentials.refresh_token or credentials.access_token
        client_id = credentials.client_id or self._config.client_id
        url = self._config.token_url.lower()
        return fingerprint(token, client_id=client_id, token_url=url)

    def account(self, credentials: Credentials) -> dict[str, Any]:
        """Return the account that was cached for this login, empty if there is none."""
        owner = self.fingerprint(credentials)
        # An account without an owner was written by an earlier version.
        owners = self.notes().get("account_of", owner)
        return _object(self._load().get(self._ACCOUNT)) if owner in str(owners) else {}

    def notes(self) -> dict[str, Any]:
        """Return the notes."""
        return _object(self._load().get(self._NOTES))

    def number(self, name: str) -> float:
        """Return a note that is a number."""
        return _number(self.notes().get(name)) or 0.0

    def update(self, account: Record, notes: Record) -> None:
        """Replace the account and the notes; write nothing if nothing changes."""
        own = {self._ACCOUNT: account, self._NOTES: _without_empty(notes)}
        before, found = self._load(), self._read()
        if (record := {**without(before, own), **_without_empty(own)}) == before:
            return
        self._unwritten = (found, record)
        if found is not None:
            with suppress(StorageError):
                _AtomicFile(self._path).commit(dump_json(record).encode(), sync=False)
                self._unwritten = (None, {})

    def note(self, **changes: object) -> None:
        """Change single notes."""
        account = _object(self._load().get(self._ACCOUNT))
        self.update(account, {**self.notes(), **changes})

    def start(self, login: Credentials, account: Record) -> None:
        """Replace the account and all notes, for a new login."""
        notes = {"key_owner": key_owner_of(login.api_key, account)}
        self.update(account, {**notes, "account_of": [self.fingerprint(login)]})

    def note_success(
        self, renewed: Credentials, before: Credentials, stored: Credentials | None
    ) -> None:
        """Note a successful refresh; the cached account stays with the login."""
        now = self._clock()
        settled = ("wait_until", "failures", "refused", "suspect", "rejected")
        notes: dict[str, object] = {**dict.fromkeys(settled), "rejected_until": None}
        if renewed.access_token != before.access_token:
            lifetime = time_left(renewed.expires_at, now)
            notes["lifetime"] = round(min(lifetime, MAX_LIFETIME))
        if self.account(before):
            notes["account_of"] = [*map(self.fingerprint, (renewed, before))]
        kept = getattr(stored, "refresh_token", renewed.refresh_token)
        if before.refresh_token == kept != renewed.refresh_token:
            # Spent: never sent again, even if the store or a backup still holds it.
            notes["spent"] = notes["refused"] = self.fingerprint(before)
            notes["refused_until"] = now + MAX_LIFETIME  # 0.1.0 does not know `spent`
        self.note(**notes)

    def note_failure(
        self, failure: TokenRefused | Unavailable, sent: Credentials, scopes: object
    ) -> float | None:
        """Note a failure; return the seconds until a second request, None for none."""
        if isinstance(failure, Unavailable):
            pause = self._note_pause(failure)
            # While the token is alive it is served, and nobody has to wait at all.
            is_expired = time_left(sent.expires_at, self._clock()) <= 0
            return pause if is_expired and 0 < pause <= SHORT_WAIT else None
        if failure.code == "invalid_scope" and scopes:
            return 0.0
        # A 401 or 404 may be a gateway's, which must not end a login: note it for 1 h.
        in_doubt = WAIT_CEILING if failure.status in (401, 404) else 0.0
        known = {"invalid_grant": MAX_LIFETIME, "invalid_client": 0.0}
        # Other refusals are about the account or the settings.
        if span := known.get(failure.code, in_doubt):
            until = self._clock() + span
            self.note(refused=self.fingerprint(sent), refused_until=until)
        return None

    def _note_pause(self, error: Unavailable) -> float:
        """Note a pause after a 429 or 5xx, for every process; return its seconds."""
        import random

        status: Any = error.status
        if status not in (429, *range(500, 1000)):
            return 0.0
        failures = int(self.number("failures")) + 1
        chance = random.random()  # noqa: S311 - it spreads load, and is no secret
        wait = error.retry_after
        pause = seconds_to_wait(status, wait, failures=failures, chance=chance)
        self.note(wait_until=self._clock() + pause, failures=failures)
        return pause

    def seconds_left(self, name: str, longest: float = 2 * MAX_LIFETIME) -> float:
        """Return the seconds until the moment of a note, 0 if that has passed."""
        return wait_left(self.number(name), self._clock(), longest)

    def is_refused(self, credentials: Credentials) -> bool:
        """Tell whether the server is known to refuse this refresh token."""
        names = ("spent", "refused")[: 1 + (self.seconds_left("refused_until") > 0)]
        return self.fingerprint(credentials) in map(self.notes().get, names)

    def raise_known_failure(self, credentials: Credentials) -> None:
        """Raise the error of a request that is known to fail, without sending it."""
        if self.is_refused(credentials):
            raise TokenRefused("invalid_grant", "refused before, and not sent again")
        if pause := self.seconds_left("wait_until", WAIT_CEILING):
            span = describe_seconds(pause + 0.999)  # never 0 s
            text = f"requests to the server are paused for {span}; try again then"
            raise Unavailable(text, pause)

    def clear(self) -> None:
        """Remove this module's own keys, and the file if nothing else is in it."""
        self.update({}, {})
        if self._read() == {}:
            _quietly(os.unlink, os.path.realpath(self._path))

    def _load(self) -> dict[str, object]:
        found, (over, unwritten) = self._read(), self._unwritten
        return {True: unwritten, False: _object(found)}[found == over]

    def _read(self) -> dict[str, object] | None:
        """Return the content; {} if there is no file, None if it must stay as it is."""
        if not self._path:
            return None
        try:
            data = read_private(self._path)
        except StorageError:
            return None
        return {} if data is None else parse_json_object(data)


def _without_empty(fields: Record) -> dict[str, object]:
    """Return the fields without those that are None, "" or {}; 0 and False stay."""
    return {k: v for k, v in fields.items() if v not in (None, "", {})}


def key_owner_of(api_key: str | None, account: Record) -> str:
    """Return a fingerprint of a key with its organization, "" if one is unknown."""
    owner = _text(account.get("organizationUuid"))
    return fingerprint(api_key, client_id=owner) if api_key and owner else ""


class PendingSave(_Value):
    """A login that could not be saved: this process saves it as soon as it can.

    Once the store holds anything other than *replaces*, the store counts.
    *account* is the account of a new login, None if the login was only refreshed.
    """

    credentials: Credentials
    replaces: Credentials | None
    account: Record | None = None


def _current_login(
    pending: PendingSave | None, stored: Credentials | None
) -> Credentials | None:
    """Return what is pending while the store holds what it replaces, else `stored`."""
    if not pending or _tokens(stored) != _tokens(pending.replaces):
        return stored
    if pending.account is not None:
        return pending.credentials
    # A key that another process has made meanwhile is permanent.
    key = pending.credentials.api_key or getattr(stored, "api_key", None)
    return pending.credentials.replace(api_key=key)


class ServedToken:
    """An access token that is handed out for a moment without reading the store."""

    def __init__(self, credentials: Credentials, now: float) -> None:
        self.token = self.api_token = credentials.access_token
        self.expires_at = self.headers_expire_at = time_left(credentials.expires_at, 0)
        bearer = f"Bearer {self.token}"
        self.headers = {"Authorization": bearer, "anthropic-beta": OAUTH_BETA}
        if key := console_key(credentials):
            self.api_token, self.headers = key, {"x-api-key": key}
            self.headers_expire_at = float("inf")
        elif needs_key(credentials):
            self.headers_expire_at = 0.0  # the API does not take this login's token
        # Two clocks: one can be set, and the other stands still while a machine sleeps.
        self.since, self.until = now, now + LOOK_INTERVAL
        self.look_again = time.monotonic() + LOOK_INTERVAL

    def is_current(self, now: float, left: float, min_validity: float) -> bool:
        """Tell whether a token with `left` seconds is served without a store read."""
        is_fresh = self.since <= now < self.until and left > min_validity
        return is_fresh and time.monotonic() < self.look_again


_NOT_FAILED: Final = (-1.0, ClaudeOAuthError())  # before any monotonic time
_NOTHING_SERVED: Final = ServedToken(Credentials(""), float("inf"))  # never current


class StoreView:
    """The storage as this process sees it: the last read, and a pending save.

    Hold the storage's lock for `read` and `save`, unless it is read-only.
    """

    def __init__(self, storage: Storage, account_file: AccountFile) -> None:
        self.storage, self.account_file, self._pid = storage, account_file, os.getpid()
        self.is_read_only = bool(getattr(storage, "read_only", False))
        self.pending: PendingSave | None = None
        # Replaced whole, never changed, so reading them needs no lock.
        self._last: tuple[object, Credentials | None] = (None, None)
        self._failure: ClaudeOAuthError | None = None
        self._failed_until, self.served = Deadline(0), _NOTHING_SERVED

    def require(self, login: Credentials | None) -> Credentials:
        """Return the login, or raise NotLoggedIn if there is none."""
        if login is not None:
            return login
        if not self.is_read_only:
            raise NotLoggedIn
        where = f"no login is in {self.storage.describe()}"
        raise NotLoggedIn(f"{where}; sign in with the program that owns it")

    def look(self) -> Credentials | None:
        """Return the login in force; read the store only if it may have changed.

        While the store fails, the last login read is served, with one warning; if none
        was read, the error is raised: a failure never means "not logged in".
        """
        if self._pid != os.getpid():
            # Forked: the parent saves what is pending, and refreshes it as well.
            self._pid, self.pending = os.getpid(), None
            self.remember(None)
        if self.pending:
            self._save_again()
        pending, before = self.pending, self._last
        latest, stamp = before, None
        with suppress(StorageError, ConfigError):  # without a stamp, it is read
            stamp = self.storage.stamp()
        if stamp is None or stamp != before[0]:
            latest = self._load(stamp, before[1])
            if self._last is before:  # else another thread knows something newer
                self._last, self.served = latest, _NOTHING_SERVED
        return _current_login(pending, latest[1])

    def read(self) -> tuple[Credentials | None, Credentials | None]:
        """Return what the store holds now, and the login in force.  Needs the lock."""
        stored = self.storage.load()
        if (newest := _current_login(self.pending, stored)) is stored:
            self.pending = None  # somebody has logged in or out since
        self.remember(newest)
        return stored, newest

    def save(
        self, new: Credentials, old: Credentials | None, account: Record | None = None
    ) -> None:
        """Save a new login in place of the *old* one, if the store still holds that.

        After an error it is served from memory, and every look tries to save it again.
        """
        if account is None and self.pending:
            account = self.pending.account
        pending: PendingSave | None = PendingSave(new, old, account)
        error: ClaudeOAuthError | None = None
        try:
            # A program that knows no lock may have stored another login: keep that.
            stale = False
            with suppress(Exception):  # a read that fails must not cost the new login
                stale = account is None and _tokens(self.storage.load()) != _tokens(old)
            # Twice: some mounts only refuse to rewrite the file that was reserved.
            if not stale and not _quietly(self.storage.save, new):
                self.storage.save(new)
            pending = None
        except Exception as problem:  # whatever it is: the token before it is spent
            error = StorageError(f"the storage fails ({type(problem).__name__})")
            error = problem if isinstance(problem, ClaudeOAuthError) else error
        finally:
            self.pending = pending
            self.remember(new)
        if error:  # raised out here, so that no other exception is chained to it
            raise error
        if account is not None:
            self.account_file.start(new, account)

    def remember(self, credentials: Credentials | None) -> None:
        """Use this as the store's content until the next look."""
        self._last, self.served = (None, credentials), _NOTHING_SERVED

    def serve(self, credentials: Credentials, now: float) -> ServedToken:
        """Return a login to hand out, now and for LOOK_INTERVAL; or StorageCorrupt."""
        served = ServedToken(credentials, now)
        if not _header_text(served.api_token):  # an HTTP library's error would quote it
            raise StorageCorrupt("the stored token is malformed; replace it, or log in")
        self.served = served
        # Checked last: not kept if a thread has refreshed, or while a save is pending.
        if credentials is not self._last[1] or self.pending:
            self.served = _NOTHING_SERVED
        return served

    def _load(
        self, stamp: object, known: Credentials | None
    ) -> tuple[object, Credentials | None]:
        """Read the store; while that fails, return what is known, without the stamp."""
        began = time.monotonic()
        try:
            if self._failure and self._failed_until.left():
                raise _copy_of(self._failure)
            found, self._failure = self.storage.load(), None
            return (None, stamp)[found is not None], found  # no login: read again
        except (StorageError, ConfigError) as error:
            took = time.monotonic() - began
            if took > SLOW_FAILURE:  # maybe a dialog: do not show it again at once
                self._failed_until = Deadline(5 * took)
            is_new, self._failure = not self._failure, _copy_of(error)
            if known is None:
                raise
            if is_new:
                warn(f"{error} (the login that was read before is used)")
            return None, known

    def _save_again(self) -> None:
        # There was a warning already; after an error the next call tries again.
        with suppress(ClaudeOAuthError), self.storage.lock(0):
            stored, newest = self.read()
            if self.pending and newest:
                self.save(newest, stored)


def with_signals_deferred(function: Callable[..., _T], *arguments: object) -> _T:
    """Call a function to its end; signals, and errors thrown into the thread, wait.

    In the main thread signals come later, except an unhandled SIGQUIT, SIGUSR1 etc.
    In others the exit waits, LOCK_TIMEOUT at most; unhandled SIGTERM and SIGHUP do not.
    """
    import signal
    import threading
    from contextlib import ExitStack

    previous: dict[int, Any] = {}
    done, pid, delivery = threading.Event(), os.getpid(), ExitStack()
    thread_id = threading.get_ident()
    # The exit waits for it.  Not atexit: multiprocessing ends a child without that.
    waiter = threading.Thread(target=done.wait, args=(LOCK_TIMEOUT,), daemon=False)

    def hold(number: int, _frame: object) -> None:
        if os.getpid() == pid:
            delivery.callback(signal.raise_signal, number)
        else:  # a forked child, where nobody delivers it
            signal.signal(number, previous[number])
            signal.raise_signal(number)

    try:
        if threading.current_thread() is threading.main_thread():
            _hold_signals(hold, previous)
        elif threading.main_thread().is_alive():  # else the exit might never end
            with suppress(RuntimeError):  # no thread can be started
                waiter.start()
        _INTERRUPTS[thread_id] = lambda error: delivery.callback(raise_error, error)
        return function(*arguments)
    finally:
        _INTERRUPTS.pop(thread_id, None)
        done.set()
        for number in reversed(previous):
            if signal.getsignal(number) is hold:
                signal.signal(number, previous[number])
        delivery.close()  # each one, even if another raises


def _hold_signals(handler: Callable[..., None], previous: dict[int, Any]) -> None:
    """Set a handler for the signals that end programs; note each previous one."""
    import signal

    # A default of these may be faulthandler's.
    names = ("QUIT", "ABRT", "USR1", "USR2", "PROF", "VTALRM")
    others: dict[str, Any] = dict.fromkeys(names, signal.SIG_DFL)
    # Not asyncio's and uvloop's: their loops have the signal, and would get it twice.
    loops = ("_sighandler_noop", "Loop.__sighandler")
    # SIGINT first: what is restored last cannot interrupt the others.
    for name in ("INT", "TERM", "HUP", "ALRM", "BREAK", *others):
        number = getattr(signal, "SIG" + name, signal.SIGINT)
        found = signal.getsignal(number)
        # None is a handler that is not Python's; an ignored signal stays ignored.
        is_kept = found in (None, signal.SIG_IGN, handler, others.get(name))
        if not any((is_kept, getattr(found, "__qualname__", "") in loops)):
            previous[number] = found  # first: the next line may be interrupted
            with suppress(ValueError):  # a sub-interpreter: none arrives
                signal.signal(number, handler)


class Refresher:
    """Gets a new access token; nothing else spends a stored refresh token.

    1. Look: a token that is good for long enough costs nothing (`is_due`).
    2. Lock out the other threads, look again, and lock out the other processes.
    3. Look again: somebody may have refreshed meanwhile, and their token will do.
    4. Check that the new login can be written, before anything is spent.
    5. Spend the refresh token.
    6. Save the new login; it is on the disk, or pending, before anybody gets it.
    7. Note the result for the other processes, and unlock.

    From 5 on, a power failure, a lost answer, or an exit while the save is pending can
    lose the login; a crash before loses nothing.  Signals: see `with_signals_deferred`.
    """

    def __init__(self, client: OAuthClient, view: StoreView, clock: Clock) -> None:
        self._client, self._clock = client, clock
        self._view, self._account_file = view, view.account_file
        self._mutexes: dict[int, Any] = {}  # RLocks by process id; for a refresh
        # The last failed refresh and when it failed, for the threads that waited.
        self._failed, self._not_before = _NOT_FAILED, 0.0

    def is_due(self, credentials: Credentials, min_validity: float) -> bool:
        """Tell whether a refresh should be tried now."""
        put_off = wait_left(self._not_before, self._clock(), REFRESH_RETRY_DELAY)
        limit = 0 if put_off or not credentials.refresh_token else max(min_validity, 0)
        return time_left(credentials.expires_at, self._clock()) <= limit

    def refresh(
        self, present: Credentials, min_validity: float, old: Credentials | None = None
    ) -> tuple[Credentials, bool]:
        """Return a valid login, and whether this call has refreshed it.

        While the present token is valid, this returns it instead of waiting or failing.
        With *old*, only a different token will do, however valid that one is.
        """
        if time_left(present.expires_at, self._clock()) <= 0 or old is not None:
            limit = max(LOCK_TIMEOUT, 3 * self._client.config.timeout)
            return self._refresh_alone(limit, min_validity, old)
        try:
            return self._refresh_alone(0.0, min_validity)
        except NotLoggedIn:
            raise
        except ClaudeOAuthError as error:
            self._not_before = self._clock() + REFRESH_RETRY_DELAY
            if not isinstance(error, (Unavailable, BadAnswer)):
                warn(f"{error} (the present token is used until it expires)")
            return present, False

    def _read_foreign(self, old: Credentials | None) -> tuple[Credentials, bool]:
        """Return the login that another program refreshes; never refresh it here."""
        if self._suffices(newest := self._view.require(self._view.read()[1]), 0, old):
            return newest, False
        text = f"the token in {self._view.storage.describe()} has to be refreshed by"
        raise Unavailable(f"{text} the program that owns it; run that, then try again")

    def _refresh_alone(
        self, timeout: float, min_validity: float, old: Credentials | None = None
    ) -> tuple[Credentials, bool]:
        """Lock, and go through the steps from 3 on; or fail as a refresh just did."""
        from contextlib import ExitStack

        if self._view.is_read_only:
            return self._read_foreign(old)
        began, deadline = time.monotonic(), Deadline(timeout)
        with ExitStack() as stack:  # made first: Ctrl-C may come at any moment
            stack.enter_context(thread_lock(self._mutexes, timeout))
            newest = self._view.require(self._view.look())  # maybe refreshed by now
            if self._suffices(newest, min_validity, old):
                return newest, False
            when, failure = self._failed
            if when > began:
                raise _copy_of(failure)  # or each thread would wait for the network
            self._failed = _NOT_FAILED
            stack.enter_context(self._view.storage.lock(deadline.left()))

            def run_locked() -> tuple[Credentials, bool]:
                with stack:  # unlocks before the signals are delivered
                    try:
                        return self._refresh_if_needed(min_validity, old)
                    except ClaudeOAuthError as error:
                        self._failed = (time.monotonic(), _copy_of(error))
                        raise

            return with_signals_deferred(run_locked)

    def _refresh_if_needed(
        self, min_validity: float, old: Credentials | None, *, is_last: bool = False
    ) -> tuple[Credentials, bool]:
        """Look again, check, spend, save, note; two requests at most."""
        stored, found = self._view.read()
        if self._suffices(newest := self._view.require(found), min_validity, old):
            return newest, False
        scopes: tuple[str, ...] = ()  # the server keeps those granted
        if not is_last:
            self._account_file.raise_known_failure(newest)
            scopes = scopes_to_refresh(newest.scopes, self._client.config.scopes)
        self._view.storage.check()
        try:
            return self._spend(newest, stored, scopes), True
        except (TokenRefused, Unavailable) as error:
            pause = self._account_file.note_failure(error, newest, scopes)
            # Another program may have refreshed meanwhile; else the failure counts.
            with suppress(StorageError, NotLoggedIn):
                latest = self._view.require(self._view.read()[1])
                if latest.refresh_token != newest.refresh_token:
                    pause = 0.0
            if is_last or pause is None:
                raise
        time.sleep(pause)
        return self._refresh_if_needed(min_validity, old, is_last=True)

    def _suffices(
        self, newest: Credentials, min_validity: float, old: Credentials | None
    ) -> bool:
        if 0 < (lifetime := self._account_file.number("lifetime")) <= min_validity:
            min_validity = lifetime / 2  # a new one would not live long enough either
        is_other = not old or newest.access_token != old.access_token
        return time_left(newest.expires_at, self._clock()) > min_validity and is_other

    def _spend(
        self, newest: Credentials, stored: Credentials | None, scopes: Iterable[str]
    ) -> Credentials:
        """Spend the refresh token; keep a successor even beside a bad access token."""
        answer, now = self._client.request_refresh(newest, scopes), self._clock()
        read = Credentials.from_answer
        new, error = outcome_of(lambda: read(answer, received_at=now, previous=newest))
        successor = newest.replace(refresh_token=_text(answer.get("refresh_token")))
        answer.clear()  # error trackers record this frame, if a store logs an error
        if not error:
            return self._keep(new, newest, stored)
        if successor.refresh_token:
            self._keep(successor, newest, stored)
        raise error

    def _keep(
        self, renewed: Credentials, before: Credentials, stored: Credentials | None
    ) -> Credentials:
        """Save the new login, and note the result for the other processes."""
        renewed = renewed.replace(client_id=self._client.client_id_for(before))
        try:
            self._view.save(renewed, stored)
        except ClaudeOAuthError as error:
            problem = f"the refreshed login could not be saved ({error})"
            warn(f"{problem}; it is kept in memory and saved as soon as that works")
        finally:  # the token before is spent, and nobody must send it again
            self._account_file.note_success(renewed, before, stored)
        return renewed


# -- Service ---------------------------------------------------------------------------


@hides_locals
class OAuthService:
    """A login that lasts: it signs in, hands out tokens and refreshes them in time.

    Safe to share between threads; any number of processes may use one storage.

    Args:
        config: Default: from the environment.
        storage: Default: the platform's store, see ``default_storage``.
        session: A ``requests.Session`` for this service's own requests.
        account_file: Where the account is cached, and the pauses that processes share.
            Default: the storage's ``account_file``; in memory if it has none.
        flush_telemetry: Called first at logout, with the seconds that it may take.
        clock: Seconds since the epoch.
    """

    def __init__(
        self,
        config: OAuthConfig | None = None,
        storage: Storage | None = None,
        *,
        session: requests.Session | None = None,
        account_file: str | os.PathLike[str] | None = None,
        flush_telemetry: Callable[[float], object] | None = None,
        clock: Clock = time.time,
    ) -> None:
        self.config = OAuthConfig.from_env() if config is None else config
        self.storage: Storage = default_storage() if storage is None else storage
        self._session, self._clock = session, clock
        self._flush_telemetry = flush_telemetry
        path: str | None = getattr(self.storage, "account_file", None)
        if account_file is not None:
            path = absolute_path(account_file)
        self._account_file = AccountFile(path, self.config, clock)
        self._client = OAuthClient(self.config, session=session, clock=clock)
        self._view = StoreView(self.storage, self._account_file)
        self._refresher = Refresher(self._client, self._view, clock)

    # Tokens

    def access_token(self, *, min_validity: float = REFRESH_BUFFER) -> str:
        """Return an access token that works, refreshed if that is due.

        While a refresh is under way, or has failed, a token that is still alive is
        handed out; after its expiry all wait for the one refresh.

        Args:
            min_validity: The least number of seconds that the token should stay valid.

        Raises:
            NotLoggedIn: There is no credential, or nothing to refresh it with; log in.
            TokenRefused: The refresh token is dead and the token has expired; log in.
            Unavailable: The token has expired and the server cannot be asked now.
            StorageError: The storage cannot be read, or could not take a new login.
        """
        # Programs call this before every request: no lock, no system call, no copy.
        served, now = self._view.served, self._clock()
        if served.is_current(now, served.expires_at - now, min_validity):
            return served.token
        del served  # an error's traceback shows the variables of this frame
        return self._serve(min_validity).token

    def auth_headers(self) -> dict[str, str]:
        """Return the headers that authenticate a request to the API.

        A Bearer token and beta header; for a Console login ``x-api-key``, made if there
        is none.  Raises what ``access_token`` and ``create_api_key`` raise.
        """
        served, now = self._view.served, self._clock()
        if served.is_current(now, served.headers_expire_at - now, REFRESH_BUFFER):
            return served.headers.copy()
        del served
        return self._serve_api(REFRESH_BUFFER).headers.copy()

    def api_token(self, *, min_validity: float = REFRESH_BUFFER) -> str:
        """Return what the API takes: an access token, or the Console path's API key.

        Raises what ``access_token`` and ``create_api_key`` raise.
        """
        return self._serve_api(min_validity).api_token

    def refresh(self, *, rejected: str | None = None) -> Credentials:
        """Get another access token now, and return the new credential.

        Args:
            rejected: The access token that a server has just answered 401 to.  A newer
                one that the storage already has is then enough.

        Raises:
            ConfigError: CLAUDE_OAUTH_TOKEN is in force, and cannot be refreshed.
            TokenRefused: The refresh token is dead; or *rejected* was new when the API
                answered 401 to it, so that a refresh would not help.
            ClaudeOAuthError: What ``access_token`` raises.
        """
        return self.refresh_rejected(Credentials(rejected) if rejected else None)

    def refresh_rejected(self, rejected: Credentials | None) -> Credentials:
        """Do what `refresh` does; `Credentials` hides the token from error trackers."""
        if environment_token():
            raise ConfigError("CLAUDE_OAUTH_TOKEN cannot be refreshed; unset it")
        present = self._view.require(self._view.look())
        if not rejected or rejected.access_token != present.access_token:
            return self._refresh(present, 0, rejected or present)
        if self.is_rejected(present):
            raise TokenRefused("invalid_token", "the API refuses new tokens too", 401)
        renewed = self._refresh(present, 0, present)
        self.note_rejected(renewed, is_new=True)
        return renewed

    @hides_locals
    def _serve(self, min_validity: float) -> ServedToken:
        """Return a token to hand out, refreshed if that is due."""
        credentials = self._view.require(self.credentials())
        if self._refresher.is_due(credentials, min_validity):
            credentials = self._refresh(credentials, min_validity)
        return self._view.serve(credentials, self._clock())

    @hides_locals
    def _serve_api(self, min_validity: float) -> ServedToken:
        """Return what the API takes: a key where it needs one, else an access token."""
        if needs_key(credentials := self._view.require(self.credentials())):
            credentials, _ = self._with_token(self._make_key, force=False)
        if console_key(credentials):  # it never expires
            return self._view.serve(credentials, self._clock())
        served = self._serve(min_validity)  # by now it may be another login
        return served if served.headers_expire_at else self._serve_api(min_validity)

    def _refresh(
        self, present: Credentials, min_validity: float, old: Credentials | None = None
    ) -> Credentials:
        credentials, is_new = self._refresher.refresh(present, min_validity, old)
        # The token is saved (else nothing is asked): a slow profile costs only time.
        return self._complete_account(credentials) if is_new else credentials

    def is_rejected(self, login: Credentials) -> bool:
        """Tell whether the API refuses new tokens, or has yet to accept this one."""
        file, stored = self._account_file, self._view.look() or Credentials("")
        names = ("rejected", "suspect")[: 1 + (file.seconds_left("suspect_until") > 0)]
        is_noted = fingerprint(login.access_token) in map(file.notes().get, names)
        is_noted |= file.seconds_left("rejected_until", REFRESH_BUFFER) > 0
        is_alive = time_left(stored.expires_at, self._clock()) > 0
        return all((is_noted, is_alive, stored.access_token == login.access_token))

    def note_rejected(self, login: Credentials, *, is_new: bool = False) -> None:
        """Note the refusal of a suspected token, or suspect a new one; "" ends that."""
        noted, until = fingerprint(login.access_token), self._clock() + REFRESH_BUFFER
        # After an error the next 401 notes it.
        with suppress(ClaudeOAuthError), self.storage.lock(SHORT_WAIT):
            changes: dict[str, object] = {}
            if not login.access_token:
                changes = {"suspect": None}
            elif is_new:
                changes = {"suspect": noted, "suspect_until": until}
            elif self.is_rejected(login):  # not one that another program got long ago
                changes = {"rejected": noted, "rejected_until": until}
            self._account_file.note(**changes)

    def _with_token(
        self, ask: Callable[..., _T], **options: bool
    ) -> tuple[_T, Credentials]:
        """Call with an access token; after a 401, once more with a new one."""
        login = Credentials(self.access_token())
        try:
            return ask(login.access_token, **options), login
        except (TokenRefused, Unavailable) as error:
            if error.status != 401:
                raise
            if environment_token():
                if isinstance(error, Unavailable):  # it says nothing of the token
                    raise
                cure = "replace the token, or unset CLAUDE_OAUTH_TOKEN first"
                raise TokenRefused("invalid_token", cure, 401) from None
        login, refused = self.refresh_rejected(login), Credentials("")
        try:
            return ask(login.access_token, **options), login
        except (TokenRefused, Unavailable) as error:
            refused = (refused, login)[error.status == 401]
            raise
        finally:
            self.note_rejected(refused)

    # The account, and the API key of the Console path

    def credentials(self) -> Credentials | None:
        """Return CLAUDE_OAUTH_TOKEN, else what is stored, else None; use no network.

        Raises:
            StorageError: It cannot be read, and nothing was read before.
            ConfigError: CLAUDE_OAUTH_TOKEN is not a token.
        """
        token = environment_token()
        return Credentials(token) if token else self._view.look()

    def profile(self, *, force: bool = False) -> Profile:
        """Return the account's profile, from the cache unless forced to ask.

        Raises:
            TokenRefused: The token may not ask (403: it lacks user:profile).
            And what ``access_token`` raises.
        """
        login = self._view.require(self.credentials())
        if environment_token():
            return self._with_token(self._client.fetch_profile)[0]
        cached = Profile.from_record(self._account_file.account(login), login)
        if cached and not force:
            return cached
        profile, login = self._with_token(self._client.fetch_profile)
        try:
            self._keep_profile(profile, login)
        except (StorageError, Unavailable) as error:
            warn(f"the profile could not be kept: {error}")
        return profile

    def _complete_account(self, renewed: Credentials) -> Credentials:
        """Ask for the profile if some of it is missing; a failure changes nothing."""
        needs = [renewed.subscription_type, renewed.rate_limit_tier]
        needs += map(self._account_file.account(renewed).get, _ACCOUNT_NEEDS)
        may_ask = not renewed.scopes or SCOPE_USER_PROFILE in renewed.scopes
        if all(needs) or not may_ask or self._view.pending:
            return renewed
        if profile := self._try_profile(renewed):
            with suppress(ClaudeOAuthError):
                return self._keep_profile(profile, renewed)
        return renewed

    def _try_profile(self, login: Credentials) -> Profile | None:
        """Return the profile; None if it cannot be had, or takes too long."""
        # A token without user:profile gets a 403 here, and works all the same.
        fetch, limit = self._client.fetch_profile, self.config.timeout
        return call_with_limit(lambda: fetch(login.access_token), limit)[0]

    def _keep_profile(self, profile: Profile, login: Credentials) -> Credentials:
        """Store the profile of a login if it is still stored; return it completed."""
        is_ours = not self._view.is_read_only
        with self.storage.lock(SHORT_WAIT) if is_ours else suppress():
            stored, newest = self._view.read()
            if newest is None or newest.access_token != login.access_token:
                return login  # somebody refreshed, or logged out or in, meanwhile
            file, account = self._account_file, self._account_file.account(newest)
            if account.get("accountUuid") not in (None, profile.account_uuid):
                account = {}
            account = {**account, **_without_empty(profile.to_record())}
            owners = [file.fingerprint(newest)]
            file.update(account, {**file.notes(), "account_of": owners})
            if (completed := _with_plan(newest, profile)) != newest and is_ours:
                self._view.save(completed, stored)
            return completed

    def create_api_key(self) -> str:
        """Make a permanent Console API key, store it, and return it.

        Each call makes another one; the organization's Console page deletes them.

        Raises:
            TokenRefused: The account may not make keys.
            StorageError: The key could not be stored, so none was made.
            And what ``access_token`` raises.
        """
        if environment_token():
            return self._with_token(self._client.create_api_key)[0]
        return str(self._with_token(self._make_key, force=True)[0].api_key)

    def _make_key(self, token: str, *, force: bool) -> Credentials:
        """Make an API key, with *force* even beside another; store it and its owner."""
        del token  # that of the store counts
        file = self._account_file
        with self.storage.lock(LOCK_TIMEOUT):
            stored, found = self._view.read()
            if not needs_key(newest := self._view.require(found)) and not force:
                return newest
            self.storage.check()  # a permanent key must not be lost once it is made
            file.raise_known_failure(newest.replace(refresh_token=None))  # if paused
            try:
                create = self._client.create_api_key
                with_key = newest.replace(api_key=create(newest.access_token))
            except Unavailable as error:
                if not force:  # else a refresh would wait as well
                    file.note_failure(error, newest, ())
                raise
            try:
                self._view.save(with_key, stored)
            except ClaudeOAuthError as error:
                warn(f"the new API key is kept in memory: {error}")
            file.note(key_owner=key_owner_of(with_key.api_key, file.account(newest)))
            return with_key

    # Login, logout, status

    def login(
        self,
        *,
        console: bool = False,
        open_browser: bool | Callable[[str], object] = True,
        paste: bool = True,
        port: int = 0,
        timeout: float = LOGIN_TIMEOUT,
        email: str | None = None,
    ) -> Credentials:
        """Sign a person in, by browser or by paste, and store the credential.

        Args:
            console: Sign in at the Console, where an API key comes with the login.
            open_browser: False for none; or a callable that takes the address.
            paste: Whether a code may be typed on stdin.
            port: For the loopback redirect; 0 lets the system choose.
            timeout: Seconds for the person.
            email: The address that the sign-in page fills in (``login_hint``).

        Raises:
            ConfigError: A setting, the client id for one, is missing or unusable.
            LoginError: Denied, too late or given up; try again.
            TokenRefused: The code was not accepted; try again.
            Unavailable: No usable answer to the code; try again.
            StorageError: The credential cannot be stored.
        """
        self._check_before_login()
        verifier, state = [generate_code_verifier()], generate_state()

        def url_for(redirect_uri: str) -> str:
            return self._client.authorize_url(
                redirect_uri=redirect_uri,
                challenge=code_challenge(verifier[0]),
                state=state,
                console=console,
                extra={"login_hint": email} if email else None,
            )

        page = failure_page("the login was not finished; try again")
        listener, problem = start_listener(state, port)
        try:
            granted = obtain_code(
                listener,
                url_for=url_for,
                state=state,
                manual_redirect_uri=self.config.manual_redirect_uri,
                open_browser=open_browser,
                paste=paste,
                port=port,
                problem=problem,
                timeout=timeout,
            )
            credentials, account = self._exchange(granted, verifier, state)
            page = success_page(_text(account.get("emailAddress")))
            return credentials
        except ClaudeOAuthError as error:
            is_denied = isinstance(error, LoginDenied)
            page = denied_page() if is_denied else failure_page(str(error))
            raise
        except KeyboardInterrupt as interrupt:
            raise LoginCancelled("the login was given up; try again") from interrupt
        finally:
            listener.finish(page)

    def _check_before_login(self) -> None:
        """Raise the errors that would make a sign-in useless."""
        self._client.check()
        environment_token()  # a malformed one would fail what comes after the login
        with self.storage.lock(LOCK_TIMEOUT):
            self.storage.check()
            self.storage.load()

    def _exchange(
        self, granted: GrantedCode, verifier: list[str], state: str
    ) -> tuple[Credentials, Record]:
        """Turn a code into a stored credential; take the verifier out of its list."""
        with self.storage.lock(LOCK_TIMEOUT):
            stored = self.storage.load()  # before the code is spent: this may fail
            exchange, secret = self._client.exchange_code, verifier.pop
            credentials = exchange(**vars(granted), verifier=secret(), state=state)
            account: Record = {}
            if profile := self._try_profile(credentials):
                account = profile.to_record()
                credentials = _with_plan(credentials, profile)
            credentials = self._with_key(credentials, stored, account)
            self._view.save(credentials, stored, account)
        return credentials, account

    def _with_key(
        self, credentials: Credentials, stored: Credentials | None, account: Record
    ) -> Credentials:
        """Add the organization's API key: the stored one, or else a new one."""
        key = stored.api_key if stored else None
        owner = self._account_file.notes().get("key_owner")
        if key_owner_of(key, account) == owner:  # which is never ""
            return credentials.replace(api_key=key)
        if credentials.is_claude_ai:
            return credentials
        try:
            key = self._client.create_api_key(credentials.access_token)
            return credentials.replace(api_key=key)
        except ClaudeOAuthError as error:
            warn(f"the login works, but no API key could be made: {error}")
            return credentials

    def logout(self) -> bool:
        """End the login here; return whether there was one.

        Telemetry is flushed first, while events still belong to somebody; then the
        grant is revoked if a revoke_url is set; then this module's own keys are
        deleted, and nothing else.  Raises StorageError if that fails.
        """
        flush, has_login = self._flush_telemetry, True
        with suppress(StorageError, ConfigError):  # then there may be one
            has_login = self._view.look() is not None
        if flush and has_login:
            _try_within_limit("the telemetry flush", lambda: flush(FLUSH_TIMEOUT))
        # Under the lock, or a refresh under way would bring the record back.
        with self.storage.lock(LOCK_TIMEOUT):
            try:
                self._revoke(self._view.read()[1])
            except (StorageError, ConfigError) as error:
                warn(f"nothing is revoked: {error}")
            if found := self.storage.delete() or bool(self._view.pending):
                self._account_file.clear()  # else it may be of another store
            self._view.pending = None
            self._view.remember(None)
        return found

    def _revoke(self, login: Credentials | None) -> None:
        token = login and login.refresh_token
        if token and self.config.revoke_url and not self._view.is_read_only:
            client_id = self._client.client_id_for(login)
            config = self.config.replace(client_id=client_id, timeout=FLUSH_TIMEOUT)
            client = OAuthClient(config, session=self._session)
            _try_within_limit("the revocation", lambda: client.revoke(token))

    def status(self) -> dict[str, object]:
        """Return the object that `status --json` prints; no request, never a token.

        Raises what ``credentials`` raises.
        """
        source, method, is_usable, warnings = "none", None, False, []
        # An empty credential stands for none: what it lacks is null in the answer.
        shown, account = Credentials(""), {}
        if environment_token():
            source, is_usable, warnings = "environment", True, self._hidden_login()
        elif stored := self._view.look():
            source, (is_usable, warnings) = "store", self._condition(stored)
            if stored.scopes or stored.api_key:  # else it is not known
                method = {True: "claude.ai", False: "console"}[stored.is_claude_ai]
            shown, account = stored, self._account_file.account(stored)
        expires_in = time_left(shown.expires_at, self._clock())
        return {
            "logged_in": is_usable,
            "source": source,
            "method": method,
            "email": _text(account.get("emailAddress")),
            "organization": _text(account.get("organizationName")),
            "subscription_type": shown.subscription_type,
            "rate_limit_tier": shown.rate_limit_tier,
            "scopes": list(shown.scopes),
            "expires_at": describe_moment(shown.expires_at),
            "expires_in": None if shown.expires_at is None else int(expires_in),
            "refresh_token_expires_at": describe_moment(shown.refresh_token_expires_at),
            "storage": self.storage.describe(),
            "client_id": _text(shown.client_id or self.config.client_id),
            "warnings": warnings,
        }

    def _hidden_login(self) -> list[str]:
        """Return the warnings about CLAUDE_OAUTH_TOKEN and the login that it hides."""
        hides = f", and hides the login in {self.storage.describe()}"
        warning = "CLAUDE_OAUTH_TOKEN is in force"
        try:
            return [warning + hides if self._view.look() else warning]
        except (StorageError, ConfigError) as error:
            return [warning, str(error)]

    def _condition(self, stored: Credentials) -> tuple[bool, list[str]]:
        """Return whether a token can be obtained, and the warnings for a person."""
        now, file = self._clock(), self._account_file
        timed = Credentials("") if console_key(stored) else stored  # a key never ends
        is_expired = time_left(timed.expires_at, now) <= 0
        served = ServedToken(stored, now)
        is_malformed = not any((is_expired, _header_text(served.api_token)))
        left = time_left(timed.refresh_token_expires_at, now)
        wait = file.seconds_left("wait_until", WAIT_CEILING)
        pause, ends = describe_seconds(wait + 0.999), describe_seconds(left)
        ends_soon, is_refused = 0 < left < LOGIN_END_WARNING, file.is_refused(timed)
        is_final, is_foreign = not stored.refresh_token, self._view.is_read_only
        lacks_key = all((needs_key(stored), not is_foreign))
        hints = {
            "the login is in memory alone: it could not be saved": self._view.pending,
            f"requests to the server are paused for another {pause}": wait,
            f"the login ends in {ends}, refreshed or not: log in again": ends_soon,
            "no API key is stored: `claude-oauth token` asks for one": lacks_key,
        }
        faults = {  # no refresh helps
            "the server refused to refresh the login: log in again": is_refused,
            "the login itself is over: log in again": left <= 0,
            "the stored token is malformed: log in again": is_malformed,
        }
        if is_expired:
            is_known = any((is_foreign, stored.client_id, self.config.client_id))
            faults["no client id is set (CLAUDE_OAUTH_CLIENT_ID)"] = not is_known
            faults["the token has expired: run the program that owns it"] = is_foreign
            faults["the token has expired, with none to refresh it: log in"] = is_final
        warnings = [text for text, holds in {**hints, **faults}.items() if holds]
        return not (any((is_expired, is_malformed)) and any(faults.values())), warnings


# Keys of account.json; if one is missing, a refresh fetches the profile.
_ACCOUNT_NEEDS: Final = ("billingType", "accountCreatedAt", "subscriptionCreatedAt")

# Environment variables that still sign programs in after a logout here.
LOGIN_VARIABLES: Final = (
    "CLAUDE_OAUTH_TOKEN", "CLAUDE_CODE_OAUTH_TOKEN",
    "ANTHROPIC_AUTH_TOKEN", "ANTHROPIC_API_KEY",
)


def environment_token() -> str | None:
    """Return CLAUDE_OAUTH_TOKEN, None if it is unset; ConfigError if it is no token."""
    value = setting("CLAUDE_OAUTH_TOKEN")
    return clean_token(value) if value else None


def _with_plan(credentials: Credentials, profile: Profile) -> Credentials:
    if not profile.organization_uuid:
        return credentials  # nothing is known of a plan
    plan, tier = profile.subscription_type, profile.rate_limit_tier
    return credentials.replace(subscription_type=plan, rate_limit_tier=tier)


def _try_within_limit(name: str, call: Callable[[], object]) -> None:
    """Call for FLUSH_TIMEOUT at most, and go on whatever it raises."""
    _, error = call_with_limit(call, FLUSH_TIMEOUT)
    if error:
        # Errors of other code may quote a secret.
        problem = error if isinstance(error, ClaudeOAuthError) else type(error).__name__
        warn(f"logging out goes on without {name} ({problem})")


@hides_locals
class BearerAuth:
    """Adds the credential to requests: an auth object for `requests`, and for httpx.

    After a 401 (`is_token_refused`) it refreshes the token and repeats the request once
    (with httpx: in a class that derives from this one and ``httpx.Auth``).  The token
    goes to the hosts listed and to the API's host in the service's settings, and there
    by https or to loopback alone.  (httpx would carry the API key of the Console path
    along a redirect: leave its ``follow_redirects`` off there.)

    Raises:
        ConfigError: A host is given with a scheme, a port or a path.
    """

    requires_request_body = True  # httpx reads the body, so that it can be repeated

    def __init__(
        self, service: OAuthService, *, hosts: Iterable[str] = ("api.anthropic.com",)
    ) -> None:
        import functools
        from urllib.parse import urlsplit

        self._service = service
        names = [hosts] if isinstance(hosts, str) else [*hosts]
        host = r"(?ai)[a-z0-9_-]+(\.[a-z0-9_-]+)*|[0-9a-f:]*::[0-9a-f:]*"
        for name in names:
            if not _text(name, host):
                text = "is not a host name; give no scheme, port, path or blank"
                raise ConfigError(f"{printable(str(name).split('@')[-1])!r} {text}")
        known = {*map(str.lower, names), urlsplit(service.config.profile_url).hostname}

        @functools.lru_cache(maxsize=100)  # a crawler asks about many origins
        def is_ours(origin: str) -> bool:
            return may_carry_token(origin) and urlsplit(origin).hostname in known

        self._is_ours = is_ours

    def __call__(self, request: Any) -> Any:
        """Sign a request of `requests` or httpx, and return it."""
        if self._may_sign(str(request.url)):
            self._sign(request)
            if hasattr(request, "hooks"):  # httpx has none
                request.hooks["response"].append(self.repeat)
        return request

    def auth_flow(self, request: Any) -> Iterator[Any]:
        """Sign, send, and repeat once after a 401: what ``httpx.Auth`` asks for."""
        may_sign = self._may_sign(str(request.url))
        response: Any = yield self(request)
        if may_sign and self._is_refusal(response) and self._renew(request):
            answer: Any = None
            try:
                answer = yield request
            finally:  # it may end in a timeout
                self._note_answer(request, answer)

    def _may_sign(self, url: str) -> bool:
        return self._is_ours("/".join(url.split("/", 3)[:3]))

    def _is_refusal(self, response: Any) -> bool:
        # A redirect may lead to another host, or (httpx) be followed without the token.
        url, sent, status = str(response.url), response.request, response.status_code
        is_ours = all((self._may_sign(url), not sent or _bearer_of(sent)))
        is_read = all((is_ours, status == 403, hasattr(response, "raw")))
        body = response.content if is_read else b""  # httpx may not have read it
        return is_ours and is_token_refused(status, body)

    def _sign(self, request: Any) -> None:
        """Set the headers of a request, in place of any other credential."""
        headers = self._service.auth_headers()
        present = set(map(str.lower, request.headers))
        if "anthropic-beta" in present & headers.keys():
            headers["anthropic-beta"] = _with_beta(request.headers["anthropic-beta"])
        # The API takes a token or a key, and refuses both.
        for name in present & {"authorization", "x-api-key"}:
            del request.headers[name]
        for name, value in headers.items():
            request.headers[name] = value

    @hides_locals
    def _renew(self, request: Any) -> bool:
        """Refresh after a 401 and sign again; return False where that cannot help."""
        service, old = self._service, Credentials(_bearer_of(request))
        if old.access_token in ("", environment_token()) or service.is_rejected(old):
            return False
        service.refresh_rejected(old)
        self._sign(request)
        return True

    @hides_locals
    def _note_answer(self, request: Any, answer: Any) -> None:
        is_refused = answer is not None and self._is_refusal(answer)
        self._service.note_rejected(Credentials(_bearer_of(request) * is_refused))

    def repeat(self, response: requests.Response, **options: Any) -> Any:
        """Return the answer to a request; after a 401, to its repetition."""
        from urllib.parse import urljoin

        request: Any = response.request
        if response.is_redirect:
            target = urljoin(response.url, response.headers["location"])
            if not self._may_sign(target):  # `requests` removes Authorization alone
                request.headers.pop("x-api-key", None)
        if not self._is_refusal(response):
            return response
        repeated = request.copy()
        try:
            if not self._renew(repeated) or not _rewind(repeated):
                return response
        except ClaudeOAuthError:
            response.close()  # the caller does not get it
            raise
        response.close()
        answer: Any = None
        try:
            answer = response.connection.send(repeated, **options)
        finally:
            self._note_answer(repeated, answer)
        answer.history.append(response)
        answer.request = repeated
        return answer


def _bearer_of(request: Any) -> str:
    return str(request.headers.get("Authorization", "")).partition("Bearer ")[2]


def _with_beta(asked_for: str | bytes) -> str:
    text = asked_for.decode("latin-1") if isinstance(asked_for, bytes) else asked_for
    return ",".join(dict.fromkeys((*text.split(","), OAUTH_BETA)))


def _rewind(request: Any) -> bool:
    """Rewind a request's body to send it again; return False if that is impossible."""
    with suppress(OSError, ValueError):
        if not isinstance(request.body, (bytes, str, type(None))):
            import_requests().utils.rewind_body(request)
        return True
    return False


# -- Sandbox ---------------------------------------------------------------------------


class _SandboxRefusal(Exception):
    """An error to answer with: status, code, message, and Retry-After in seconds."""


@hides_locals
class Sandbox:
    """An authorization server on loopback, for demos and for tests of your program.

        with Sandbox() as sandbox:
            service = OAuthService(sandbox.config, MemoryStorage())
            service.login(open_browser=sandbox.approve, paste=False)

    It enforces the rules: S256, the same redirect_uri and state, codes and refresh
    tokens that work once (reuse ends the login).  ``/v1/messages`` echoes a body.

    Attributes:
        origin: ``http://127.0.0.1:PORT``, once the block has begun.
        counts: Requests by endpoint: authorize, callback (the page with the code),
            authorization_code, refresh_token, profile, api_key, revoke, messages.
        lifetime: Seconds that the next access token lives.
        scopes: The most that the next login is granted (CONSOLE_SCOPES: the Console).
    """

    def __init__(
        self,
        *,
        port: int = 0,
        lifetime: float = 28800,
        scopes: Iterable[str] = CLAUDE_AI_SCOPES,
    ) -> None:
        import threading

        self.origin, self.lifetime, self.scopes = "", lifetime, tuple(scopes)
        self.counts = {name: 0 for name, _ in _SANDBOX_ENDPOINTS.values()}
        self._port = port
        # Guards counts and all below, while a request is answered.
        self._lock = threading.Lock()
        self._failures: dict[str, list[_SandboxRefusal]] = {n: [] for n in self.counts}
        # By code or refresh token; and by access token or API key, with its expiry.
        self._logins: dict[str, types.SimpleNamespace] = {}
        self._access: dict[str, tuple[types.SimpleNamespace, float]] = {}

    def __enter__(self) -> Self:
        try:
            self._server = make_server("127.0.0.1", self._port, self._handle)
        except (OSError, OverflowError) as exc:
            text = f"port {self._port} of 127.0.0.1 cannot be used ({_reason(exc)})"
            raise ConfigError(f"{text}: use another port") from None
        self.origin = f"http://127.0.0.1:{self._server.server_address[1]}"
        if start_thread("sandbox", self._server.serve_forever, 0.05) is None:
            self._server.server_close()
            raise Unavailable("a sandbox needs threads, and none can be started")
        return self

    def __exit__(self, *exc_info: object) -> None:
        call_with_limit(self._server.shutdown, 2)  # a child has no thread that does it
        self._server.server_close()

    @property
    def config(self) -> OAuthConfig:
        """The settings for a program that signs in here."""
        return OAuthConfig.for_server(self.origin, client_id="sandbox")

    def approve(self, url: str) -> str:
        """Approve what an authorize URL asks for, as a person with a browser would.

        Fits as ``open_browser=``: a loopback callback is visited, in a thread.  Returns
        the callback's address, fit to paste; a ValueError names a wrong parameter.
        """
        return self._decide(url, b"decision=approve")

    def deny(self, url: str) -> str:
        """Deny what an authorize URL asks for; otherwise like `approve`."""
        return self._decide(url, b"decision=deny")

    def expire_access_tokens(self) -> None:
        """Answer every access token with 401, however long it should live."""
        with self._lock:
            self._access = {k: v for k, v in self._access.items() if "-oat01-" not in k}

    def fail_next(
        self,
        endpoint: str,
        status: int = 503,
        code: str = "api_error",
        *,
        retry_after: float = 0,
        times: int = 1,
    ) -> None:
        """Answer the next requests of an endpoint, a key of `counts`, with an error.

        For example 400, "invalid_grant"; or 429, "rate_limit_error", retry_after=5 (s).
        """
        refusal = _SandboxRefusal(status, code, "as fail_next asked", retry_after)
        self._failures[endpoint].extend([refusal] * times)

    def _decide(self, url: str, decision: bytes) -> str:
        path = "/oauth/authorize?" + url.partition(f"{self.origin}/oauth/authorize?")[2]
        request = types.SimpleNamespace(command="POST", path=path, body=decision)
        try:
            location = str(self._answer(request))
        except _SandboxRefusal as refusal:
            raise ValueError(f"this cannot be decided on: {refusal.args[2]}") from None
        if not location.startswith(self.origin + "/"):
            start_thread("sandbox-visit", _visit, location)
        return location

    def _handle(self, request: Any) -> None:
        """Answer a request of `make_server`, with a policy that lets a form be sent."""
        length = request.headers.get("Content-Length", "")
        request.body = request.rfile.read(int(length)) if length.isdecimal() else b""
        bearer = request.headers.get("Authorization", "").split("Bearer ")[-1]
        request.token = request.headers.get("x-api-key", bearer)
        status, headers = 200, {"Content-Security-Policy": "default-src 'none'"}
        try:
            answer = self._answer(request)
        except _SandboxRefusal as refusal:
            status, code, message, *pause = refusal.args
            answer = {"type": "error", "error": {"type": code, "message": message}}
            if request.path == "/v1/oauth/token":  # RFC 6749 section 5.2
                answer = {"error": code, "error_description": message}
            if any(pause):
                headers["Retry-After"] = f"{pause[0]:g}"
        content = answer if isinstance(answer, str) else dump_json(answer)
        if content.startswith("http"):
            status, headers["Location"] = 302, content
        elif not content.startswith("<"):
            headers["Content-Type"] = "application/json"
        respond(request, status, content, **headers)

    def _answer(self, request: Any) -> Any:
        """Return a page, an address to go to, or an object."""
        from urllib.parse import parse_qsl

        endpoint, _, query = request.path.partition("?")
        asked: dict[str, Any] = dict(parse_qsl(query))
        if endpoint.startswith("/v1/oauth/"):
            asked = parse_json_object(request.body) or {"": None}
            if not all(isinstance(value, str) for value in asked.values()):
                raise _SandboxRefusal(400, "oauth_request_parse_error", "not strings")
            endpoint = asked.get("grant_type", endpoint)
        if endpoint not in _SANDBOX_ENDPOINTS:
            raise _SandboxRefusal(404, "not_found_error", "no such endpoint")
        name, scope = _SANDBOX_ENDPOINTS[endpoint]
        with self._lock:
            self.counts[name] += 1
            if self._failures[name]:
                raise self._failures[name].pop(0)
            if scope:
                self._check_access(request.token, scope)
            return getattr(self, "_do_" + name)(asked, request)

    def _do_authorize(self, asked: Any, request: Any) -> str:
        from urllib.parse import urlencode

        for name, rule in _SANDBOX_RULES.items():
            if not _text(asked.get(name), rule):
                raise _SandboxRefusal(400, "invalid_request", f"{name} is not valid")
        if request.command != "POST":
            return _SANDBOX_PAGE
        callback = {"error": "access_denied", "error_description": "they said no"}
        if request.body == b"decision=approve":
            callback = {"code": "authcode-sandbox-" + generate_state()}
            self._logins[callback["code"]] = types.SimpleNamespace(
                asked=asked,
                scopes=sorted({*asked["scope"].split()} & {*self.scopes}),
                grant=callback["code"],  # the code or refresh token that is not spent
                is_alive=True,
                ends=time.monotonic() + 30 * 86400,
            )
        query = urlencode({**callback, "state": asked["state"]})
        return f"{asked['redirect_uri']}?{query}"

    def _do_authorization_code(self, asked: Any, request: Any) -> dict[str, object]:
        if not asked.get("state"):  # required by the service, not by RFC 6749
            raise _SandboxRefusal(400, "oauth_request_parse_error", "state is missing")
        login = self._login_of(asked.get("code", ""))
        login.grant = ""  # the code is spent, whatever comes next
        verifier = _text(asked.get("code_verifier"), r"[A-Za-z0-9._~-]{43,128}")
        if not verifier:
            raise _SandboxRefusal(400, "invalid_request", "code_verifier is not valid")
        asked["code_challenge"] = code_challenge(verifier)
        for name in ("redirect_uri", "state", "client_id", "code_challenge"):
            if asked.get(name) != login.asked[name]:
                raise _SandboxRefusal(400, "invalid_grant", f"{name} is another one")
        return self._issue(login)

    def _do_refresh_token(self, asked: Any, request: Any) -> dict[str, object]:
        login = self._login_of(asked.get("refresh_token", ""))
        if login.asked["client_id"] != asked.get("client_id"):
            raise _SandboxRefusal(400, "invalid_grant", "the login is another client's")
        wanted = set(asked.get("scope", "").split())
        if not wanted <= {*login.scopes, *ALLOWED_SCOPE_EXPANSIONS}:
            raise _SandboxRefusal(400, "invalid_scope", "more than can be granted")
        login.scopes = sorted(wanted) or login.scopes
        return self._issue(login)

    def _do_profile(self, *_: Any) -> dict[str, object]:
        since, mail = "2024-01-01T00:00:00Z", "sandbox@example.com"
        return {
            "account": {"uuid": "sandbox-account", "email": mail, "created_at": since},
            "organization": {
                "uuid": "sandbox-organization",
                "name": "Sandbox",
                "organization_type": "claude_max",
                "rate_limit_tier": "default_claude_max_5x",
                "billing_type": "stripe_subscription",
                "subscription_created_at": since,
            },
        }

    def _do_messages(self, asked: Any, request: Any) -> dict[str, object]:
        return {"echo": request.body.decode("utf-8", "replace")}

    def _do_api_key(self, *_: Any) -> dict[str, object]:
        key = "sk-ant-api03-sandbox-" + generate_state()
        holder = types.SimpleNamespace(is_alive=True, scopes=[SCOPE_USER_INFERENCE])
        self._access[key] = holder, float("inf")
        return {"raw_key": key}

    def _check_access(self, token: str, scope: str) -> None:
        login, end = self._access.get(token, (_NO_LOGIN, 0.0))
        if not login.is_alive or end <= time.monotonic():
            raise _SandboxRefusal(401, "authentication_error", "the token is dead")
        if scope not in login.scopes:
            raise _SandboxRefusal(403, "permission_error", f"{scope} was not granted")

    def _do_callback(self, asked: Any, request: Any) -> str:
        from html import escape

        shown = asked.get("error") or f"{asked.get('code')}#{asked.get('state')}"
        return f"<!doctype html><title>Sandbox</title><p><code>{escape(shown)}</code>"

    def _do_revoke(self, asked: Any, request: Any) -> dict[str, object]:
        token = asked.get("token", "")
        if login := self._access.get(token, (None,))[0] or self._logins.get(token):
            login.is_alive = False
        return {}  # for an unknown token too: RFC 7009 section 2.2

    def _login_of(self, grant: str) -> types.SimpleNamespace:
        """Return the login of a code or refresh token; its reuse ends it (RFC 9700)."""
        if not (login := self._logins.get(grant, _NO_LOGIN)).is_alive:
            raise _SandboxRefusal(400, "invalid_grant", "the grant is unknown or ended")
        if login.grant != grant:
            login.is_alive = False  # two programs have it: one may have stolen it
            raise _SandboxRefusal(400, "invalid_grant", "the grant was used before")
        return login

    def _issue(self, login: types.SimpleNamespace) -> dict[str, object]:
        access_token = "sk-ant-oat01-sandbox-" + generate_state()
        self._access[access_token] = login, time.monotonic() + self.lifetime
        login.grant = "sk-ant-ort01-sandbox-" + generate_state()
        self._logins[login.grant] = login
        return {
            "token_type": "bearer",
            "access_token": access_token,
            "refresh_token": login.grant,
            "expires_in": self.lifetime,
            "refresh_token_expires_in": int(login.ends - time.monotonic()),
            "scope": " ".join(login.scopes),
        }


def _visit(url: str) -> None:
    """Fetch a page as a browser does; `requests` would log the code in its address."""
    from urllib.error import HTTPError
    from urllib.request import ProxyHandler, Request, build_opener

    fetch, host = build_opener(ProxyHandler({})).open, {"Host": url.split("/")[2]}
    for address in ("127.0.0.1", "[::1]"):  # `localhost` does not resolve everywhere
        page = f"http://{url[7:].replace('localhost', address, 1)}"
        with suppress(OSError):  # the listener does not use this address
            with suppress(HTTPError):  # an answer, too
                fetch(Request(page, headers=host), timeout=REQUEST_TIMEOUT).close()
            return


_NO_LOGIN: Final = types.SimpleNamespace(is_alive=False)
# By path, or grant_type: the name that `counts` has, and the scope that it requires.
_SANDBOX_ENDPOINTS: Final = {
    "/oauth/authorize": ("authorize", ""),
    "/oauth/code/callback": ("callback", ""),
    "authorization_code": ("authorization_code", ""),
    "refresh_token": ("refresh_token", ""),
    "/v1/oauth/token/revoke": ("revoke", ""),
    "/api/oauth/profile": ("profile", SCOPE_USER_PROFILE),
    "/api/oauth/claude_cli/create_api_key": ("api_key", SCOPE_ORG_CREATE_API_KEY),
    "/v1/messages": ("messages", SCOPE_USER_INFERENCE),
}

# The parameters of an authorize request, and the pattern of each value.
_SANDBOX_RULES: Final = {
    "response_type": "code",
    "client_id": r"[!-~]+",
    "redirect_uri": r"http://(localhost:[1-9]\d*|127\.0\.0\.1:\d+/oauth/code)/callback",
    "scope": r"[!-~]+( [!-~]+)*",
    "state": r"[!-~]{8,}",
    "code_challenge": r"[A-Za-z0-9_-]{43}",
    "code_challenge_method": "S256",
}

_SANDBOX_PAGE: Final = """<!doctype html><html lang="en"><title>Sandbox</title>
<h1>Sandbox</h1><p>A program asks to sign in. Nothing here is real.</p>
<form method="post"><button name="decision" value="approve">Approve</button>
<button name="decision" value="deny">Deny</button></form></html>
"""


# -- Command line ----------------------------------------------------------------------

_EXIT_CODES: Final[Mapping[int, Any]] = {
    2: ConfigError,  # and what argparse refuses
    3: (NotLoggedIn, TokenRefused, LoginError),
    4: Unavailable,
    5: StorageError,
    1: Exception,
}


@hides_locals
def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return its exit code."""
    if sys.stdout is None:
        say("claude-oauth: cannot write the answer: stdout is closed")
        return 1
    for stream in (sys.stdout, sys.stderr):
        # A name that the terminal cannot show must not end in a traceback.
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        try:
            return _run(list(sys.argv[1:] if argv is None else argv))
        finally:
            sys.stdout.flush()  # Python's own at its end is too late for an exit code
    except SystemExit as done:  # argparse: usage, --help, --version
        return done.code if isinstance(done.code, int) else 2
    except (KeyboardInterrupt, ClaudeOAuthError, OSError) as error:
        return _report(error)


def _run(argv: list[str]) -> int:
    # Shell loops run this very line, and argparse would double what it costs.
    if argv == ["token"]:
        print(OAuthService().api_token())
        return 0
    if (options := make_parser().parse_args(argv)).verbose:
        import logging

        logging.basicConfig(level=logging.DEBUG)
    return int(options.run(options) or 0)


def _report(error: BaseException) -> int:
    """Say what ended the command, and return its exit code."""
    if isinstance(error.__cause__ or error, KeyboardInterrupt):  # login() wraps it
        say("\nclaude-oauth: interrupted")
        return 130
    text = str(error)
    if isinstance(error, OSError):
        text = _reason(error)
        # What is still in the buffer must not fail once more at Python's end.
        if not _quietly(sys.stdout.flush):
            with open(os.devnull, "wb") as nowhere:
                os.dup2(nowhere.fileno(), sys.stdout.fileno())
    if not isinstance(error, BrokenPipeError):  # nobody is left to read the answer
        say(f"claude-oauth: {text}")
    return next(c for c, kinds in _EXIT_CODES.items() if isinstance(error, kinds))


def _service(options: Any) -> OAuthService:
    given: Any = _without_empty({"CLAUDE_OAUTH_CLIENT_ID": options.client_id})
    scopes = _without_empty({"scopes": getattr(options, "scope", None)})
    config = OAuthConfig.from_env({**os.environ, **given}).replace(**scopes)
    return OAuthService(config, make_storage(options.store, options.dir))


def _login(options: Any) -> None:
    """Sign in with a browser here, or with any browser by pasting the code it shows."""
    service = _service(options)
    service.login(
        console=options.console,
        open_browser=not options.no_browser,
        port=options.port,
        timeout=options.timeout,
        email=options.email,
    )
    status = service.status()
    name = f" as {printable(status['email'])}" if status["email"] else ""
    say(f"Signed in{name}; the login is kept in {service.storage.describe()}.")
    _print(options, status, {})


def _status(options: Any) -> int:
    """Show whose login this is, what it may do and when it ends, offline."""
    service = _service(options)
    check = _check(service) if options.check else ""
    status, stored = service.status(), service.credentials() or Credentials("")
    rows = {
        "logged in": status["logged_in"],
        "check": check,
        "source": {"environment": "CLAUDE_OAUTH_TOKEN"}.get(str(status["source"])),
        "account": status["email"],
        "organization": status["organization"],
        "plan": status["subscription_type"],
        "tier": status["rate_limit_tier"],
        "path": status["method"],
        "scopes": " ".join(stored.scopes),
        "token ends": _until(stored.expires_at),
        "login ends": _until(stored.refresh_token_expires_at),
        "store": status["storage"],
        "client id": status["client_id"],
    }
    word = check.partition(":")[0]
    _print(options, {**status, **_without_empty({"check": word})}, rows)
    if status["source"] == "none" and not options.json:
        say("! run `claude-oauth login` to sign in")
    code = {True: 0, False: 3}[bool(status["logged_in"])]
    return {"works": 0, "refused": 3, "unknown": 4}.get(word, code)


def _check(service: OAuthService) -> str:
    """Ask the server with the present token; return its verdict, with the reason."""
    try:
        OAuthClient(service.config).fetch_profile(service.access_token())
    except (NotLoggedIn, TokenRefused) as error:
        # A token is good if only too narrow for the profile; not if OAuth is forbidden.
        if not _text(repr(error.args), r"\('permission_error'(?!.*not allowed).*403\)"):
            if console_key(service.credentials() or Credentials("")):
                return "unknown: the API key in force cannot ask for the profile"
            hint = " (first unset CLAUDE_OAUTH_TOKEN)" * bool(environment_token())
            return f"refused: {error}{hint}"
    except (Unavailable, BadAnswer) as error:
        return f"unknown: {error}"
    return "works"


def _until(moment: float | None) -> str:
    """Return a moment for people: relative to now."""
    if moment is None:
        return ""
    span = {True: "in {}", False: "ended {} ago"}[(left := moment - time.time()) > 0]
    return f"{span.format(describe_seconds(abs(left)))} ({describe_moment(moment)})"


def _print(options: Any, answer: Mapping[str, Any], rows: Mapping[str, Any]) -> None:
    """Print an answer as JSON, or else its rows; its warnings go to stderr."""
    if options.json:
        print(dump_json(answer))
        return
    width = max(map(len, rows), default=0) + 2
    for name, value in rows.items():
        if text := {True: "yes", False: "no"}.get(value, value):
            print(f"{name:{width}}{printable(text, limit=1000)}")
    for warning in answer.get("warnings", ()):
        say(f"! {warning}")


def _token(options: Any) -> None:
    """Print an access token that works; on the Console path, the API key."""
    service = _service(options)
    token = service.api_token(min_validity=options.min_validity)
    if options.json:
        status = service.status()
        ends = {name: status[name] for name in ("expires_at", "expires_in")}
        answer = {"access_token": token, **ends}
        if "x-api-key" in service.auth_headers():
            answer = {"api_key": token, "expires_at": None}
        token = dump_json({**answer, "token": token})
    print(token)


def _refresh(options: Any) -> None:
    """Ask the server for a new token, even if the present one is still valid."""
    service = _service(options)
    left = time_left(service.refresh().expires_at, time.time())
    say(f"Refreshed; the new token is good for {describe_seconds(left)}.")
    _print(options, service.status(), {})


def _profile(options: Any) -> None:
    """Ask the server whose login it is."""
    profile = vars(_service(options).profile(force=True))
    _print(options, profile, {k.replace("_", " "): v for k, v in profile.items()})


def _api_key(options: Any) -> None:
    """Create another permanent Console API key, store it and print it."""
    print(_service(options).create_api_key())
    say("This key is permanent; delete it on the API keys page of the Console.")


def _logout(options: Any) -> None:
    """Revoke the login where the server can, and delete it here."""
    service = _service(options)
    text = {True: "Logged out of", False: "There was no login in"}[service.logout()]
    say(f"{text} {service.storage.describe()}.")
    for name in filter(setting, LOGIN_VARIABLES):
        say(f"{name} is set, and may still sign programs in.")


def _sandbox(options: Any) -> None:
    """Run a local test server; the lines it prints make claude-oauth use it."""
    import shlex

    sandbox = Sandbox(port=options.port, lifetime=options.lifetime)
    with suppress(KeyboardInterrupt), _temporary_directory() as directory, sandbox:
        print(f"export CLAUDE_OAUTH_SERVER={sandbox.origin}")
        print("export CLAUDE_OAUTH_CLIENT_ID=sandbox\nexport CLAUDE_OAUTH_STORE=file")
        print(f"export CLAUDE_OAUTH_DIR={shlex.quote(directory)}", flush=True)
        say("Paste these lines into another terminal; Ctrl-C ends this one.")
        while True:
            time.sleep(3600)  # Windows: Ctrl-C ends a sleep, but not an Event.wait


def _demo(options: Any) -> None:
    """Run a login from start to end against a sandbox, in a temporary folder."""
    hidden = {n: os.environ.pop(n) for n in [*os.environ] if n.startswith("CLAUDE_")}
    try:
        with _temporary_directory() as folder, Sandbox() as sandbox:
            _play(sandbox, folder, uses_browser=options.browser)
    finally:
        os.environ.update(hidden)


def _temporary_directory() -> ContextManager[str]:
    """Return a directory that goes with its context, also if a signal ends that."""
    import signal
    from tempfile import TemporaryDirectory

    for number in (signal.SIGTERM, getattr(signal, "SIGHUP", signal.SIGTERM)):
        if signal.getsignal(number) is signal.SIG_DFL:
            with suppress(ValueError):  # not the main thread
                signal.signal(number, signal.default_int_handler)
    return TemporaryDirectory(prefix="claude-oauth-")


def _play(sandbox: Sandbox, directory: str, *, uses_browser: bool) -> None:
    from functools import partial

    show = partial(print, flush=True)
    service = OAuthService(
        sandbox.config,
        make_storage("file", directory),
        flush_telemetry=lambda _: show("logout    telemetry is flushed first"),
    )
    show(f"server    a sandbox at {sandbox.origin}; the store is {directory}")
    opener, limit = uses_browser or sandbox.approve, (10, LOGIN_TIMEOUT)[uses_browser]
    service.login(open_browser=opener, paste=uses_browser, timeout=limit)
    status = service.status()
    show(f"login     {status['email']}, plan {status['subscription_type']}")
    show(f"token     {service.access_token()[:13]}… from the file, no request")
    sandbox.lifetime = 0.001  # from now on, a token has expired when it comes
    expired = service.refresh().access_token
    news = "the same token" if service.access_token() == expired else "a new token"
    show(f"expiry    {news}, {sandbox.counts['refresh_token'] - 1} refresh")
    sandbox.lifetime = 28800
    show(f"stampede  {_stampede(sandbox, directory)}")
    service.access_token()  # the processes' token
    sandbox.expire_access_tokens()
    url, auth = sandbox.origin + "/v1/messages", BearerAuth(service)
    post = import_requests().post
    answer = post(url, json={}, auth=auth, proxies={"no_proxy": "*"}, timeout=9)
    codes = [each.status_code for each in (*answer.history, answer)]
    show(f"401       a token that died early is refreshed, and sent again: {codes}")
    service.logout()
    left = {True: "nothing", False: "something"}[service.credentials() is None]
    show(f"          the grant is revoked; {left} is left in the store")


def _stampede(sandbox: Sandbox, directory: str) -> str:
    """Let 8 processes ask for a token at once; return the result as text."""
    import subprocess

    # Not `python FILE`: its folder may hold names of the standard library's.
    program = os.path.abspath(globals().get("__file__", ""))
    if not all((own_python(), os.path.isfile(program))):  # in a zip archive
        return "left out: no Python can be started with this file"
    before = sandbox.counts["refresh_token"]
    code = "import sys; sys.path[:] = filter(None, sys.path)"
    code += f"; exec(open({program!r}, 'rb').read())"
    command = [own_python(), "-c", code, "--dir", directory, "--store", "file", "token"]
    environ = {**os.environ, "CLAUDE_OAUTH_SERVER": sandbox.origin}
    # Without stderr, where Ctrl-C would print tracebacks.
    start, pipe, null = subprocess.Popen, subprocess.PIPE, subprocess.DEVNULL
    workers = [start(command, env=environ, stdout=pipe, stderr=null) for _ in range(8)]
    tokens = [t for w in workers if (t := w.communicate(timeout=LOCK_TIMEOUT)[0])]
    refreshes = sandbox.counts["refresh_token"] - before
    text = f"{refreshes} refresh, {len(tokens)} of 8 have a token"
    return f"8 processes find an expired token: {text}, {len(set(tokens))} token in all"


def _filled(text: str) -> str:
    """Return an option's value without the blanks around it; refuse an empty one."""
    from argparse import ArgumentTypeError

    if value := text.strip():
        return value
    raise ArgumentTypeError("it is empty; give it a value or leave it out")  # "$UNSET"


def duration(text: str, most: float = MAX_LIFETIME) -> float:
    """Return an option's number, in seconds; argparse shows this function's name."""
    from argparse import ArgumentTypeError

    if 0 <= (number := float(text)) <= most:
        return number
    raise ArgumentTypeError(f"give a number from 0 to {most:.0f}")


def port_number(text: str) -> int:
    """Return an option's port; argparse shows this function's name."""
    return int(duration(str(int(text)), 65535))


# Each option: its parsers, help, metavar, type, default, action, choices.
_OPTIONS: Final[Mapping[str, Any]] = {
    "--client-id": ("claude-oauth", "the client id of your program", "ID", _filled),
    "--dir": ("claude-oauth", "folder of the login's files", "PATH", _filled),
    "--store": (
        "claude-oauth", "auto: the Keychain on macOS, else a file", None, _filled,
        None, None, ("auto", "file", "keychain", "keyring"),
    ),
    "--verbose": ("claude-oauth", "log, without secrets, to stderr"),
    "--console": ("login", "sign in at the Console, for an API key"),
    "--no-browser": ("login", "do not open a browser, only print the address"),
    "--port": ("login sandbox", "fixed port, as for `ssh -L`", "N", port_number, 0),
    "--timeout": ("login", "time limit (300)", "SECONDS", duration, LOGIN_TIMEOUT),
    "--scope": ("login", "ask for SCOPE; repeatable", "SCOPE", _filled, None, "append"),
    "--email": ("login", "the account to suggest on the page", "ADDRESS", _filled),
    "--check": ("status", "ask the server too: works (0), refused (3) or unknown (4)"),
    "--min-validity": ("token", "least time left", "SECONDS", duration, REFRESH_BUFFER),
    "--lifetime": ("sandbox", "life of an access token", "SECONDS", duration, 28800),
    "--browser": ("demo", "sign in with your own browser"),
    "--json": ("login status token refresh profile", "print one JSON object"),
}
_EPILOG: Final = """\
environment: CLAUDE_OAUTH_CLIENT_ID, CLAUDE_OAUTH_DIR, CLAUDE_OAUTH_STORE,
  CLAUDE_OAUTH_SERVER (see `sandbox`), CLAUDE_OAUTH_TOKEN (comes before any store),
  CLAUDE_OAUTH_PASSPHRASE_FILE (encrypts the file), CLAUDE_CONFIG_DIR, BROWSER,
  and what `requests` reads (HTTPS_PROXY, REQUESTS_CA_BUNDLE, ...)
exit codes: 0 done, 1 another error, 2 usage or settings, 3 log in (again),
  4 try later, 5 the store cannot be read or written, 130 Ctrl-C
"""


def make_parser() -> argparse.ArgumentParser:
    """Return the command line's parser, which shtab makes completions from."""
    import argparse

    class Parser(argparse.ArgumentParser):
        def error(self, message: str) -> NoReturn:
            super().error(printable(message, limit=1000))  # a token may be in it

    parser = Parser(
        prog="claude-oauth",
        description="Sign in to Claude, and get tokens that work.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    version = f"%(prog)s {__version__}"
    parser.add_argument("--version", action="version", version=version)
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    parsers = {"claude-oauth": parser}
    for run in (
        _login, _status, _token, _refresh, _profile, _api_key, _logout, _sandbox, _demo
    ):
        name, text = run.__name__[1:].replace("_", "-"), run.__doc__
        parsers[name] = commands.add_parser(name, help=text, description=text)
        parsers[name].set_defaults(run=run)
    for option, (names, *values) in _OPTIONS.items():
        kinds = ("help", "metavar", "type", "default", "action", "choices")
        settings: dict[str, Any] = dict(zip(kinds, values))
        if len(values) == 1:
            settings["action"] = "store_true"
        for name in names.split():
            parsers[name].add_argument(option, **settings)
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
