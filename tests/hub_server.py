"""A server on this machine with the few endpoints of the Hugging Face Hub that the kit uses.

It keeps repositories in memory, and what it was sent by its hash, as the Hub does; it is written
from what ``huggingface_hub`` asks for.
"""

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

LARGE = (".onnx", ".data")  # kept as large files, by SHA-256


def git_hash(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


class Hub(ThreadingHTTPServer):
    """The server.

    Attributes:
        repos: By name, the commits: each its hash and the files, by path.
        large: What was uploaded, by SHA-256.
        requests: ``method path``, and the part that was asked for, of each in their order.
        cut: A file's download ends after so many bytes, once.
    """

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        self.repos: dict[str, list[tuple[str, dict[str, bytes]]]] = {}
        self.large: dict[str, bytes] = {}
        self.requests: list[str] = []
        self.cut: int | None = None

    def commit(self, repo: str, files: dict[str, bytes]) -> str:
        commits = self.repos.setdefault(repo, [])
        whole = {**(commits[-1][1] if commits else {}), **files}
        text = json.dumps([len(commits), sorted((n, git_hash(c)) for n, c in whole.items())])
        commits.append((hashlib.sha1(text.encode()).hexdigest(), whole))
        return commits[-1][0]

    def at(self, repo: str, revision: str) -> tuple[str, dict[str, bytes]] | None:
        commits = self.repos.get(repo, [])
        if revision == "main" and commits:
            return commits[-1]
        return next((commit for commit in commits if commit[0] == revision), None)


class Handler(BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def _answer(self, status: int, body: object = b"", **headers: object) -> None:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def _route(self) -> None:
        path = unquote(urlsplit(self.path).path)
        part = self.headers.get("Range", "")
        self.server.requests.append(f"{self.command} {path} {part}".rstrip())
        body = self._body()
        for method, pattern, name in ROUTES:
            match = re.fullmatch(pattern, path)
            if match and self.command in method:
                getattr(self, f"_{name}")(body, *match.groups())
                return
        self._answer(404, {"error": "no such page"})

    do_GET = do_HEAD = do_POST = do_PUT = _route  # noqa: N815 - http.server's names

    def _found(self, repo: str, revision: str) -> tuple[str, dict[str, bytes]] | None:
        if repo not in self.server.repos:
            self._answer(404, {"error": "x"}, X_Error_Code="RepoNotFound")
        elif (commit := self.server.at(repo, revision)) is None:
            self._answer(404, {"error": "x"}, X_Error_Code="RevisionNotFound")
        else:
            return commit
        return None

    def _create(self, body: bytes) -> None:
        asked = json.loads(body)
        name = "/".join(filter(None, [asked.get("organization"), asked["name"]]))
        if name in self.server.repos:
            self._answer(409, {"error": "it exists", "url": f"{self.server.url}/{name}"})
            return
        self.server.commit(name, {".gitattributes": b"*.onnx filter=lfs\n"})
        self._answer(200, {"url": f"{self.server.url}/{name}"})

    def _info(self, _: bytes, repo: str, revision: str | None) -> None:
        if commit := self._found(repo, revision or "main"):
            names = [{"rfilename": name} for name in commit[1]]
            self._answer(200, {"id": repo, "modelId": repo, "sha": commit[0], "siblings": names})

    def _tree(self, _: bytes, repo: str, revision: str) -> None:
        if commit := self._found(repo, revision):
            self._answer(200, [entry(name, content) for name, content in commit[1].items()])

    def _paths(self, body: bytes, repo: str, revision: str) -> None:
        names = parse_qs(body.decode())["paths"]
        if commit := self._found(repo, revision):
            self._answer(200, [entry(n, content) for n, content in commit[1].items() if n in names])

    def _preupload(self, body: bytes, *_: str) -> None:
        files = [
            {"path": each["path"], "shouldIgnore": False,
             "uploadMode": "lfs" if each["path"].endswith(LARGE) else "regular"}
            for each in json.loads(body)["files"]
        ]  # fmt: skip
        self._answer(200, {"files": files})

    def _batch(self, body: bytes, _: str) -> None:
        objects = [
            {"oid": each["oid"], "size": each["size"], "authenticated": True}
            | ({} if each["oid"] in self.server.large else
               {"actions": {"upload": {"href": f"{self.server.url}/large/{each['oid']}"}}})
            for each in json.loads(body)["objects"]
        ]  # fmt: skip
        self._answer(200, {"transfer": "basic", "objects": objects},
                     Content_Type="application/vnd.git-lfs+json")  # fmt: skip

    def _upload(self, body: bytes, oid: str) -> None:
        assert hashlib.sha256(body).hexdigest() == oid
        self.server.large[oid] = body
        self._answer(200)

    def _commit(self, body: bytes, repo: str, _: str) -> None:
        files = {}
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.server.large[value["oid"]]
        made = self.server.commit(repo, files)
        self._answer(200, {"commitUrl": f"{self.server.url}/{repo}/commit/{made}",
                           "commitOid": made, "success": True})  # fmt: skip

    def _resolve(self, _: bytes, repo: str, revision: str, name: str) -> None:
        commit = self._found(repo, revision)
        if commit is None:
            return
        if name not in commit[1]:
            self._answer(404, {"error": "x"}, X_Error_Code="EntryNotFound")
            return
        content = commit[1][name]
        headers = {"ETag": f'"{hash_of(name, content)}"', "X_Repo_Commit": commit[0],
                   "Accept_Ranges": "bytes"}  # fmt: skip
        start = int((self.headers.get("Range") or "bytes=0-")[6:].split("-")[0])
        if self.command == "GET" and self.server.cut is not None:
            self.send_response(200)
            self.send_header("ETag", headers["ETag"])
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content[: self.server.cut])
            self.wfile.flush()
            self.server.cut = None
            self.close_connection = True
            self.connection.close()
            return
        if start:
            headers["Content_Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
        self._answer(206 if start else 200, content[start:], **headers)

    def _validate(self, body: bytes) -> None:
        text = json.loads(body)["content"]
        errors = [] if "license: cc-by-4.0" in text else [{"message": '"license" must be known'}]
        self._answer(400 if errors else 200, {"errors": errors, "warnings": []})


def hash_of(name: str, content: bytes) -> str:
    return hashlib.sha256(content).hexdigest() if name.endswith(LARGE) else git_hash(content)


def entry(name: str, content: bytes) -> dict[str, object]:
    found: dict[str, object] = {
        "type": "file", "path": name, "size": len(content), "oid": git_hash(content)
    }  # fmt: skip
    if name.endswith(LARGE):
        oid = hashlib.sha256(content).hexdigest()
        found["lfs"] = {"oid": oid, "size": len(content), "pointerSize": 134}
    return found


REPO = r"([\w.-]+/[\w.-]+)"
ROUTES = [
    ("POST", "/api/repos/create", "create"),
    ("POST", "/api/validate-yaml", "validate"),
    ("GET", f"/api/models/{REPO}(?:/revision/(.+))?", "info"),
    ("GET", f"/api/models/{REPO}/tree/([^/]+)", "tree"),
    ("POST", f"/api/models/{REPO}/paths-info/(.+)", "paths"),
    ("POST", f"/api/models/{REPO}/preupload/(.+)", "preupload"),
    ("POST", f"/api/models/{REPO}/commit/(.+)", "commit"),
    ("POST", rf"/{REPO}\.git/info/lfs/objects/batch", "batch"),
    ("PUT", "/large/(.+)", "upload"),
    (("GET", "HEAD"), f"/{REPO}/resolve/([^/]+)/(.+)", "resolve"),
]


@contextmanager
def serving() -> Iterator[Hub]:
    with Hub() as hub:
        thread = threading.Thread(target=hub.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield hub
        finally:
            hub.shutdown()
            thread.join()
