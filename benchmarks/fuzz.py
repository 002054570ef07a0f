# SPDX-License-Identifier: MIT
"""Fuzz whatever reads what somebody else wrote: pastes, callbacks, files, answers.

    pip install atheris requests
    PYTHONPATH=. python benchmarks/fuzz.py -max_total_time=600 [CORPUS]

The options are libFuzzer's; CORPUS is a directory that keeps what was found from one
run to the next.  The first byte of an input chooses the reader.  A reader may answer,
or refuse by ValueError or an error of the module's own.  It may not let anything else
out, show a secret, chain an exception that could hold one, or change the file.
"""

from __future__ import annotations

import json
import os
import re
import sys
import tempfile
from typing import Callable

import atheris

# Regular expressions and str methods guide the fuzzer only if it may look into them.
with atheris.instrument_imports(include=["claude_oauth"]):
    import claude_oauth

atheris.enabled_hooks.add("RegEx")

NOW = 1_800_000_000.0
STATE = "xyzzy-6f1e2d3c4b5a69788796a5b4c3d2e1f0-STATE"
SECRET = "plugh-c0ffee00c0ffee00c0ffee00c0ffee00"
MANUAL = claude_oauth.MANUAL_REDIRECT_URI
FOLDER = tempfile.TemporaryDirectory(prefix="fuzz-")
STORE = os.path.join(FOLDER.name, "store")
PATH = os.path.join(STORE, "credentials.json")


class Clear:
    """A cipher that hides nothing, so that the fuzzer gets behind it."""

    def encrypt(self, data: bytes) -> bytes:
        return data

    def decrypt(self, data: bytes) -> bytes:
        return data


def read_paste(data: bytes) -> None:
    text = data.decode("utf-8", "surrogateescape")
    granted = claude_oauth.parse_paste(text, state=STATE, manual_redirect_uri=MANUAL)
    code, uri = granted.code, granted.redirect_uri
    assert re.fullmatch("[!-~]{1,4096}", code), "not a code"
    assert re.fullmatch("http://localhost:[0-9]{1,5}/callback", uri) or uri == MANUAL


def read_callback(data: bytes) -> None:
    query = data.decode("utf-8", "surrogateescape")
    code = claude_oauth.parse_callback(query, state=STATE)
    assert re.fullmatch("[!-~]{1,4096}", code) and "state=" in query


def read_file(data: bytes, cipher: Clear | None = None) -> None:
    with open(PATH, "wb") as file:
        file.write(data)
    os.chmod(PATH, 0o600)  # or the module would, with a warning
    before = os.stat(PATH)
    try:
        claude_oauth.FileStorage(PATH, cipher=cipher).load()
    finally:
        config = claude_oauth.OAuthConfig("fuzz")
        notes = claude_oauth.AccountFile(PATH, config, lambda: NOW)  # reads anything
        login = claude_oauth.Credentials(SECRET, SECRET)
        claude_oauth.Profile.from_record(notes.account(login))
        notes.pause_left()
        notes.is_refused(login)
        with open(PATH, "rb") as file:
            assert file.read() == data, "the file was changed"
        assert os.stat(PATH).st_mtime_ns == before.st_mtime_ns
        assert os.listdir(STORE) == ["credentials.json"]


def read_encrypted_file(data: bytes) -> None:
    read_file(data, Clear())


def read_record(data: bytes) -> None:
    record = claude_oauth.parse_json_object(data) or {}
    found = claude_oauth.Credentials.from_record(record)
    stored = claude_oauth.merge_record(record, found.to_record())
    again = json.loads(claude_oauth.dump_json(stored))
    kept = claude_oauth.Credentials.from_record(again)
    moment = kept.expires_at  # a file has whole milliseconds
    assert moment is None or abs(moment - (found.expires_at or 0)) < 0.002
    moments = {"expires_at": None, "refresh_token_expires_at": None}
    assert kept.replace(**moments) == found.replace(**moments), "not what was stored"
    assert {**record, **again} == again, "a foreign key was lost"


def read_token_answer(data: bytes) -> None:
    answer = claude_oauth.parse_json_object(data)
    credentials = claude_oauth.Credentials(SECRET, SECRET, scopes=("user:profile",))
    new = claude_oauth.Credentials.from_answer(
        answer, received_at=NOW, previous=credentials
    )
    assert new.refresh_token and new.expires_at and new.expires_at > NOW
    stored = json.loads(claude_oauth.dump_json(new.to_record()))
    kept = claude_oauth.Credentials.from_record(stored)
    assert kept.access_token == new.access_token, "an answer that cannot be stored"
    assert kept.refresh_token == new.refresh_token


def read_profile(data: bytes) -> None:
    answer = claude_oauth.parse_json_object(data) or {}
    profile = claude_oauth.Profile.from_answer(answer)
    again = json.loads(claude_oauth.dump_json(profile.to_record()))
    assert claude_oauth.Profile.from_record(again) == profile.replace(
        subscription_type=None, rate_limit_tier=None
    ), "the account that is cached is another"


