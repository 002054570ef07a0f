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
    Errors        ClaudeOAuthError and its subclasses
    Values        OAuthConfig, Credentials, Profile: frozen, and silent about secrets
    PKCE          code verifier, code challenge, state
    Messages      build and parse what goes over the wire and what a person pastes; pure
    Client        OAuthClient: the HTTP requests
    Storage       where a credential is kept; the lock that processes share
    Sign-in       AuthCodeListener, the paste prompt, and the race between them
    Refresh       the one place that spends a refresh token
    Service       OAuthService: login, access_token, profile, logout, status; BearerAuth
    Sandbox       a loopback authorization server, for demos and for tests
    Command line  main(argv=None) -> int

What a caller can do about an error decides its class:

    ClaudeOAuthError
    +-- ConfigError       a setting is missing or unsafe: fix the call
    +-- NotLoggedIn       there is no credential: log in
    +-- LoginError        this attempt failed: try again
    |   +-- LoginDenied      the server answered the callback with an error
    |   +-- LoginTimeout     nobody finished in time
    |   +-- LoginCancelled   the person gave up, or no way to answer is left
    +-- TokenRefused      the server refused the grant: log in again
    +-- Unavailable       network, TLS, 429, 5xx: try later
    +-- BadAnswer         the server's answer is not what it should be
    +-- StorageError      the credential could not be read or written
        +-- StorageLocked    the keychain is locked; the text says how to unlock it
        +-- StorageCorrupt   the record is unreadable; it is left as it was

Not affiliated with Anthropic.  There is no default client id: bring the one that your
program was issued.
"""

from __future__ import annotations

import errno
import io
import os
import sys
import time
import types

# `token` stands in shell loops, so importing must cost next to nothing: what is slow to
# import is imported where it is needed, and `typing` never is.
TYPE_CHECKING = False
if TYPE_CHECKING:
    import argparse
    import socket
    import threading
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
    from types import FrameType
    from typing import Any, ClassVar, ContextManager, Final, NoReturn, Protocol, TypeVar

    import requests
    from typing_extensions import Self, dataclass_transform

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
REVOKE_URL: Final = "https://platform.claude.com/v1/oauth/token/revoke"
"""Seen at logout.  Source: six independent public programs."""

MANUAL_REDIRECT_URI: Final = "https://platform.claude.com/oauth/code/callback"
"""Shows ``code#state`` to copy, where the browser cannot reach the loopback."""

SCOPE_ORG_CREATE_API_KEY: Final = "org:create_api_key"
SCOPE_USER_PROFILE: Final = "user:profile"
SCOPE_USER_INFERENCE: Final = "user:inference"
SCOPE_USER_SESSIONS_CLAUDE_CODE: Final = "user:sessions:claude_code"
SCOPE_USER_MCP_SERVERS: Final = "user:mcp_servers"
SCOPE_USER_FILE_UPLOAD: Final = "user:file_upload"

ALLOWED_SCOPE_EXPANSIONS: Final = (
    SCOPE_USER_SESSIONS_CLAUDE_CODE,
    SCOPE_USER_MCP_SERVERS,
    SCOPE_USER_FILE_UPLOAD,
)
"""Scopes that a refresh may add to an older login, without a new login."""

CONSOLE_SCOPES: Final = (SCOPE_ORG_CREATE_API_KEY, SCOPE_USER_PROFILE)
ALL_SCOPES: Final = (*CONSOLE_SCOPES, SCOPE_USER_INFERENCE, *ALLOWED_SCOPE_EXPANSIONS)
"""Both paths ask for these; the server grants those that fit the account."""

CLAUDE_AI_SCOPES: Final = ALL_SCOPES[1:]
"""A Claude.ai subscriber's: all but the one for Console API keys."""

SUBSCRIPTION_TYPES: Final = {
    "claude_max": "max",
    "claude_pro": "pro",
    "claude_team": "team",
    "claude_enterprise": "enterprise",
}
"""The credential's subscription type for each organization_type of the profile."""

OAUTH_BETA: Final = "oauth-2025-04-20"
"""The anthropic-beta header that the API requires with an OAuth token."""

REFRESH_BUFFER: Final = 300
"""Seconds before expiry from which a token is refreshed while it is still served."""
DEFAULT_LIFETIME: Final = 3600.0
"""Seconds that a token lives if the answer has no usable expires_in."""
MAX_LIFETIME: Final = 366 * 86400.0
"""Seconds; a longer lifetime in an answer is a mistake, and counts as malformed."""
LOGIN_END_WARNING: Final = 3 * 86400.0
"""Seconds before the end of the login itself (30 days) from which `status` warns."""

LOGIN_TIMEOUT: Final = 300.0
"""Seconds for a person to sign in."""
REQUEST_TIMEOUT: Final = 30.0
"""Seconds to connect, and to answer.  Under 15 s, slow proxies fail."""
MAX_REQUEST_TIMEOUT: Final = 86400.0
"""Seconds; far longer ones exceed the system's own limits."""
LOOK_INTERVAL: Final = 0.5
"""Seconds for which a token is handed out before the store is looked at again."""
SLOW_FAILURE: Final = 0.1
"""Seconds; a store that took longer to fail is not asked again for some time."""
LOCK_TIMEOUT: Final = 3 * REQUEST_TIMEOUT
"""Seconds to wait for a refresh elsewhere: as long as one request may take there."""
PUT_OFF: Final = 30.0
"""Seconds until the next try when a refresh failed and the token is still alive."""
SHORT_WAIT: Final = 2.0
"""Seconds; when the token has expired, a pause up to this is waited out."""
WAIT_FLOOR: Final = 1.0
"""Seconds; no pause after a 5xx is shorter, and without Retry-After it doubles."""
RATE_LIMIT_FLOOR: Final = 30.0
"""Seconds to pause after a 429 that names none or 0; asking sooner prolongs it."""
WAIT_CEILING: Final = 3600.0
"""Seconds; a longer Retry-After counts as this."""
FLUSH_TIMEOUT: Final = 5.0
"""Seconds that a logout gives to telemetry, and then to revocation."""

MAX_ANSWER_BYTES: Final = 1 << 20
"""Far more than any answer of the service; the rest is not read."""
MAX_FILE_BYTES: Final = 1 << 20
"""No credential file is larger."""
MAX_PASTE_CHARS: Final = 4096
"""No code or address is longer."""

USER_AGENT: Final = "claude-oauth-py/" + __version__
"""The edge refuses an empty one, and those of scripting libraries."""


# -- Errors ----------------------------------------------------------------------------


class ClaudeOAuthError(Exception):
    """Any error of this module; ``str()`` says what is wrong and what to do.

    No secret, request or response is in an error or in its chain.  The arguments are
    the facts, in order, so that an error survives pickle and copy.
    """


class ConfigError(ClaudeOAuthError):
    """A setting is missing or unsafe: fix the call."""


class NotLoggedIn(ClaudeOAuthError):
    """There is no credential: log in."""

    def __init__(
        self, message: str = "not logged in; run `claude-oauth login`"
    ) -> None:
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
        self.code = code
        self.description = description

    def __str__(self) -> str:
        reason = ": ".join(filter(None, (self.code, self.description)))
        return f"the login was denied ({reason}); try again"


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
        self.code = code
        self.description = description
        self.status = status

    def __str__(self) -> str:
        reason = ": ".join(filter(None, (self.code, self.description)))
        if self.status == 403:
            return f"this is not allowed ({reason}); it takes another scope or account"
        return f"the server refused the login ({reason}); log in again"


class Unavailable(ClaudeOAuthError):
    """No usable answer, for a reason that may pass: try later.

    ``retry_after`` is in seconds, ``status`` is HTTP's; each is None if unknown.
    """

    def __init__(
        self, message: str, retry_after: float | None = None, status: int | None = None
    ) -> None:
        super().__init__(message, retry_after, status)
        self.retry_after = retry_after
        self.status = status

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


def hides_locals(subject: _T) -> _T:
    """Keep secrets out of tracebacks: of a function, or a class's public methods.

    Error trackers record the local variables of each frame.  When an exception leaves
    the function, those of the frames below are cleared, in its causes and contexts too;
    function names and line numbers stay.
    """
    function: Any = subject
    if isinstance(function, type):
        for name, member in list(vars(function).items()):
            if name[0] == "_" and name not in ("__init__", "__call__", "__enter__"):
                continue
            if isinstance(member, types.FunctionType):
                setattr(function, name, hides_locals(member))
            elif isinstance(member, classmethod):
                setattr(function, name, classmethod(hides_locals(member.__func__)))
        return subject

    def call(*args: Any, **options: Any) -> Any:
        has_failed = True
        try:
            result = function(*args, **options)
            has_failed = False
        finally:
            if has_failed:
                _clear_frames(sys.exc_info()[1])
        return result

    for name in ("__module__", "__name__", "__qualname__", "__doc__"):
        setattr(call, name, getattr(function, name))
    wrapper: Any = call
    wrapper.__wrapped__ = function
    decorated: _T = wrapper
    return decorated


def _clear_frames(error: BaseException | None) -> None:
    # Not traceback.clear_frames: where no file can be opened, its import would fail.
    chain = [error]
    for failure in filter(None, chain):  # grows in the loop
        step = failure.__traceback__
        if step and failure is not error and not _clear_frame(step.tb_frame):
            continue  # the caller is handling it: those frames are the caller's
        while step:
            _clear_frame(step.tb_frame)
            step = step.tb_next
        others = (failure.__cause__, failure.__context__)
        chain += [other for other in others if other not in chain]


def _clear_frame(frame: FrameType) -> bool:
    try:
        frame.clear()
    except RuntimeError:  # still running
        return False
    return True


# -- Values ----------------------------------------------------------------------------


def setting(name: str, environ: Mapping[str, str] | None = None) -> str:
    """Return an environment variable without surrounding blanks, "" if it is unset."""
    return (os.environ if environ is None else environ).get(name, "").strip()


def import_package(name: str) -> Any:
    """Import a module of an optional package.

    Raises:
        ConfigError: The package is missing, or it is there and cannot be imported.
    """
    from importlib import import_module

    package = name.partition(".")[0]
    try:
        import_module(package)
        return import_module(name)
    except Exception as error:  # a broken one raises whatever its code runs into
        is_missing = isinstance(error, ModuleNotFoundError) and error.name == package
        problem = "is missing" if is_missing else f"is broken: {printable(error)}"
    raise ConfigError(
        f"the package `{package}` {problem}; get it by `apt install python3-{package}`,"
        f" `dnf install python3-{package}` or pip install {package}"
    )


@hides_locals
@dataclass_transform(frozen_default=True)
class _Value:
    """A frozen record whose annotations are its fields, in order.

    A small dataclass: importing `dataclasses` takes longer than starting Python.
    """

    _secret: ClassVar[tuple[str, ...]] = ()
    """Fields that repr does not show."""

    def __init__(self, *values: Any, **named: Any) -> None:
        cls = type(self)
        names = cls.__annotations__
        given = {**dict(zip(names, values)), **named}
        needed = {name for name in names if not hasattr(cls, name)}
        is_clear = len(given) == len(values) + len(named)
        if not (is_clear and needed <= given.keys() <= names.keys()):
            raise TypeError(
                f"{cls.__name__} takes {', '.join(names)};"
                f" it got {len(values)} values and {sorted(named)}"
            )
        for name in names:
            value = given.get(name, getattr(cls, name, None))
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
    """Who asks, and where: the client id, the endpoints, the scopes.

    Raises:
        ConfigError: The User-Agent or the time limit is unusable, or an endpoint is not
            https; plain http is for loopback hosts alone.
    """

    client_id: str
    """The one that the program was issued; may be empty except for a login."""
    claude_ai_authorize_url: str = CLAUDE_AI_AUTHORIZE_URL
    console_authorize_url: str = CONSOLE_AUTHORIZE_URL
    token_url: str = TOKEN_URL
    profile_url: str = PROFILE_URL
    api_key_url: str = API_KEY_URL
    manual_redirect_uri: str = MANUAL_REDIRECT_URI
    revoke_url: str | None = REVOKE_URL
    """None: nothing is revoked at logout."""
    scopes: tuple[str, ...] = ALL_SCOPES
    user_agent: str = USER_AGENT
    """A program may put its own name in front; this module's name is kept."""
    timeout: float = REQUEST_TIMEOUT
    """Seconds to connect, and to answer."""

    @classmethod
    def for_server(cls, origin: str, *, client_id: str, **settings: Any) -> OAuthConfig:
        """Return the settings for a server that has every endpoint at one origin.

        Raises:
            ConfigError: The origin is not ``https://host:port`` (or loopback http).
        """
        origin = origin.rstrip("/")
        if origin.count("/") != 2 or "?" in origin or "#" in origin:
            raise ConfigError("a server is given as https://host:port, without a path")
        endpoints = {
            name: f"{origin}/{url.split('/', 3)[3]}"
            for name, url in vars(OAuthConfig).items()
            if name.endswith(("_url", "_uri"))
        }
        endpoints["claude_ai_authorize_url"] = endpoints["console_authorize_url"]
        return cls(client_id, **{**endpoints, **settings})

    @classmethod
    def from_env(cls, environ: Mapping[str, str] | None = None) -> OAuthConfig:
        """Return what CLAUDE_OAUTH_CLIENT_ID and CLAUDE_OAUTH_SERVER say.

        Raises what `for_server` does.
        """
        client_id = setting("CLAUDE_OAUTH_CLIENT_ID", environ)
        server = setting("CLAUDE_OAUTH_SERVER", environ)
        return cls.for_server(server, client_id=client_id) if server else cls(client_id)

    def _validate(self) -> None:
        if isinstance(self.scopes, str):
            raise ConfigError("scopes must be a list of strings, not one string")
        if not 0 < self.timeout <= MAX_REQUEST_TIMEOUT:
            raise ConfigError("timeout must be above 0 seconds and at most a day")
        if not self.user_agent.isprintable() or not self.user_agent.isascii():
            raise ConfigError("user_agent must be printable ASCII")
        for name, url in self.__dict__.items():
            # The defaults are known to be good, and urllib is slow to import.
            if name.endswith(("_url", "_uri")) and url != getattr(type(self), name):
                self._check_endpoint(name, url)
        own = "" if USER_AGENT in self.user_agent else USER_AGENT
        self.__dict__["user_agent"] = f"{self.user_agent} {own}".strip()
        self.__dict__["client_id"] = (self.client_id or "").strip()

    def _check_endpoint(self, name: str, url: str) -> None:
        is_left_out = name == "revoke_url" and not url
        if not is_left_out and (not may_carry_token(url) or "@" in url):
            raise ConfigError(
                f"{name} must be a URL like https://host/path, without a password"
                " (plain http is for loopback alone)"
            )


def may_carry_token(url: str) -> bool:
    """Tell whether a token may go to a URL: https, or plain http on this machine."""
    from urllib.parse import urlsplit

    try:
        # Some programs take a backslash for a slash: then it is another host.
        parts = urlsplit(url if is_header_safe(url) and "\\" not in url else "")
        host = (parts.port != 0 and parts.hostname) or ""
    except ValueError:  # a port that is no number, brackets that do not match
        return False
    is_safe = parts.scheme == "https" or (parts.scheme == "http" and is_loopback(host))
    return bool(host) and is_safe


def is_loopback(host: str) -> bool:
    """Tell whether a host name or address can only mean this machine.

    Not ``localhost.``: the resolver may send a name with a final dot elsewhere.
    """
    import ipaddress

    try:
        return host.lower() == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def is_header_safe(token: str) -> bool:
    """Tell whether a token can stand in a header: printable ASCII without a blank."""
    return bool(token) and token.isascii() and token.isprintable() and " " not in token


# Readers of one field; a value that is malformed counts as unknown: None.


def _text(value: object) -> str | None:
    return value if isinstance(value, str) and value.strip() else None


def _header_text(value: object) -> str | None:
    return value if isinstance(value, str) and is_header_safe(value) else None


def _object(value: object) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _number(value: object) -> float | None:
    if isinstance(value, str) and value.isascii() and value.isdigit():
        value = float(value[:400])
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    return value if abs(value) < 1e15 else None  # False for NaN too


def _moment(value: object) -> float | None:
    milliseconds = _number(value)
    return None if milliseconds is None else max(milliseconds, 0) / 1000


def _lifetime(value: object) -> float | None:
    seconds = _number(value)
    # Less than a millisecond is no lifetime, and may not even be told from none.
    return seconds if seconds and 0.001 <= seconds <= MAX_LIFETIME else None


def _scopes(value: object) -> tuple[str, ...]:
    if isinstance(value, str):
        value = value.split()
    return tuple(filter(_text, value)) if isinstance(value, (list, tuple)) else ()


RECORD_KEYS: Final = ("claudeAiOauth", "consoleApiKey")
"""The keys of a stored record that are this module's."""

_RECORD_FIELDS: Final[Mapping[str, tuple[str, Callable[[object], Any]]]] = {
    "access_token": ("accessToken", _header_text),
    "refresh_token": ("refreshToken", _text),
    "api_key": ("consoleApiKey", _header_text),
    "expires_at": ("expiresAt", _moment),
    "refresh_token_expires_at": ("refreshTokenExpiresAt", _moment),
    "scopes": ("scopes", _scopes),
    "subscription_type": ("subscriptionType", _text),
    "rate_limit_tier": ("rateLimitTier", _text),
    "client_id": ("clientId", _text),
}
"""The credential's fields: the key in the stored record, and its reader."""

_PROFILE_FIELDS: Final[Mapping[str, tuple[str, str, str, Callable[[object], Any]]]] = {
    "account_uuid": ("account", "uuid", "accountUuid", _text),
    "email": ("account", "email", "emailAddress", _text),
    "display_name": ("account", "display_name", "displayName", _text),
    "account_created_at": ("account", "created_at", "accountCreatedAt", _text),
    "organization_uuid": ("organization", "uuid", "organizationUuid", _text),
    "organization_name": ("organization", "name", "organizationName", _text),
    "subscription_type": ("organization", "organization_type", "", _text),
    "rate_limit_tier": ("organization", "rate_limit_tier", "", _text),
    "billing_type": ("organization", "billing_type", "billingType", _text),
    "subscription_created_at": (
        "organization",
        "subscription_created_at",
        "subscriptionCreatedAt",
        _text,
    ),
    "has_extra_usage_enabled": (
        "organization",
        "has_extra_usage_enabled",
        "hasExtraUsageEnabled",
        lambda value: value if isinstance(value, bool) else None,
    ),
}
"""The profile's fields: part and key in the server's answer, the key in account.json
("" for what stays with the credential), and the reader."""


