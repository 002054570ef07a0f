"""Measure claude_oauth beside what people would use instead; print the table.

    tox -e bench                      everything, and the charts: under ten minutes
    tox -e bench -- --quick           few rounds, to see that it runs
    tox -e bench -- --only import     one row

Every peer gets an environment of its own with the versions named here. Each row runs
its subjects in turn (A B C, A B C, …), so that a slow moment of the machine falls on
all of them; a ratio is taken within its round, and the table gives the median and the
middle half of these ratios.
"""

import argparse
import json
import os
import platform
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import venv
from contextlib import contextmanager
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
SCRIPT = ROOT / "claude_oauth.py"
ENVIRONMENTS = Path(os.environ.get("TOX_ENV_DIR", ROOT / ".tox" / "bench")) / "peers"

PEERS = {
    "ours": ["requests==2.34.2"],
    "google": ["google-auth==2.63.0", "google-auth-oauthlib==1.5.0"],
    "msal": ["msal==1.39.0", "msal-extensions==1.3.1"],
    "requests_oauthlib": ["requests-oauthlib==2.0.0"],
    "authlib": ["Authlib==1.9.10", "requests==2.34.2"],
    "requests_auth": ["requests_auth==8.0.0"],
    "cli_oauth2": ["cli-oauth2==0.3.1"],
    "oauth2_cli_auth": ["oauth2-cli-auth==2.0.0"],
    "databricks": ["databricks-sdk==0.162.0"],
    "anthropic": ["anthropic==2.14.0"],
}
CHARTS = ["matplotlib==3.11.2"]

NOT_RUN = {
    "token from a file": "requests-oauthlib, Authlib and oauth2-cli-auth keep no file; "
    "databricks-sdk keeps one for its own hosts alone",
    "living token": "cli-oauth2 hands out requests-oauthlib's session, measured there; "
    "oauth2-cli-auth forgets the token once it has returned it",
    "prepared request": "msal, databricks-sdk and the two cli libraries hand out a "
    "token or a whole session, not an auth object",
    "callback to return": "requests-oauthlib and Authlib have no listener; "
    "requests_auth starts one in mid-request only; the anthropic SDK has no login",
    "expired token": "no peer shares one refresh between processes",
}

IMPORTS = {
    "pass": ("ours", "pass"),
    "json+secrets+hashlib+threading": ("ours", "import json,secrets,hashlib,threading"),
    "claude_oauth": ("ours", "import claude_oauth"),
    "requests": ("ours", "import requests"),
    "oauth2-cli-auth": ("oauth2_cli_auth", "import oauth2_cli_auth"),
    "requests_auth": ("requests_auth", "import requests_auth"),
    "requests-oauthlib": ("requests_oauthlib", "import requests_oauthlib"),
    "Authlib": ("authlib", "import authlib.integrations.requests_client"),
    "msal": ("msal", "import msal"),
    "cli-oauth2": ("cli_oauth2", "import oauthcli"),
    "google": ("google", "import google_auth_oauthlib.flow"),
    "databricks-sdk": ("databricks", "import databricks.sdk.oauth"),
    "anthropic SDK": ("anthropic", "import anthropic"),
}

# label: (environment, script, its argument below the subject's directory)
TOKENS = {
    "json and time alone": ("ours", "floor", "credentials.json"),
    "google-auth": ("google", "google", "google.json"),
    "requests_auth": ("requests_auth", "requests_auth", "requests_auth.json"),
    "msal-extensions": ("msal", "msal", "msal.json"),
    "cli-oauth2": ("cli_oauth2", "cli_oauth2", "http://127.0.0.1:1/"),
    "anthropic SDK": ("anthropic", "anthropic", ""),
}

CALLS = {
    "attribute and clock": ("ours", "attribute_and_clock"),
    "attribute, clock and stat": ("ours", "attribute_clock_and_stat"),
    "claude_oauth": ("ours", "ours"),
    "anthropic SDK": ("anthropic", "anthropic"),
    "Authlib": ("authlib", "authlib"),
    "requests-oauthlib": ("requests_oauthlib", "requests_oauthlib"),
    "google-auth": ("google", "google"),
    "databricks-sdk": ("databricks", "databricks"),
    "requests_auth": ("requests_auth", "requests_auth"),
    "msal": ("msal", "msal"),
    "msal with its file": ("msal", "msal_file"),
}

SIGNED = {
    "claude_oauth": ("ours", "ours"),
    "google-auth": ("google", "google"),
    "Authlib": ("authlib", "authlib"),
    "requests-oauthlib": ("requests_oauthlib", "requests_oauthlib"),
    "anthropic SDK": ("anthropic", "anthropic"),
}

