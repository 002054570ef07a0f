"""What is measured, for us and for each peer; runs in the environment of one of them.

    python subjects.py ROW SUBJECT DIRECTORY [ARGUMENT…]

prints one JSON object on stdout. `prepare` fills DIRECTORY with the subject's own kind
of token file; the other rows find it there. Only what SUBJECT needs is imported.
"""

import json
import os
import sys
import threading
import time
import timeit
import types

LIFETIME = 8 * 3600
API = "https://api.anthropic.com/v1/models"


# -- A living token --------------------------------------------------------------------


def ours_credentials(lifetime=LIFETIME):
    import claude_oauth

    return claude_oauth.Credentials(
        access_token="sk-ant-oat01-" + "a" * 80,
        refresh_token="sk-ant-ort01-" + "r" * 80,
        expires_at=time.time() + lifetime,
        scopes=claude_oauth.CLAUDE_AI_SCOPES,
        subscription_type="max",
        rate_limit_tier="default_claude_max_20x",
        client_id="bench",
    )


def ours_service(directory, port=1):
    import claude_oauth

    config = claude_oauth.OAuthConfig.for_server(
        f"http://127.0.0.1:{port}", client_id="bench"
    )
    path = os.path.join(directory, "credentials.json")
    return claude_oauth.OAuthService(config, claude_oauth.FileStorage(path))


def ours(directory):
    return ours_service(directory).access_token


def attribute_and_clock(directory):
    served = types.SimpleNamespace(token="a" * 90, expires_at=time.time() + LIFETIME)

    def call():
        if served.expires_at - time.time() > 300:
            return served.token
        raise RuntimeError

    return call


def attribute_clock_and_stat(directory):
    path = os.path.join(directory, "credentials.json")
    living = attribute_and_clock(directory)
    stamp = os.stat(path).st_mtime_ns

    def call():
        if os.stat(path).st_mtime_ns != stamp:
            raise RuntimeError
        return living()

    return call


def anthropic(directory):
    from anthropic.lib.credentials import AccessToken, TokenCache

    token = AccessToken("a" * 90, int(time.time()) + LIFETIME)
    return TokenCache(lambda force_refresh=False: token).get_token


def authlib(directory):
    session = authlib_session()

    def call():
        session.ensure_active_token()
        return session.token["access_token"]

    return call


def authlib_session():
    from authlib.integrations.requests_client import OAuth2Session

    return OAuth2Session("bench", token=peer_token())


def peer_token():
    return {
        "token_type": "Bearer",
        "access_token": "a" * 90,
        "refresh_token": "r" * 90,
        "expires_at": int(time.time()) + LIFETIME,
        "expires_in": LIFETIME,
    }


def requests_oauthlib(directory):
    client = oauthlib_client()
    return lambda: client.add_token(API)[1]["Authorization"]


def oauthlib_client():
    from oauthlib.oauth2 import WebApplicationClient

    return WebApplicationClient("bench", token=peer_token())


def google(directory):
    credentials = google_credentials(directory)

    def call():
        if not credentials.valid:
            raise RuntimeError
        return credentials.token

    return call


def google_credentials(directory):
    from google.oauth2.credentials import Credentials

    path = os.path.join(directory, "google.json")
    return Credentials.from_authorized_user_file(path)


def msal(directory):
    from msal import SerializableTokenCache

    cache = SerializableTokenCache()
    cache.add(msal_event())
    return msal_call(cache)


def msal_file(directory):
    from msal_extensions import FilePersistence, PersistedTokenCache

    path = os.path.join(directory, "msal.json")
    return msal_call(PersistedTokenCache(FilePersistence(path)))


def msal_call(cache):
    app = msal_app(cache)
    account = app.get_accounts()[0]
    return lambda: app.acquire_token_silent(["bench"], account)["access_token"]


MSAL_AUTHORITY = "https://login.microsoftonline.com/common"


def msal_app(cache):
    import msal

    discovered = types.SimpleNamespace(
        status_code=200,
        headers={},
        text=json.dumps(
            {
                "issuer": MSAL_AUTHORITY,
                "authorization_endpoint": MSAL_AUTHORITY + "/a",
                "token_endpoint": MSAL_AUTHORITY + "/t",
            }
        ),
    )
    return msal.PublicClientApplication(
        "bench",
        authority=MSAL_AUTHORITY,
        token_cache=cache,
        http_client=types.SimpleNamespace(get=lambda url, **_options: discovered),
        instance_discovery=False,
    )