@hides_locals
class Credentials(_Value):
    """The result of a login; lifetimes are moments of this machine's clock."""

    _secret = ("access_token", "refresh_token", "api_key")

    access_token: str
    refresh_token: str | None = None
    """Works once: the answer to a refresh brings its successor."""
    expires_at: float | None = None
    """Seconds since the epoch, or None if unknown."""
    scopes: tuple[str, ...] = ()
    """As granted."""
    subscription_type: str | None = None
    rate_limit_tier: str | None = None
    refresh_token_expires_at: float | None = None
    """Seconds since the epoch: the login itself ends then, refreshed or not."""
    client_id: str | None = None
    """The program that the tokens were issued to, and that must refresh them."""
    api_key: str | None = None
    """On the Console path: a permanent key of the organization."""

    @property
    def is_claude_ai(self) -> bool:
        """Whether this is a Claude.ai subscriber's login rather than the Console's."""
        return SCOPE_USER_INFERENCE in self.scopes

    def to_record(self) -> dict[str, object]:
        """Return the JSON object to store, without the fields that are None."""
        tokens = {}
        for name, (key, read) in _RECORD_FIELDS.items():
            value = getattr(self, name)
            if value is not None:
                tokens[key] = int(value * 1000) if read is _moment else value
        tokens["scopes"] = list(self.scopes)
        top = {key: tokens.pop(key) for key in RECORD_KEYS if key in tokens}
        return {"claudeAiOauth": tokens, **top}

    @classmethod
    def from_record(cls, record: Mapping[str, object]) -> Credentials:
        """Read a stored JSON object.  Fields other than the tokens may have any type.

        Raises:
            StorageCorrupt: A token has the wrong type, or no header can carry it; the
                text names the field.
        """
        tokens = _object(record.get("claudeAiOauth"))
        stored = {**tokens, "consoleApiKey": record.get("consoleApiKey")}
        found: dict[str, Any] = {
            name: read(stored.get(key)) for name, (key, read) in _RECORD_FIELDS.items()
        }
        for name in cls._secret:
            key = _RECORD_FIELDS[name][0]
            is_needed = name == "access_token" or stored.get(key) not in (None, "")
            if is_needed and found[name] is None:
                raise StorageCorrupt(
                    f"the stored record is damaged: {key} is missing or malformed (in"
                    " claudeAiOauth or beside it); move it away and log in again"
                )
        return cls(**found)

    @classmethod
    def from_answer(
        cls, answer: object, *, received_at: float, previous: Credentials | None = None
    ) -> Credentials:
        """Read a token endpoint's answer, merged over the previous credential.

        A field that is missing keeps its value, and an unusable lifetime counts as
        3600 s: the refresh token is spent already.  Source: RFC 6749 section 5.1.

        Raises:
            BadAnswer: It has no usable access token.
        """
        if not isinstance(answer, dict):
            raise BadAnswer("the answer", "is not a JSON object")
        access_token = _header_text(answer.get("access_token"))
        if access_token is None:
            raise BadAnswer("access_token")
        if str(answer.get("token_type") or "bearer").strip().lower() != "bearer":
            raise BadAnswer("token_type", "is not bearer")
        base = previous or cls(access_token)
        lifetime = _lifetime(answer.get("expires_in")) or DEFAULT_LIFETIME
        login_lifetime = _lifetime(answer.get("refresh_token_expires_in"))
        if login_lifetime:
            base = base.replace(refresh_token_expires_at=received_at + login_lifetime)
        return base.replace(
            access_token=access_token,
            refresh_token=_text(answer.get("refresh_token")) or base.refresh_token,
            expires_at=received_at + lifetime,
            scopes=_scopes(answer.get("scope")) or base.scopes,
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
    """max, pro, team, enterprise; None for a kind of organization not known here."""
    rate_limit_tier: str | None = None
    billing_type: str | None = None
    subscription_created_at: str | None = None
    has_extra_usage_enabled: bool | None = None

    @classmethod
    def from_answer(cls, answer: Mapping[str, object]) -> Profile:
        """Read the profile endpoint's answer.

        Raises:
            BadAnswer: It names no account.
        """
        found: dict[str, Any] = {
            name: read(_object(answer.get(part)).get(key))
            for name, (part, key, _stored, read) in _PROFILE_FIELDS.items()
        }
        if not found["account_uuid"]:
            raise BadAnswer("account.uuid")
        plan = SUBSCRIPTION_TYPES.get(found["subscription_type"])
        return cls(**{**found, "subscription_type": plan})

    def to_record(self) -> dict[str, object]:
        """Return the part for account.json; plan and tier stay with the credential."""
        fields = ((name, row[2]) for name, row in _PROFILE_FIELDS.items())
        return {key: getattr(self, name) for name, key in fields if key}

    @classmethod
    def from_record(
        cls, record: Mapping[str, object], credentials: Credentials | None = None
    ) -> Profile | None:
        """Read the part from account.json, with plan and tier from the credential."""
        found: dict[str, Any] = {
            name: read(record.get(key)) if key else getattr(credentials, name, None)
            for name, (_part, _key, key, read) in _PROFILE_FIELDS.items()
        }
        return cls(**found) if found["account_uuid"] else None


# -- PKCE ------------------------------------------------------------------------------


def generate_code_verifier() -> str:
    """Return a new code verifier: 32 random bytes, 43 characters.

    Use it for one login, and never store it.  Source: RFC 7636 section 4.1.
    """
    import secrets

    return secrets.token_urlsafe(32)


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
# Pure functions that build and parse messages, without I/O.


def parse_json_object(
    data: bytes, *, lenient: bool = False
) -> dict[str, object] | None:
    """Return the JSON object in data, or None if it holds anything else.

    With ``lenient``, broken characters are replaced and control characters accepted.
    """
    import json

    # A JSONDecodeError carries the whole text, tokens included, so it is caught here.
    try:
        encoding = json.detect_encoding(data)
        text = data.decode(encoding, "replace" if lenient else "surrogatepass")
        found = json.loads(text, strict=not lenient)
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


def dump_json(obj: object) -> str:
    """Return obj as compact ASCII JSON, keys in the order given."""
    import json

    return json.dumps(obj, separators=(",", ":"))


def printable(text: object, *, secrets: Iterable[str] = (), limit: int = 200) -> str:
    """Return untrusted text as one line that is safe to print.

    Control, direction and zero-width characters are removed; ``secrets``, and anything
    that looks like one of the service's tokens, are replaced.
    """
    import re

    line = "".join(c for c in " ".join(str(text).split()) if c.isprintable())
    for secret in secrets:
        if len(secret) > 3:
            line = line.replace(secret, "…")
    line = re.sub(r"sk-ant-[\w-]+", "sk-ant-…", line)
    return line if len(line) <= limit else line[: limit - 1] + "…"


def read_answer(
    status: int, content: bytes, *, field: str, secrets: Iterable[str] = ()
) -> dict[str, object]:
    """Return the JSON object of a 2xx answer, as far as it can be read.

    The grant is spent already, so a defect elsewhere must not lose the tokens.

    Raises:
        BadAnswer: It is JSON, but not an object.
        Unavailable: It is not the service's.
        TokenRefused: It has an ``error`` instead of the field.
    """
    answer = parse_json_object(content, lenient=True)
    if answer is None:
        answer = _fields_of(content)
    if answer is None and parse_json_object(b'{"":%s}' % content, lenient=True):
        raise BadAnswer("the answer", "is not a JSON object")
    found = _object(answer).get(field)
    is_granted = isinstance(found, dict) or _header_text(found)
    if answer is None or (answer.get("error") and not is_granted):
        raise error_of_answer(status, content, secrets=secrets)
    return answer


def _fields_of(content: bytes) -> dict[str, object] | None:
    """Return the token fields of a JSON object that is truncated or damaged."""
    import re

    names = b"access_token|refresh_token|token_type|scope|expires_in|raw_key"
    value = rb'"(?:[ !#-\[\]-~]|\\["/\\])*"|\d{1,9}(?=[\s,}])'
    fields = re.findall(rb'"(?:%s)"\s*:\s*(?:%s)' % (names, value), content)
    found = parse_json_object(b"{%s}" % b",".join(fields)) or {}
    # A truncated answer may lack the refresh token, and is useless without it.
    is_cut = not content.rstrip().endswith(b"}")
    is_whole = "access_token" in found and ("refresh_token" in found or not is_cut)
    is_object = content.lstrip().startswith(b"{")
    return found if is_object and (is_whole or "raw_key" in found) else None


def scopes_to_refresh(granted: Iterable[str], wanted: Iterable[str]) -> tuple[str, ...]:
    """Return the granted scopes, and the wanted ones that a refresh may add.

    Empty if the granted scopes are unknown: a guess could narrow the token.
    """
    granted = tuple(granted)
    added = (s for s in wanted if s in ALLOWED_SCOPE_EXPANSIONS and s not in granted)
    return (*granted, *added) if granted else ()


def parse_retry_after(value: str | None, *, now: float) -> float | None:
    """Return a Retry-After header in seconds, None if malformed or not in the future.

    Source: RFC 9110 section 10.2.3.
    """
    from email.utils import parsedate_to_datetime

    text = (value or "").strip()
    try:
        if text.isdigit():
            seconds = float(text[:12])
        else:
            seconds = parsedate_to_datetime(text).timestamp() - now
    except (TypeError, ValueError, IndexError, OverflowError):
        return None
    return min(seconds, WAIT_CEILING) if seconds > 0 else None


def seconds_to_wait(
    status: int, asked_for: float | None, *, failures: int, chance: float
) -> float:
    """Return the seconds to pause after a 429 or a 5xx.

    Without the server's own number they double with each failure in a row.  ``chance``
    is random, 0 to 1: it keeps many machines from returning at once.
    """
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
    """Return the error for an answer, without the secrets that it may quote.

    Both envelopes are read: RFC 6749 section 5.2's, and the API's
    ``{"type": "error", "error": {"type", "message"}}``; some answers mix them.
    """
    if status == 403 and b"error code: 1010" in body:
        return ConfigError(
            "the edge refuses this User-Agent; set user_agent to name your program"
        )
    answer = _object(parse_json_object(body, lenient=True))
    error = _object(answer.get("error"))

    def first_text(*found: object, limit: int) -> str:
        return printable(next(filter(_text, found), ""), secrets=secrets, limit=limit)

    codes = (answer.get("error"), error.get("type"), error.get("code"))
    code = first_text(*codes, limit=60)
    texts = (answer.get("error_description"), error.get("message"))
    details = first_text(*texts, answer.get("message"), limit=200)
    if request_id:
        details += f"; request {first_text(request_id, limit=80)}"
    details = details.lstrip("; ")
    if status == 429:
        text = "the server is limiting requests"
    elif status >= 500:
        text = f"the server is out of order ({status})"
    elif 300 <= status < 400:
        text = f"the server redirects the request ({status}), which is not followed"
    elif code in _PASSING_CODES:
        text = f"the answer ({status}) is not the service's; a proxy may stand between"
    else:
        return TokenRefused(code, details or None, status)
    text += f" ({details})" if details else ""
    return Unavailable(f"{text}; try again later", retry_after, status)


_PASSING_CODES: Final = (
    *("", "temporarily_unavailable", "server_error", "rate_limit_error"),
    *("overloaded_error", "api_error", "timeout_error"),
)
"""Error codes that say nothing about the grant, whatever the status."""


@hides_locals
def merge_record(stored: Mapping[str, Any], ours: Mapping[str, Any]) -> dict[str, Any]:
    """Return a stored record with our part replaced.

    The keys of other programs stay, at the top and inside.
    """
    own_keys = {key for key, _read in _RECORD_FIELDS.values()}
    tokens = _object(stored.get("claudeAiOauth"))
    foreign = {key: tokens[key] for key in tokens if key not in own_keys}
    kept = {key: stored[key] for key in stored if key not in RECORD_KEYS}
    return {**kept, **ours, "claudeAiOauth": {**foreign, **ours["claudeAiOauth"]}}


@hides_locals
def clean_token(value: str) -> str:
    """Return a token from the environment without the blanks around it.

    Raises:
        ConfigError: It is not a ``b64token`` (RFC 6750 section 2.1) but a quoted one,
            an assignment, JSON or a placeholder.
    """
    import re

    token = value.strip()
    if not re.fullmatch(r"[\w.~+/-]+=*", token, re.ASCII):
        raise ConfigError("CLAUDE_OAUTH_TOKEN is no token; set it to the token alone")
    return token


def fingerprint(refresh_token: str, *, client_id: str, token_url: str) -> str:
    """Return a hash that identifies a token or key without revealing it.

    Another client or server may judge the token differently, so they are included.
    """
    import hashlib

    data = "\0".join(("claude-oauth refused", token_url, client_id, refresh_token))
    return hashlib.sha256(data.encode(errors="backslashreplace")).hexdigest()


def describe_seconds(seconds: float) -> str:
    """Return a duration as text: ``45 s``, ``12 min``, ``3 h 12 min``, ``29 d 4 h``."""
    whole = max(int(min(seconds, 1e15)), 0)
    days, hours, minutes = whole // 86400, whole // 3600 % 24, whole // 60 % 60
    if days:
        return f"{days} d {hours} h"
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min" if minutes else f"{whole} s"


def describe_moment(moment: float | None) -> str | None:
    """Return a moment as ISO 8601 in UTC.  Source: RFC 3339 section 5.6."""
    if moment is None:
        return None
    known = max(0, min(moment, 32_535_215_999))  # Windows knows the years 1970 to 3000
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(known))


CALLBACK_PATH: Final = "/callback"
"""The loopback redirect's path; the server takes any port, but no other path."""

PASTE_REFUSALS: Final = (
    ("^$", "nothing was pasted"),
    ("[\0-\x1f\x7f-\x9f\ud800-\udfff]", "that has control characters in it"),
    ("(?i)sk-ant-", "that is a token or an API key, not a code: keep it safe"),
)

# Source: RFC 6749 appendix A.11 (VSCHAR), without the blank.
_CODE: Final = f"[!-~]{{1,{MAX_PASTE_CHARS}}}"
# A terminal breaks a code into long pieces.  A word of a sentence is none of them.
_PROSE: Final = (
    r"(?<!\S)(?=\S*[aeiouyAEIOUY\x80-\uffff])"
    r"(?:[^\W\d_][^\W\d_A-Z]{0,14}|[A-Z]{1,15})(?!\S)"
)
_LABEL: Final = rf"(?::|{_PROSE}) "
_VOUCHED_CODE: Final = (
    rf"(?:.*{_LABEL})?((?:(?!{_PROSE})[^#&? ]{{8,}}(?<!:) )*[^#&? ]+(?<!:))"
)
# A code that cannot be guessed is longer.  Source: RFC 6749 section 10.10.
_BARE_CODE: Final = (
    rf"(?:.*(?i:code)(?: |.*{_LABEL}))?"
    rf"([^#&?/:@ ]{{16,}}(?: (?!{_PROSE})[^#&?/:@ ]+){{0,2}})"
)


class GrantedCode(_Value):
    """An authorization code, and the redirect_uri that the exchange must repeat."""

    code: str
    redirect_uri: str

    _secret = ("code",)


def parse_callback(query: str, *, state: str) -> str:
    """Return the code of a callback's query.

    Raises:
        LoginDenied: The server says ``error=``, with the right state.
        ValueError: It is not the answer that is waited for; says why, for a person.

    Source: RFC 6749 sections 4.1.2 and 3.1 (no parameter more than once).
    """
    import hmac
    import re
    from urllib.parse import parse_qsl

    pairs = parse_qsl(query, keep_blank_values=True)
    fields = dict(pairs)
    if len(fields) < len(pairs):
        raise ValueError("the address has a parameter twice")
    given = fields.get("state", "").encode("utf-8", "replace")
    if not hmac.compare_digest(given, state.encode()):
        raise ValueError("the address belongs to another sign-in (its state differs)")
    if "error" in fields:
        secrets = (state, fields.get("code", ""))  # a server may quote them
        description = printable(fields.get("error_description", ""), secrets=secrets)
        code = printable(fields["error"], secrets=secrets, limit=64)
        raise LoginDenied(code or "error", description or None)
    if not re.fullmatch(_CODE, fields.get("code", "")):
        raise ValueError("the address has no code")
    return fields["code"]


def parse_paste(text: str, *, state: str, manual_redirect_uri: str) -> GrantedCode:
    """Return the code in what a person pasted: `code#state`, a code, or the address.

    Terminals, mail programs and people add to it.  Where the state is there it vouches
    for the code beside it; a code without a state has to look like one.

    Raises:
        LoginDenied: The address says ``error=``, with the right state.
        ValueError: It is none of these; says what it is, for a person.
    """
    import re

    if len(text) > MAX_PASTE_CHARS:
        raise ValueError(f"that is longer than any code ({MAX_PASTE_CHARS} characters)")
    cleaned = _without_paste_noise(text, state)
    for pattern, reason in PASTE_REFUSALS:
        if re.search(pattern, cleaned.replace(" ", "")):
            raise ValueError(reason)
    # A terminal that marks the begin of a paste, but not its end, will send more.
    if "\x1b[200~" in text and "\x1b[201~" not in text and state not in cleaned:
        raise ValueError("that is not a code")
    # The whole screen may have been copied: the code stands below the address then.
    cleaned, is_screen = re.subn(r"\S*code_challenge=\S*", "", cleaned)
    if is_screen and "#" + state not in cleaned:
        raise ValueError("that is the address to open, not what comes after signing in")
    if re.search(r"://|[?&]\w+=", cleaned):
        return _parse_pasted_address(cleaned, state, manual_redirect_uri)
    return GrantedCode(_parse_pasted_code(cleaned, state), manual_redirect_uri)


def _without_paste_noise(text: str, state: str) -> str:
    """Return a paste as words with one blank between; the state is in one piece."""
    import re
    from urllib.parse import unquote

    # Bracketed paste, a shell's escapes, zero-width characters and direction marks.
    invisible = "\xad\u200b-\u200f\u202a-\u202e\u2060-\u206f\ufeff"
    text = re.sub(rf"\x1b\[20[01]~|[\\{invisible}]", "", text)
    text = re.sub("&(amp;)+", "&", text)
    if "=" not in text and "%3d" in text.lower():
        text = unquote(text)
    # Quotes and brackets stand around an address or a code; separators are blanks too.
    quotes = "\"'`<>(){}\u2018-\u201f\xab\xbb\u2039\u203a"
    text = re.sub(rf"[{quotes}]|[^\S\x0b\x0c\x1c-\x1f]", " ", text)
    text = re.sub(" *".join(map(re.escape, state)), state, text)
    text = re.sub(f" *(#|%23) *{re.escape(state)}", f"#{state}", text)
    text = re.sub(r"(?<!\S)[*\[]+|[.,;!*\]]+(?!\S)", "", text)
    text = re.sub(" +", " ", text).strip(" ")
    # The same once more: Ctrl-V was pressed twice.
    copies = re.fullmatch(r"(.{16,}?)(?: *\1)+", text)
    return copies[1] if copies and len(set(copies[1])) > 1 else text


def _parse_pasted_code(text: str, state: str) -> str:
    import re

    text = re.sub(r"(?i)\b(code) ?[:=] ?", r"\1: ", text)
    label = r"(?:#|(?:^|[ &,;]+)(?i:state) ?[:=]? ?| )"
    found = re.search(rf"{label}{re.escape(state)}(?![\w#-])", text)
    if found:
        # Where the state comes first, it has its label, and the code comes after it.
        text = text[: found.start()].strip() or text[found.end() :].strip()
    else:
        mark = re.search(r"#(.*)", text.replace("%23", "#"))
        if mark and state.startswith(mark[1].replace(" ", "")):
            raise ValueError("the end of the code is missing")
        if re.search(r"(?i)#|%23|\bstate ?[:=]", text):
            raise ValueError("that code belongs to another sign-in (its state differs)")
    code = re.fullmatch(_VOUCHED_CODE if found else _BARE_CODE, text)
    pieces = code[1].split() if code else []
    joined = pieces[0] if len(set(pieces)) == 1 else "".join(pieces)
    if not re.fullmatch(_CODE, joined.replace(state, " ")):  # nor is the state one
        raise ValueError("that is not a code")
    return joined


def _parse_pasted_address(text: str, state: str, manual_uri: str) -> GrantedCode:
    import re

    text = re.sub("(?=https?://)", " ", text)
    near = "(?:(?!://).)*?"  # a line break may be in it, before the state
    shapes = (
        rf"((?:https?://{near}|\S*)\b(?:code|error)={near}\bstate=\S*)(.*)",
        r"(\S*\bstate=\S*\b(?:code|error)=\S*)(.*)",
        r"(\S*[/?=].*)()",
    )
    found = next(filter(None, (re.search(shape, text) for shape in shapes)))
    address = found[1].replace(" ", "")
    behind = (found[1] + found[2]).partition("code=")[2]
    if re.search("[?&]code=[^&]*$", address) and " " in behind:
        raise ValueError("the code in that address is cut: copy the address alone")
    page, _, query = address.partition("?")
    if re.match(r"&?\w+=", page):  # what follows the question mark, alone
        page, query = "", page.lstrip("&")
    # Browsers hide the scheme; some leave it out of what is copied.
    manual = re.escape(re.sub("(?i)^https?://", "", manual_uri))
    loopback = rf"(?:localhost|127\.0\.0\.1|\[::1\]):(\d{{1,5}}){CALLBACK_PATH}"
    known = re.search(rf"(?i)(?<![\w.@-])(?:{manual}|{loopback})$", page)
    if page and not known:
        raise ValueError("that is the address of another page")
    code = parse_callback(query.partition("#")[0], state=state)
    if known and known[1]:
        return GrantedCode(code, f"http://localhost:{known[1]}{CALLBACK_PATH}")
    return GrantedCode(code, manual_uri)


def success_page(account: str | None) -> str:
    """Return the page after a login; `account` is a name for the person, or None."""
    known = printable(account or "")
    who = f"You are signed in as {known}." if known else "You are signed in."
    return result_page("success", "Signed in", f"{who}\nYou can close this window.")


def failure_page(reason: str) -> str:
    """Return the page after a login that failed: what happened, and what to do."""
    reason = printable(reason, limit=400)
    reason = reason[:1].upper() + reason[1:]
    text = f"{reason}.\nClose this window and see the terminal."
    return result_page("failure", "Sign-in failed", text)


def denied_page() -> str:
    """Return the page after the server's, or the person's, no."""
    hint = "If that was a mistake, close this window and try again."
    text = f"Nothing was stored.\n{hint}"
    return result_page("denied", "Access was not granted", text)


def stray_page(reason: str) -> str:
    """Return the page for a request that is not what the login waits for, and why."""
    text = f"A sign-in is waiting here for something else: {reason}.\n"
    text += "Go back to the terminal, and open the address that it shows."
    return result_page("failure", "Nothing to see here", text)


def result_page(kind: str, title: str, text: str) -> str:
    """Return a whole HTML page without script or outside resource; text is escaped."""
    import html

    mark = {"success": "\u2713", "failure": "!", "denied": "\u2715"}[kind]
    return f"""<!doctype html>
<html lang="en"><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<link rel="icon" href="data:,">
<title>{html.escape(title)}</title>
<style>{_STYLE}</style>
<main><p class="mark {kind}" aria-hidden="true">{mark}</p>
<h1>{html.escape(title)}</h1>
<p>{html.escape(text)}</p></main>
"""


_STYLE: Final = """
:root { color-scheme: light dark; }
main { background: Canvas; font: 1.0625rem/1.55 system-ui; text-align: center;
  max-width: 30rem; margin: 25vh auto; }
p { white-space: pre-line; overflow-wrap: anywhere; }
.mark { font-size: 2.5rem; margin: 0; }
.success { color: light-dark(#17663a, #6fd39b); }
.failure { color: light-dark(#a3261b, #ff9b8f); }
.denied { color: light-dark(#7a4b00, #f0bd6a); }
"""


# -- Client ----------------------------------------------------------------------------


class Deadline:
    """One time limit for several waits in a row, by the monotonic clock."""

    def __init__(self, seconds: float) -> None:
        self._ends = time.monotonic() + seconds

    def left(self) -> float:
        """Return the seconds that are left, 0 when it has passed."""
        return max(self._ends - time.monotonic(), 0.0)

    def passed(self) -> bool:
        """Tell whether the limit is reached."""
        return self.left() == 0


def call_with_limit(function: Callable[[], _T], seconds: float) -> _T:
    """Return what a function returns, or raise TimeoutError after so many seconds.

    It goes on in a daemon thread then.  Where none can start, there is no limit.
    """
    import threading

    results: list[_T] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            results.append(function())
        except BaseException as error:  # whatever it is, the caller gets it
            errors.append(error)

    thread = threading.Thread(target=run, daemon=True, name="claude-oauth-call")
    try:
        thread.start()
        thread.join(seconds)
    except RuntimeError:
        run()
    if errors:
        raise errors.pop()
    if not results:
        raise TimeoutError
    return results.pop()


