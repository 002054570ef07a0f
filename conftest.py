# SPDX-License-Identifier: MIT
"""What pytest does beside the tests: the last line of a run, and what Windows skips."""

from __future__ import annotations

import gc
import os
import re
import sys
import types
from collections import Counter
from dis import get_instructions
from functools import lru_cache

import pytest

ELSEWHERE = {
    "slow": "the slow proofs (tox -e coverage)",
    "browser": "Chromium (tox -e browser)",
}


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_sessionfinish(session):
    """End with a line that says what was not run, and how to get it."""
    result = yield
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    if reporter and not hasattr(session.config, "workerinput"):
        reporter.write_line(closing_line(session.config, reporter.stats))
    return result


def closing_line(config, stats):
    """What this run left out: by marker, by platform, and for want of something."""
    left_out = config.option.markexpr
    parts = [how for name, how in ELSEWHERE.items() if f"not {name}" in left_out]
    if os.name != "nt" and not os.environ.get("TOX_ENV_NAME"):
        parts.append("Windows under Wine (tox -e windows)")
        parts.append("the other Pythons (tox)")
    skipped = len(stats.get("skipped", ()))
    if skipped:
        parts.append(f"{skipped} skipped for the reasons above (.ci/run installs all)")
    parts = parts or ["nothing"]
    get_tox = " To get tox: .venv/bin/pip install tox" if "(tox" in str(parts) else ""
    return f"Not run here: {'; '.join(parts)}.{get_tox}"


def pytest_collection_modifyitems(items):
    """Keep one part of the tests, if TEST_PART says ``number/parts``, from 0 on."""
    number, _, parts = os.environ.get("TEST_PART", "0/1").partition("/")
    items[:] = items[int(number) :: int(parts)]


def pytest_terminal_summary(terminalreporter):
    """On Windows, count the skipped tests by reason."""
    if os.name != "nt":
        return
    skipped = terminalreporter.stats.get("skipped", ())
    counts = Counter(report.longrepr[2] for report in skipped)
    terminalreporter.section("skipped, by reason")
    for reason, count in counts.most_common():
        terminalreporter.write_line(f"{count:5} {reason.replace('Skipped: ', '')}")


# -- What Windows, or Wine, cannot do --------------------------------------------------
# Follows from what a test or fixture uses itself, or through helpers and programs
# (string constants) of its module.  Whatever this cannot see is marked by hand:
# @pytest.mark.posix("why").

NEEDS = {
    "pseudo-terminals": "spawn_cli pexpect openpty pty termios tcsetattr tmux",
    "POSIX signals or fork": (
        "fork send_signal setitimer pthread_sigmask waitpid WIFSIGNALED"
        " SIGINT SIGTERM SIGHUP SIGKILL SIGSTOP SIGCONT SIGALRM SIGCHLD SIGPIPE"
    ),
    "POSIX modes, owners or limits": (
        "umask chmod chown geteuid getuid S_IMODE st_mode st_nlink mkfifo"
        " setrlimit RLIMIT_NOFILE RLIMIT_FSIZE symlink symlink_to fcntl"
    ),
    "a stand-in that is a script with a shebang": "make_program #!",
    "a POSIX shell": "sh /bin/sh",
    "programs of a Linux machine": "need strace unshare bwrap /dev/full",
}
NEED_CRYPTOGRAPHY = {"FernetCipher", "cryptography", "trustme"}
HARMLESS = {"put_bytes"}
"""Not looked into: its chmod changes nothing on Windows, and nobody there asks."""
GLOBAL = "LOAD_GLOBAL"
"""The instruction that reads a name of the module, and not a variable of that name."""
MAX_PROGRAM = 10_000
REASONS = {word: reason for reason, words in NEEDS.items() for word in words.split()}


def pytest_configure(config):
    """Declare the marker for what cannot be told from a test's code."""
    config.addinivalue_line("markers", "posix(reason): cannot run on Windows")


def pytest_runtest_logstart():
    """Close what PyPy leaves open until it collects: pexpect's `select` takes 1,024."""
    is_pypy = sys.implementation.name == "pypy" and os.name == "posix"
    if is_pypy and len(os.listdir("/dev/fd")) > 400:
        gc.collect()
        gc.collect()  # it runs finalizers after the first


@pytest.hookimpl(tryfirst=True)  # before what skips for a missing program
def pytest_runtest_setup(item):
    """Skip a test that uses what Windows does not have."""
    if os.name == "nt":
        marks = [mark.args[0] for mark in item.iter_markers("posix")]
        skip_for(marks[0] if marks else reason_of(item.function))


@pytest.hookimpl(tryfirst=True)
def pytest_fixture_setup(fixturedef):
    """Skip the tests whose fixture uses what Windows does not have."""
    reason = reason_of(fixturedef.func) if os.name == "nt" else None
    if reason:  # pytest keeps account of what is set up: let it call what skips
        fixturedef.func = lambda *args, **kwargs: skip_for(reason)


def skip_for(reason):
    if reason:
        pytest.skip("not on Windows: " + reason)


@lru_cache(maxsize=None)
def reason_of(function):
    """Why a function cannot run on Windows, or None."""
    used = words_used_by(function)
    found = [reason for word, reason in REASONS.items() if word in used]
    if not found and used & NEED_CRYPTOGRAPHY and not has_cryptography():
        return "cryptography, whose DLL Wine does not load"
    return found[0] if found else None


@lru_cache(maxsize=None)
def has_cryptography():
    try:
        import cryptography.fernet  # noqa: F401
    except ImportError:
        return False
    return True


def words_used_by(function):
    """The names and words that the code of a function and of its helpers has."""
    module = getattr(function, "__globals__", {})
    words, todo, seen = set(), [function], set()
    while todo:
        thing = todo.pop()
        if id(thing) in seen:
            continue
        seen.add(id(thing))
        if isinstance(thing, (str, bytes)):
            words |= words_of(thing)
        elif isinstance(thing, types.CodeType):
            words |= {*thing.co_names, *thing.co_varnames}
            todo += [c for c in thing.co_consts if is_readable(c)]
            used = {i.argval for i in get_instructions(thing) if i.opname == GLOBAL}
            todo += [module[n] for n in used if is_readable(module.get(n), module)]
        elif isinstance(thing, type):
            todo += [m for m in vars(thing).values() if is_readable(m, module)]
        else:
            todo.append(getattr(thing, "__wrapped__", thing).__code__)
    return words


def is_readable(value, module=None):
    """Whether to look for words in it: code, text, and what the module defines."""
    if isinstance(value, (str, bytes)):
        return len(value) < MAX_PROGRAM  # README.md is no program
    if isinstance(value, types.CodeType):
        return True
    its_own = getattr(value, "__module__", "") == (module or {}).get("__name__")
    its_own = its_own and value.__name__ not in HARMLESS
    return its_own and isinstance(value, (type, types.FunctionType))


def words_of(text):
    """What counts in a string: a program's names; of other text the whole alone."""
    if isinstance(text, bytes):
        text = text.decode("latin-1")
    words = {"#!"} if text.startswith("#!") else {text}
    if re.search(r"^\s*(import|from) \w", text, re.M):
        words |= set(re.findall(r"\w+|/dev/full", text))
    return words