def msal_event():
    import base64

    def encoded(obj):
        return base64.urlsafe_b64encode(json.dumps(obj).encode()).decode().rstrip("=")

    now = int(time.time())
    identity = {"aud": "bench", "iss": "x", "sub": "s", "exp": now + LIFETIME}
    return {
        "client_id": "bench",
        "scope": ["bench"],
        "token_endpoint": MSAL_AUTHORITY + "/t",
        "environment": "login.microsoftonline.com",
        "response": {
            **peer_token(),
            "client_info": encoded({"uid": "u", "utid": "t"}),
            "id_token": f"e30.{encoded(identity)}.x",
        },
    }


def requests_auth(directory):
    from requests_auth import JsonTokenFileCache

    cache = JsonTokenFileCache(os.path.join(directory, "requests_auth.json"))
    return lambda: cache.get_token("bench")


def databricks(directory):
    import datetime

    from databricks.sdk.oauth import SessionCredentials, Token

    expiry = datetime.datetime.now() + datetime.timedelta(seconds=LIFETIME)
    session = SessionCredentials(Token("a" * 90, "Bearer", "r", expiry), API, "bench")
    return lambda: session.token().access_token


# -- Token files, one of each kind -----------------------------------------------------


def prepare_ours(directory):
    import claude_oauth

    path = os.path.join(directory, "credentials.json")
    claude_oauth.FileStorage(path).save(ours_credentials())


def prepare_google(directory):
    import datetime

    from google.oauth2.credentials import Credentials

    credentials = Credentials(
        "a" * 90,
        refresh_token="r" * 90,
        token_uri=API,
        client_id="bench",
        client_secret="bench",
        expiry=datetime.datetime.utcnow() + datetime.timedelta(seconds=LIFETIME),
    )
    with open(os.path.join(directory, "google.json"), "w") as file:
        file.write(credentials.to_json())


def prepare_msal(directory):
    from msal_extensions import FilePersistence, PersistedTokenCache

    path = os.path.join(directory, "msal.json")
    PersistedTokenCache(FilePersistence(path)).add(msal_event())


def prepare_requests_auth(directory):
    tokens = {"bench": ["a" * 90, time.time() + LIFETIME, "r" * 90]}
    with open(os.path.join(directory, "requests_auth.json"), "w") as file:
        json.dump(tokens, file)


def prepare_cli_oauth2(directory):
    from oauthcli import AuthFlow
    from requests_oauthlib import OAuth2Session

    AuthFlow("bench", OAuth2Session("bench"), API, API)._save_token(peer_token())


def prepare_anthropic(directory):
    config = {"authentication": {"type": "user_oauth", "client_id": "bench"}}
    token = {
        "type": "oauth_token",
        "access_token": "a" * 90,
        "refresh_token": "r" * 90,
        "expires_at": int(time.time()) + LIFETIME,
    }
    for folder, content in (("configs", config), ("credentials", token)):
        os.makedirs(os.path.join(directory, folder), exist_ok=True)
        path = os.path.join(directory, folder, "bench.json")
        with open(path, "w") as file:
            json.dump(content, file)
        os.chmod(path, 0o600)


def prepare(subject, directory):
    globals()["prepare_" + subject](directory)
    return {}


# -- Rows: a call ----------------------------------------------------------------------