@hides_locals
class OAuthClient:
    """The requests to the service, each with a time limit and a size limit.

    Without a session each has its own.  Thread-safe if the session is.
    """

    def __init__(
        self,
        config: OAuthConfig,
        *,
        session: requests.Session | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.config = config
        self._session = session
        self._clock = clock

    def check(self) -> None:
        """Raise ConfigError if no request could be sent, without sending one."""
        self.client_id_for(None)
        session = self._session or import_requests().Session()
        for url in (self.config.token_url, self.config.profile_url):
            check_way(url, session)

    def client_id_for(self, credentials: Credentials | None) -> str:
        """Return the client id that a grant was issued to; ConfigError if unknown."""
        client_id = getattr(credentials, "client_id", "") or self.config.client_id
        if not client_id:
            raise ConfigError(
                "no client id: pass client_id=, --client-id or CLAUDE_OAUTH_CLIENT_ID"
                " (the one that your program was issued)"
            )
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
        return f"{page}{'&' if '?' in page else '?'}{urlencode(query)}"

    def exchange_code(
        self, code: str, *, verifier: str, redirect_uri: str, state: str
    ) -> Credentials:
        """Trade an authorization code for tokens.  A code works once.

        Raises TokenRefused if it is wrong, used or too old; Unavailable or BadAnswer if
        the answer is not usable, and the code may be spent all the same.  Source: RFC
        6749 section 4.1.3; the service refuses a request without ``state``.
        """
        client_id = self.client_id_for(None)
        body = {
            "grant_type": "authorization_code",
            "code": code,
            "redirect_uri": redirect_uri,
            "client_id": client_id,
            "code_verifier": verifier,
            "state": state,
        }
        answer = self._send(self.config.token_url, body, field="access_token")
        granted = Credentials.from_answer(answer, received_at=self._clock())
        # RFC 6749 section 5.1: an answer without scope grants what was asked for.
        scopes = granted.scopes or self.config.scopes
        return granted.replace(scopes=scopes, client_id=client_id)

    def refresh(
        self, credentials: Credentials, *, scopes: Iterable[str] | None = None
    ) -> Credentials:
        """Spend the refresh token for new tokens, merged over the given ones.

        Save what this returns before using it: the token that was sent is dead.  Raises
        NotLoggedIn without one; TokenRefused if it is dead, or a scope is out of reach;
        Unavailable if the answer is not usable, and it may be spent all the same.
        """
        answer = self.request_refresh(credentials, scopes or ())
        renewed = Credentials.from_answer(
            answer, received_at=self._clock(), previous=credentials
        )
        return renewed.replace(client_id=self.client_id_for(credentials))

    def request_refresh(
        self, credentials: Credentials, scopes: Iterable[str] = ()
    ) -> dict[str, object]:
        """Do what `refresh` does, but return the server's answer itself.

        Without scopes the server keeps those granted.  Source: RFC 6749 section 6.
        """
        if not credentials.refresh_token:
            raise NotLoggedIn(
                "the login has no refresh token; run `claude-oauth login`"
            )
        body = {
            "grant_type": "refresh_token",
            "refresh_token": credentials.refresh_token,
            "client_id": self.client_id_for(credentials),
            "scope": " ".join(scopes),
        }
        if not body["scope"]:
            del body["scope"]
        # Repeated if the connection is dropped: if the server has spent the token, its
        # successor is lost anyway, and any later try would send the same token.
        return self._send(self.config.token_url, body, field="access_token", tries=2)

    def fetch_profile(self, access_token: str) -> Profile:
        """Return the profile; TokenRefused if the token is dead or too narrow."""
        url = self.config.profile_url
        answer = self._send(url, None, field="account", bearer=access_token, tries=2)
        return Profile.from_answer(answer)

    def create_api_key(self, access_token: str) -> str:
        """Create another permanent Console API key; TokenRefused if not allowed."""
        url = self.config.api_key_url
        answer = self._send(url, {}, field="raw_key", bearer=access_token)
        key = _header_text(answer.get("raw_key"))
        if key is None:
            raise BadAnswer("raw_key")
        return key

    def revoke(self, token: str) -> None:
        """End the grant behind a refresh token.  Source: RFC 7009 section 2.1."""
        if not self.config.revoke_url:
            raise ConfigError("no revoke_url is set; set one, or log out without it")
        body = {
            "token": token,
            "token_type_hint": "refresh_token",
            "client_id": self.client_id_for(None),
        }
        self._send(self.config.revoke_url, body)

    def _send(
        self,
        url: str,
        body: Mapping[str, str] | None,
        *,
        field: str = "",
        bearer: str = "",
        tries: int = 1,
    ) -> dict[str, object]:
        """Send a request; return the answer's JSON object, {} without a field."""
        # `requests` limits the wait for each packet only: slow headers, or a resolver
        # that hangs, would hold the lock for ever.
        try:
            status, headers, content = call_with_limit(
                lambda: self._attempt(url, body, bearer, tries), 3 * self.config.timeout
            )
        except TimeoutError:
            raise Unavailable("no whole answer in time; try again later") from None
        sent = {"bearer": bearer, **(body or {})}
        names = ("bearer", "code", "code_verifier", "state", "refresh_token", "token")
        secrets = [sent.get(name, "") for name in names]
        if not 200 <= status < 300:
            wait = parse_retry_after(headers.get("Retry-After"), now=self._clock())
            request = headers.get("request-id")
            raise error_of_answer(
                status, content, retry_after=wait, request_id=request, secrets=secrets
            )
        if not field:
            return {}
        return read_answer(status, content, field=field, secrets=secrets)

    def _attempt(
        self, url: str, body: Mapping[str, str] | None, bearer: str, tries: int
    ) -> tuple[int, Mapping[str, str], bytes]:
        """Return status, headers and content of any answer."""
        from contextlib import ExitStack

        headers = {"Accept": "application/json", "User-Agent": self.config.user_agent}
        if bearer:
            headers["Authorization"] = f"Bearer {bearer}"
            headers["anthropic-beta"] = OAUTH_BETA
        content, response = b"", None
        with ExitStack() as stack:
            session = self._session or stack.enter_context(import_requests().Session())
            way, proxies = check_way(url, session)
            try:
                response = session.request(
                    ("POST", "GET")[body is None],
                    url,
                    json=body,
                    headers=headers,
                    # Without an auth= of ours, a netrc entry would replace the token.
                    auth=_without_redirect,
                    proxies=proxies,
                    timeout=self.config.timeout,
                    # A token must not follow a redirect to wherever it points.
                    allow_redirects=False,
                    stream=True,
                )
                tries = 1  # an answer has begun: the token is spent
                pieces = stack.enter_context(response).iter_content(8192)
                while len(content) <= MAX_ANSWER_BYTES and (piece := next(pieces, b"")):
                    content += piece
                is_cut = getattr(response.raw, "length_remaining", 0)  # for urllib3 1
                if is_cut or len(content) > MAX_ANSWER_BYTES:
                    raise BufferError
                return response.status_code, response.headers, content
            except Exception as failure:
                error = failure
                # The tokens may be whole, whatever comes behind them.
                if response is not None and _fields_of(content):
                    return response.status_code, response.headers, content
        # An exception of the session may hold the request, and so the tokens: raise a
        # text alone, and outside the except block, so that no chain leads to it.
        failed = _error_of_failure(error, way)
        if tries > 1 and str(failed) == _DROPPED.format(way=way):
            return self._attempt(url, body, bearer, tries - 1)
        raise failed


def _without_redirect(request: Any) -> Any:
    # `requests` parses a Location that it does not follow, and may fail on it.
    request.register_hook("response", lambda got, **_: got.headers.update(Location=""))
    return request


_DROPPED: Final = "{way} dropped the connection; try again later"

_FAILURES: Final = {
    "SSLError": "TLS to {way} failed, or its certificate is not trusted; if a proxy"
    " inspects TLS here, set REQUESTS_CA_BUNDLE to its certificate's file",
    "ProxyError": "the way to {way} is closed: the proxy refused or did not answer;"
    " check HTTPS_PROXY with its name and password",
    "ConnectionResetError ConnectionAbortedError BrokenPipeError": _DROPPED,
    "Timeout TimeoutError": "no answer from {way} in time; try again later",
    "ValueError FileNotFoundError PermissionError OSErrorNone": "no request to {way}"
    " can be made ({kind}); check the address, the proxy and the certificates' files",
    "ConnectionError": "no connection to {way}; check the network and try again",
    "Exception": "no usable answer from {way} ({kind}); try again later",
}
"""The text for an exception of a class, or with one inside; the first match counts."""


def _error_of_failure(error: Exception, way: str) -> ClaudeOAuthError:
    # `requests` wraps urllib3's error, and that the socket's; they nest by args.
    causes: list[object] = [error]
    for cause in causes:
        causes += getattr(cause, "args", ())
    kinds = {kind.__name__ for cause in causes for kind in type(cause).__mro__}
    kind = type(error).__name__
    # What `requests` itself says of a missing file is an OSError without a number.
    kinds.add(f"{kind}{getattr(error, 'errno', '')}")
    row = next(names for names in _FAILURES if kinds.intersection(names.split()))
    text = _FAILURES[row].format(way=way, kind=kind)
    return ConfigError(text) if "ValueError" in row else Unavailable(text)


def import_requests() -> Any:
    """Return the package `requests`; raises ConfigError if it is missing or broken."""
    import_package("requests.sessions")  # a stray requests.py has none
    return sys.modules["requests"]


def check_way(url: str, session: requests.Session) -> tuple[str, dict[str, str]]:
    """Return a text that names the host and its proxy, and the proxies to use.

    Raises:
        ConfigError: The proxy's URL, or the file of certificates, is unusable.  No URL
            of a proxy is shown: a password may be in it.
    """
    import re
    from urllib.parse import urlsplit

    requests, parts = import_requests(), urlsplit(url)
    # Plain http stays on this machine, whatever HTTP_PROXY or a session says: the key
    # with the host takes precedence over all others.
    proxies = {f"http://{parts.hostname}": ""}
    merge = getattr(session, "merge_environment_settings", None)
    if parts.scheme == "http" or not merge:  # not a session of `requests`
        return parts.netloc, proxies
    settings = merge(url, proxies, True, None, None)
    variables = sorted(os.environ.items())
    names = {value: name for name, value in variables if name.upper() in _VARIABLES}
    bundle = settings["verify"]
    try:
        if isinstance(bundle, (str, os.PathLike)) and not os.path.isdir(bundle):
            import ssl

            ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_verify_locations(bundle)
    except (ImportError, OSError, ValueError):
        name = names.get(str(bundle), "the session's verify")
        raise ConfigError(
            f"{name} names {printable(bundle)}, which is no readable file of"
            " certificates; correct or unset it"
        ) from None
    proxy = requests.utils.select_proxy(url, settings["proxies"])
    if not proxy:
        return parts.netloc, proxies
    try:
        (address,) = re.findall(_PROXY_URL, proxy)
        address.split(":")[0].encode("idna")  # fails for an empty or a long label
        proxy_url = requests.utils.prepend_scheme_if_needed(proxy, "http")
        requests.adapters.HTTPAdapter().proxy_manager_for(proxy_url)
        return f"{parts.netloc} through the proxy {address}", proxies
    except (ValueError, AssertionError) as error:
        kind = type(error).__name__
    name = names.get(proxy, "the proxy of the session or the system")
    raise ConfigError(f"{name} {_PROXY_PROBLEMS.get(kind, _PROXY_PROBLEMS[''])}")


_VARIABLES: Final = ("HTTPS_PROXY", "ALL_PROXY", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE")

_PROXY_URL: Final = (
    r"^(?:[A-Za-z0-9]+://)?(?:[^\s/?#\[\]]*@)?"
    r"((?:[^\s/?#@:\[\]]+|\[[^\s/?#@\]]+\])(?::(?!0)[0-6]?\d{0,4})?)/?\Z"
)
"""A proxy's URL as `requests` takes it; the group is its host and port."""

_PROXY_PROBLEMS: Final = {
    "": "is no usable proxy URL; give it as http://host:port, and write characters like"
    " # ? / [ @ of a password as %23 %3F %2F %5B %40",
    "InvalidSchema": "names a SOCKS proxy; get PySocks: pip install PySocks",
}


# -- Storage ---------------------------------------------------------------------------


class Storage(Protocol):
    """Where a credential waits between runs.  Safe to share between threads.

    Two attributes are optional: ``read_only`` (True: another program owns the
    credential, so its refresh token is never spent) and ``account_file`` (the path
    where the account is cached; None: in memory alone).
    """

    def load(self) -> Credentials | None:
        """Return the stored credential, or None if it is certain that there is none."""

    def save(self, credentials: Credentials) -> None:
        """Write a credential whole, or raise StorageError and leave the old one."""

    def delete(self) -> bool:
        """Remove this module's own keys; return whether there were any."""
        ...

    def check(self) -> None:
        """Raise StorageError if a save could not succeed now, under the same lock."""

    def lock(self, timeout: float) -> ContextManager[object]:
        """Return a context that one thread of one process is in at a time.

        To enter it raises Unavailable when the seconds are over; 0 tries once.
        """
        ...

    def stamp(self) -> object:
        """Return a cheap value that changes when the record may have; None: read it."""

    def describe(self) -> str:
        """Say for people where the credential is."""
        ...


def absolute_path(path: str | os.PathLike[str]) -> str:
    """Return a path from the root, with ``~`` filled in.

    What is empty or not expanded is a ConfigError, never a folder below this one.
    """
    found = os.path.expanduser(os.fsdecode(path))
    if not found.strip() or found[0] in "\"'$%~" or "\0" in found:
        raise ConfigError(
            f"{printable(found)!r} is no path: it is empty, begins with a quote or an"
            " unexpanded variable, or no home directory is known; set the path itself"
        )
    return os.path.abspath(found)


def default_directory(environ: Mapping[str, str] | None = None) -> str:
    """Return where files go: CLAUDE_OAUTH_DIR, or beside Claude's own settings."""
    chosen = setting("CLAUDE_OAUTH_DIR", environ)
    if not chosen:
        settings = setting("CLAUDE_CONFIG_DIR", environ) or os.path.join("~", ".claude")
        chosen = os.path.join(settings, "claude-oauth")
    return absolute_path(chosen)


def warn(message: str, *, once: bool = False) -> None:
    """Tell the program's log, or stderr if it has none, what a person should know."""
    import logging

    if message in _WARNED:
        return
    if once:
        _WARNED.add(message)
    logging.getLogger("claude_oauth").warning(message)


_WARNED: Final[set[str]] = set()
"""What this process says only once."""

_NO_MODES: Final = "others can read this, by its mode; set its mode to 0600 if you can"


def _make_private(target: int | str, mode: int, subject: str) -> bool:
    """Set the mode of a file or directory; warn once where that has no effect."""
    if sys.platform == "win32":
        return False  # the mode is invented there, and access follows from the ACL
    try:
        os.chmod(target, mode)
        if not os.stat(target).st_mode & 0o077:
            return True
    except OSError:
        pass
    warn(f"{subject}: {_NO_MODES}", once=True)
    return False


def _make_directory(path: str) -> None:
    """Create a directory and those above it, 0700 each; leave existing ones alone."""
    # os.makedirs would apply the mode to the last level only.
    if os.path.isdir(path):
        return
    if os.path.dirname(path) != path:
        _make_directory(os.path.dirname(path))
    try:
        os.mkdir(path, 0o700)
    except FileExistsError:
        return
    _make_private(path, 0o700, path)  # a umask of 0777 has left 0000


def read_private(
    path: str, *, is_ours: bool = True, any_owner: bool = False
) -> bytes | None:
    """Return a private file's content, None if there is no file or nothing in it.

    Blanks, marks of an encoding and the NULs that a crash leaves are nothing.
    A file of ours that others can read is set to 0600 with a warning.  What is no
    regular file of this user is a StorageError.
    """
    try:
        # Not after opening it: a named pipe would hold the program up.
        if os.path.exists(path) and not os.path.isfile(path):
            raise StorageError(f"{path} is not a regular file; move it away")
        with open(path, "rb") as file:
            _check_owner_and_mode(file.fileno(), path, is_ours, any_owner)
            data = file.read(MAX_FILE_BYTES + 1)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise StorageError(f"cannot read {path}: {_reason(error)}") from None
    if len(data) > MAX_FILE_BYTES:
        raise StorageCorrupt(f"{path} is too large to be a credential; move it away")
    is_blank = data.strip(b"\0 \t\r\n\v\f") in (b"", b"\xef\xbb\xbf", b"\xff\xfe")
    return None if is_blank else data


def _check_owner_and_mode(fd: int, path: str, is_ours: bool, any_owner: bool) -> None:
    if sys.platform == "win32":
        return
    found = os.fstat(fd)
    if found.st_uid not in (os.geteuid(), 0) and not any_owner:
        raise StorageError(f"{path} is another user's; use a directory of your own")
    if not found.st_mode & 0o077:
        return
    if not is_ours:
        warn(f"{path}: {_NO_MODES}", once=True)
    elif _make_private(fd, 0o600, os.path.dirname(path)):
        warn(f"others could read {path}; it is set to 0600 now")


def _reason(error: OSError) -> str:
    return f"{error.strerror or type(error).__name__}".lower()


def write_private(path: str, data: bytes, *, is_cache: bool = False) -> None:
    """Replace a private file whole, or raise StorageError and leave it as it was.

    Hold the lock, or two writers could lose a change.  The file is 0600, and on the
    disk when this returns; a cache is not worth the wait.
    """
    _AtomicFile(path).commit(data, sync=not is_cache)


class _AtomicFile:
    """The successor of a private file: made beside it, and renamed over it once whole.

    It can be made before a refresh token is spent, with room on the disk for what comes
    back: then neither a disk that fills meanwhile nor a mode can cost the answer.
    """

    def __init__(self, path: str, *, reserve: bool = False) -> None:
        # os.replace onto a link would replace the link, and leave the old token there.
        self._path, self._real = path, os.path.realpath(path)
        self._directory, name = os.path.split(self._real)
        unique = f".{name}.{os.urandom(8).hex()}{_TEMPORARY_SUFFIX}"
        self._temporary = os.path.join(self._directory, unique)
        self._file: Any = None
        flags = os.O_CREAT | os.O_EXCL | os.O_RDWR | getattr(os, "O_BINARY", 0)
        try:
            _make_directory(self._directory)
            self._file = io.FileIO(os.open(self._temporary, flags, 0o600), "r+")
            _make_private(self._file.fileno(), 0o600, self._directory)
            if reserve:
                room = RESERVED_BYTES + self._size_if_replaceable()
                _write_all(self._file, b" " * room)
                _sync(self._file, self._directory)
        except OSError as error:
            self.discard()
            raise StorageError(f"cannot write {path}: {_reason(error)}") from None

    def commit(self, data: bytes, *, sync: bool = True) -> None:
        """Put the data in the file's place, through the descriptor that has room."""
        try:
            self._file.seek(0)
            _write_all(self._file, data)
            self._file.truncate()
            if sync:
                _sync(self._file, self._directory)
            self._file.close()
            self._replace(data)
            if sync:
                _sync_directory(self._directory)
        except OSError as error:
            raise StorageError(f"cannot write {self._path}: {_reason(error)}") from None
        finally:
            self.discard()

    def discard(self) -> None:
        """Remove what was not committed."""
        if self._file is not None:
            _quietly(self._file.close)  # a full NFS says so only now
            _quietly(os.unlink, self._temporary)

    def _size_if_replaceable(self) -> int:
        """Return the file's size; raise if it can be neither replaced nor rewritten."""
        try:
            with io.FileIO(self._real, "r+") as file:
                return file.seek(0, os.SEEK_END)
        except FileNotFoundError:
            return 0
        except PermissionError:
            os.chmod(self._real, 0o600)  # fails unless it is ours, and can be replaced
            return os.path.getsize(self._real)

    def _replace(self, data: bytes) -> None:
        """Rename over the file, or rewrite it in place where that is refused.

        That is a mount of its own, as in containers, a sticky directory, or on Windows
        another program that has the file open for more than a moment.
        """
        pauses = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0) if os.name == "nt" else (0.0,)
        for pause in pauses:
            try:
                os.replace(self._temporary, self._real)
                return
            except OSError as error:
                refusals = (errno.EBUSY, errno.EPERM, errno.EACCES)
                if error.errno not in refusals or not os.path.isfile(self._real):
                    raise
            time.sleep(pause)
        # Blanks, which JSON allows, first take the room for a longer record, and then
        # hide the end of a longer old one until it is cut off.
        with io.FileIO(self._real, "r+") as file:
            size = file.seek(0, os.SEEK_END)
            _write_all(file, b" " * (len(data) - size))
            file.seek(0)
            _write_all(file, data.ljust(size))
            file.truncate(len(data))
            _sync(file, self._directory)


RESERVED_BYTES: Final = 16384
"""Room for what a credential's successor may be longer."""

_TEMPORARY_SUFFIX: Final = ".claude-oauth.tmp"


def _write_all(file: io.FileIO, data: bytes) -> None:
    # A write may take a part only, on a disk that is nearly full.
    view = memoryview(data)
    while view:
        view = view[file.write(view) :]


def _sync(file: io.FileIO, directory: str) -> None:
    """Put a file on the disk; warn once where the file system cannot be asked to."""
    try:
        os.fsync(file.fileno())
    except OSError as error:
        # Not EIO, ENOSPC and the like: those say that it is not on the disk.
        refusals = (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP)
        if error.errno not in (*refusals, errno.EPERM, errno.EACCES, errno.ENOTTY):
            raise
        text = "this file system refuses fsync; a power cut may cost the login"
        warn(f"{directory}: {text}", once=True)


def _sync_directory(directory: str) -> None:
    # Not on Windows, nor where it may be written but not read; some network file
    # systems cannot.  The file itself is on the disk.
    try:
        fd = os.open(directory, os.O_RDONLY)
    except OSError:
        return
    _quietly(os.fsync, fd)
    _quietly(os.close, fd)


def _quietly(function: Callable[..., object], *arguments: object) -> None:
    """Call a function whose failure changes nothing."""
    try:
        function(*arguments)
    except (OSError, StorageError):
        pass


class FileLock:
    """A lock that processes share, held while its context lasts.

    The kernel frees it when a process dies.  The file stays: to remove it would let two
    processes hold locks on two files of one name.  Whoever holds it removes what
    processes that died have left.
    """

    reserved: _AtomicFile | None = None
    """What a check made for the next save under this lock."""

    def __init__(self, path: str, timeout: float) -> None:
        self.path = path
        self._timeout = timeout
        self._file: Any = None
        self.pid = 0
        """The process that holds it."""

    def __enter__(self) -> None:
        deadline = Deadline(self._timeout)
        pause = 0.002
        # The kernel's lock has no time limit to wait with, so this tries again: a
        # signal gets through at once, and nothing is left behind when the time is over.
        while not self._acquire():
            if deadline.passed():
                raise Unavailable(
                    f"another process holds the lock {self.path}; try again later"
                )
            time.sleep(min(pause, deadline.left()))
            pause = min(pause * 1.5, 0.01)
        self.pid = os.getpid()

    def __exit__(self, *exc_info: object) -> None:
        import glob

        is_held, self.pid = self.pid == os.getpid(), 0
        with self._file as file:
            if not is_held:
                return  # a child that was forked under the lock: its parent holds it
            if self.reserved:
                self.reserved.discard()
            directory = glob.escape(os.path.dirname(self.path))
            for path in glob.glob(os.path.join(directory, f".*{_TEMPORARY_SUFFIX}")):
                _quietly(os.unlink, path)
            if sys.platform != "win32":
                import fcntl

                # A child that was forked meanwhile has the file open too: to close it
                # here would leave it locked for as long as the child lives.
                _quietly(fcntl.flock, file.fileno(), fcntl.LOCK_UN)

    def _acquire(self) -> bool:
        """Take the lock if it is free."""
        flags = os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0)
        directory = os.path.dirname(self.path)
        try:
            _make_directory(directory)
            # A file object, which closes itself if Ctrl-C comes before this returns.
            file = io.FileIO(os.open(self.path, flags, 0o600), "r+")
            try:
                fd = file.fileno()
                if os.fstat(fd).st_mode & 0o600 != 0o600:  # made under a umask of 0777
                    _make_private(fd, 0o600, directory)
                # Locked, but removed by somebody meanwhile: others lock another file.
                if _lock(fd) and (os.name == "nt" or os.fstat(fd).st_nlink):
                    self._file = file
            finally:
                if self._file is None:
                    file.close()
        except OSError as error:
            raise StorageError(
                f"cannot lock {self.path}: {_reason(error)}; choose another directory,"
                " as with CLAUDE_OAUTH_DIR"
            ) from None
        return self._file is not None


def _lock(fd: int) -> bool:
    try:
        if sys.platform == "win32":
            import msvcrt

            msvcrt.locking(fd, msvcrt.LK_NBLCK, 1)
        else:
            import fcntl

            # Not lockf: it is lost as soon as any descriptor of the file is closed, and
            # does not keep threads apart.
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        # Held, on Windows: EACCES or EDEADLK by the documentation, and 0 under Wine.
        is_unknown = os.name != "nt" or error.errno in (errno.EBADF, errno.EINVAL)
        if is_unknown and not isinstance(error, BlockingIOError):
            raise
        return False
    return True


@hides_locals
class _RecordStorage:
    """What stores of a JSON object have in common."""

    _read_record: Callable[[], dict[str, object]]
    _write_record: Callable[[dict[str, object]], None]
    _watched: str
    """The file that changes when the record does."""

    def load(self) -> Credentials | None:
        """Return the stored credential, or None if it is certain that there is none.

        One that is damaged is StorageCorrupt, and is left as it was.
        """
        record = self._read_record()
        tokens = record.get("claudeAiOauth")
        if isinstance(tokens, dict) and not (
            tokens.get("accessToken") or tokens.get("refreshToken")
        ):
            return None  # emptied by another program's logout
        return Credentials.from_record(record) if tokens else None

    def save(self, credentials: Credentials) -> None:
        """Store a credential; keys of other programs stay.  Hold the lock.

        After a StorageError it is not stored, or nobody knows: keep it and try again.
        """
        # Any answer of the read but a record or a certain absence ends it here.
        self._write_record(merge_record(self._read_record(), credentials.to_record()))

    def stamp(self) -> object:
        """Return what a single ``stat`` tells of a file."""
        try:
            found = os.stat(self._watched)
        except FileNotFoundError:
            return "absent"
        except OSError:
            return None
        return found.st_mtime_ns, found.st_ino, found.st_size