def read_error_answer(data: bytes) -> None:
    status = 300 + (data[0] if data else 100)
    raise claude_oauth.error_of_answer(
        status,
        data[1:],
        request_id=data[-80:].decode("latin-1"),
        secrets=[SECRET, STATE],
    )


def read_retry_after(data: bytes) -> None:
    wait = claude_oauth.parse_retry_after(data.decode("latin-1"), now=NOW)
    assert wait is None or 0 < wait <= claude_oauth.WAIT_CEILING


QUERY = f"code=abcdefghijklmnopqrst&state={STATE}"
TOKENS = (
    b'{"accessToken": "%s", "refreshToken": "r", "expiresAt": 1, "scopes": ["a"],'
    b' "refreshTokenExpiresAt": 2.5, "clientId": "c", "subscriptionType": "max"}'
) % SECRET.encode()
SEEDS: list[tuple[Callable[[bytes], None], bytes]] = [
    (read_paste, f"abcdefghijklmnopqrst#{STATE}".encode()),
    (read_paste, f"\x1b[200~http://127.0.0.1:9/callback?{QUERY}\x1b[201~".encode()),
    (read_paste, f"{MANUAL}?{QUERY}".encode()),
    (read_paste, b"https://elsewhere/?code_challenge=c"),
    (read_paste, f"https://elsewhere/?{QUERY}".encode()),
    (read_paste, b"sk-ant-oat01-abcdefghijklmnop"),
    (read_callback, QUERY.encode()),
    (read_callback, f"error=denied&error_description=d&state={STATE}".encode()),
    (read_file, b'{"claudeAiOauth": %s, "other": 1}' % TOKENS),
    (
        read_file,
        b'{"oauthAccount": {"accountUuid": "u"}, "claudeOauthMemory": {"failures": 1,'
        b' "wait_until": 1.5, "account_of": ["a"], "refused": "f"}}',
    ),
    (read_encrypted_file, b'{"claudeOauthEncrypted": "e30="}'),
    (read_record, b'{"claudeAiOauth": %s, "consoleApiKey": "k", "o": {}}' % TOKENS),
    (
        read_token_answer,
        b'{"access_token": "t", "token_type": "Bearer", "expires_in": 28800,'
        b' "refresh_token": "r", "scope": "a b", "refresh_token_expires_in": 9}',
    ),
    (
        read_profile,
        b'{"account": {"uuid": "u", "email": "e"}, "organization": {"uuid": "o",'
        b' "organization_type": "claude_max", "has_extra_usage_enabled": true}}',
    ),
    (read_error_answer, b"g<html>error code: 1010"),
    (read_token_answer, b'{"access_token": "t", "scope": ["a"]}'),
    (read_error_answer, b'd{"error": "invalid_grant", "error_description": "d"}'),
    (read_error_answer, b'd{"type": "error", "error": {"type": "t", "message": "m"}}'),
    (read_error_answer, f'd{{"error": "x", "message": "{SECRET}"}}'.encode()),
    (read_retry_after, b"120"),
    (read_retry_after, b"Fri, 15 Jan 2027 08:00:30 GMT"),
]
READERS = tuple(dict.fromkeys(reader for reader, _ in SEEDS))


def check_refusal(error: BaseException) -> None:
    told = f"{error} {error!r}"
    assert not re.search(r"sk-ant-[\w-]", told), "a token is shown"
    if isinstance(error, claude_oauth.ClaudeOAuthError):
        assert str(error).isprintable(), "a control character is shown"
    if not isinstance(error, claude_oauth.LoginDenied):  # in it the server speaks
        assert SECRET not in told and STATE not in told, "a secret is shown"
    for hanging in filter(None, (error.__cause__, error.__context__)):
        held = [getattr(hanging, name, "") for name in ("args", "doc", "object")]
        assert SECRET not in repr(held), "a secret hangs on it"


@atheris.instrument_func
def check(data: bytes) -> None:
    """Give one input to the reader that its first byte chooses."""
    if not data:
        return
    reader = READERS[data[0] % len(READERS)]
    try:
        reader(data[1:])
    except (ValueError, claude_oauth.ClaudeOAuthError) as error:
        check_refusal(error)


def main() -> None:
    """Fuzz until libFuzzer has enough, from the seeds on."""
    seeds = os.path.join(FOLDER.name, "seeds")
    os.mkdir(seeds)
    for number, (reader, data) in enumerate(SEEDS):
        with open(os.path.join(seeds, str(number)), "wb") as file:
            file.write(bytes((READERS.index(reader),)) + data)
    words = {word for _, data in SEEDS for word in re.findall(rb"\w+", data)}
    with open(os.path.join(FOLDER.name, "words"), "wb") as file:
        file.write(b"".join(b'"%s"\n' % word for word in sorted(words)))
    os.mkdir(STORE)
    child = os.fork()  # libFuzzer ends its process without cleaning up
    if child:
        status = os.waitpid(child, 0)[1]
        FOLDER.cleanup()
        sys.exit(1 if status else 0)
    atheris.Setup([*sys.argv, f"-dict={file.name}", seeds], check)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
