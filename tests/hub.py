"""A Hugging Face hub on this machine: repositories with commits, over HTTP as the client asks."""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from hashlib import sha1
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from urllib.parse import unquote, urlsplit

Files = Mapping[str, bytes]


class Hub(ThreadingHTTPServer):
    """Repositories, such as ``datasets/a/b`` and ``models/a/b``, each with commits in order."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.commits: dict[str, dict[str, Files]] = {}

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def commit(self, repository: str, files: Files) -> str:
        """Add the newest commit of a repository's main, and return its name."""
        commits = self.commits.setdefault(repository, {})
        name = sha1(repr((repository, len(commits), *files.items())).encode()).hexdigest()
        commits[name] = files
        return name


@contextmanager
def hub() -> Iterator[Hub]:
    """Serve a hub without repositories."""
    with Hub() as server:
        Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield server
        finally:
            server.shutdown()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Hub

    def do_GET(self) -> None:
        self._answer()

    def do_HEAD(self) -> None:
        self._answer()

    def do_POST(self) -> None:
        self._answer()

    def _answer(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        path = unquote(urlsplit(self.path).path)
        is_api, path = path.startswith("/api/"), path.removeprefix("/api").strip("/")
        if not is_api and not path.startswith("datasets/"):
            path = f"models/{path}"
        kind, owner, name, *rest = [*path.split("/"), "", ""]
        action, revision, *inside = [part for part in rest if part] or ["revision", "main"]
        commits = self.server.commits.get(f"{kind}/{owner}/{name}")
        if commits is None:
            return self._send(404, b"", {"X-Error-Code": "RepoNotFound"})
        newest = list(commits)[-1]
        revision = newest if revision == "main" else revision
        if revision not in commits:
            return self._send(404, b"", {"X-Error-Code": "RevisionNotFound"})
        files, inner = commits[revision], "/".join(inside)
        if action == "resolve":
            if inner not in files:
                headers = {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": revision}
                return self._send(404, b"", headers)
            etag = f'"{sha1(files[inner]).hexdigest()}"'
            return self._send(200, files[inner], {"X-Repo-Commit": revision, "ETag": etag})
        if action == "tree":
            return self._json(_tree(f"{inner}/".lstrip("/"), files))
        if action == "paths-info":
            return self._json(
                [_entry(name, files) for name in json.loads(body)["paths"] if name in files]
            )
        siblings = [{"rfilename": name} for name in files]
        return self._json({"id": f"{owner}/{name}", "sha": revision, "siblings": siblings})

    def _json(self, document: object) -> None:
        self._send(200, json.dumps(document).encode(), {"Content-Type": "application/json"})

    def _send(self, status: int, content: bytes, headers: Mapping[str, str]) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        """Say nothing."""


def _entry(name: str, files: Files) -> dict[str, object]:
    oid = sha1(files[name]).hexdigest()
    return {"type": "file", "path": name, "size": len(files[name]), "oid": oid}


def _tree(folder: str, files: Files) -> list[dict[str, object]]:
    """Return the folders and then all files below a folder."""
    paths = [Path(name) for name in files if name.startswith(folder)]
    folders = {str(above) for path in paths for above in path.parents} - {".", folder.strip("/")}
    below = [
        {"type": "directory", "path": one, "oid": sha1(one.encode()).hexdigest()}
        for one in sorted(folders)
        if one.startswith(folder)
    ]
    return below + [_entry(str(path), files) for path in paths]
