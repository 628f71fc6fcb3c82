"""A web server on this machine that misbehaves when it is told to."""

import base64
import hashlib
import threading
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Site:
    """A web server on this machine.

    Attributes:
        files: The content of each file by its path.
        answers: What the next requests of a path are answered instead: a status, ``short``, or
            ``wrong``.
        requests: How often each path was asked for with GET, and from which byte.
        changed: When its files were changed last, which it says in place of their ETags; None for
            a server that has ETags.
        knows_ranges: Whether it sends the rest of a file where it is asked for that.
    """

    def __init__(self, files=(), *, knows_ranges=True):
        self.files = dict(files)
        self.answers = {}
        self.requests = Counter()
        self.ranges = []
        self.changed = None
        self.knows_ranges = knows_ranges
        site = self

        class Handler(BaseHTTPRequestHandler):
            def do_HEAD(self):
                self.answer(has_body=False)

            def do_GET(self):
                site.requests[self.path] += 1
                self.answer(has_body=True)

            def answer(self, *, has_body):
                waiting = site.answers.get(self.path, [])
                body = site.files.get(self.path)
                what = waiting.pop(0) if waiting and has_body else 200 if body is not None else 404
                if what not in (200, "short", "wrong"):
                    self.send_error(what)
                    return
                start = 0
                if has_body and site.knows_ranges and "Range" in self.headers:
                    start = int(self.headers["Range"].removeprefix("bytes=").rstrip("-"))
                    site.ranges.append(start)
                sent = bytes(len(body)) if what == "wrong" else body
                self.send_response(206 if start else 200)
                self.send_header("Content-Length", str(len(body) - start))
                md5 = base64.b64encode(hashlib.md5(body).digest()).decode()
                if site.changed is None:
                    self.send_header("ETag", f'"{hash(body)}"')
                else:
                    self.send_header("Last-Modified", site.changed)
                self.send_header("x-goog-hash", f"crc32c=AAAAAA==,md5={md5}")
                self.end_headers()
                if has_body:
                    self.wfile.write(
                        sent[start : len(body) // 2] if what == "short" else sent[start:]
                    )
                    self.close_connection = True

            def log_message(self, *arguments):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def close(self):
        self.server.shutdown()
        self.server.server_close()