@hides_locals
class FileStorage(_RecordStorage):
    """A credential in a file that only this user can read, encrypted if you like.

    Args:
        path: Default: credentials.json in the default directory.  A file of Claude
            Code's own layout will do.
        cipher: Has ``encrypt(bytes) -> bytes`` and ``decrypt(bytes) -> bytes``, whose
            errors are StorageErrors.  On Windows, a file that another process encrypted
            with DPAPI needs none, and stays encrypted.
        read_only: Another program owns the file: hand out what is there, write nothing
            and never spend its refresh token.
    """

    def __init__(
        self,
        path: str | os.PathLike[str] | None = None,
        *,
        cipher: Any = None,
        read_only: bool = False,
    ) -> None:
        import threading

        if path is None:
            path = os.path.join(default_directory(), "credentials.json")
        self.path = self._watched = absolute_path(path)
        self.read_only = read_only
        self._cipher = cipher
        self._thread = threading.local()
        """Its ``lock`` is the one that this thread asked for last."""

    @property
    def account_file(self) -> str | None:
        """Where the account of this file is cached: beside the real file, by its name.

        None for another program's file, whose login may change at any time.
        """
        if self.read_only:
            return None
        directory, name = os.path.split(os.path.realpath(self.path))
        stem = "" if name == "credentials.json" else f"{name}."
        return os.path.join(directory, f"{stem}account.json")

    def delete(self) -> bool:
        """Remove this module's keys, and the file if nothing else is in it."""
        self._refuse_if_read_only()
        stored = self._read_stored()
        kept = {k: v for k, v in stored.items() if k not in _OUR_KEYS}
        if len(kept) == len(stored):
            return False
        real = os.path.realpath(self.path)
        if not kept:
            _quietly(os.unlink, real)
            _sync_directory(os.path.dirname(real))
        # A mount of its own cannot be removed, only emptied; nor, on Windows, can what
        # somebody is reading.
        if os.path.exists(real):
            write_private(real, dump_json(kept).encode("ascii"))
        return True

    def check(self) -> None:
        """Raise StorageError if a save could not succeed now, or would lose something.

        Under the lock, the next save has the room that this has found.
        """
        self._refuse_if_read_only()
        self._read_record()
        left = self._swap_reserved(_AtomicFile(self.path, reserve=True))
        if left:
            left.discard()

    def lock(self, timeout: float) -> FileLock:
        """Return the lock of the file's folder: a file named ``lock`` in it."""
        self._refuse_if_read_only()
        folder = os.path.dirname(os.path.realpath(self.path))
        lock = self._thread.lock = FileLock(os.path.join(folder, "lock"), timeout)
        return lock

    def describe(self) -> str:
        """Say where the file is, and whether it is encrypted."""
        notes = ["encrypted"] * bool(self._cipher) + ["read only"] * self.read_only
        return f"{self.path} ({', '.join(notes)})" if notes else self.path

    def _refuse_if_read_only(self) -> None:
        if self.read_only:
            raise StorageError(
                f"{self.path} belongs to another program and is only read;"
                " log in and out there, or use a storage of your own"
            )

    def _swap_reserved(self, file: _AtomicFile | None) -> _AtomicFile | None:
        """Keep a file with the lock that this thread holds; return the one before.

        Without the lock, return the file itself.
        """
        lock = getattr(self._thread, "lock", None)
        if lock and lock.pid == os.getpid():
            file, lock.reserved = lock.reserved, file
        return file

    def _read_stored(self) -> dict[str, object]:
        data = read_private(self.path, is_ours=not self.read_only)
        if data is None:
            return {}
        stored = parse_json_object(data)
        if stored is None:
            raise StorageCorrupt(
                f"{self.path} is damaged: it holds no JSON object;"
                " move it away and log in again"
            )
        return stored

    def _read_record(self) -> dict[str, object]:
        import binascii

        stored, cipher = self._read_stored(), self._cipher
        if _ENCRYPTED_KEY not in stored:
            return stored
        text: Any = stored[_ENCRYPTED_KEY]
        try:
            sealed = binascii.a2b_base64(text)
        except (ValueError, TypeError):
            raise _undecryptable() from None
        if sys.platform == "win32" and sealed.startswith(_DPAPI_MARK):
            cipher = DPAPICipher()
            self._cipher = self._cipher or cipher
        if cipher is None:
            raise StorageError(
                f"{self.path} is encrypted; set CLAUDE_OAUTH_PASSPHRASE_FILE to the"
                " file with its passphrase"
            )
        clear = parse_json_object(cipher.decrypt(sealed))
        if clear is None:
            raise _undecryptable()
        return {**{k: v for k, v in stored.items() if k not in _OUR_KEYS}, **clear}

    def _write_record(self, record: dict[str, object]) -> None:
        import binascii

        self._refuse_if_read_only()
        if self._cipher:
            ours = {key: record.pop(key) for key in RECORD_KEYS if key in record}
            sealed = self._cipher.encrypt(dump_json(ours).encode("ascii"))
            record[_ENCRYPTED_KEY] = binascii.b2a_base64(sealed, newline=False).decode()
        file = self._swap_reserved(None) or _AtomicFile(self.path)
        file.commit(dump_json(record).encode("ascii"))


_ENCRYPTED_KEY: Final = "claudeOauthEncrypted"
_OUR_KEYS: Final = (*RECORD_KEYS, _ENCRYPTED_KEY)


@hides_locals
class MemoryStorage:
    """A credential that ends with the process; for tests and for guests."""

    account_file: str | None = None

    def __init__(self, credentials: Credentials | None = None) -> None:
        self._stored = credentials
        self._mutexes: dict[int, threading.Lock] = {}
        """By process: nobody in a forked child would free its parent's."""
        self._changes = 0

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
        import threading
        from contextlib import contextmanager

        mutex = self._mutexes.setdefault(os.getpid(), threading.Lock())

        @contextmanager
        def hold() -> Iterator[None]:
            if not mutex.acquire(timeout=timeout):
                raise Unavailable("another thread holds the lock; try again later")
            try:
                yield
            finally:
                mutex.release()

        return hold()

    def stamp(self) -> object:
        """Return how often the credential has changed."""
        return self._changes

    def describe(self) -> str:
        """Say that it is in memory."""
        return "memory"


@hides_locals
class _SecretStorage(_RecordStorage):
    """A record in a store of the system, which may be locked, slow or gone at any time.

    An empty file beside the lock tells other processes of a save.  If it cannot be
    written, they notice when they refresh, which begins with a read.

    Args:
        service: The item's service.
        account: The item's account; None is one for each directory of *lock_path*.
        lock_path: The file that processes lock; None is the default directory's.
    """

    read_only = False
    _title: ClassVar[str]
    _call: Callable[..., bytes | None]
    """Does "get", "set" (with data) or "delete" for a service's item.  None: it is
    certain that there is no such item."""

    def __init__(
        self,
        service: str = "claude-oauth",
        account: str | None = None,
        *,
        lock_path: str | os.PathLike[str] | None = None,
    ) -> None:
        if lock_path is None:
            lock_path = os.path.join(default_directory(), "lock")
        self._lock_path = absolute_path(lock_path)
        directory = os.path.dirname(self._lock_path)
        self.account_file = os.path.join(directory, "account.json")
        self._watched = os.path.join(directory, "store.changed")
        self.time_limit = STORE_TIMEOUT
        """Seconds for one operation; give more if a person can answer."""
        if account is None:
            import hashlib

            # Whoever shares the lock of a directory shares its login.
            path, default = map(os.path.realpath, (directory, default_directory({})))
            digest = hashlib.sha256(os.fsencode(path)).hexdigest()[:16]
            account = "default" if path == default else digest
        self._service, self._account = service, account
        for name in (service, account):
            if not name.strip() or not name.isprintable() or len(name.encode()) > 200:
                raise ConfigError(
                    "service and account must be printable, and 1 to 200 bytes long"
                )

    def delete(self) -> bool:
        """Remove the record, readable or not; return whether there was one."""
        found = self._call("delete", self._service) is not None
        if found and self._call("get", self._service) is not None:
            raise StorageError("the login was deleted, but is still there")
        _quietly(write_private, self._watched, b"")
        return found

    def check(self) -> None:
        """Raise StorageError if a save could not succeed now.

        A store that can be read may be full, or refuse writes all the same: so an item
        of the record's size is written beside it, read back and removed.
        """
        beside = f"{self._service} check"
        self._put(beside, b"x" * len(dump_json(self._read_record())))
        self._call("delete", beside)

    def lock(self, timeout: float) -> FileLock:
        """Return the lock of the directory: a file named ``lock`` in it."""
        return FileLock(self._lock_path, timeout)

    def describe(self) -> str:
        """Say in a few words where the credential is."""
        return f"{self._title} (service {self._service}, account {self._account})"

    def _read_record(self) -> dict[str, object]:
        data = self._call("get", self._service)
        record = {} if data is None else parse_json_object(data)
        if record is None:
            raise StorageCorrupt(
                f"the record in the {self.describe()} is unreadable;"
                " `claude-oauth logout` removes it"
            )
        return record

    def _write_record(self, record: dict[str, object]) -> None:
        self._put(self._service, dump_json(record).encode("ascii"))
        _quietly(write_private, self._watched, b"")

    def _put(self, service: str, data: bytes) -> None:
        """Write an item, and believe only what a read brings back.

        A success can lie, a refusal can come after the change, and a time limit says
        nothing at all.
        """
        for _ in range(2):
            problem = None
            try:
                self._call("set", service, data)
            except StorageError as error:
                problem = error
            try:
                found = self._call("get", service)
            except StorageError as error:
                text = f"{error}; whether the new login was stored is not known"
                raise type(error)(text) from None
            if found == data:
                return
            if problem:
                raise problem
        raise StorageError(
            f"the {self._title} does not keep what is stored in it; {_USE_FILE}"
        )


STORE_TIMEOUT: Final = 10.0
"""Seconds for one operation: a dialog that nobody sees waits for ever."""

_USE_FILE: Final = "choose a file with `--store file`"

SECURITY: Final = "/usr/bin/security"
"""The Keychain's own program, by its whole path: whatever comes first on PATH could be
anybody's.  Tests put their stand-in here."""

SECURITY_LINE: Final = 4094
"""Bytes of a line for `security -i`, newline included.  From 4096 on it stores a value
that was cut, and exits with 0.  Source: Apple's SecurityTool, readline.c."""

_LOCKED_NUMBERS: Final = frozenset(
    number & 255
    for number in (-25308, -25315, -25293, -128, -60005, -60008, -67869, -2070, -25299)
)
"""What `security` exits with where a person is needed: its number, modulo 256.  With
-U, -25299 is no duplicate: the update was refused.  Source: Apple's SecBase.h."""


class KeychainStorage(_SecretStorage):
    """A credential in the macOS Keychain; any program of this user can have it read.

    Each operation is one process of `security -i` and one line on its stdin, because
    every user of the machine can read arguments.  Numbers decide, never texts.  The
    arguments are the item's ``service``, its ``account`` (default: one for each
    directory of the lock) and the ``lock_path``.  Source: Apple's SecurityTool.
    """

    _title = "macOS Keychain"

    def _call(self, action: str, service: str, data: bytes = b"") -> bytes | None:
        import re

        # In a word for `security -i`, a backslash escapes in any state.
        account, name, secret = (
            b'"' + word.replace(b"\\", b"\\\\").replace(b'"', b'\\"') + b'"'
            for word in (self._account.encode(), service.encode(), data)
        )
        digits = data.hex().encode("ascii")
        # -U without -T and -A: they change who may read the item, which asks a person.
        command, *forms = {
            "get": (b"find-generic-password", b" -w"),
            "set": (b"add-generic-password -U", b" -X " + digits, b" -w " + secret),
            "delete": (b"delete-generic-password", b""),
        }[action]
        start = b"%s -a %s -s %s" % (command, account, name)
        fitting = [form for form in forms if len(start + form) < SECURITY_LINE]
        if not fitting:
            raise StorageError(
                f"the login is too long for an item of the Keychain; {_USE_FILE}"
            )
        output = _run_security(start + fitting[0] + b"\n", self.time_limit)
        if output is None or action != "get":
            return output
        # `-w` prints in hex what is not all printable ASCII.  A record begins with "{",
        # so its hex cannot be mistaken for it.
        is_hex = re.fullmatch(rb"7b([0-9a-f]{2})*\n", output)
        return bytes.fromhex(output.decode()) if is_hex else output[:-1]


def _run_security(line: bytes, timeout: float) -> bytes | None:
    """Run one line; return its output, or None if it is certain that there is no item.

    Both outputs may hold the secret, so they are never part of an error.
    """
    import re
    import subprocess

    try:
        # In a session of its own it has no terminal to ask on, and a Ctrl-C that is
        # meant for us does not end it half-way.
        done = subprocess.run(
            [SECURITY, "-i"],
            input=line,
            capture_output=True,
            timeout=timeout,
            start_new_session=True,
            check=False,
        )
        output, errors = done.stdout, done.stderr
        # The number that is printed for a failure is whole, the status modulo 256.
        printed = re.findall(rb"^[^:\n]*: returned (-?\d+)$", errors, re.MULTILINE)
        number = int((printed or [done.returncode])[0])
    except subprocess.TimeoutExpired:
        number, output, errors = -128, b"", b""  # most likely, a dialog nobody sees
    except OSError as error:
        text = f"{SECURITY} cannot be run ({_reason(error)}); {_USE_FILE}"
        raise StorageError(text) from None
    if number == 0:
        return output
    # -25300 stands for any failure of the search.  It is certain if the one line that
    # `security` printed itself is the one that says so.
    own = re.findall(rb"^security: (\w*)", errors, re.MULTILINE)
    if number == -25300 and own == [b"SecKeychainSearchCopyNext"]:
        return None
    if number & 255 in _LOCKED_NUMBERS:
        raise StorageLocked(
            "the Keychain is locked or asks for a person; unlock it in this session"
            " with `security unlock-keychain ~/Library/Keychains/login.keychain-db`, or"
            f" {_USE_FILE}"
        )
    raise StorageError(
        "the Keychain could not be used, or did not say for certain whether the login"
        f" is there (status {number}); look at HOME, try again, or {_USE_FILE}"
    )


class KeyringStorage(_SecretStorage):
    """A credential in the desktop's keyring, through the PyPI package `keyring`.

    That is the Secret Service (GNOME Keyring), KWallet or the Windows Credential
    Locker, which takes 1,280 characters; any program of the session can read it.  The
    arguments are those of KeychainStorage.
    """

    _title = "keyring"

    def _call(self, action: str, service: str, *data: bytes) -> bytes | None:
        if action == "delete" and self._call("get", service) is None:
            return None
        call = getattr(import_package("keyring"), f"{action}_password")
        arguments = (service, self._account, *(each.decode("ascii") for each in data))
        try:
            found = call_with_limit(lambda: call(*arguments), self.time_limit)
        except Exception as error:  # each backend has errors of its own
            name, is_missing = type(error).__name__, isinstance(error, ImportError)
            # What a write complains about may have the secret in it.
            reason = name if data else printable(f"{name}: {error}")
        else:
            is_there = found is not None or action != "get"
            return str(found).encode(errors="surrogatepass") if is_there else None
        # Where a time limit is over, most likely a dialog waits that nobody sees.
        locked = "TimeoutError KeyringLocked LockedException PromptDismissedException"
        if name in locked.split():
            raise StorageLocked(
                "the keyring is locked or asks for a person; unlock it, as by signing"
                f" in to the desktop, or {_USE_FILE}"
            )
        if is_missing:
            raise ConfigError(f"the backend of `keyring` is not there ({reason})")
        raise StorageError(
            f"the keyring could not be used ({reason}); it needs a desktop session"
            f" (D-Bus) with an unlocked keyring, or {_USE_FILE}"
        )


@hides_locals
class FernetCipher:
    """Encrypts with a passphrase: scrypt, then Fernet (AES-128-CBC and HMAC-SHA256).

    Needs the package `cryptography`.  An empty passphrase is a ConfigError.  Source:
    RFC 7914; OWASP's password storage cheat sheet for the cost.
    """

    _COST = (1 << 15, 8, 3)
    """scrypt's n, r and p: 32 MiB and some 0.2 s."""

    _FORM = rb"scrypt:%d:%d:%d:([0-9a-f]{32}):([0-9a-f]{16}):(.+)" % _COST
    """What encrypt returns: the cost, the salt, a check of the key, and Fernet's text.
    No other cost is taken: a planted record could make reading slow."""

    def __init__(self, passphrase: str | bytes) -> None:
        if isinstance(passphrase, str):
            passphrase = passphrase.encode()
        if not passphrase:
            raise ConfigError("the passphrase is empty")
        self._fernet = import_package("cryptography.fernet")
        self._kdf = import_package("cryptography.hazmat.primitives.kdf.scrypt")
        self._passphrase = passphrase
        self._keys: dict[bytes, bytes] = {}
        """Derived keys by salt: deriving one is slow on purpose."""

    def encrypt(self, data: bytes) -> bytes:
        """Return ASCII text that carries the cost and the salt along."""
        salt = next(iter(self._keys), None) or os.urandom(16).hex().encode("ascii")
        box, check = self._derive(salt)
        start = b"scrypt:%d:%d:%d:%b:%b:" % (*self._COST, salt, check)
        return start + bytes(box.encrypt(data))

    def decrypt(self, data: bytes) -> bytes:
        """Return what was encrypted.

        Another passphrase is a StorageError; damage, or another cipher, StorageCorrupt.
        """
        import re

        found = re.fullmatch(self._FORM, data)
        if found is None:
            raise _undecryptable()
        box, check = self._derive(found.group(1))
        if check != found.group(2):
            raise StorageError(
                "the passphrase is not the one that the login was encrypted with"
            )
        try:
            return bytes(box.decrypt(found.group(3)))
        except self._fernet.InvalidToken:
            raise _undecryptable() from None

    def _derive(self, salt: bytes) -> tuple[Any, bytes]:
        """Return what encrypts, and a check that tells a wrong passphrase from damage.

        Both come out of scrypt together, so the check is as hard to guess from.
        """
        import base64

        if salt not in self._keys:
            # Not hashlib's: it is missing where OpenSSL is old, and in PyPy.
            (n, r, p), raw = self._COST, bytes.fromhex(salt.decode())
            scrypt = self._kdf.Scrypt(salt=raw, length=40, n=n, r=r, p=p)
            self._keys[salt] = scrypt.derive(self._passphrase)
        key = self._keys[salt]
        box = self._fernet.Fernet(base64.urlsafe_b64encode(key[:32]))
        return box, key[32:].hex().encode("ascii")


@hides_locals
class DPAPICipher:
    """Encrypts for this Windows user on this machine, by the system's own means.

    Source: learn.microsoft.com, dpapi.h and winerror.h.
    """

    def encrypt(self, data: bytes) -> bytes:
        """Return what only this user can decrypt."""
        return _DPAPI_MARK + _dpapi("CryptProtectData", data)

    def decrypt(self, data: bytes) -> bytes:
        """Return what was encrypted.

        A session without the user's key is StorageLocked, another user or machine a
        StorageError; damage, or another cipher, StorageCorrupt.
        """
        if not data.startswith(_DPAPI_MARK):
            raise _undecryptable()
        return _dpapi("CryptUnprotectData", data[len(_DPAPI_MARK) :])


_DPAPI_MARK: Final = b"dpapi:"


def _undecryptable() -> StorageCorrupt:
    return StorageCorrupt(
        "the encrypted login cannot be read: it is damaged, or was encrypted in another"
        " way; move it away and log in again"
    )


def _dpapi(function: str, data: bytes) -> bytes:
    """Call CryptProtectData or CryptUnprotectData, never with a dialog."""
    import ctypes

    if sys.platform != "win32":
        raise ConfigError("DPAPI is there on Windows alone")

    class Blob(ctypes.Structure):
        _fields_ = [("size", ctypes.c_uint32), ("data", ctypes.c_void_p)]

    crypt32 = ctypes.WinDLL("crypt32", use_last_error=True)
    buffer = ctypes.create_string_buffer(data, len(data))
    given = Blob(len(data), ctypes.cast(buffer, ctypes.c_void_p))
    taken, no, ui_forbidden = Blob(), None, 0x1
    if not getattr(crypt32, function)(
        ctypes.byref(given), no, no, no, no, ui_forbidden, ctypes.byref(taken)
    ):
        raise _dpapi_error(ctypes.get_last_error())
    try:
        return ctypes.string_at(taken.data or 0, taken.size)
    finally:
        ctypes.WinDLL("kernel32").LocalFree(ctypes.c_void_p(taken.data))


def _dpapi_error(number: int) -> StorageError:
    number &= 0xFFFFFFFF
    if number == 13:  # ERROR_INVALID_DATA
        return _undecryptable()
    if number in (2, 5, 1325, 0x80090345):  # no profile, denied, a dialog, delegation
        return StorageLocked(
            "Windows gives this session no access to the user's key, as over SSH with a"
            " public key; sign in with a password, or choose another store"
        )
    return StorageError(
        f"Windows cannot use the user's key (error {number:#x}): another user, another"
        " machine or a reset password; move the file away and log in again"
    )


def default_storage() -> Storage:
    """Return the store that the environment chooses, or the platform's own."""
    return make_storage()


@hides_locals
def make_storage(
    kind: str | None = None,
    directory: str | None = None,
    *,
    environ: Mapping[str, str] | None = None,
) -> Storage:
    """Return a store by its name: auto, file, keychain or keyring.

    None asks CLAUDE_OAUTH_STORE.  auto is the Keychain on macOS, unless
    CLAUDE_OAUTH_PASSPHRASE_FILE asks for an encrypted file, and a file elsewhere.  An
    unknown store or an unusable passphrase is a ConfigError.
    """
    if kind is None:
        kind = setting("CLAUDE_OAUTH_STORE", environ) or "auto"
    directory = default_directory(environ) if directory is None else directory
    directory = absolute_path(directory)
    passphrase_file = setting("CLAUDE_OAUTH_PASSPHRASE_FILE", environ)
    if kind == "auto":
        kind = "file" if sys.platform != "darwin" or passphrase_file else "keychain"
    if kind == "file":
        path = os.path.join(directory, "credentials.json")
        return FileStorage(path, cipher=_cipher_for(passphrase_file))
    stores = {"keychain": KeychainStorage, "keyring": KeyringStorage}
    if kind in stores:
        return stores[kind](lock_path=os.path.join(directory, "lock"))
    name = printable(kind, limit=40)
    raise ConfigError(
        f"there is no store {name!r}; choose auto, file, keychain or keyring"
    )


def _cipher_for(path: str) -> FernetCipher | DPAPICipher | None:
    """Return the platform's cipher, or one with the passphrase that is in a file.

    The file's owner and mode are not ours to set: systemd or a container made it.
    """
    if not path:
        return DPAPICipher() if sys.platform == "win32" else None
    path = absolute_path(path)
    try:
        passphrase = read_private(path, is_ours=False, any_owner=True) or b""
    except StorageError as error:
        raise ConfigError(f"the passphrase file cannot be used: {error}") from None
    if not passphrase.strip():
        raise ConfigError(f"the passphrase file {path} is missing or empty")
    return FernetCipher(passphrase.rstrip(b"\r\n"))


# -- Sign-in ---------------------------------------------------------------------------

VISIT_SECONDS: Final = 5.0
"""For a connection to say what it wants, and 1 s to hang up; then it is closed."""

PAGE_SECONDS: Final = 2.0
"""For the browser to fetch the result page, once the login is decided."""

TOO_LATE: Final = "nobody finished the sign-in in time; try again"

MAX_VISITORS: Final = 128
"""Connections at a time; the oldest one makes room for the next."""

MAX_HEAD_BYTES: Final = 98304
"""Browsers send the cookies of every server on `localhost`: 64 KB of them are usual."""

PASTE_PAUSE: Final = 0.05
"""Seconds of silence that end a paste of several lines."""

FOREGROUND_INTERVAL: Final = 0.5
"""Seconds between two looks at what no wait reports: `fg`, and Ctrl-C on Windows."""

MAX_TERMINAL_LINE: Final = 1023 if sys.platform == "darwin" else 4095
"""Characters that a terminal takes in one line; the rest is lost.  Source: tty(4)."""

MAX_PIPED_REFUSALS: Final = 20
"""Lines of a pipe that are no code, until no more are read: nobody corrects them."""

TEXT_BROWSERS: Final = (
    r"(?<![\w-])"
    r"(?:www-browser|lynx|links2?|elinks|w3m|browsh|carbonyl|edbrowse|netrik|cha)"
    r"(?=[\s\"']|$)"
)
"""Browsers that would take the terminal for themselves."""

WSL_BROWSERS: Final = ("wslview", "rundll32.exe url.dll,FileProtocolHandler %s")
"""Source: wslu's manual; url.dll is what Windows itself opens addresses with."""

OPEN_BROWSER_PROGRAM: Final = """
import os, sys, webbrowser
is_open = webbrowser.open(sys.argv[1])
try:
    is_open = is_open and os.wait()[1] == 0
except (AttributeError, OSError):
    pass  # it has no child that is left to fail
sys.exit(not is_open)
"""


def start_thread(
    name: str, function: Callable[..., object], *args: object
) -> threading.Thread | None:
    """Run a function in a daemon thread; return None where no thread can be started.

    What it raises is nobody's to handle, and is not shown.
    """
    import contextlib
    import threading

    def run() -> None:
        # A caller's function, or a notebook's: it may raise SystemExit as well.
        with contextlib.suppress(BaseException):
            function(*args)

    thread = threading.Thread(target=run, name=f"claude-oauth-{name}", daemon=True)
    try:
        thread.start()
    except RuntimeError:
        return None
    return thread


