"""An authorization server that says yes to everything, at once or after a delay.

    python server.py [SECONDS]

Prints its port; GET /count tells how many token requests came since the last time.
"""

import json
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

SCOPES = (
    "user:profile user:inference user:sessions:claude_code user:mcp_servers "
    "user:file_upload"
)
PROFILE = {
    "account": {
        "uuid": "00000000-0000-0000-0000-000000000001",
        "email": "someone@example.com",
        "display_name": "Someone",
        "created_at": "2025-01-01T00:00:00Z",
    },
    "organization": {
        "uuid": "00000000-0000-0000-0000-000000000002",
        "name": "Example",
        "organization_type": "claude_max",
        "billing_type": "stripe_subscription",
        "rate_limit_tier": "default_claude_max_20x",
        "subscription_created_at": "2025-01-01T00:00:00Z",
        "has_extra_usage_enabled": False,
    },
}


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    wbufsize = -1
    delay = 0.0
    issued = 0
    counted = 0
    lock = threading.Lock()

    def do_POST(self):
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        with self.lock:
            Handler.issued += 1
        time.sleep(self.delay)
        scope = SCOPES if b"claude" in body or b"{" in body else "all"
        self.answer(
            {
                "token_type": "bearer",
                "access_token": f"access-{Handler.issued}",
                "refresh_token": f"refresh-{Handler.issued}",
                "expires_in": 28800,
                "scope": scope,
            }
        )

    def do_GET(self):
        above = self.path.partition("/.well-known")[0]
        origin = f"https://{self.headers['Host']}{above}"
        if self.path == "/count":
            with self.lock:
                since = Handler.issued - Handler.counted
                Handler.counted = Handler.issued
            self.answer({"count": since})
        elif self.path.endswith("/openid-configuration"):
            self.answer(
                {
                    "issuer": origin,
                    "authorization_endpoint": f"{origin}/authorize",
                    "token_endpoint": f"{origin}/token",
                }
            )
        else:
            self.answer(PROFILE)

    def answer(self, obj):
        data = json.dumps(obj).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)
        self.wfile.flush()

    def log_message(self, format, *args):
        pass


class Server(ThreadingHTTPServer):
    request_queue_size = 128


if __name__ == "__main__":
    Handler.delay = float(sys.argv[1]) if len(sys.argv) > 1 else 0.0
    with Server(("127.0.0.1", 0), Handler) as server:
        print(server.server_port, flush=True)
        server.serve_forever()