# label: (environment, subject, logins in a round)
LOGINS = {
    "bare thread, post, fsync": ("ours", "bare", 12),
    "the same, profile and its file too": ("ours", "bare_profile", 12),
    "claude_oauth": ("ours", "ours", 12),
    "oauth2-cli-auth": ("oauth2_cli_auth", "oauth2_cli_auth", 12),
    "google": ("google", "google", 12),
    "cli-oauth2": ("cli_oauth2", "cli_oauth2", 12),
    "databricks-sdk": ("databricks", "databricks", 12),
    "msal": ("msal", "msal", 3),
}

UNWANTED = ("requests", "http.server", "subprocess", "webbrowser", "asyncio", "ssl")


# -- Environments ----------------------------------------------------------------------


def python_of(name):
    return str(ENVIRONMENTS / name / "bin" / "python")


def install(name, requirements):
    """An environment with exactly these, kept while they stay the same."""
    directory = ENVIRONMENTS / name
    mark = directory / "requirements"
    wanted = "\n".join(requirements)
    if not mark.exists() or mark.read_text() != wanted:
        venv.create(directory, with_pip=False, clear=True)
        pip(name, *requirements)
        mark.write_text(wanted)


def pip(name, *arguments):
    command = [sys.executable, "-m", "pip", "--python", python_of(name), "install"]
    options = ["-qq", "--disable-pip-version-check"]
    subprocess.run([*command, *options, *arguments], check=True)


def install_all():
    """Everybody's environment. Who cannot be installed is named, and left out."""
    missing = {}
    for name, requirements in PEERS.items():
        try:
            install(name, requirements)
        except subprocess.CalledProcessError as error:
            if name == "ours":
                raise
            missing[name] = f"pip ended with {error.returncode}"
    pip("ours", "--force-reinstall", "--no-deps", str(ROOT))
    return missing


# -- One measurement -------------------------------------------------------------------


class Bench:
    """Where the token files lie, and how a subject is started there."""

    def __init__(self, directory, quick, missing):
        self.directory = Path(directory)
        self.quick = quick
        self.missing = dict(missing)
        home = self.directory / "home"
        home.mkdir()
        self.environ = {
            "PATH": os.environ["PATH"],
            "HOME": str(home),
            "LANG": "C.UTF-8",
            "CLAUDE_OAUTH_DIR": str(self.directory),
            "CLAUDE_OAUTH_STORE": "file",
            "ANTHROPIC_CONFIG_DIR": str(self.directory),
            "PYTHONWARNINGS": "ignore",
        }

    def rounds(self, full):
        return 2 if self.quick else full

    def subject(self, environment, row, subject, *arguments):
        """Run one row of subjects.py in an environment; its JSON answer."""
        command = [python_of(environment), str(HERE / "subjects.py"), row, subject]
        ended = subprocess.run(
            [*command, str(self.directory), *map(str, arguments)],
            env=self.environ,
            capture_output=True,
            stdin=subprocess.DEVNULL,
            text=True,
            timeout=120,
        )
        if ended.returncode:
            raise Failed(last_line(ended.stderr))
        return json.loads(ended.stdout)

    def process(self, command):
        """Seconds and peak KiB of a whole process."""
        launcher = [sys.executable, "-I", "-S", str(HERE / "launcher.py")]
        ended = subprocess.run(
            [*launcher, *command],
            env=self.environ,
            capture_output=True,
            text=True,
            timeout=60,
        )
        seconds, memory, code = ended.stdout.split()
        if code != "0":
            raise Failed(last_line(ended.stderr) or f"exit code {code}")
        return float(seconds), int(memory)

    def in_turn(self, measures, rounds):
        """{label: [figure of each round]}; who fails is named once and left out.

        A first round does not count: it leaves the bytecode and the disk cache behind.
        """
        figures = {label: [] for label in measures}
        for number in range(rounds + 1):
            for label, measure in measures.items():
                if label in figures:
                    try:
                        figures[label].append(measure())
                    except (Failed, subprocess.TimeoutExpired, OSError) as error:
                        del figures[label]
                        self.missing[label] = str(error)
                        print(f"    {label}: {error}", file=sys.stderr)
            if number == 0:
                figures = {label: [] for label in figures}
        return figures


class Failed(Exception):
    """A subject did not run."""


def last_line(text):
    lines = text.strip().splitlines()
    return lines[-1] if lines else ""