def make_server(
    host: str, port: int, handle: Callable[[Any], None], read_head: Any = None
) -> Any:
    """Return a bound, quiet `http.server`; `handle` takes each of its requests.

    `read_head` returns the head from the socket, if `http.server` is not to read it.
    """
    import socket
    import socketserver
    from http import HTTPStatus
    from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

    class Handler(BaseHTTPRequestHandler):
        timeout = VISIT_SECONDS
        wbufsize = -1  # an answer goes out in one piece
        default_request_version = "HTTP/1.0"

        def handle_one_request(self) -> None:
            self.close_connection = True
            if read_head:
                self.rfile.close()
                self.rfile = io.BytesIO(read_head(self.connection))
            self.raw_requestline = self.rfile.readline(MAX_HEAD_BYTES)
            if self.raw_requestline and self.parse_request():
                handle(self)
            self.wfile.flush()
            # Read what a client still sends: closing before would reset the connection.
            self.connection.shutdown(socket.SHUT_WR)
            deadline = Deadline(1.0)
            self.connection.settimeout(1.0)
            while self.connection.recv(65536) and not deadline.passed():
                pass

        def send_error(
            self, code: int, message: str | None = None, explain: str | None = None
        ) -> None:
            """Say in our own words what `parse_request` did not understand."""
            phrase = HTTPStatus(code).phrase.lower()
            respond(self, code, stray_page(f"this is no browser's request ({phrase})"))

        def log_message(self, format: str, *args: object) -> None:
            """Say nothing: the request line may hold a code."""

    class Server(ThreadingHTTPServer):
        address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
        request_queue_size = 1024  # when it overflows, a browser waits for 1 s
        daemon_threads = True
        # Else the last login's connections would keep a chosen port for a minute.  On
        # Windows it would let another program bind the same port and be served.
        allow_reuse_address = sys.platform != "win32"
        allow_reuse_port = False

        def server_bind(self) -> None:
            if sys.platform == "win32":
                alone = socket.SO_EXCLUSIVEADDRUSE
                self.socket.setsockopt(socket.SOL_SOCKET, alone, 1)
            # HTTPServer's own asks the resolver for this machine's name.
            socketserver.TCPServer.server_bind(self)

        def handle_error(self, request: object, client_address: object) -> None:
            """Say nothing: a client went away."""

    return Server((host, port), Handler)


def respond(request: Any, status: int, page: str, **headers: str) -> None:
    """Send a page that has no banner, for no cache and no other site to learn of.

    Source: Content Security Policy Level 3 (style by its hash).
    """
    import base64
    import hashlib

    body = page.encode("utf-8", "replace")
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


def _read_head(sock: socket.socket) -> bytes:
    """Return a request's head, once it is whole; b"" if the client hangs up.

    `http.server` alone takes half a request line for HTTP/0.9, headers that end
    early for complete ones, and waits anew for each byte.
    """
    import re

    head, deadline = bytearray(), Deadline(VISIT_SECONDS)
    end = None
    while not end:
        sock.settimeout(deadline.left() + 0.001)
        chunk = sock.recv(65536)
        if not chunk or deadline.passed():
            return b""
        head += chunk
        if not head[:1].isalpha() or len(head) > MAX_HEAD_BYTES:
            return b"?\n"  # noise, TLS or no end: refused as no request line
        end = re.search(rb"\n\r?\n", head[-len(chunk) - 3 :])
    sock.settimeout(VISIT_SECONDS)
    return bytes(head)


@hides_locals
class AuthCodeListener:
    """Waits on the loopback interface for the browser to bring the code.

    Nothing ends the wait but a callback with the right state.  That request is held
    until `finish` says what became of the login.  One thread accepts connections, and
    each has a thread of its own for a short time.

    Raises:
        OSError: On entry, if it cannot listen; the login can go on by paste.
    """

    def __init__(self, state: str, *, port: int = 0) -> None:
        import threading

        if not 0 <= port <= 65535:
            raise ConfigError("the port must be from 0 to 65535; 0 takes a free one")
        self.port = port
        self.redirect_uri = ""
        self.arrived = threading.Event()
        """Set when the code, or the server's refusal, is there."""
        self.on_arrival: Callable[[], object] = lambda: None
        self._state = state
        self._changed = threading.Condition()  # guards what follows; held for moments
        self._outcome: str | LoginDenied | None = None
        self._page: str | None = None
        self._pages_owed = 0  # callbacks that have not got the page yet
        self._is_closed = False
        self._unread: dict[socket.socket, None] = {}  # clients, the oldest first
        self._threads: list[threading.Thread] = []  # the accepting thread's alone

    def __enter__(self) -> Self:
        import importlib
        import socket

        # What a request needs is loaded now, in a thread: glibc loads a library when
        # the first one ends, and without a descriptor left it ends the process.
        names = ("base64", "hashlib", "hmac", "html", "re", "urllib.parse")
        load = start_thread("load", lambda: list(map(importlib.import_module, names)))
        if load:
            load.join()
        self._servers = self._bind()
        self.port = self._servers[0].server_address[1]
        self.redirect_uri = f"http://localhost:{self.port}{CALLBACK_PATH}"
        # The page names the account: nobody else on this machine may find it.
        self._page_path = "/done/" + generate_state()[:16]
        self._stop, self._stopper = socket.socketpair()
        self._thread = start_thread("listener", self._serve)
        if not self._thread:
            self.close()
            raise OSError(errno.EAGAIN, "no thread can be started")
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def wait(self, timeout: float | None = None) -> str:
        """Return the code.

        Raises:
            LoginDenied: The server answered with an error instead.
            LoginTimeout: Neither came within `timeout` seconds.
        """
        if not self.arrived.wait(timeout):
            raise LoginTimeout(TOO_LATE)
        if isinstance(self._outcome, LoginDenied):
            raise LoginDenied(*self._outcome.args)
        return str(self._outcome)

    def finish(self, page: str) -> None:
        """Show the browser that brought the code this page, and stop listening.

        Returns when nobody is left to fetch it, and after PAGE_SECONDS in any case.
        """
        try:
            with self._changed:
                self._page = page
                self._changed.notify_all()
                self._changed.wait_for(lambda: self._pages_owed <= 0, PAGE_SECONDS)
        finally:
            self.close()

    def close(self) -> None:
        """Stop listening; nothing of it is left afterwards."""
        with self._changed:
            if self._is_closed:
                return
            self._is_closed = True
            self._changed.notify_all()
        self._stopper.send(b"!")
        if self._thread:
            self._thread.join()
        with self._changed:
            while self._unread:
                self._drop_oldest()
        for thread in self._threads:
            thread.join(VISIT_SECONDS + 1)
        for server in self._servers:
            server.server_close()
        self._stop.close()
        self._stopper.close()

    def _bind(self, tries: int = 10) -> list[Any]:
        """Listen on 127.0.0.1 and ::1, which browsers try in either order.

        One that does not exist is left out.  One that is taken is another program's,
        which would be handed the code: then it is another port, or an error.
        """
        servers: list[Any] = []
        port = self.port
        for host in ("127.0.0.1", "::1"):
            try:
                servers.append(make_server(host, port, self._handle, _read_head))
                port = servers[0].server_address[1]
            except OSError as error:
                is_taken = error.errno in (errno.EADDRINUSE, errno.EACCES)
                if not is_taken and (servers or host != "::1"):
                    continue
                for server in servers:
                    server.server_close()
                if self.port or not servers or not tries:
                    raise
                return self._bind(tries - 1)
        return servers

    def _serve(self) -> None:
        import selectors

        with selectors.DefaultSelector() as selector:
            selector.register(self._stop, selectors.EVENT_READ)
            for server in self._servers:
                server.socket.setblocking(False)
                selector.register(server, selectors.EVENT_READ)
            while not self._is_closed:
                ready = [key.fileobj for key, _ in selector.select()]
                for server in set(ready) - {self._stop}:
                    self._accept(server)

    def _accept(self, server: Any) -> None:
        """Give one connection a thread of its own."""
        with self._changed:
            try:
                sock, address = server.socket.accept()
            except OSError:  # no descriptor is left for it, or it has gone again
                self._drop_oldest()
                self._changed.wait(PASTE_PAUSE)
                return
            if len(self._unread) >= MAX_VISITORS:
                self._drop_oldest()
            self._unread[sock] = None
        thread = start_thread("client", self._serve_client, server, sock, address)
        if thread:
            self._threads = [t for t in self._threads if t.is_alive()] + [thread]
        else:
            self._serve_client(server, sock, address)

    def _drop_oldest(self) -> None:
        import socket

        for sock in list(self._unread)[:1]:
            del self._unread[sock]
            try:
                sock.shutdown(socket.SHUT_RDWR)  # its thread reads the end, and closes
            except OSError:
                pass

    # What follows runs in a connection's thread.

    def _serve_client(self, server: Any, sock: socket.socket, address: Any) -> None:
        server.process_request_thread(sock, address)
        with self._changed:
            self._unread.pop(sock, None)
            self._changed.notify_all()

    def _handle(self, request: Any) -> None:
        """Answer a request.  Source: RFC 9112 section 3.2 (one Host, absolute form)."""
        import re

        port = "(:80)?" if self.port == 80 else f":{self.port}"
        ours = rf"(localhost|127\.0\.0\.1|\[::1\]){port}"
        hosts = request.headers.get_all("Host", [])
        path, _, query = request.path.partition("?")
        path = re.sub(f"(?i)^http://{ours}(?=/)", "", path)
        if len(hosts) != 1 or len(request.requestline.split()) != 3:
            respond(request, 400, stray_page("this is no browser's request"))
        elif not re.fullmatch(ours, hosts[0].strip(), re.IGNORECASE):
            # A foreign name that was made to point here (DNS rebinding) learns nothing.
            respond(request, 421, stray_page("it is for another host or port"))
        elif request.command != "GET":
            respond(request, 405, stray_page("only GET is answered"), Allow="GET")
        elif path == CALLBACK_PATH:
            self._receive(request, query)
        elif path == self._page_path and self._page is not None:
            respond(request, 200, self._page)
            self._page_is_done()
        else:
            respond(request, 404, stray_page("nothing is at this address"))

    def _receive(self, request: Any, query: str) -> None:
        try:
            outcome: str | LoginDenied = parse_callback(query, state=self._state)
        except LoginDenied as denied:
            outcome = LoginDenied(*denied.args)  # without its traceback
        except ValueError as reason:
            respond(request, 400, stray_page(str(reason)))
            return
        with self._changed:
            if self._outcome is None:
                self._outcome = outcome
                self.arrived.set()
                self.on_arrival()
            self._pages_owed += 1
            self._unread.pop(request.connection, None)  # it waits for us now
            self._changed.wait_for(lambda: self._page or self._is_closed, LOGIN_TIMEOUT)
            self._unread[request.connection] = None
        try:
            if self._page is not None:
                respond(request, 303, "", Location=self._page_path)
        except OSError:  # it is gone
            self._page_is_done()

    def _page_is_done(self) -> None:
        with self._changed:
            self._pages_owed -= 1
            self._changed.notify_all()


def start_listener(state: str, port: int) -> tuple[AuthCodeListener | None, str]:
    """Return a listener that was entered, or None and why there is none."""
    try:
        return AuthCodeListener(state, port=port).__enter__(), ""
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
    what = f"port {port} cannot be used" if port else "no local port could be opened"
    return None, f"{what} ({reason})"


def python_program() -> str | None:
    """Return the Python that may be started as a child, None if there is none.

    A frozen program (PyInstaller, py2exe, cx_Freeze, Nuitka) and one that embeds Python
    (QGIS, PyOxidizer) would be started a second time.
    """
    import re

    name = os.path.basename(sys.executable or "").lower()
    is_compiled = getattr(sys, "frozen", False) or "__compiled__" in globals()
    is_python = re.fullmatch(r"(python|pypy)[\d.]*[a-z]?(\.exe)?", name)
    return sys.executable if is_python and not is_compiled else None


def find_browsers() -> list[str] | None:
    """Return the commands to open an address, [] for the desktop's own.

    None says that there is no browser, or none that the person would see.
    """
    import re

    named = list(filter(None, setting("BROWSER").split(os.pathsep)))
    if named:
        return [b for b in named if not re.search(TEXT_BROWSERS, b)] or None
    has_screen = any(map(setting, ("DISPLAY", "WAYLAND_DISPLAY")))
    # Over SSH it would open where nobody sits.
    is_remote = any(map(setting, ("SSH_CONNECTION", "SSH_CLIENT", "SSH_TTY")))
    is_desktop = sys.platform in ("darwin", "win32", "cygwin")
    is_wsl = bool(setting("WSL_DISTRO_NAME"))
    if has_screen or (not is_remote and (is_desktop or is_wsl)):
        return list(WSL_BROWSERS) if is_wsl else []
    return None


def open_in_browser(url: str, browsers: list[str]) -> bool:
    """Open an address; tell whether that has worked, as far as one can know.

    `webbrowser` starts browsers with our stdout, and waits for some: a child calls it.
    """
    import shlex

    if python := python_program():
        return _runs([python, "-I", "-S", "-c", OPEN_BROWSER_PROGRAM, url], browsers)
    openers = {"darwin": "open", "win32": WSL_BROWSERS[1]}
    for browser in browsers or [openers.get(sys.platform, "xdg-open")]:
        command = browser if "%s" in browser else browser.rstrip(" &") + " %s"
        command = command.replace("%s", url)
        if _runs(shlex.split(command) if os.name == "posix" else command, browsers):
            return True
    return False


def _runs(command: list[str] | str, browsers: list[str]) -> bool:
    """Run a command in silence, away from our terminal; tell whether it succeeds."""
    import subprocess

    environ = {**os.environ, "BROWSER": os.pathsep.join(browsers)}
    environ.pop("TERM", None)  # without it, webbrowser knows no text-mode browser
    for name in ("LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH", "LIBPATH"):
        # A frozen program's libraries are not for others.  Source: PyInstaller's
        # manual, "LD_LIBRARY_PATH / LIBPATH considerations".
        original = environ.pop(name + "_ORIG", "")
        if original or getattr(sys, "frozen", False):
            environ[name] = original
    try:
        return not subprocess.call(
            command,
            env=environ,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,  # neither Ctrl-C nor the terminal is for it
            creationflags=getattr(subprocess, "CREATE_NO_WINDOW", 0),
        )
    except OSError:
        return False


class _PastePrompt:
    """Asks for a paste on stdin: without Python's buffers, and only once it is there.

    So the lines after ours are the host program's.  What cannot be waited on (a Windows
    console, a notebook, a StringIO) is read by a daemon thread.  A read there cannot be
    called off: the one under way takes the program's next line.
    """

    def __init__(self, state: str, manual_uri: str, *, is_open: bool) -> None:
        import socket

        self.is_open = is_open
        self._state = state
        self._manual_uri = manual_uri
        self._wake_up, self._waker = socket.socketpair()
        self._descriptor: int | None = None  # None: a thread reads
        self._lines: list[bytes] = []  # from the thread
        self._is_terminal = self._is_shown = False
        self._held = b""  # of a paste that may go on
        self._is_silent = False  # nothing has come for a moment
        self._is_last = False  # nothing can follow what is held
        self._earlier = ""  # what was refused: a paste may come in two
        self._refusals = 0
        self._is_notebook = getattr(input, "__module__", "builtins") != "builtins"
        try:
            self._is_terminal = sys.stdin.isatty()
            if os.name == "posix" and not self._is_notebook:
                self._descriptor = sys.stdin.fileno()
        except (AttributeError, OSError, ValueError):  # no stdin, or an object
            pass
        self._request_line()

    def is_readable(self) -> bool:
        """Tell whether to wait for a paste: in the background a read would stop us."""
        if sys.platform == "win32" or self._descriptor is None or not self.is_open:
            return self.is_open
        try:
            return os.tcgetpgrp(self._descriptor) == os.getpgrp()
        except OSError:  # no terminal, or not ours, stops nobody
            return True

    def _request_line(self) -> None:
        """Have a thread read one line, where no descriptor can be waited on."""
        is_ours = self.is_open and self._descriptor is None
        if is_ours and not start_thread("paste", self._read_line):
            self._read_line()

    def _read_line(self) -> None:
        import builtins
        import contextlib

        line = ""
        with contextlib.suppress(Exception):  # no stdin, a closed one, no front end
            # Python's own input() in a daemon thread can abort the process at its end.
            line = builtins.input() if self._is_notebook else sys.stdin.readline()
            line = line.rstrip("\n") + "\n" if line or self._is_notebook else ""
        self._lines.append(line[-2 * MAX_PASTE_CHARS :].encode("utf-8", "replace"))
        self.wake()

    def wake(self) -> None:
        """End the wait: there is news."""
        try:
            self._waker.send(b"!")
        except OSError:  # the race is over
            pass

    def wait(self, seconds: float) -> None:
        """Wait for news, or that much silence; read what is pasted."""
        import selectors

        # epoll refuses files, macOS's poll terminals, and select descriptors over 1023.
        has_poll = sys.platform not in ("darwin", "win32")
        selector = getattr(selectors, "PollSelector" if has_poll else "SelectSelector")
        with selector() as waiting:
            waiting.register(self._wake_up, selectors.EVENT_READ)
            if self._descriptor is not None and self.is_readable():
                waiting.register(self._descriptor, selectors.EVENT_READ)
            ready = [key.fileobj for key, _ in waiting.select(seconds)]
        if self._wake_up in ready:
            self._wake_up.recv(4096)
        has_paste = self._descriptor in ready or bool(self._lines)
        # It may have been put into the background meanwhile.
        self._is_silent = not (has_paste and self.is_readable())
        if not self._is_silent:
            self._read()

    def _read(self) -> None:
        """Take what is there: a line of a terminal, a byte of a pipe, or the end."""
        chunk = b""
        try:
            if self._descriptor is None:
                chunk = self._lines.pop()
            else:
                size = MAX_TERMINAL_LINE + 1 if self._is_terminal else 1
                chunk = os.read(self._descriptor, size)
        except OSError:  # it was closed beneath the object, or the terminal is gone
            pass
        self._held += chunk
        self._is_last = not chunk or len(self._held) > 2 * MAX_PASTE_CHARS
        if not self._held:
            self._stop()

    def show(self, seconds_left: float) -> None:
        """Ask, unless that has been done."""
        if self._is_shown or not self.is_readable():
            return
        left = describe_seconds(seconds_left + 0.5)
        end = " " if self._is_terminal else "\n"
        say(f"Paste the code that the page shows here ({left} left):", end=end)
        self._is_shown = True

    def has_line(self) -> bool:
        """Tell whether a line is whole."""
        return self._held.endswith((b"\n", b"\r")) or self._is_last

    def take(self) -> GrantedCode | None:
        """Return the code in what was pasted, once it is known to be whole.

        With its state it is.  Anything else may go on, until a moment of silence.
        """
        if not self.is_open or not self.has_line():
            return None
        text = self._held.decode("utf-8", "replace")
        found = self._find_code(text)
        is_whole = self._is_silent or self._is_last
        if isinstance(found, str):
            if is_whole or self._descriptor is None or not self._is_terminal:
                self._refuse(text, found)
            return None
        behind = "".join((self._earlier + text).split()).partition(found.code)[2]
        if not is_whole and self._state not in behind:
            return None
        self._is_shown = False  # the person's Enter has ended the line
        return found

    def _find_code(self, text: str) -> GrantedCode | str:
        """Return the code, or why there is none."""
        longest = max(map(len, self._held.splitlines()))
        if self._is_terminal and longest >= MAX_TERMINAL_LINE:
            limit = f"A terminal takes {MAX_TERMINAL_LINE} characters a line, no more"
            return f"the terminal has cut it. {limit}"
        reason = ""
        uri = self._manual_uri
        for whole in (self._earlier + text, text):
            try:
                return parse_paste(whole, state=self._state, manual_redirect_uri=uri)
            except ValueError as refusal:
                reason = str(refusal)
        return reason

    def _refuse(self, text: str, reason: str) -> None:
        say(f"Not taken: {reason}. Copy the whole code that the page shows.")
        # A state that began here vouches that the next line belongs to it.  The two are
        # tried first: a state vouches for the second half of a code as well.
        self._earlier = text if "#" in text or "://" in text else ""
        self._held, self._is_shown = b"", False
        self._refusals += 1
        is_impatient = not self._is_terminal and self._refusals >= MAX_PIPED_REFUSALS
        if self._is_last or is_impatient:
            self._stop()
        self._request_line()

    def _stop(self) -> None:
        self.is_open = False
        self._end_line("\nNothing will be pasted, then. Ctrl-C gives up.")

    def _end_line(self, text: str = "") -> None:
        """Leave the line on which the person is asked."""
        if self._is_shown and self._is_terminal:
            say(text)
        self._is_shown = False

    def close(self) -> None:
        """Ask no more, and take no more news."""
        self._end_line()
        self._wake_up.close()
        self._waker.close()


class _Race:
    """One sign-in: the browser's callback against the paste, until the time is over."""

    def __init__(
        self, listener: AuthCodeListener | None, opener: Any, port: int, problem: str
    ) -> None:
        self._listener = listener
        self._opener = opener
        self._port = port if listener else 0
        self._problem = problem

    def run(self, prompt: _PastePrompt, seconds: float, *urls: str) -> GrantedCode:
        """Return the code that comes first.

        The first of the URLs comes back to the listener; it is "" if there is none.
        """
        self._prompt, self._deadline = prompt, Deadline(seconds)
        prompt.wait(PASTE_PAUSE)  # an empty stdin is known before anything is shown
        self._check_that_a_way_is_left()
        self._announce(*urls)
        if self._listener:
            self._listener.on_arrival = prompt.wake
        if self._opener and not start_thread("browser", self._open, urls[0] or urls[1]):
            self._opener = None
        while True:
            if granted := prompt.take():
                return granted
            if self._listener and self._listener.arrived.is_set():
                return GrantedCode(self._listener.wait(0), self._listener.redirect_uri)
            self._check_that_a_way_is_left()
            left = self._deadline.left()
            prompt.show(left)
            pause = PASTE_PAUSE if prompt.has_line() else FOREGROUND_INTERVAL
            prompt.wait(min(pause, left))

    def _announce(self, automatic_url: str, manual_url: str) -> None:
        has_paste = self._prompt.is_open
        if self._problem:
            say(f"{self._problem[0].upper()}{self._problem[1:]}: paste the code, then.")
        where = ", on any machine" if has_paste else " on this machine"
        say(f"To sign in, open this address in a browser{where}:")
        say(manual_url if has_paste else automatic_url)
        if self._port and has_paste:
            say("Where this machine's port is forwarded, this one needs no paste:")
            say(automatic_url)
        if self._port:
            say(f"  (forwarded by: ssh -L {self._port}:localhost:{self._port} HOST)")

    def _check_that_a_way_is_left(self) -> None:
        if self._deadline.passed():
            raise LoginTimeout(TOO_LATE)
        by_browser = self._listener and (self._port or self._opener)
        if not (self._prompt.is_open or by_browser):
            cause = self._problem or "no browser could be opened"
            raise LoginCancelled(
                f"{cause} and nothing can be pasted here; log in from a terminal, or "
                "give a port that your browser can reach"
            )

    def _open(self, url: str) -> None:
        """Open the browser, in a thread: it may fail, hang or never return."""
        is_open = False
        try:
            is_open = self._opener(url) if self._opener else False
        finally:
            if is_open is False:
                self._opener = None
                self._prompt.wake()


