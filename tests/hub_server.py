"""A hub on this machine: the few addresses of huggingface.co that downloads ask for, answered from folders.

`ROOT/models/owner/name/…` and `ROOT/datasets/owner/name/…` hold the files of a repository; another branch is a folder
`name@branch` with the branch's slashes as "!". A file named GATED in it makes a repository answer as one does whose terms
nobody has accepted.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any
from urllib.parse import unquote, urlsplit


@contextmanager
def hub_server(root: Path) -> Iterator[str]:
    """Serve the folder; the value is the hub's address, for HF_ENDPOINT."""
    handler = type("Handler", (_Handler,), {"root": root})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    root: Path

    def do_GET(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length") or 0))
        parts = [unquote(part) for part in urlsplit(self.path).path.strip("/").split("/")]
        asks_for_files = parts[0] != "api"
        if not asks_for_files:
            parts = parts[1:]
        kind, parts = ("datasets", parts[1:]) if parts[0] == "datasets" else ("models", parts[parts[0] == "models" :])
        name, rest = "/".join(parts[:2]), parts[2:]
        # What a first answer named by its commit is asked for by that commit again.
        branch = rest[1] if len(rest) > 1 else "main"
        repository = self._repository(kind, name, branch)
        if repository is None:
            self._send(404, {"error": "Repository not found"}, X_Error_Code="RepoNotFound")
        elif (repository / "GATED").exists():
            self._send(403, {"error": f"Access to {name} is restricted."}, X_Error_Code="GatedRepo")
        elif asks_for_files:
            self._send_file(repository.joinpath(*rest[2:]))
        elif rest[:1] == ["tree"]:
            self._send_listing(repository, repository.joinpath(*rest[2:]))
        else:
            files = [str(path.relative_to(repository)) for path in sorted(repository.rglob("*")) if path.is_file()]
            self._send(
                200,
                {
                    "id": name,
                    "sha": _commit(repository),
                    "private": False,
                    "gated": False,
                    "tags": [],
                    "downloads": 0,
                    "siblings": [{"rfilename": file} for file in files],
                },
            )

    do_HEAD = do_POST = do_GET

    def _repository(self, kind: str, name: str, branch: str) -> Path | None:
        owner, _, own = name.partition("/")
        found = [path for path in (self.root / kind / owner).glob("*") if path.name.split("@")[0] == own]
        wanted = own if branch == "main" else f"{own}@{branch.replace('/', '!')}"
        return next((path for path in found if wanted == path.name or branch == _commit(path)), None)

    def _send_file(self, path: Path) -> None:
        if not path.is_file():
            self._send(404, {}, X_Error_Code="EntryNotFound", X_Repo_Commit=self._commit_of(path))
            return
        self._send(200, path.read_bytes(), X_Repo_Commit=self._commit_of(path), ETag=f'"{_digest(path)}"')

    def _commit_of(self, path: Path) -> str:
        kind, owner, name = path.relative_to(self.root).parts[:3]
        return _commit(self.root / kind / owner / name)

    def _send_listing(self, repository: Path, folder: Path) -> None:
        if not folder.is_dir():
            self._send(404, {"error": "not found"}, X_Error_Code="EntryNotFound")
            return
        recursive = "recursive=true" in self.path.lower()
        found = sorted(folder.rglob("*") if recursive else folder.iterdir())
        self._send(200, [_entry(repository, path) for path in found])

    def _send(self, status: int, content: Any, **headers: str) -> None:
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        """Say nothing."""


def _commit(repository: Path) -> str:
    """Return a commit's name: of a branch's folder its own, so that the branch is known by it again."""
    return hashlib.sha1(repository.name.encode()).hexdigest()


def _digest(path: Path) -> str:
    return hashlib.sha1(path.read_bytes()).hexdigest()


def _entry(repository: Path, path: Path) -> dict[str, Any]:
    place = str(path.relative_to(repository))
    if path.is_dir():
        return {"type": "directory", "oid": "0" * 40, "size": 0, "path": place}
    return {"type": "file", "oid": _digest(path), "size": path.stat().st_size, "path": place}