@contextmanager
def server(delay=0.0):
    """Our loopback authorization server in a process of its own; yields its port."""
    command = [sys.executable, str(HERE / "server.py"), str(delay)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        yield int(process.stdout.readline())
    finally:
        process.terminate()
        process.wait()
        process.stdout.close()


# -- Rows ------------------------------------------------------------------------------


def row_import(bench):
    """Whole processes that import a library and end."""
    commands = {
        label: [python_of(environment), "-c", code]
        for label, (environment, code) in IMPORTS.items()
    }
    figures = processes(bench, commands)
    return {"import": {k: [v[0] for v in vs] for k, vs in figures.items()}}


def processes(bench, commands):
    """Seconds and peak bytes of every command, round by round."""
    return bench.in_turn(
        {label: lambda c=c: bench.process(c) for label, c in commands.items()},
        bench.rounds(11),
    )


def row_token(bench):
    """Whole processes that print a living token from a file, and their peak memory."""
    prepared = ("ours", "google", "msal", "requests_auth", "cli_oauth2", "anthropic")
    for name in prepared:
        try:
            bench.subject(name, "prepare", name)
        except (Failed, OSError) as error:
            print(f"    {name}: {error}", file=sys.stderr)
    ours = python_of("ours")
    commands = {
        "pass": [ours, "-c", "pass"],
        "python -m claude_oauth token": [ours, "-m", "claude_oauth", "token"],
        "claude-oauth token": [str(ENVIRONMENTS / "ours/bin/claude-oauth"), "token"],
        "python claude_oauth.py token": [ours, str(SCRIPT), "token"],
    }
    for label, (environment, script, argument) in TOKENS.items():
        if "://" not in argument:
            argument = str(bench.directory / argument)
        path = str(HERE / "tokens" / f"token_{script}.py")
        commands[label] = [python_of(environment), path, argument]
    figures = processes(bench, commands)
    return {
        "token from a file": {k: [v[0] for v in vs] for k, vs in figures.items()},
        "memory of token": {k: [v[1] * 1024 for v in vs] for k, vs in figures.items()},
    }


def row_call(bench):
    return {"living token": in_process(bench, CALLS, "call")}


def row_threads(bench):
    return {"living token, 8 threads": in_process(bench, CALLS, "threads")}


def row_signed(bench):
    return {"prepared request": in_process(bench, SIGNED, "signed")}


def in_process(bench, subjects, row):
    bench.subject("ours", "prepare", "ours")
    for name in ("google", "msal", "requests_auth"):
        bench.subject(name, "prepare", name)
    return bench.in_turn(
        {
            label: lambda e=environment, s=subject: bench.subject(e, row, s)["value"]
            for label, (environment, subject) in subjects.items()
        },
        bench.rounds(5),
    )


def row_login(bench):
    """Median of a round's logins, from the callback to the return."""

    def measure(environment, subject, count):
        values = bench.subject(environment, "login", subject, port, count)["values"]
        return statistics.median(values)

    with server() as port:
        figures = bench.in_turn(
            {label: lambda a=a: measure(*a) for label, a in LOGINS.items()},
            bench.rounds(5),
        )
    return {"callback to return": figures}


def row_stampede(bench):
    """One refresh against 64 workers in 8 processes that all find an expired token."""
    workers = {
        "1 worker": ("ours", 1, 1),
        "64 workers in 8 processes": ("ours", 8, 8),
        "1 worker, requests imported": ("ours_warm", 1, 1),
        "64 workers, requests imported": ("ours_warm", 8, 8),
    }
    rows = {}
    for delay in (0.1, 0.0):
        with server(delay) as port:
            label = f"expired token, server answers after {delay * 1000:.0f} ms"
            rows[label] = bench.in_turn(
                {
                    name: lambda w=w, p=port: stampede(bench, p, *w)["value"]
                    for name, w in workers.items()
                },
                bench.rounds(7),
            )
    return rows


def stampede(bench, port, subject, processes, threads):
    """Seconds until all have a token; fails if that took more than one request."""
    ask_count(port)
    row = ("stampede", subject, port, processes, threads)
    result = bench.subject("ours", *row)
    if result["served"] != processes * threads:
        raise Failed(f"only {result['served']} got a token")
    if ask_count(port) != 1:
        raise Failed("more than one refresh request")
    return result


def ask_count(port):
    from urllib.request import ProxyHandler, build_opener

    url = f"http://127.0.0.1:{port}/count"
    with build_opener(ProxyHandler({})).open(url) as answer:
        return json.load(answer)["count"]


def row_growth(bench):
    """Many processes over one directory, and large records.

    In each run of the first two one process refreshes, once, and all get the token.
    """
    with server() as port:
        runs = bench.in_turn(
            {
                f"{count}": lambda c=count: stampede(bench, port, "ours", c, 1)
                for count in (1, 8, 64, 256)
            },
            bench.rounds(3),
        )
    rows = {
        f"growth: {name}, by processes": {
            count: [run[key] for run in figures] for count, figures in runs.items()
        }
        for name, key in (("refresh for all", "value"), ("access_token", "call"))
    }
    bench.subject("ours", "prepare", "ours")
    rows["growth: save, by processes"] = bench.in_turn(
        {
            f"{count}": lambda c=count: bench.subject("ours", "grow", "ours", c)[
                "value"
            ]
            for count in (1, 8, 64)
        },
        bench.rounds(3),
    )
    for operation in ("access_token", "load", "save"):
        rows[f"growth: {operation}, by KiB of record"] = bench.in_turn(
            {
                f"{size}": lambda s=size, o=operation: bench.subject(
                    "ours", "sized", "ours", o, s
                )["value"]
                for size in (1, 15, 30, 60)
            },
            bench.rounds(3),
        )
    (bench.directory / "credentials.json").unlink()  # its padding is not for others
    return rows


def row_noticed(bench):
    bench.subject("ours", "prepare", "ours")
    figures = bench.in_turn(
        {"claude_oauth": lambda: bench.subject("ours", "noticed", "ours")["value"]},
        bench.rounds(9),
    )
    return {"another process's change": figures}


def unwanted_imports(bench):
    """Which of the modules that `token` must not import it does import."""
    bench.subject("ours", "prepare", "ours")
    command = [python_of("ours"), "-X", "importtime", str(SCRIPT), "token"]
    ended = subprocess.run(command, env=bench.environ, capture_output=True, text=True)
    seen = set(re.findall(r"\|\s+([\w.]+)$", ended.stderr, re.MULTILINE))
    return [name for name in UNWANTED if name in seen]


ROWS = {
    "import": row_import,
    "token": row_token,
    "call": row_call,
    "threads": row_threads,
    "signed": row_signed,
    "login": row_login,
    "stampede": row_stampede,
    "growth": row_growth,
    "noticed": row_noticed,
}

# What a row's ratios are taken against, where it is not the row's first subject.
REFERENCE = {
    "living token": "claude_oauth",
    "living token, 8 threads": "claude_oauth",
    "prepared request": "claude_oauth",
}


# -- Report ----------------------------------------------------------------------------


def ratios(figures, label, reference):
    """Round by round, this subject's figure over the reference's."""
    return [a / b for a, b in zip(figures[label], figures[reference])]


def middle(values):
    """Median and the middle half."""
    if len(values) < 2:
        return values[0], values[0], values[0]
    low, middle_, high = statistics.quantiles(values, n=4, method="inclusive")
    return middle_, low, high


def shown(value, row):
    """A figure with its unit: bytes for memory, else seconds."""
    if "memory" in row:
        return f"{value / 2**20:.1f} MiB"
    for factor, unit in ((1, "s"), (1e3, "ms"), (1e6, "µs")):
        if value * factor >= 1:
            return f"{value * factor:.3g} {unit}"
    return f"{value * 1e9:.0f} ns"


def table(results):
    lines = []
    for row, figures in results.items():
        reference = REFERENCE.get(row, next(iter(figures)))
        lines += [f"### {row}", "", f"| | median | × {reference} | middle half |"]
        lines += ["| --- | ---: | ---: | ---: |"]
        for label in figures:
            value, low, high = middle(ratios(figures, label, reference))
            absolute = shown(statistics.median(figures[label]), row)
            spread = f"{low:.2f} – {high:.2f}"
            lines.append(f"| {label} | {absolute} | {value:.2f} | {spread} |")
        lines.append("")
        if row in NOT_RUN:
            lines += [f"Not in this row: {NOT_RUN[row]}.", ""]
    return "\n".join(lines)


def goals(results):
    """What was to be reached: (what, goal, measured as text, whether it is)."""

    def ratio(row, label, reference):
        return statistics.median(ratios(results[row], label, reference))

    def peers(row):
        known = ("claude_oauth", "attribute and clock", "attribute, clock and stat")
        others = [label for label in results[row] if label not in known]
        return min(others, key=lambda label: statistics.median(results[row][label]))

    checks = []

    def at_most(what, limit, value, unit="×"):
        checks.append(
            (what, f"≤ {limit:g} {unit}", f"{value:.2f} {unit}", value <= limit)
        )

    if "import" in results:
        at_most("import claude_oauth", 2.0, ratio("import", "claude_oauth", "pass"))
    if "token from a file" in results:
        for row, limit in (("token from a file", 2.5), ("memory of token", 1.5)):
            for label in results[row]:
                if label.endswith(" token"):
                    at_most(f"{row}: {label}", limit, ratio(row, label, "pass"))
    for row in ("living token", "living token, 8 threads"):
        if row in results:
            best = peers(row)
            at_most(f"{row}, against {best}", 1.0, ratio(row, "claude_oauth", best))
    if "another process's change" in results:
        seen = max(results["another process's change"]["claude_oauth"])
        at_most("another process's change is seen", 1.0, seen, "s")
    if "prepared request" in results:
        value = ratio("prepared request", "claude_oauth", "google-auth")
        at_most("BearerAuth, against google's before_request", 0.333, value)
    if "callback to return" in results:
        for reference in list(LOGINS)[:2]:
            value = ratio("callback to return", "claude_oauth", reference)
            at_most(f"login() from its callback, against {reference}", 1.3, value)
    for row in results:
        if row.startswith("expired"):
            value = ratio(row, "64 workers in 8 processes", "1 worker")
            at_most(row, 1.5, value)
            value = ratio(
                row, "64 workers, requests imported", "1 worker, requests imported"
            )
            at_most(f"{row}, requests imported", 1.5, value)
        if row.endswith("by processes"):
            # The processor's time of one call stays; that of all may grow with them.
            most = list(results[row])[-1]
            limit = int(most) if "for all" in row else 1.5
            at_most(f"{row}, {most} against 1", limit, ratio(row, most, "1"))
        if row.endswith("KiB of record"):
            at_most(f"{row}, 60 against 1", 60, ratio(row, "60", "1"))
    return checks


def goal_table(checks):
    lines = ["| what | goal | measured | |", "| --- | ---: | ---: | --- |"]
    for what, goal, measured, reached in checks:
        lines.append(
            f"| {what} | {goal} | {measured} | {'' if reached else 'missed'} |"
        )
    return "\n".join(lines) + "\n"


def machine():
    model = "unknown processor"
    if os.path.exists("/proc/cpuinfo"):
        names = re.findall(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
        model = names[0] if names else model
    return (
        f"{platform.system()} {platform.machine()}, {os.cpu_count()} × {model}, "
        f"{platform.python_implementation()} {platform.python_version()}"
    )


def report(results, bench, unwanted, seconds):
    versions = ", ".join(v for k, named in PEERS.items() if k != "ours" for v in named)
    parts = [
        "# Results of the last run of `tox -e bench`",
        f"{machine()}; {seconds / 60:.1f} min. Peers: {versions}.",
        goal_table(goals(results)),
        "Modules that `token` imports though it should not: "
        + (", ".join(unwanted) or "none")
        + ".",
        table(results),
    ]
    if bench.missing:
        reasons = "; ".join(f"{k}: {v}" for k, v in bench.missing.items())
        parts += [f"Did not run: {reasons}."]
    return "\n\n".join(parts) + "\n"


def draw(results):
    install("charts", CHARTS)
    path = HERE / "results" / "results.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(results, indent=1))
    command = [python_of("charts"), str(HERE / "charts.py"), str(path)]
    subprocess.run(command, check=True)
    fleet = [python_of("ours"), str(HERE / "profile_fleet.py"), "--json"]
    told = subprocess.run(fleet, check=True, stdout=subprocess.PIPE, text=True)
    drawn = [python_of("charts"), str(HERE / "charts.py"), "--fleet"]
    subprocess.run(drawn, input=told.stdout, text=True, check=True)


def main():
    parser = argparse.ArgumentParser(description="Measure claude_oauth and its peers.")
    parser.add_argument("--quick", action="store_true", help="two rounds of each row")
    parser.add_argument("--only", choices=ROWS, action="append", help="this row alone")
    chosen = parser.parse_args()
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
    begin = time.monotonic()
    print("installing the peers", file=sys.stderr)
    missing = install_all()
    results = {}
    directory = tempfile.mkdtemp(prefix="claude-oauth-bench-")
    try:
        bench = Bench(directory, chosen.quick, missing)
        unwanted = unwanted_imports(bench)
        for name in chosen.only or ROWS:
            print(f"{time.monotonic() - begin:4.0f} s  {name}", file=sys.stderr)
            results.update(ROWS[name](bench))
    finally:
        shutil.rmtree(directory)
    if not (chosen.only or chosen.quick):
        draw(results)
    text = report(results, bench, unwanted, time.monotonic() - begin)
    if not (chosen.only or chosen.quick):
        (HERE / "RESULTS.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