@hides_locals
def obtain_code(
    listener: AuthCodeListener | None,
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
        listener: One that was entered, or None; `problem` says why there is none.
        url_for: Returns the authorize URL for a redirect_uri.
        port: The one that was asked for, 0 if none: that alone counts as a way.

    Raises:
        LoginDenied: The server answered with an error.
        LoginTimeout: Nobody finished within `timeout` seconds.
        LoginCancelled: Neither a browser nor a paste can bring a code.
    """
    import functools

    opener = open_browser if callable(open_browser) else None
    browsers = find_browsers() if open_browser is True else None
    if browsers is not None:
        opener = functools.partial(open_in_browser, browsers=browsers)
    automatic_url = url_for(listener.redirect_uri) if listener else ""
    manual_url = url_for(manual_redirect_uri)
    prompt = _PastePrompt(state, manual_redirect_uri, is_open=paste)
    try:
        race = _Race(listener, opener, port, problem)
        return race.run(prompt, timeout, automatic_url, manual_url)
    finally:
        prompt.close()


def say(text: str, end: str = "\n") -> None:
    """Write a line for people to stderr, if the program has one that is open."""
    try:
        sys.stderr.write(text + end)
        sys.stderr.flush()
    except (AttributeError, OSError, ValueError):
        pass


# -- Refresh ---------------------------------------------------------------------------


def seconds_left(credentials: Credentials, now: float) -> float:
    """Return how long an access token is still valid; infinity if unknown."""
    expires_at = credentials.expires_at
    return float("inf") if expires_at is None else expires_at - now


def required(credentials: Credentials | None) -> Credentials:
    """Return the credential, or raise NotLoggedIn if there is none."""
    if credentials is None:
        raise NotLoggedIn
    return credentials


def _tokens(credentials: Credentials | None) -> object:
    return credentials and (credentials.access_token, credentials.refresh_token)


def console_key(credentials: Credentials) -> str | None:
    """Return the API key of a login at the Console, None on the Claude.ai path."""
    return None if credentials.is_claude_ai else credentials.api_key


def needs_key(credentials: Credentials) -> bool:
    """Tell whether the API needs a key for this login, and none is stored."""
    is_console = bool(credentials.scopes) and not credentials.is_claude_ai
    return is_console and not credentials.api_key


def safe_text(error: BaseException) -> str:
    """Return an error's text if this module wrote it: others may quote a secret."""
    return str(error) if isinstance(error, ClaudeOAuthError) else type(error).__name__


def _copy_of(error: _Error) -> _Error:
    """Return a copy of an error without its traceback, whose frames hold tokens."""
    return type(error)(*error.args)


class AccountFile:
    """account.json: the cached account, and notes about it that processes share.

    The notes, none of them a secret; one that is malformed counts as missing:

        wait_until  no refresh before this: the server asked for a pause, or failed
        failures    the number of such answers in a row
        lifetime    seconds that the last access token had when it was new
        refused     the fingerprint of a dead refresh token; counts to refused_until
        rejected    that of a new access token that the API answered 401 to
        account_of  those of the login that the cached account belongs to
        key_owner   that of the stored API key together with its organization

    A cache: a damaged file is left alone and counts as empty, and changes that cannot
    be written are kept in memory.  Hold the storage's lock to make changes.
    """

    _ACCOUNT: Final = "oauthAccount"
    _NOTES: Final = "claudeOauthMemory"

    def __init__(
        self, path: str | None, config: OAuthConfig, clock: Callable[[], float]
    ) -> None:
        self._path = path
        self._config = config
        self._clock = clock
        # What could not be written, and the file's content then: once that differs,
        # another process has written something newer.
        self._unwritten: tuple[object, dict[str, object]] = (None, {})

    def fingerprint(self, credentials: Credentials) -> str:
        """Return a hash that identifies a login without revealing its token."""
        return fingerprint(
            credentials.refresh_token or credentials.access_token,
            client_id=credentials.client_id or self._config.client_id,
            token_url=self._config.token_url,
        )

    def account(self, credentials: Credentials | None) -> dict[str, Any]:
        """Return the account that was cached for this login, empty if there is none."""
        owners = self.notes().get("account_of")
        # An account without an owner was written by an earlier version.
        if credentials and (not owners or self.fingerprint(credentials) in str(owners)):
            return _object(self._load().get(self._ACCOUNT))
        return {}

    def notes(self) -> dict[str, Any]:
        """Return the notes."""
        return _object(self._load().get(self._NOTES))

    def number(self, name: str) -> float:
        """Return a note that is a number."""
        return _number(self.notes().get(name)) or 0.0

    def update(
        self, account: Mapping[str, object], notes: Mapping[str, object]
    ) -> None:
        """Replace the account and the notes; write nothing if nothing changes."""
        kept = {name: value for name, value in notes.items() if value}
        own = {self._ACCOUNT: account, self._NOTES: kept}
        before, found = self._load(), self._read()
        record = {k: v for k, v in {**before, **own}.items() if v or k not in own}
        if record == before:
            return
        self._unwritten = (found, record)
        try:
            if self._path is not None and found is not None:
                write_private(self._path, dump_json(record).encode(), is_cache=True)
                self._unwritten = (None, {})
        except StorageError:
            pass

    def note(self, **changes: object) -> None:
        """Change single notes."""
        account = _object(self._load().get(self._ACCOUNT))
        self.update(account, {**self.notes(), **changes})

    def start(self, login: Credentials, account: Mapping[str, object]) -> None:
        """Replace the account and all notes, for a new login."""
        key_owner = key_owner_of(login.api_key, account)
        owners = [self.fingerprint(login)]
        self.update(account, {"account_of": owners, "key_owner": key_owner})

    def note_success(
        self, renewed: Credentials, before: Credentials, stored: Credentials | None
    ) -> None:
        """Note a successful refresh; the cached account stays with the login."""
        now = self._clock()
        settled = ("wait_until", "failures", "refused", "refused_until", "rejected")
        notes: dict[str, object] = dict.fromkeys(settled)
        if renewed.access_token != before.access_token:
            notes["lifetime"] = round(min(seconds_left(renewed, now), MAX_LIFETIME))
        if self.account(before):
            owners = [self.fingerprint(renewed), self.fingerprint(before)]
            notes["account_of"] = owners
        if stored and stored.refresh_token != renewed.refresh_token:
            # It is spent.  If the store still holds it, because the successor could not
            # be saved, or a backup brings it back, it must not be sent again.
            notes["refused"] = self.fingerprint(stored)
            notes["refused_until"] = now + MAX_LIFETIME
        self.note(**notes)

    def note_failure(
        self, failure: TokenRefused | Unavailable, sent: Credentials, scopes: object
    ) -> float | None:
        """Note a failure; return the seconds until a second request, None for none."""
        if isinstance(failure, Unavailable):
            pause = self._note_pause(failure)
            # While the token is alive it is served, and nobody has to wait at all.
            is_expired = seconds_left(sent, self._clock()) <= 0
            return pause if is_expired and 0 < pause <= SHORT_WAIT else None
        if failure.code == "invalid_scope" and scopes:
            return 0.0
        is_dead = failure.code == "invalid_grant"
        # Probably dead; but a gateway may have said so, which must not end a login.
        may_be_dead = failure.status in (401, 404) and failure.code != "invalid_client"
        if is_dead or may_be_dead:
            until = self._clock() + (MAX_LIFETIME if is_dead else WAIT_CEILING)
            self.note(refused=self.fingerprint(sent), refused_until=until)
        return None  # other refusals are about the account or the settings

    def _note_pause(self, error: Unavailable) -> float:
        """Note a pause after a 429 or 5xx, for every process; return its seconds."""
        import random

        status = error.status or 0
        if status != 429 and status < 500:
            return 0.0
        failures = int(self.number("failures")) + 1
        chance = random.random()  # noqa: S311 - it spreads load, and is no secret
        wait = error.retry_after
        pause = seconds_to_wait(status, wait, failures=failures, chance=chance)
        self.note(wait_until=self._clock() + pause, failures=failures)
        return pause

    def pause_left(self) -> float:
        """Return the seconds of a noted pause that are left, 0 if there is none."""
        left = self.number("wait_until") - self._clock()
        # A longer one was noted before the clock was set back.
        return left if 0 < left <= WAIT_CEILING else 0.0

    def is_refused(self, credentials: Credentials) -> bool:
        """Tell whether the server is known to refuse this refresh token."""
        is_known = self._clock() < self.number("refused_until")
        return is_known and self.notes().get("refused") == self.fingerprint(credentials)

    def raise_known_failure(self, credentials: Credentials) -> None:
        """Raise the error of a request that is known to fail, without sending it."""
        if self.is_refused(credentials):
            raise TokenRefused("invalid_grant", "refused before, and not sent again")
        pause = self.pause_left()
        if pause:
            span = describe_seconds(pause)
            text = f"requests to the server are paused for {span}; try again then"
            raise Unavailable(text, pause)

    def clear(self) -> None:
        """Remove this module's own keys, and the file if nothing else is in it."""
        self.update({}, {})
        if self._path is not None and self._read() == {}:
            try:
                os.unlink(os.path.realpath(self._path))
            except OSError:
                pass

    def _load(self) -> dict[str, object]:
        found, (over, unwritten) = self._read(), self._unwritten
        return unwritten if found == over else found or {}

    def _read(self) -> dict[str, object] | None:
        """Return the file's content, None if it must not be replaced."""
        if self._path is None:
            return {}
        try:
            data = read_private(self._path)
        except StorageError:
            return None
        return {} if data is None else parse_json_object(data)


def key_owner_of(api_key: str | None, account: Mapping[str, object]) -> str:
    """Return a fingerprint of a key with its organization, "" if one is unknown."""
    owner = _text(account.get("organizationUuid"))
    if not api_key or not owner:
        return ""
    return fingerprint(api_key, client_id=owner, token_url="")


class PendingSave(_Value):
    """A login that could not be saved: this process saves it as soon as it can.

    Once the store's content is not *instead_of* any more, the store counts.  *account*
    is that of a new login; None where the login was only refreshed.
    """

    credentials: Credentials
    instead_of: Credentials | None
    account: Mapping[str, object] | None = None


class ServedToken:
    """An access token that is handed out for a moment without reading the store."""

    def __init__(self, credentials: Credentials, now: float) -> None:
        key, expires_at = console_key(credentials), credentials.expires_at
        self.token = credentials.access_token
        self.expires_at = float("inf") if expires_at is None else expires_at
        # CLAUDE_OAUTH_TOKEN may hold a key as well.
        key = key or (self.token if self.token.startswith("sk-ant-api") else None)
        bearer = {"Authorization": f"Bearer {self.token}", "anthropic-beta": OAUTH_BETA}
        self.headers = {"x-api-key": key} if key else bearer
        self.headers_expire_at = float("inf") if key else self.expires_at
        if needs_key(credentials):
            self.headers_expire_at = 0.0  # the token is no API credential
        # Two clocks: one can be set, and the other stands still while a machine sleeps.
        self.since = now
        self.until = now + LOOK_INTERVAL
        self.look_again = time.monotonic() + LOOK_INTERVAL


_NOTHING_SERVED: Final = ServedToken(Credentials(""), float("inf"))
"""Never valid, so that every call looks at the store."""


class StoreView:
    """The storage as this process sees it: the last read, and a pending save.

    Hold the storage's lock for `read`, `save` and `remember`, unless it is read-only.
    """

    def __init__(self, storage: Storage, account_file: AccountFile) -> None:
        self.storage = storage
        self.is_read_only = bool(getattr(storage, "read_only", False))
        self.pending: PendingSave | None = None
        self.account_file = account_file
        self._pid = os.getpid()
        # Replaced whole, never changed, so reading them needs no lock.
        self._last: tuple[object, Credentials | None] = (None, None)
        self._failure: ClaudeOAuthError | None = None
        self._failed_until = Deadline(0)
        self.served = _NOTHING_SERVED

    def look(self) -> Credentials | None:
        """Return the login in force; read the store only if it may have changed.

        While the store fails, what was read before is served, with one warning: a
        failure never means "not logged in".

        Raises:
            StorageError: The store fails, and nothing was read before.
        """
        if self._pid != os.getpid():
            # Forked: the parent saves what is pending, and refreshes it as well.
            self._pid, self.pending = os.getpid(), None
            self.remember(None)
        if self.pending:
            self._save_again()
        pending, before = self.pending, self._last
        stamp = self.storage.stamp()
        if stamp is None or stamp != before[0]:
            found = self._load(before[1])
            if self._last is before:  # else another thread knows something newer
                self._last = (None if self._failure else stamp, found)
                self.served = _NOTHING_SERVED
        else:
            found = before[1]
        if pending and _tokens(found) == _tokens(pending.instead_of):
            return pending.credentials
        return found

    def read(self) -> tuple[Credentials | None, Credentials | None]:
        """Return what the store holds now, and the login in force.  Needs the lock."""
        stored = self.storage.load()
        if self.pending and _tokens(stored) != _tokens(self.pending.instead_of):
            self.pending = None  # somebody has logged in or out since
        return stored, self.pending.credentials if self.pending else stored

    def save(
        self,
        credentials: Credentials,
        stored: Credentials | None,
        account: Mapping[str, object] | None = None,
    ) -> ClaudeOAuthError | None:
        """Save a login in place of *stored*; return the error if that fails.

        After an error it is served from memory, and every look tries to save it again.
        """
        if account is None and self.pending:
            account = self.pending.account
        pending: PendingSave | None = PendingSave(credentials, stored, account)
        error: ClaudeOAuthError | None = None
        try:
            self.storage.save(credentials)
            pending = None
        except (ClaudeOAuthError, OSError) as problem:
            error = StorageError(f"the storage fails ({type(problem).__name__})")
            error = problem if isinstance(problem, ClaudeOAuthError) else error
        finally:  # whatever else a store raises: the token before it is spent
            self.pending = pending
            self.remember(credentials)
        if account is not None and not error:
            self.account_file.start(credentials, account)
        return error

    def remember(self, credentials: Credentials | None) -> None:
        """Use this as the store's content until the next look."""
        self._last = (None, credentials)
        self.served = _NOTHING_SERVED

    def serve(self, credentials: Credentials, now: float) -> ServedToken:
        """Return a login to hand out, now and for LOOK_INTERVAL."""
        served = self.served = ServedToken(credentials, now)
        # Not kept if another thread has refreshed since the look (checked last, or it
        # could do so in between), nor while a save is pending.
        if credentials is not self._last[1] or self.pending:
            self.served = _NOTHING_SERVED
        return served

    def _load(self, known: Credentials | None) -> Credentials | None:
        """Read the store; while that fails, return what is known.

        After a slow failure it is not read for a while: it may have shown a dialog.
        """
        began = time.monotonic()
        try:
            if self._failure and not self._failed_until.passed():
                raise _copy_of(self._failure)
            found = self.storage.load()
            self._failure = None
            return found
        except (StorageError, ConfigError) as error:
            took = time.monotonic() - began
            if took > SLOW_FAILURE:
                self._failed_until = Deadline(5 * took)
            if known and not self._failure:
                warn(f"{error} (going on with what was read before)")
            self._failure = _copy_of(error)
            if known is None:
                raise
            return known

    def _save_again(self) -> None:
        try:
            with self.storage.lock(0):
                stored, newest = self.read()
                if self.pending and newest:
                    self.save(newest, stored)
        except (StorageError, Unavailable):
            pass  # there was a warning already; the next call tries again


def with_signals_deferred(function: Callable[..., _T], *arguments: object) -> _T:
    """Call a function to its end, although a signal tells the program to end.

    In the main thread signals come afterwards, except SIGQUIT, as a way out.  Another
    thread gets none, but the program may end: then its exit waits.  SIGKILL, and a
    SIGTERM while this runs in another thread, cannot be deferred.
    """
    import atexit
    import signal
    import threading

    came: list[int] = []
    previous: dict[int, Any] = {}
    done, pid = threading.Event(), os.getpid()

    def hold(number: int, _frame: FrameType | None) -> None:
        if number not in came:
            came.append(number)

    def wait() -> None:
        if os.getpid() == pid:  # a forked child has not got this thread
            done.wait(LOCK_TIMEOUT)

    def deliver() -> None:
        if came:
            try:
                signal.raise_signal(came.pop(0))
            finally:  # even if the first one raises
                deliver()

    try:
        if threading.current_thread() is threading.main_thread():
            _hold_signals(hold, previous)
        else:
            atexit.register(wait)
        return function(*arguments)
    finally:
        done.set()
        atexit.unregister(wait)
        for number in reversed(previous):
            if signal.getsignal(number) is hold:
                signal.signal(number, previous[number])
        deliver()


def _hold_signals(handler: Callable[..., None], previous: dict[int, Any]) -> None:
    """Set a handler for the signals that end programs; note each previous one."""
    import signal

    # SIGINT first: what is restored last cannot interrupt the others.
    for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGALRM", "SIGBREAK"):
        number = getattr(signal, name, signal.SIGINT)
        found = signal.getsignal(number)
        # None is a handler that is not Python's; an ignored signal stays ignored.
        if found in (None, signal.SIG_IGN, handler):
            continue
        previous[number] = found  # first: the next line may be interrupted
        try:
            signal.signal(number, handler)
        except ValueError:
            pass  # a sub-interpreter, where no signal arrives


class Refresher:
    """Gets a new access token; nothing else spends a refresh token.

    1. Look: a token that is good for long enough costs nothing (`is_due`).
    2. Lock out the other threads and the other processes.
    3. Look again: somebody may have refreshed meanwhile, and their token will do.
    4. Check that the new login can be written, before anything is spent.
    5. Spend the refresh token, with signals deferred.
    6. Save the new login; it is on the disk before anybody gets it.
    7. Note the result for the other processes, and unlock.

    A crash before 5 loses nothing.  Between 5 and 6 the login can be lost, by a power
    failure or a signal that cannot be deferred.
    """

    def __init__(
        self, client: OAuthClient, view: StoreView, clock: Callable[[], float]
    ) -> None:
        self._client = client
        self._view = view
        self._account_file = view.account_file
        self._clock = clock
        # The last failed refresh and when it failed, for the threads that waited.
        self._failed: tuple[float, ClaudeOAuthError | None] = (0.0, None)
        self._not_before = 0.0

    def is_due(self, credentials: Credentials, min_validity: float) -> bool:
        """Tell whether a refresh should be tried now."""
        left = seconds_left(credentials, self._clock())
        if left <= 0 or not credentials.refresh_token:
            return left <= 0
        put_off = self._not_before - self._clock()
        # A longer one dates from before the clock was set back.
        return left <= min_validity and not 0 < put_off <= PUT_OFF

    def refresh(
        self, present: Credentials, min_validity: float, other_than: str | None = None
    ) -> tuple[Credentials, bool]:
        """Return a valid login, and whether this call has refreshed it.

        While the present token is valid, it is returned rather than wait or fail.

        Args:
            other_than: An access token to replace, however long it is valid.
        """
        is_alive = other_than is None and seconds_left(present, self._clock()) > 0
        limit = max(LOCK_TIMEOUT, 3 * self._client.config.timeout)
        began = time.monotonic()
        try:
            if self._view.is_read_only:
                return self._read_foreign(other_than), False
            with self._view.storage.lock(0.0 if is_alive else limit):
                return self._refresh_locked(began, min_validity, other_than)
        except ClaudeOAuthError as error:
            if not is_alive or isinstance(error, NotLoggedIn):
                raise
            self._not_before = self._clock() + PUT_OFF
            if not isinstance(error, (Unavailable, BadAnswer)):
                warn(f"{error} (the present token is used until it expires)")
            return present, False

    def _read_foreign(self, other_than: str | None) -> Credentials:
        """Return the login that another program refreshes; never refresh it here."""
        newest = required(self._view.storage.load())
        self._view.remember(newest)
        if self._suffices(newest, 0, other_than):
            return newest
        raise Unavailable(
            f"the token in {self._view.storage.describe()} has to be refreshed by the"
            " program that owns it; run that program, then try again"
        )

    def _refresh_locked(
        self, began: float, min_validity: float, other_than: str | None
    ) -> tuple[Credentials, bool]:
        """Go through the steps from 3 on, unless a refresh failed while this waited."""
        when, failure = self._failed
        if failure and when > began:
            raise _copy_of(failure)  # or each thread would wait for the network
        self._failed = (0.0, None)
        try:
            return self._refresh_if_needed(min_validity, other_than)
        except ClaudeOAuthError as error:
            self._failed = (time.monotonic(), _copy_of(error))
            raise

    def _refresh_if_needed(
        self, min_validity: float, other_than: str | None
    ) -> tuple[Credentials, bool]:
        """Look again, check, spend, save, note; two requests at most."""
        scopes: tuple[str, ...] = ()
        for is_last in (False, True):
            stored, found = self._view.read()
            newest = required(found)
            if self._suffices(newest, min_validity, other_than):
                self._view.remember(newest)
                return newest, False
            if not is_last:
                self._account_file.raise_known_failure(newest)
                scopes = scopes_to_refresh(newest.scopes, self._client.config.scopes)
            self._view.storage.check()
            try:
                renewed = with_signals_deferred(self._spend, newest, stored, scopes)
                return renewed, True
            except (TokenRefused, Unavailable) as error:
                pause = self._account_file.note_failure(error, newest, scopes)
                found = self._view.read()[1]
                is_other = found and found.refresh_token != newest.refresh_token
                # Another program may have refreshed meanwhile.
                if is_last or (pause is None and not is_other):
                    raise
            time.sleep(pause or 0)
            scopes = ()  # the server keeps those granted
        raise AssertionError("the last round returns or raises")

    def _suffices(
        self, newest: Credentials, min_validity: float, other_than: str | None
    ) -> bool:
        left = seconds_left(newest, self._clock())
        if newest.access_token == other_than:
            return False
        lifetime = self._account_file.number("lifetime")
        if 0 < lifetime <= min_validity:
            return left > lifetime / 2  # a new one would not live long enough either
        return left > min_validity

    def _spend(
        self, newest: Credentials, stored: Credentials | None, scopes: Iterable[str]
    ) -> Credentials:
        """Spend the refresh token; keep a successor even beside a bad access token."""
        answer = self._client.request_refresh(newest, scopes)
        now, problem = self._clock(), None
        try:
            renewed = Credentials.from_answer(answer, received_at=now, previous=newest)
        except BadAnswer as defect:
            successor = _text(answer.get("refresh_token"))
            if not successor:
                raise
            renewed, problem = newest.replace(refresh_token=successor), defect
        renewed = renewed.replace(client_id=self._client.client_id_for(newest))
        error = self._view.save(renewed, stored)
        self._account_file.note_success(renewed, newest, stored)
        if error:
            warn(
                f"the refreshed login could not be saved ({safe_text(error)});"
                " it is kept in memory and saved as soon as that works"
            )
        if problem:
            raise problem
        return renewed


# -- Service ---------------------------------------------------------------------------


class OAuthService:
    """A login that lasts: it signs in, hands out tokens and refreshes them in time.

    Safe to share between threads; any number of processes may use one storage.

    Args:
        config: Default: from the environment.
        storage: Default: the platform's store, see ``default_storage``.
        session: A ``requests.Session`` for this service's own requests.
        account_file: Where the account is cached, and the pauses that processes share.
            Default: what the storage says (``account_file``); in memory if it says
            nothing.
        flush_telemetry: Called at logout, before anything is deleted, with the seconds
            that it may take.
        clock: Seconds since the epoch.
    """

    @hides_locals
    def __init__(
        self,
        config: OAuthConfig | None = None,
        storage: Storage | None = None,
        *,
        session: requests.Session | None = None,
        account_file: str | os.PathLike[str] | None = None,
        flush_telemetry: Callable[[float], object] | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.config = OAuthConfig.from_env() if config is None else config
        self.storage: Storage = default_storage() if storage is None else storage
        self._session = session
        self._flush_telemetry = flush_telemetry
        self._clock = clock
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

        While a refresh is under way, or fails for a reason that may pass, a token that
        is still alive is handed out; after its expiry all wait for the one refresh.

        Args:
            min_validity: Seconds that the token should live on at least.

        Raises:
            NotLoggedIn: There is no credential; log in.
            TokenRefused: The refresh token is dead and the token has expired; log in.
            Unavailable: The token has expired and the server cannot be asked now.
            StorageError: The storage cannot be read, or a refreshed token not be kept.
        """
        # Programs call this before every request: no lock, no system call, no copy.
        served, now = self._view.served, self._clock()
        if (
            served.since <= now < served.until
            and served.expires_at - now > min_validity
            and time.monotonic() < served.look_again
        ):
            return served.token
        del served  # an error's traceback shows the variables of this frame
        return self._serve(min_validity).token

    def auth_headers(self) -> dict[str, str]:
        """Return the headers that sign a request to the API in.

        A Bearer token with the API's OAuth beta header, or ``x-api-key`` on the Console
        path, where a key is made if none is stored.  Raises what ``access_token`` and
        ``create_api_key`` raise.
        """
        served, now = self._view.served, self._clock()
        if (
            served.since <= now < served.until
            and served.headers_expire_at - now > REFRESH_BUFFER
            and time.monotonic() < served.look_again
        ):
            return served.headers.copy()
        del served
        return self._serve(REFRESH_BUFFER, for_api=True).headers.copy()

    @hides_locals
    def api_token(self, *, min_validity: float = REFRESH_BUFFER) -> str:
        """Return what the API takes: an access token, or the Console path's API key.

        Raises what ``access_token`` and ``create_api_key`` raise.
        """
        headers = self._serve(min_validity, for_api=True).headers
        return headers.get("x-api-key") or headers["Authorization"][len("Bearer ") :]

    @hides_locals
    def refresh(self, *, rejected: str | None = None) -> Credentials:
        """Get another access token now, and return the new credential.

        Args:
            rejected: The access token that a server has just answered 401 to.  Then a
                newer one that the storage has already will do.

        Raises:
            ConfigError: CLAUDE_OAUTH_TOKEN is in force, and cannot be refreshed.
            TokenRefused: The refresh token is dead; or *rejected* was new when the API
                answered 401 to it, so that a refresh would not help.
            ClaudeOAuthError: What ``access_token`` raises.
        """
        if environment_token():
            raise ConfigError(
                "CLAUDE_OAUTH_TOKEN is in force and cannot be refreshed; unset it"
            )
        present = required(self._view.look())
        if rejected is not None and self.is_rejected(rejected):
            raise TokenRefused("invalid_token", "the API refuses new tokens too", 401)
        other_than = present.access_token if rejected is None else rejected
        return self._refresh(present, 0, other_than)

    @hides_locals
    def _serve(self, min_validity: float, *, for_api: bool = False) -> ServedToken:
        """Return a token to hand out, refreshed if due; *for_api*, a key will do."""
        token = environment_token()
        if token:
            return ServedToken(Credentials(token), self._clock())
        credentials = required(self._view.look())
        # A key does not expire: the API needs no fresh token beside it.
        has_key = for_api and console_key(credentials) is not None
        if not has_key and self._refresher.is_due(credentials, min_validity):
            credentials = self._refresh(credentials, min_validity)
        if for_api and not has_key and needs_key(credentials):
            credentials = self._with_token(
                lambda _token: self._make_key(only_if_missing=True)
            )[0]
        return self._view.serve(credentials, self._clock())

    def _refresh(
        self, present: Credentials, min_validity: float, other_than: str | None = None
    ) -> Credentials:
        credentials, is_new = self._refresher.refresh(present, min_validity, other_than)
        # The token is on the disk: nobody has to wait for the profile.
        return self._complete_account(credentials) if is_new else credentials

    @hides_locals
    def is_rejected(self, token: str) -> bool:
        """Tell whether the API refused an access token when it was new."""
        return self._account_file.notes().get("rejected") == _rejected(token)

    @hides_locals
    def note_rejected(self, token: str) -> None:
        """Note that the API answers 401 to a new token: a refresh would not help."""
        try:
            with self.storage.lock(SHORT_WAIT):
                self._account_file.note(rejected=_rejected(token))
        except (StorageError, Unavailable):
            pass  # the next 401 notes it

    def _with_token(self, ask: Callable[[str], _T]) -> tuple[_T, str]:
        """Call with an access token; after a 401, once more with a new one."""
        token = self.access_token()
        for is_last in (False, True):
            try:
                return ask(token), token
            except (TokenRefused, Unavailable) as error:
                if error.status != 401 or environment_token():
                    raise
                if is_last:
                    self.note_rejected(token)
                    raise
            token = self.refresh(rejected=token).access_token
        raise AssertionError("the last round returns or raises")

    # The account

    @hides_locals
    def credentials(self) -> Credentials | None:
        """Return the credential in force, or None; no network is used.

        CLAUDE_OAUTH_TOKEN outranks the storage.

        Raises:
            StorageError: It cannot be read, and nothing was read before.
            ConfigError: CLAUDE_OAUTH_TOKEN is not a token.
        """
        token = environment_token()
        return Credentials(token) if token else self._view.look()

    @hides_locals
    def profile(self, *, force: bool = False) -> Profile:
        """Return the account's profile, from the cache unless forced to ask.

        Raises:
            TokenRefused: The token may not ask (403: it lacks user:profile).
            And what ``access_token`` raises.
        """
        credentials = required(self.credentials())
        if environment_token():
            return self._with_token(self._client.fetch_profile)[0]
        account = self._account_file.account(credentials)
        cached = Profile.from_record(account, credentials)
        if cached and not force:
            return cached
        profile, token = self._with_token(self._client.fetch_profile)
        try:
            self._keep_profile(profile, token)
        except (StorageError, Unavailable) as error:
            warn(f"the profile could not be kept: {error}")
        return profile

    def _complete_account(self, renewed: Credentials) -> Credentials:
        """Ask for the profile if some of it is missing; a failure changes nothing."""
        account = self._account_file.account(renewed)
        plan = (renewed.subscription_type, renewed.rate_limit_tier)
        is_complete = all(plan) and all(map(account.get, _ACCOUNT_NEEDS))
        may_ask = not renewed.scopes or SCOPE_USER_PROFILE in renewed.scopes
        if is_complete or not may_ask or self._view.pending:
            return renewed
        profile = self._try_profile(renewed.access_token)
        try:
            completed = profile and self._keep_profile(profile, renewed.access_token)
            return completed or renewed
        except ClaudeOAuthError:
            return renewed

    def _try_profile(self, access_token: str) -> Profile | None:
        """Return the profile; None if it cannot be had, or takes too long."""
        fetch = self._client.fetch_profile
        try:
            return call_with_limit(lambda: fetch(access_token), self.config.timeout)
        except (ClaudeOAuthError, TimeoutError):
            return None  # a narrow token may not ask, and is none the worse for it

    def _keep_profile(self, profile: Profile, token: str) -> Credentials | None:
        """Store the profile of an access token, if the store still holds that token."""
        import contextlib

        is_ours = not self._view.is_read_only
        with self.storage.lock(SHORT_WAIT) if is_ours else contextlib.nullcontext():
            stored, newest = self._view.read()
            if newest is None or newest.access_token != token:
                return None  # somebody refreshed, or logged out or in, meanwhile
            file, account = self._account_file, self._account_file.account(newest)
            if account.get("accountUuid") not in (None, profile.account_uuid):
                account = {}
            news = {k: v for k, v in profile.to_record().items() if v is not None}
            owners = [file.fingerprint(newest)]
            file.update({**account, **news}, {**file.notes(), "account_of": owners})
            completed = _with_plan(newest, profile)
            if is_ours and completed != newest:
                error = self._view.save(completed, stored)
                if error:
                    raise error
            return completed

    # The Console path

    @hides_locals
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
        return self._with_token(lambda _token: self._make_key())[0].api_key or ""

    def _make_key(self, *, only_if_missing: bool = False) -> Credentials:
        """Make an API key, and store it and whose it is."""
        file = self._account_file
        with self.storage.lock(LOCK_TIMEOUT):
            stored, found = self._view.read()
            newest = required(found)
            if only_if_missing and not needs_key(newest):
                self._view.remember(newest)
                return newest
            self.storage.check()  # a permanent key must not be made to be lost
            key = self._client.create_api_key(newest.access_token)
            with_key = newest.replace(api_key=key)
            error = self._view.save(with_key, stored)
            if error:
                warn(f"the new API key is kept in memory: {safe_text(error)}")
            file.note(key_owner=key_owner_of(key, file.account(newest)))
            return with_key

    # Login and logout

    @hides_locals
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
        verifier, state = generate_code_verifier(), generate_state()

        def url_for(redirect_uri: str) -> str:
            return self._client.authorize_url(
                redirect_uri=redirect_uri,
                challenge=code_challenge(verifier),
                state=state,
                console=console,
                extra={"login_hint": email} if email else None,
            )

        page = failure_page("the login did not come to its end; try again")
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
            if listener:
                listener.finish(page)

    def _check_before_login(self) -> None:
        """Raise the errors that would make a sign-in useless."""
        self._client.check()
        environment_token()  # a malformed one would fail what comes after the login
        with self.storage.lock(LOCK_TIMEOUT):
            self.storage.check()
            self.storage.load()

    def _exchange(
        self, granted: GrantedCode, verifier: str, state: str
    ) -> tuple[Credentials, Mapping[str, object]]:
        """Turn a code into a stored credential; return it with its account."""
        with self.storage.lock(LOCK_TIMEOUT):
            self.storage.check()
            stored = self.storage.load()  # before the code is spent: this may fail
            credentials = self._client.exchange_code(
                granted.code,
                verifier=verifier,
                redirect_uri=granted.redirect_uri,
                state=state,
            )
            profile = self._try_profile(credentials.access_token)
            account = profile.to_record() if profile else {}
            credentials = _with_plan(credentials, profile)
            credentials = self._with_key(credentials, stored, account)
            error = self._view.save(credentials, stored, account)
            if error:
                raise error
        return credentials, account

    def _with_key(
        self,
        credentials: Credentials,
        stored: Credentials | None,
        account: Mapping[str, object],
    ) -> Credentials:
        """Add the organization's API key: the stored one, or else a new one."""
        key = stored.api_key if stored else None
        owner = key_owner_of(key, account)
        if not owner or owner != self._account_file.notes().get("key_owner"):
            key = None
        try:
            if not key and not credentials.is_claude_ai:
                key = self._client.create_api_key(credentials.access_token)
        except ClaudeOAuthError as error:
            warn(f"the login works, but no API key could be made: {error}")
        return credentials.replace(api_key=key)

    @hides_locals
    def logout(self) -> bool:
        """End the login here; return whether there was one.

        Telemetry is flushed first, while events still belong to somebody; then the
        grant is revoked if a revoke_url is set; then this module's own keys are
        deleted, and nothing else.

        Raises:
            StorageError: The credential could not be deleted.
        """
        flush = self._flush_telemetry
        try:
            has_login = self._view.look() is not None
        except StorageError:
            has_login = True  # there may be one
        if flush and has_login:
            _try_within_limit("the telemetry flush", lambda: flush(FLUSH_TIMEOUT))
        # Under the lock, or a refresh under way would bring the record back.
        with self.storage.lock(LOCK_TIMEOUT):
            try:
                self._revoke(self._view.read()[1])
            except StorageError as error:
                warn(f"nothing is revoked: {error}")
            found = self.storage.delete()
            if found:  # else the account may belong to another store's login
                self._account_file.clear()
            self._view.pending = None
            self._view.remember(None)
        return found

    def _revoke(self, login: Credentials | None) -> None:
        token = login and login.refresh_token
        if login and token and self.config.revoke_url:
            client_id = login.client_id or self.config.client_id
            config = self.config.replace(client_id=client_id, timeout=FLUSH_TIMEOUT)
            client = OAuthClient(config, session=self._session)
            _try_within_limit("the revocation", lambda: client.revoke(token))

    # Status

    @hides_locals
    def status(self) -> dict[str, object]:
        """Return what `status --json` prints; no network, never a token.

        Raises:
            StorageError: The storage cannot be read.
            ConfigError: CLAUDE_OAUTH_TOKEN is not a token.
        """
        source, method, stored = "none", None, None
        is_usable, warnings = False, []
        if environment_token():
            source, is_usable, warnings = "environment", True, self._hidden_login()
        else:
            stored = self._view.look()
        if stored:
            source, (is_usable, warnings) = "store", self._condition(stored)
            method = "claude.ai" if stored.is_claude_ai else "console"
        account = self._account_file.account(stored)
        # An empty credential stands for none: what it lacks is null in the answer.
        shown = stored or Credentials("none")
        expires_in = seconds_left(shown, self._clock())
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
            "client_id": shown.client_id or self.config.client_id or None,
            "warnings": warnings,
        }

    def _hidden_login(self) -> list[str]:
        """Return the warnings about CLAUDE_OAUTH_TOKEN and the login that it hides."""
        hides = f", and hides the login in {self.storage.describe()}"
        warning = "CLAUDE_OAUTH_TOKEN is in force"
        try:
            return [warning + hides if self._view.look() else warning]
        except StorageError as error:
            return [warning, str(error)]

    def _condition(self, stored: Credentials) -> tuple[bool, list[str]]:
        """Return whether a token can be had, and what a person should know."""
        now, file = self._clock(), self._account_file
        is_expired = seconds_left(stored, now) <= 0
        ends_at = stored.refresh_token_expires_at
        left = float("inf") if ends_at is None else ends_at - now
        pause, ends = describe_seconds(file.pause_left()), describe_seconds(left)
        hints = {
            "the login is in memory alone: it could not be saved": self._view.pending,
            f"requests to the server are paused for another {pause}": file.pause_left(),
            f"the login ends in {ends}, whatever is refreshed: log in again": (
                0 < left < LOGIN_END_WARNING
            ),
        }
        # For these the token cannot be refreshed.
        faults = {
            "the server refused to refresh the login: log in again": (
                file.is_refused(stored)
            ),
            "the login itself is over: log in again": left <= 0,
            "the token has expired: run the program that owns it": (
                is_expired and self._view.is_read_only
            ),
            "the token has expired, with none to refresh it: log in": (
                is_expired and not stored.refresh_token
            ),
        }
        warnings = [text for text, holds in {**hints, **faults}.items() if holds]
        return not (is_expired and any(faults.values())), warnings


_ACCOUNT_NEEDS: Final = ("billingType", "accountCreatedAt", "subscriptionCreatedAt")
"""Keys of account.json; if one is missing, a refresh fetches the profile."""

SIGNS_IN: Final = (
    "CLAUDE_OAUTH_TOKEN",
    "CLAUDE_CODE_OAUTH_TOKEN",
    "ANTHROPIC_AUTH_TOKEN",
    "ANTHROPIC_API_KEY",
)
"""Environment variables that still sign programs in after a logout here."""


def environment_token() -> str | None:
    """Return the token that CLAUDE_OAUTH_TOKEN holds, None if it is unset or blank.

    Raises:
        ConfigError: Its value is not a token.
    """
    value = setting("CLAUDE_OAUTH_TOKEN")
    return clean_token(value) if value else None


def _rejected(token: str) -> str:
    return fingerprint(token, client_id="", token_url="")


def _with_plan(credentials: Credentials, profile: Profile | None) -> Credentials:
    if not profile or not profile.organization_uuid:
        return credentials  # nothing is known of a plan
    return credentials.replace(
        subscription_type=profile.subscription_type,
        rate_limit_tier=profile.rate_limit_tier,
    )


def _try_within_limit(name: str, call: Callable[[], object]) -> None:
    """Call for FLUSH_TIMEOUT at most, and go on whatever it raises."""
    try:
        call_with_limit(call, FLUSH_TIMEOUT)
    except BaseException as error:  # somebody else's code, SystemExit included
        problem = safe_text(error)
        if isinstance(error, TimeoutError):
            problem = f"no end after {FLUSH_TIMEOUT:g} s"
        warn(f"logging out goes on without {name} ({problem})")


class BearerAuth:
    """Adds the credential to requests: an auth object for `requests`, and for httpx.

    After a 401 the token is refreshed once and the request repeated once, body and all
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
        import re
        from urllib.parse import urlsplit

        self._service = service
        names = [hosts] if isinstance(hosts, str) else [*hosts]
        names = [str(name).lower() for name in names]
        host = r"[a-z0-9_-]+(\.[a-z0-9_-]+)*|[0-9a-f:]*::[0-9a-f:]*"
        for name in names:
            if not re.fullmatch(host, name):
                raise ConfigError(
                    f"{printable(name)!r} is not a host name: give hosts= names alone,"
                    " without scheme, port or path"
                )
        self._hosts = {*names, urlsplit(service.config.profile_url).hostname}
        # A crawler asks about many origins; each is decided on once.
        self._is_ours = functools.lru_cache(maxsize=100)(self._decide)

    def __call__(self, request: Any) -> Any:
        """Sign a request of `requests` or httpx, and return it."""
        if self._may_sign(str(request.url)):
            self._sign(request)
            hooks = getattr(request, "hooks", None)  # httpx has none
            if hooks is not None:
                position = _position(request.body)
                hooks["response"].append(
                    lambda answer, **options: self.repeat(answer, position, options)
                )
        return request

    def auth_flow(self, request: Any) -> Iterator[Any]:
        """Sign, send, and repeat once after a 401: what ``httpx.Auth`` asks for."""
        is_ours = self._may_sign(str(request.url))
        if is_ours:
            self._sign(request)
        response: Any = yield request
        # A redirect may have led to a stranger, whose answer says nothing of a token.
        is_ours = is_ours and self._may_sign(str(response.url))
        if is_ours and response.status_code == 401 and self._renew(request):
            response = yield request
            if response.status_code == 401 and self._may_sign(str(response.url)):
                self._service.note_rejected(_bearer_of(request))

    def _may_sign(self, url: str) -> bool:
        return self._is_ours("/".join(url.split("/", 3)[:3]))

    def _decide(self, origin: str) -> bool:
        from urllib.parse import urlsplit

        return may_carry_token(origin) and urlsplit(origin).hostname in self._hosts

    def _sign(self, request: Any) -> None:
        """Set the headers of a request, in place of any other credential."""
        headers = self._service.auth_headers()
        present = {name.lower() for name in request.headers}
        if "anthropic-beta" in present and "anthropic-beta" in headers:
            headers["anthropic-beta"] = _with_beta(request.headers["anthropic-beta"])
        # The API takes a token or a key, and refuses both.
        for name in present & {"authorization", "x-api-key"}:
            del request.headers[name]
        for name, value in headers.items():
            request.headers[name] = value

    @hides_locals
    def _renew(self, request: Any) -> bool:
        """Refresh after a 401 and sign again; return False where that cannot help."""
        token = _bearer_of(request)
        is_fixed = not token or token == environment_token()
        if is_fixed or self._service.is_rejected(token):
            return False
        self._service.refresh(rejected=token)
        self._sign(request)
        return True

    @hides_locals
    def repeat(
        self, response: requests.Response, position: int | None, options: Any
    ) -> Any:
        """Return the answer to a request; after a 401, to its repetition."""
        from urllib.parse import urljoin

        request: Any = response.request
        if response.is_redirect:
            target = urljoin(response.url, response.headers["location"])
            if not self._may_sign(target):  # `requests` removes Authorization alone
                request.headers.pop("x-api-key", None)
        # After a redirect this also gets the answer of another host: only a 401 of a
        # host that the token may go to counts.
        if response.status_code != 401 or not self._may_sign(str(request.url)):
            return response
        repeated = request.copy()
        try:
            if not _rewind(request.body, position) or not self._renew(repeated):
                return response
        except ClaudeOAuthError:
            response.close()  # the caller does not get it
            raise
        response.close()
        answer: Any = response.connection.send(repeated, **options)
        if answer.status_code == 401:
            self._service.note_rejected(_bearer_of(repeated))
        answer.history.append(response)
        answer.request = repeated
        return answer


def _bearer_of(request: Any) -> str:
    return str(request.headers.get("Authorization") or "").partition("Bearer ")[2]


def _with_beta(asked_for: str | bytes) -> str:
    text = asked_for.decode("latin-1") if isinstance(asked_for, bytes) else asked_for
    return ",".join(dict.fromkeys((*text.split(","), OAUTH_BETA)))


def _position(body: Any) -> int | None:
    """Return where a body that is a file begins, None if it cannot be sent again."""
    try:
        return int(body.tell()) if hasattr(body, "tell") else None
    except (OSError, ValueError):
        return None


def _rewind(body: Any, position: int | None) -> bool:
    """Rewind a request's body to send it again; return False if that is impossible."""
    if position is not None:
        body.seek(position)
        return True
    return body is None or isinstance(body, (bytes, str))


# -- Sandbox ---------------------------------------------------------------------------

class _SandboxRefusal(Exception):
    """An error to answer with: status, code, message, and Retry-After in seconds."""


@hides_locals
class Sandbox:
    """An authorization server on loopback, for demos and for tests of your program.

        with Sandbox() as sandbox:
            service = OAuthService(sandbox.config, MemoryStorage())
            service.login(open_browser=sandbox.approve, paste=False)

    It enforces the rules: S256, the same redirect_uri and state, and codes and refresh
    tokens that work once; reuse of one ends the whole login.
    ``/v1/messages`` takes its tokens and keys, and answers with the body that it got.

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
        login_lifetime: float = 30 * 86400,
        rotate: bool = True,
        scopes: Iterable[str] = CLAUDE_AI_SCOPES,
    ) -> None:
        import threading

        self.origin = ""
        self.lifetime = lifetime
        self.scopes = tuple(scopes)
        self.counts = dict.fromkeys((*_SANDBOX_PATHS.values(), *_SANDBOX_GRANTS), 0)
        self._port = port
        self._login_lifetime = login_lifetime
        self._rotate = rotate
        self._threads: list[threading.Thread] = []
        # Guards counts and all below, while a request is answered.
        self._lock = threading.Lock()
        self._failures: dict[str, list[_SandboxRefusal]] = {}
        # A login is a family of tokens that live and die together: by code and refresh
        # token, and by access token or key with its end.
        self._logins: dict[str, types.SimpleNamespace] = {}
        self._access: dict[str, tuple[types.SimpleNamespace, float]] = {}

    def __enter__(self) -> Self:
        try:
            self._server = make_server("127.0.0.1", self._port, self._handle)
        except (OSError, OverflowError) as exc:
            raise ConfigError(
                f"no sandbox on port {self._port} ({exc}); choose another port"
            ) from exc
        self.origin = f"http://127.0.0.1:{self._server.server_address[1]}"
        self._start(self._server.serve_forever, 0.05)
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        for thread in self._threads:
            thread.join()

    @property
    def config(self) -> OAuthConfig:
        """The settings for a program that signs in here."""
        return OAuthConfig.for_server(self.origin, client_id="sandbox")

    def approve(self, url: str) -> str:
        """Approve what an authorize URL asks for, as a person with a browser would.

        Fits as ``open_browser=``: a loopback callback is visited, in a thread.  Returns
        the address that the browser is sent to, which can be pasted as well.

        Raises:
            ValueError: The request is not a valid one; the text says why.
        """
        return self._decide(url, b"decision=approve")

    def deny(self, url: str) -> str:
        """Like `approve`, as a person who does not agree."""
        return self._decide(url, b"decision=deny")

    def expire_access_tokens(self) -> None:
        """Answer every access token with 401, however long it should live."""
        with self._lock:
            keys = [key for key in self._access if key.startswith("sk-ant-api")]
            self._access = {key: self._access[key] for key in keys}

    def fail_next(
        self,
        endpoint: str,
        status: int = 503,
        code: str = "api_error",
        *,
        retry_after: float = 0,
        times: int = 1,
    ) -> None:
        """Answer the next requests of an endpoint, as `counts` calls it, with an error.

        ``code`` is the error's name, like ``invalid_grant``; ``retry_after`` is in
        seconds, 0 for no such header.
        """
        if endpoint not in self.counts:
            raise ValueError(f"a sandbox has no endpoint {endpoint!r}")
        refusal = _SandboxRefusal(status, code, "as fail_next asked", retry_after)
        with self._lock:
            self._failures.setdefault(endpoint, []).extend([refusal] * times)

    def _start(self, function: Callable[..., object], argument: object) -> None:
        import threading

        thread = threading.Thread(target=function, args=(argument,), daemon=True)
        try:
            thread.start()
        except RuntimeError as exc:
            raise Unavailable(f"a sandbox needs threads, and here: {exc}") from exc
        self._threads.append(thread)

    def _decide(self, url: str, decision: bytes) -> str:
        is_ours = url.startswith(self.origin + "/oauth/authorize?")
        path = url[len(self.origin) :] if is_ours else ""
        request = types.SimpleNamespace(command="POST", path=path, body=decision)
        try:
            location = str(self._answer(request))
        except _SandboxRefusal as refusal:
            problem = refusal.args[2]
            raise ValueError(f"this login cannot be decided on: {problem}") from None
        if not location.startswith(self.origin + "/"):
            self._start(_visit, location)
        return location

    def _handle(self, request: Any) -> None:
        """Answer a request of `make_server`; the connection ends with the answer."""
        length = request.headers.get("Content-Length", "")
        request.body = request.rfile.read(int(length)) if length.isdecimal() else b""
        bearer = request.headers.get("Authorization", "").split("Bearer ")[-1]
        request.token = request.headers.get("x-api-key", bearer)
        status, headers = 200, {"Content-Type": "application/json"}
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
        elif content.startswith("<"):
            headers["Content-Type"] = "text/html; charset=utf-8"
        request.send_response_only(status)  # send_response would name the server
        for header in headers.items():
            request.send_header(*header)
        request.end_headers()
        request.wfile.write(content.encode())

    def _answer(self, request: Any) -> str | dict[str, object]:
        """Return a page, an address to go to, or an object."""
        path, _, query = request.path.partition("?")
        request.asked = _sandbox_parameters(path, query, request.body)
        request.endpoint = _SANDBOX_PATHS.get(path, "")
        if path == "/v1/oauth/token":
            request.endpoint = request.asked.get("grant_type", "")
        if request.endpoint not in self.counts:
            raise _SandboxRefusal(404, "not_found_error", "no such endpoint")
        with self._lock:
            self.counts[request.endpoint] += 1
            if self._failures.get(request.endpoint):
                raise self._failures[request.endpoint].pop(0)
            do = getattr(self, "_do_" + request.endpoint, self._do_resource)
            answer: str | dict[str, object] = do(request)
            return answer

    def _do_authorize(self, request: Any) -> str:
        """Return the page with the question, or where its answer leads."""
        import re
        from urllib.parse import urlencode

        asked = request.asked
        for name, rule in _SANDBOX_RULES.items():
            pattern = rule.replace("ORIGIN", re.escape(self.origin))
            if not re.fullmatch(pattern, asked.get(name, "")):
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
                ends=time.monotonic() + self._login_lifetime,
            )
        query = urlencode({**callback, "state": asked["state"]})
        return f"{asked['redirect_uri']}?{query}"

    def _do_authorization_code(self, request: Any) -> dict[str, object]:
        import re

        asked = request.asked
        if not asked.get("state"):  # required by the service, not by RFC 6749
            raise _SandboxRefusal(400, "oauth_request_parse_error", "state is missing")
        login = self._login_of(asked.get("code", ""))
        login.grant = ""  # the code is spent, whatever comes next
        verifier = asked.get("code_verifier", "")
        if not re.fullmatch(r"[A-Za-z0-9._~-]{43,128}", verifier):
            raise _SandboxRefusal(400, "invalid_request", "code_verifier is not valid")
        asked["code_challenge"] = code_challenge(verifier)
        for name in ("redirect_uri", "state", "client_id", "code_challenge"):
            if asked.get(name) != login.asked[name]:
                raise _SandboxRefusal(400, "invalid_grant", f"{name} is another one")
        return self._issue(login)

    def _do_refresh_token(self, request: Any) -> dict[str, object]:
        asked = request.asked
        login = self._login_of(asked.get("refresh_token", ""))
        if login.ends < time.monotonic():
            raise _SandboxRefusal(400, "invalid_grant", "the login is over")
        if login.asked["client_id"] != asked.get("client_id"):
            raise _SandboxRefusal(400, "invalid_grant", "client_id is another one")
        wanted = set(asked.get("scope", "").split())
        if not wanted <= {*login.scopes, *ALLOWED_SCOPE_EXPANSIONS}:
            raise _SandboxRefusal(400, "invalid_scope", "more than can be granted")
        login.scopes = sorted(wanted) or login.scopes
        return self._issue(login)

    def _do_resource(self, request: Any) -> dict[str, object]:
        """Answer what takes an access token or a key."""
        login, end = self._access.get(request.token, (None, 0.0))
        if login is None or not login.is_alive or end <= time.monotonic():
            raise _SandboxRefusal(401, "authentication_error", "the token is dead")
        scope = _SANDBOX_SCOPES[request.endpoint]
        if scope not in login.scopes:
            raise _SandboxRefusal(403, "permission_error", f"{scope} was not granted")
        if request.endpoint == "profile":
            return {**_SANDBOX_PROFILE}
        if request.endpoint == "messages":
            return {"echo": request.body.decode("utf-8", "replace")}
        key = "sk-ant-api03-sandbox-" + generate_state()
        holder = types.SimpleNamespace(is_alive=True, scopes=[SCOPE_USER_INFERENCE])
        self._access[key] = holder, float("inf")
        return {"raw_key": key}

    def _do_callback(self, request: Any) -> str:
        from html import escape

        asked = {"code": "", "state": "", **request.asked}
        shown = asked.get("error") or "{code}#{state}".format_map(asked)
        return f"<!doctype html><title>Sandbox</title><p><code>{escape(shown)}</code>"

    def _do_revoke(self, request: Any) -> dict[str, object]:
        token = request.asked.get("token", "")
        login = self._access.get(token, (None,))[0] or self._logins.get(token)
        if login:
            login.is_alive = False
        return {}  # for an unknown token too: RFC 7009 section 2.2

    def _login_of(self, grant: str) -> types.SimpleNamespace:
        """Return the login of a code or refresh token; reuse of one ends it.

        Source: RFC 6749 section 4.1.2, RFC 9700 section 4.14.
        """
        login = self._logins.get(grant)
        if login is None or not login.is_alive:
            raise _SandboxRefusal(400, "invalid_grant", "the grant is wrong or over")
        if login.grant != grant:
            login.is_alive = False  # two programs have it: one may have stolen it
            raise _SandboxRefusal(400, "invalid_grant", "the grant was used before")
        return login

    def _issue(self, login: types.SimpleNamespace) -> dict[str, object]:
        access_token = "sk-ant-oat01-sandbox-" + generate_state()
        self._access[access_token] = login, time.monotonic() + self.lifetime
        if self._rotate or not login.grant:
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


def _sandbox_parameters(path: str, query: str, body: bytes) -> dict[str, str]:
    """Return the strings of a JSON body, or the query's parameters, each once.

    Source: RFC 6749 section 3.1.
    """
    from urllib.parse import parse_qsl

    if path.startswith("/v1/oauth/"):
        found = parse_json_object(body)
        if found is None or not all(isinstance(value, str) for value in found.values()):
            raise _SandboxRefusal(400, "oauth_request_parse_error", "not JSON strings")
        return {name: str(value) for name, value in found.items()}
    pairs = parse_qsl(query, keep_blank_values=True)
    if len(pairs) != len(dict(pairs)):
        raise _SandboxRefusal(400, "invalid_request", "a parameter stands twice")
    return dict(pairs)


def _visit(url: str) -> None:
    """Fetch a page of this machine as a browser does, redirects included."""
    options = {"headers": {"Host": url.split("/")[2]}, "timeout": REQUEST_TIMEOUT}
    for address in ("127.0.0.1", "[::1]"):  # `localhost` does not resolve everywhere
        page = url.replace("localhost", address, 1)
        try:
            import_requests().get(page, proxies={"no_proxy": "*"}, **options)
        except (OSError, ValueError, ClaudeOAuthError):
            continue  # the listener does not use this address
        return


_SANDBOX_PATHS: Final = {
    "/oauth/authorize": "authorize",
    "/oauth/code/callback": "callback",
    "/v1/oauth/token/revoke": "revoke",
    "/api/oauth/profile": "profile",
    "/api/oauth/claude_cli/create_api_key": "api_key",
    "/v1/messages": "messages",
}
_SANDBOX_GRANTS: Final = ("authorization_code", "refresh_token")  # /v1/oauth/token

_SANDBOX_SCOPES: Final = {
    "profile": SCOPE_USER_PROFILE,
    "api_key": SCOPE_ORG_CREATE_API_KEY,
    "messages": SCOPE_USER_INFERENCE,
}
"""The scope that each endpoint requires."""

_SANDBOX_RULES: Final = {
    "response_type": "code",
    "client_id": r"[!-~]+",
    "redirect_uri": r"(http://localhost:[1-9]\d{0,4}|ORIGIN/oauth/code)/callback",
    "scope": r"[!-~]+( [!-~]+)*",
    "state": r"[!-~]{8,}",
    "code_challenge": r"[A-Za-z0-9_-]{43}",
    "code_challenge_method": "S256",
}
"""The parameters of an authorize request, and the pattern of each value."""

_SANDBOX_PROFILE: Final[Mapping[str, object]] = {
    "account": {
        "uuid": "sandbox-account",
        "email": "sandbox@example.com",
        "created_at": "2024-01-01T00:00:00Z",
    },
    "organization": {
        "uuid": "sandbox-organization",
        "name": "Sandbox",
        "organization_type": "claude_max",
        "rate_limit_tier": "default_claude_max_5x",
        "billing_type": "stripe_subscription",
        "subscription_created_at": "2024-01-01T00:00:00Z",
    },
}

_SANDBOX_PAGE: Final = """<!doctype html>
<html lang="en"><meta charset="utf-8"><title>Sandbox</title>
<h1>Sandbox</h1><p>A program asks to sign in. Nothing here is real.</p>
<form method="post"><button name="decision" value="approve">Approve</button>
<button name="decision" value="deny">Deny</button></form></html>
"""


# -- Command line ----------------------------------------------------------------------

_EXIT_CODES: Final[Mapping[int, Any]] = {
    2: ConfigError,
    3: (NotLoggedIn, TokenRefused, LoginError),
    4: Unavailable,
    5: StorageError,
    1: Exception,
}
"""The exit code of each kind of error; argparse too uses 2, and Ctrl-C is 130."""


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
    parser = make_parser()
    options = parser.parse_args(argv)
    for name, value in vars(options).items():
        option = "argument --" + name.replace("_", "-")
        most = 65535 if name == "port" else MAX_LIFETIME
        if "" in (value if isinstance(value, list) else [value]):  # "$UNSET" in a shell
            parser.error(f"{option}: it is empty; give it a value or leave it out")
        if isinstance(value, (int, float)) and not 0 <= value <= most:
            parser.error(f"{option}: give a number from 0 to {most:.0f}")
    if options.verbose:
        import logging

        logging.basicConfig(level=logging.DEBUG)
    code: int = options.run(options)
    return code


def _report(error: BaseException) -> int:
    """Say what ended the command, and return its exit code."""
    if isinstance(error.__cause__ or error, KeyboardInterrupt):  # login() wraps it
        say("\nclaude-oauth: interrupted")
        return 130
    text = str(error)
    if isinstance(error, OSError):
        text = (error.strerror or type(error).__name__).lower()
        try:
            sys.stdout.flush()
        except OSError:
            # What is still in the buffer must not fail once more at Python's end.
            with open(os.devnull, "wb") as nowhere:
                os.dup2(nowhere.fileno(), sys.stdout.fileno())
    if not isinstance(error, BrokenPipeError):  # nobody is left to read the answer
        say(f"claude-oauth: {text}")
    return next(c for c, kinds in _EXIT_CODES.items() if isinstance(error, kinds))


def _service(options: Any) -> OAuthService:
    config = OAuthConfig.from_env()
    if options.client_id:
        config = config.replace(client_id=options.client_id)
    if getattr(options, "scope", None):
        config = config.replace(scopes=tuple(options.scope))
    return OAuthService(config, make_storage(options.store, options.dir))


def _login(options: Any) -> int:
    """Sign in by browser, or paste the code that the page shows on any machine."""
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
    return 0


def _status(options: Any) -> int:
    """Show whose login this is, what it may do and when it ends, offline."""
    service = _service(options)
    check = _check(service) if options.check else ""
    status, stored = service.status(), service.credentials() or Credentials("")
    missing = sorted({*service.config.scopes} - {*stored.scopes})
    source = "CLAUDE_OAUTH_TOKEN, not the store"
    rows = {
        "logged in": status["logged_in"],
        "check": check,
        "source": source if status["source"] == "environment" else "",
        "account": status["email"],
        "organization": status["organization"],
        "plan": status["subscription_type"],
        "tier": status["rate_limit_tier"],
        "path": status["method"],
        "scopes": " ".join(stored.scopes),
        "not granted": " ".join(missing) if stored.scopes else "",
        "token ends": _until(stored.expires_at),
        "login ends": _until(stored.refresh_token_expires_at),
        "store": status["storage"],
        "client id": status["client_id"],
    }
    word = check.partition(":")[0]
    _print(options, {**status, "check": word} if word else status, rows)
    if status["source"] == "none" and not options.json:
        say("! run `claude-oauth login` to sign in")
    code = 0 if status["logged_in"] else 3
    return {"works": 0, "refused": 3, "unknown": 4}.get(word, code)


def _check(service: OAuthService) -> str:
    """Ask the server with the present token; return its verdict, with the reason."""
    try:
        token = service.access_token()
        if token.startswith("sk-ant-api"):
            return "unknown: an API key cannot ask for the profile"
        OAuthClient(service.config).fetch_profile(token)
    except (NotLoggedIn, TokenRefused) as error:
        # With 403 the token is good, but too narrow for the profile.
        if getattr(error, "status", None) != 403:
            return f"refused: {error}"
    except (Unavailable, BadAnswer) as error:
        return f"unknown: {error}"
    return "works"


def _until(moment: float | None) -> str:
    """Return a moment for people: relative to now."""
    if moment is None:
        return ""
    left = moment - time.time()
    span = ("in " if left > 0 else "over for ") + describe_seconds(abs(left))
    return f"{span} ({describe_moment(moment)})"


def _print(
    options: Any, answer: Mapping[str, Any], rows: Mapping[str, object]
) -> None:
    """Print an answer as JSON, or else its rows; its warnings go to stderr."""
    if options.json:
        print(dump_json(answer))
        return
    width = max(map(len, rows), default=0) + 2
    for name, value in rows.items():
        text = ("no", "yes")[value] if isinstance(value, bool) else value
        if text:
            print(f"{name:{width}}{printable(text, limit=1000)}")
    for warning in answer.get("warnings", ()):
        say(f"! {warning}")


def _token(options: Any) -> int:
    """Print an access token that works; on the Console path, the API key."""
    service = _service(options)
    token = service.api_token(min_validity=options.min_validity)
    if options.json:
        status, stored = service.status(), service.credentials()
        ends = {name: status[name] for name in ("expires_at", "expires_in")}
        answer = {"access_token": token, **ends}
        if stored and stored.access_token != token:
            answer = {"api_key": token, "expires_at": None}
        token = dump_json({**answer, "token": token})
    print(token)
    return 0


def _refresh(options: Any) -> int:
    """Ask the server for a new token, however long the present one lives."""
    service = _service(options)
    left = (service.refresh().expires_at or 0) - time.time()
    say(f"Refreshed; the new token is good for {describe_seconds(left)}.")
    _print(options, service.status(), {})
    return 0


def _profile(options: Any) -> int:
    """Ask the server whose login it is."""
    profile = vars(_service(options).profile(force=True))
    _print(options, profile, {k.replace("_", " "): v for k, v in profile.items()})
    return 0


def _api_key(options: Any) -> int:
    """Make one more permanent API key of the Console, store it and print it."""
    print(_service(options).create_api_key())
    say("This key is permanent; delete it on the Console's page of API keys.")
    return 0


def _logout(options: Any) -> int:
    """Revoke the login where the server can, and delete it here."""
    service = _service(options)
    found = service.logout()
    where = service.storage.describe()
    say(f"Logged out of {where}." if found else f"There was no login in {where}.")
    for name in filter(setting, SIGNS_IN):
        say(f"{name} is set, and still signs programs in.")
    return 0


def _sandbox(options: Any) -> int:
    """Serve a login to play with; the lines it prints point claude-oauth at it."""
    import contextlib
    import shlex
    import signal
    from tempfile import TemporaryDirectory

    sandbox = Sandbox(port=options.port, lifetime=options.lifetime)
    # A SIGTERM too must remove the temporary folder.
    with contextlib.suppress(ValueError):  # not the main thread
        signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        with TemporaryDirectory(prefix="claude-oauth-") as directory, sandbox:
            print(f"export CLAUDE_OAUTH_SERVER={sandbox.origin}")
            print(f"export CLAUDE_OAUTH_CLIENT_ID={sandbox.config.client_id}")
            print(f"export CLAUDE_OAUTH_DIR={shlex.quote(directory)}")
            print("export CLAUDE_OAUTH_STORE=file", flush=True)
            say("Paste these lines into another terminal; Ctrl-C ends this one.")
            while True:
                time.sleep(3600)  # Windows: Ctrl-C ends a sleep, but not an Event.wait
    except KeyboardInterrupt:
        return 0


def _demo(options: Any) -> int:
    """Play a login's whole life against a sandbox, in a temporary folder."""
    names = [name for name in os.environ if name.startswith("CLAUDE_")]
    hidden = {name: os.environ.pop(name) for name in names}
    try:
        return _run_demo(options.browser)
    finally:
        os.environ.update(hidden)


def _run_demo(uses_browser: bool) -> int:
    from functools import partial
    from tempfile import TemporaryDirectory

    show = partial(print, flush=True)
    temporary = TemporaryDirectory(prefix="claude-oauth-")
    with temporary as directory, Sandbox() as sandbox:
        storage = make_storage("file", directory)  # as the processes below make theirs
        service = OAuthService(
            sandbox.config,
            storage,
            flush_telemetry=lambda _: show("logout    telemetry is flushed first"),
        )
        show(f"server    a sandbox at {sandbox.origin}; the store is {directory}")
        service.login(open_browser=uses_browser or sandbox.approve, paste=uses_browser)
        status = service.status()
        show(f"login     {status['email']}, plan {status['subscription_type']}")
        first = service.access_token()
        show(f"token     {first[:13]}… from the file, no request")
        _expire(storage)
        news = "the same token" if service.access_token() == first else "a new token"
        show(f"expiry    {news}, {sandbox.counts['refresh_token']} refresh")
        _expire(storage)
        show(f"stampede  {_stampede(sandbox, directory)}")
        time.sleep(LOOK_INTERVAL)  # until the service has seen the processes' token
        sandbox.expire_access_tokens()
        url, auth = sandbox.origin + "/v1/messages", BearerAuth(service)
        post = import_requests().post
        answer = post(url, json={}, auth=auth, proxies={"no_proxy": "*"}, timeout=9)
        codes = [each.status_code for each in (*answer.history, answer)]
        text = "a token that died early is refreshed and the request repeated"
        show(f"401       {text}: {codes}")
        service.logout()
        left = "nothing" if storage.load() is None else "something"
        show(f"          the grant is revoked; {left} is left in the store")
    return 0


def _expire(storage: Storage) -> None:
    """Set the stored token's expiry to the past, and wait until that is noticed."""
    with storage.lock(LOCK_TIMEOUT):
        stored = storage.load() or Credentials("")
        storage.save(stored.replace(expires_at=time.time() - 1))
    time.sleep(LOOK_INTERVAL)


def _stampede(sandbox: Sandbox, directory: str) -> str:
    """Let 8 processes ask for a token at once; return the result as text."""
    import subprocess

    python = python_program()
    if python is None:
        return "left out: this program has no Python to start"
    before = sandbox.counts["refresh_token"]
    spec = globals().get("__spec__")  # None where this file is run as a script
    program = ["-m", spec.name] if spec else [os.path.abspath(__file__)]
    command = [python, *program, "--dir", directory, "--store", "file", "token"]
    paths = os.pathsep.join(map(os.path.abspath, sys.path))
    environ = {**os.environ, "PYTHONPATH": paths, "CLAUDE_OAUTH_SERVER": sandbox.origin}
    # From a folder with nothing to import by mistake; Ctrl-C would print tracebacks.
    pipes: Any = {"stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
    workers = [
        subprocess.Popen(command, env=environ, cwd=directory, **pipes) for _ in range(8)
    ]
    limit = LOCK_TIMEOUT
    answers: list[Any] = [worker.communicate(timeout=limit)[0] for worker in workers]
    tokens: list[Any] = list(filter(None, answers))
    return (
        "8 processes find an expired token:"
        f" {sandbox.counts['refresh_token'] - before} refresh,"
        f" {len(tokens)} of 8 have a token, {len(set(tokens))} token in all"
    )


_STORES: Final = ("auto", "file", "keychain", "keyring")

_OPTIONS: Final[Mapping[str, Any]] = {
    "--client-id": ("ID", str.strip, None, "the client id of your program"),
    "--dir": ("PATH", str.strip, None, "folder of the login's files"),
    "--store": (None, None, None, "auto: the Keychain on macOS, else a file", _STORES),
    "--verbose": "log, without secrets, to stderr",
    "--console": "sign in at the Console, for an API key",
    "--no-browser": "open none, print the address",
    "--port": ("N", int, 0, "a fixed one, for `ssh -L` (default: free)"),
    "--timeout": ("SECONDS", float, LOGIN_TIMEOUT, "to sign in within"),
    "--scope": ("SCOPE", str.strip, None, "ask for this one (may be repeated)"),
    "--email": ("ADDRESS", str.strip, None, "the account to suggest on the page"),
    "--check": "ask the server too: ends with 0 (works), 3 (refused) or 4 (unknown)",
    "--json": "print one JSON object",
    "--min-validity": ("SECONDS", float, REFRESH_BUFFER, "that it must live on"),
    "--lifetime": ("SECONDS", float, 28800, "that access tokens live"),
    "--browser": "sign in with your own browser",
}
"""For a flag its help; else metavar, type, default, help and choices."""

_COMMANDS: Final = {
    "login": (_login, "--console --no-browser --port --timeout --scope --email --json"),
    "status": (_status, "--check --json"),
    "token": (_token, "--min-validity --json"),
    "refresh": (_refresh, "--json"),
    "profile": (_profile, "--json"),
    "api-key": (_api_key, ""),
    "logout": (_logout, ""),
    "sandbox": (_sandbox, "--port --lifetime"),
    "demo": (_demo, "--browser"),
}
"""Each command: the function, whose docstring is its help; and its options."""

_EPILOG: Final = """\
environment: CLAUDE_OAUTH_CLIENT_ID, CLAUDE_OAUTH_DIR, CLAUDE_OAUTH_STORE,
  CLAUDE_OAUTH_SERVER (see `sandbox`), CLAUDE_OAUTH_TOKEN (comes before any store),
  CLAUDE_OAUTH_PASSPHRASE_FILE (encrypts the file), BROWSER, HTTPS_PROXY
exit codes: 0 done, 1 another error, 2 usage or settings, 3 log in (again),
  4 try later, 5 the store cannot be read or written, 130 Ctrl-C
"""


def make_parser() -> argparse.ArgumentParser:
    """Return the command line's parser, which shtab makes completions from."""
    import argparse

    parser = argparse.ArgumentParser(
        prog="claude-oauth",
        description="Sign in to Claude, and get tokens that work.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    version = f"%(prog)s {__version__}"
    parser.add_argument("--version", action="version", version=version)
    parsers = [(parser, "--client-id --dir --store --verbose")]
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    for name, (run, options) in _COMMANDS.items():
        command = commands.add_parser(name, help=run.__doc__, description=run.__doc__)
        command.set_defaults(run=run)
        parsers.append((command, options))
    keys = ("metavar", "type", "default", "help", "choices")
    for command, options in parsers:
        for name in options.split():
            option = _OPTIONS[name]
            settings: dict[str, Any] = dict(zip(keys, option))
            if isinstance(option, str):
                settings = {"action": "store_true", "help": option}
            elif name == "--scope":
                settings["action"] = "append"
            command.add_argument(name, **settings)
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