def call(subject, directory):
    """Seconds of one call that hands out a living token; the best of seven series."""
    timer = timeit.Timer(globals()[subject](directory))
    count = max(1, timer.autorange()[0] // 4)
    return {"value": min(timer.repeat(7, count)) / count}


def threads(subject, directory, count=8):
    """The same, from eight threads at once: seconds divided by all their calls."""
    function = globals()[subject](directory)
    each = max(100, timeit.Timer(function).autorange()[0] // 32)
    best = min(_round(function, int(count), each) for _ in range(3))
    return {"value": best / (int(count) * each)}


def _round(function, count, each):
    barrier = threading.Barrier(count + 1)

    def work():
        barrier.wait()
        for _ in range(each):
            function()

    workers = [threading.Thread(target=work) for _ in range(count)]
    for worker in workers:
        worker.start()
    barrier.wait()
    begin = time.perf_counter()
    for worker in workers:
        worker.join()
    return time.perf_counter() - begin


# -- Rows: a prepared request ----------------------------------------------------------


def signed(subject, directory):
    """Seconds to put the token into one prepared request, each a new one."""
    make, sign = globals()["sign_" + subject](directory)
    best = min(_sign_all([make() for _ in range(2000)], sign) for _ in range(7))
    return {"value": best / 2000}


def _sign_all(prepared, sign):
    begin = time.perf_counter()
    for request in prepared:
        sign(request)
    return time.perf_counter() - begin


def prepared_request():
    import requests

    return requests.Request("GET", API).prepare()


def sign_ours(directory):
    import claude_oauth

    return prepared_request, claude_oauth.BearerAuth(ours_service(directory))


def sign_google(directory):
    credentials = google_credentials(directory)

    def sign(request):
        credentials.before_request(None, request.method, request.url, request.headers)

    return prepared_request, sign


def sign_authlib(directory):
    return prepared_request, authlib_session().token_auth


def sign_requests_oauthlib(directory):
    from requests_oauthlib import OAuth2

    return prepared_request, OAuth2("bench", oauthlib_client())


def sign_anthropic(directory):
    import httpx2
    from anthropic.lib.credentials import AccessToken, AccessTokenAuth, TokenCache

    token = AccessToken("a" * 90, int(time.time()) + LIFETIME)
    auth = AccessTokenAuth(TokenCache(lambda force_refresh=False: token))
    return (
        lambda: httpx2.Request("GET", API),
        lambda request: next(auth.sync_auth_flow(request)),
    )


# -- Rows: a login ---------------------------------------------------------------------


class Browser:
    """A person who says yes at once: opens the callback in a thread, follows redirects.

    `.began` is the moment at which the callback leaves for the listener.
    """

    def __init__(self, with_state=True):
        self.with_state = with_state

    def open(self, url, new=0, autoraise=True):
        threading.Thread(target=self._approve, args=(url,), daemon=True).start()
        return True

    def _approve(self, url):
        from urllib.parse import parse_qs, urlencode, urlsplit

        asked = parse_qs(urlsplit(url).query)
        answer = {"code": "c" * 40}
        if self.with_state:
            answer["state"] = asked["state"][0]
        target = urlsplit(asked["redirect_uri"][0])
        path, query = target.path or "/", urlencode(answer)
        connection = self._connect(target.port)
        self.began = time.perf_counter()
        if asked.get("response_mode") == ["form_post"]:
            kind = {"Content-Type": "application/x-www-form-urlencoded"}
            connection.request("POST", path, query, kind)
            connection.getresponse().read()
            return
        path += "?" + query
        while path:
            connection.request("GET", path)
            response = connection.getresponse()
            response.read()
            path = response.getheader("Location")
            connection.close()

    def _connect(self, port):
        """A connection to the listener, which some open after the browser only."""
        import http.client

        limit = time.monotonic() + 10
        while True:
            try:
                connection = http.client.HTTPConnection("localhost", port)
                connection.connect()
                return connection
            except ConnectionRefusedError:
                if time.monotonic() > limit:
                    raise
                time.sleep(0.001)


def login(subject, directory, port, count):
    """Seconds from the callback to the return of the login, for each login."""
    import webbrowser

    browser = Browser(with_state=subject != "oauth2_cli_auth")
    webbrowser.register("bench", None, browser, preferred=True)
    run = globals()["login_" + subject](directory, int(port), browser)
    values = []
    for _ in range(int(count) + 2):
        run()
        values.append(time.perf_counter() - browser.began)
    return {"values": values[2:]}


def login_bare(directory, port, browser):
    """A thread, an Event, a requests.post, fsync and rename: the least that does it."""

    def run():
        code = bare_callback(browser)
        answer = bare_exchange(port, code)
        bare_write(os.path.join(directory, "bare.json"), answer)

    return run


def login_bare_profile(directory, port, browser):
    """The same with what else a login of ours does: the profile, and a file for it."""
    import requests

    def run():
        code = bare_callback(browser)
        answer = bare_exchange(port, code)
        bearer = {"Authorization": f"Bearer {answer['access_token']}"}
        url = f"http://127.0.0.1:{port}/api/oauth/profile"
        profile = requests.get(url, headers=bearer).json()
        bare_write(os.path.join(directory, "bare-account.json"), profile)
        bare_write(os.path.join(directory, "bare.json"), answer)

    return run


def bare_callback(browser):
    import socket

    got = []
    arrived = threading.Event()
    with socket.create_server(("127.0.0.1", 0)) as listener:
        threading.Thread(target=bare_serve, args=(listener, arrived, got)).start()
        here = f"http://127.0.0.1:{listener.getsockname()[1]}"
        browser.open(f"{here}/?state=s&redirect_uri={here}/callback")
        arrived.wait()
    return got[0]


def bare_serve(listener, arrived, got):
    from urllib.parse import parse_qs, urlsplit

    connection, _ = listener.accept()
    with connection:
        path = connection.recv(65536).split(b" ")[1].decode()
        got.append(parse_qs(urlsplit(path).query)["code"][0])
        arrived.set()
        connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok")


def bare_exchange(port, code):
    import requests

    body = {"grant_type": "authorization_code", "code": code}
    return requests.post(f"http://127.0.0.1:{port}/v1/oauth/token", json=body).json()


def bare_write(path, obj):
    with open(path + ".tmp", "w") as file:
        json.dump(obj, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(path + ".tmp", path)


def login_ours(directory, port, browser):
    directory = os.path.join(directory, "login")
    os.makedirs(directory, exist_ok=True)
    service = ours_service(directory, port)
    return lambda: service.login(open_browser=browser.open, paste=False)


def login_google(directory, port, browser):
    from google_auth_oauthlib.flow import InstalledAppFlow

    os.environ["OAUTHLIB_INSECURE_TRANSPORT"] = "1"
    os.environ["OAUTHLIB_RELAX_TOKEN_SCOPE"] = "1"
    origin = f"http://127.0.0.1:{port}"
    client = {
        "client_id": "bench",
        "client_secret": "bench",
        "auth_uri": f"{origin}/authorize",
        "token_uri": f"{origin}/token",
    }

    def run():
        flow = InstalledAppFlow.from_client_config({"installed": client}, ["all"])
        flow.run_local_server(port=0, authorization_prompt_message=None)

    return run


def login_cli_oauth2(directory, port, browser):
    from oauthcli import AuthFlow
    from requests_oauthlib import OAuth2Session

    os.environ["OAUTHLIB_INSECURE_TRANSPORT"] = "1"
    origin = f"http://127.0.0.1:{port}"

    def run():
        flow = AuthFlow(
            "bench", OAuth2Session("bench"), f"{origin}/authorize", f"{origin}/token"
        )
        flow.auth_server(port=0, force=True, authorization_prompt_message=None)

    return run


def login_oauth2_cli_auth(directory, port, browser):
    from oauth2_cli_auth import OAuth2ClientInfo, get_access_token_with_browser_open

    origin = f"http://127.0.0.1:{port}"
    client = OAuth2ClientInfo(
        f"{origin}/authorize", f"{origin}/token", "bench", None, ["all"]
    )
    return lambda: get_access_token_with_browser_open(client, 0)


def login_databricks(directory, port, browser):
    from databricks.sdk.oauth import OAuthClient, OidcEndpoints

    origin = f"http://127.0.0.1:{port}"
    endpoints = OidcEndpoints(f"{origin}/authorize", f"{origin}/token")

    def run():
        redirect = f"http://localhost:{free_port()}/callback"
        client = OAuthClient(endpoints, redirect, "bench", ["all"])
        client.initiate_consent().launch_external_browser()

    return run


def free_port():
    import socket

    with socket.create_server(("127.0.0.1", 0)) as taken:
        return taken.getsockname()[1]


def login_msal(directory, port, browser):
    import msal
    import requests

    class Loopback(requests.Session):
        """msal insists on https; the server here has none."""

        def request(self, method, url, **options):
            return super().request(method, url.replace("https:", "http:", 1), **options)

    authority = f"https://127.0.0.1:{port}/bench"
    app = msal.PublicClientApplication(
        "bench", oidc_authority=authority, http_client=Loopback()
    )

    def run():
        answer = app.acquire_token_interactive(["all"])
        if "access_token" not in answer:
            raise RuntimeError(answer)

    return run


# -- Rows: many at once ----------------------------------------------------------------


def stampede(subject, directory, port, processes, threads_each):
    """Seconds until all threads of all processes have a token; none lives before.

    And then what another call costs each of them, in seconds of processor time.
    """
    import subprocess

    prepare_expired(directory)
    command = [sys.executable, __file__, "stampeder", subject, directory, port]
    workers = [
        subprocess.Popen(
            [*command, threads_each],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for _ in range(int(processes))
    ]
    for worker in workers:
        worker.stdout.readline()  # it is ready
    begin = time.monotonic()
    for worker in workers:
        worker.stdin.write("go\n")
        worker.stdin.flush()
    ends = [json.loads(worker.stdout.readline()) for worker in workers]
    calls = [json.loads(worker.communicate("go\n")[0])["call"] for worker in workers]
    return {
        "value": max(end["end"] for end in ends) - begin,
        "served": sum(end["served"] for end in ends),
        "call": sorted(calls)[len(calls) // 2],
    }


def prepare_expired(directory):
    import claude_oauth

    path = os.path.join(directory, "credentials.json")
    claude_oauth.FileStorage(path).save(ours_credentials(lifetime=-60))
    write_account(directory)


def write_account(directory):
    """A warm account, so that a refresh asks for no profile; without older notes."""
    account = {
        "accountUuid": "a",
        "emailAddress": "someone@example.com",
        "organizationUuid": "o",
        "billingType": "stripe_subscription",
        "accountCreatedAt": "2025-01-01T00:00:00Z",
        "subscriptionCreatedAt": "2025-01-01T00:00:00Z",
    }
    path = os.path.join(directory, "account.json")
    with open(path, "w", opener=lambda *at: os.open(*at, 0o600)) as file:
        json.dump({"oauthAccount": account}, file)


def stampeder(subject, directory, port, count):
    if subject == "ours_warm":
        import requests  # noqa: F401
    service = ours_service(directory, int(port))
    barrier = threading.Barrier(int(count) + 1)
    served = []

    def work():
        barrier.wait()
        served.append(service.access_token())

    workers = [threading.Thread(target=work) for _ in range(int(count))]
    for worker in workers:
        worker.start()
    print("ready", flush=True)
    sys.stdin.readline()
    barrier.wait()
    for worker in workers:
        worker.join()
    print(json.dumps({"end": time.monotonic(), "served": len(served)}), flush=True)
    sys.stdin.readline()
    begin = time.process_time()
    for _ in range(5000):
        service.access_token()
    return {"call": (time.process_time() - begin) / 5000}


# -- Rows: growth ----------------------------------------------------------------------


def grow(subject, directory, processes):
    """Seconds of processor time a save costs each of many processes at once."""
    import subprocess

    command = [sys.executable, __file__, "grower", subject, directory]
    workers = [
        subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        for _ in range(int(processes))
    ]
    for worker in workers:
        worker.stdout.readline()
    for worker in workers:
        worker.stdin.write("go\n")
        worker.stdin.flush()
    values = [json.loads(worker.communicate()[0])["value"] for worker in workers]
    return {"value": sorted(values)[len(values) // 2]}


def grower(subject, directory):
    function, count = _operation(directory, "save")
    function()
    print("ready", flush=True)
    sys.stdin.readline()
    begin = time.process_time()
    for _ in range(count):
        function()
    return {"value": (time.process_time() - begin) / count}


def _operation(directory, name):
    import claude_oauth

    if name == "access_token":
        return ours(directory), 5000
    storage = claude_oauth.FileStorage(os.path.join(directory, "credentials.json"))
    credentials = ours_credentials()
    return (lambda: storage.save(credentials)), 20


def sized(subject, directory, operation, kibibytes):
    """Seconds of processor time a call costs with so large a record in the store."""
    path = os.path.join(directory, "credentials.json")
    os.remove(path)  # a save would keep the keys that the last size put there
    prepare_ours(directory)
    with open(path) as file:
        record = json.load(file)
    padding = int(float(kibibytes) * 1024) - len(json.dumps(record))
    for number in range(max(0, padding) // 108):
        record[f"another program's key {number:05}"] = "x" * 70
    with open(path, "w") as file:
        json.dump(record, file)
    if operation == "load":
        import claude_oauth

        function, count = claude_oauth.FileStorage(path).load, 20
    else:
        function, count = _operation(directory, operation)
    function()
    series = []
    for _ in range(5):
        begin = time.process_time()
        for _ in range(count):
            function()
        series.append((time.process_time() - begin) / count)
    return {"value": min(series)}


def noticed(subject, directory):
    """Seconds until access_token() hands out what another process has stored."""
    import subprocess

    service = ours_service(directory)
    before = service.access_token()
    code = (
        "import time, sys, claude_oauth\n"
        "storage = claude_oauth.FileStorage(sys.argv[1])\n"
        "storage.save(storage.load().replace(access_token='another'))\n"
        "print(time.monotonic())"
    )
    path = os.path.join(directory, "credentials.json")
    other = subprocess.Popen(
        [sys.executable, "-c", code, path], stdout=subprocess.PIPE, text=True
    )
    while service.access_token() == before:
        time.sleep(0.001)
    seen = time.monotonic()
    saved = float(other.communicate()[0])
    prepare_ours(directory)
    return {"value": max(0.0, seen - saved)}


def main(row, subject, directory, *arguments):
    """Answer on stdout alone: whatever a peer prints goes to stderr."""
    answer = os.dup(1)
    if row not in ("stampeder", "grower"):
        os.dup2(2, 1)
    result = globals()[row](subject, directory, *arguments)
    sys.stdout.flush()
    os.write(answer, json.dumps(result).encode())


if __name__ == "__main__":
    main(*sys.argv[1:])
