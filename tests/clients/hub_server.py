"""A small Hub: repositories of commits, answering as the Hugging Face Hub does.

What is small comes from the Hub itself. What is large lies in a store on another port, which
wants no token and answers none: whoever sends it one has told a secret to a stranger.
"""

import hashlib
import json
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, quote, unquote, urlsplit

# Files of these kinds are kept outside of git.
LARGE = (".onnx", ".onnx_data", ".safetensors", ".bin")
# Files on one page of a list; the real one has a thousand.
PAGE = 2


@dataclass
class File:
    content: bytes
    is_large: bool

    @property
    def sha256(self):
        return hashlib.sha256(self.content).hexdigest()

    @property
    def blob(self):
        """As git names what stands in its tree: the content, or a pointer to it."""
        pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{self.sha256}\nsize {len(self.content)}\n"
        stored = pointer.encode() if self.is_large else self.content
        return hashlib.sha1(b"blob %d\0" % len(stored) + stored).hexdigest()

    @property
    def etag(self):
        return self.sha256 if self.is_large else self.blob

    def described(self, path):
        described = {"type": "file", "oid": self.blob, "size": len(self.content), "path": path}
        if self.is_large:
            described["lfs"] = {"oid": self.sha256, "size": len(self.content), "pointerSize": 134}
        return described


@dataclass
class Repository:
    """`token` is the one that may read it, when not everybody may; a `gated` one says that it is there."""

    commits: dict = field(default_factory=dict)
    branches: dict = field(default_factory=dict)
    token: str | None = None
    gated: bool = False


class Hub:
    """`endpoint` is what goes into `HF_ENDPOINT`; `asked` and `stored` are the paths that were asked for."""

    def __init__(self):
        self.repositories = {}
        self.tokens = {"hf_right"}
        self.asked, self.stored = [], []
        # What the store gives for a content, by its SHA-256, when that is not what it should be.
        self.spoiled = {}
        self.store = serve(store_of(self))
        self.server = serve(hub_of(self))
        self.endpoint = f"http://127.0.0.1:{self.server.server_port}"
        self.store_address = f"http://127.0.0.1:{self.store.server_port}"

    def commit(self, repository, files, branch="main", **access):
        """Moves a branch to a new commit with these files; its hash."""
        held = self.repositories.setdefault(repository, Repository(**access))
        files = {path: File(bytes_of(content), path.endswith(LARGE)) for path, content in files.items()}
        listing = "".join(f"{path} {file.blob}\n" for path, file in sorted(files.items()))
        commit = hashlib.sha1(f"{len(held.commits)}\n{listing}".encode()).hexdigest()
        held.commits[commit] = files
        held.branches[branch] = commit
        return commit

    def close(self):
        for server in (self.server, self.store):
            server.shutdown()
            server.server_close()


def bytes_of(content):
    return content if isinstance(content, bytes) else content.SerializeToString()


def serve(handler):
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return server


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def do_HEAD(self):
        self.do_GET()

    def give(self, status, body=b"", headers=()):
        self.send_response(status)
        for name, value in dict(headers).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def give_content(self, content, headers=()):
        """The content, or the range of it that is asked for."""
        headers = dict(headers) | {"Accept-Ranges": "bytes"}
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if not wanted:
            return self.give(200, content, headers)
        start = int(wanted[1])
        end = min(int(wanted[2] or len(content) - 1), len(content) - 1)
        if start > end:
            return self.give(416, headers={"Content-Range": f"bytes */{len(content)}"})
        headers["Content-Range"] = f"bytes {start}-{end}/{len(content)}"
        return self.give(206, content[start : end + 1], headers)

    def refuse(self, status, code, message):
        headers = {"X-Error-Code": code, "X-Error-Message": message}
        self.give(status, json.dumps({"error": message}).encode(), {k: v for k, v in headers.items() if v})


def store_of(hub):
    class Store(Handler):
        def do_GET(self):
            hub.stored.append(self.path)
            if "Authorization" in self.headers:
                return self.give(400, b"only one authentication mechanism is allowed")
            digest = urlsplit(self.path).path.removeprefix("/blobs/")
            if digest in hub.spoiled:
                return self.give_content(hub.spoiled[digest])
            for repository in hub.repositories.values():
                for files in repository.commits.values():
                    for file in files.values():
                        if file.is_large and file.sha256 == digest:
                            return self.give_content(file.content, {"ETag": f'"{digest}"'})
            return self.give(403)

    return Store


def hub_of(hub):
    class Front(Handler):
        def do_GET(self):
            hub.asked.append(f"{self.command} {self.path}")
            url = urlsplit(self.path)
            if api := re.fullmatch(r"/api/models/(.+?)/(revision|tree)/([^/]+)", url.path):
                return self.api(api[1], api[2], unquote(api[3]), parse_qs(url.query))
            if file := re.fullmatch(r"/(.+?)/resolve/([^/]+)/(.+)", url.path):
                return self.resolve(file[1], unquote(file[2]), unquote(file[3]))
            return self.refuse(404, "", "Not Found")

        def found(self, name, revision, *, content):
            """The commit of a revision and its files; nothing when the answer was a refusal."""
            token = self.headers.get("Authorization", "").removeprefix("Bearer ")
            if token and token not in hub.tokens:
                return self.refuse(401, "", "Invalid credentials in Authorization header")
            repository = hub.repositories.get(name)
            is_closed = repository and repository.token and token != repository.token
            if not repository or (is_closed and not repository.gated):
                return self.refuse(404 if token else 401, "RepoNotFound", "Repository not found")
            if is_closed and content:
                return self.refuse(403 if token else 401, "GatedRepo", f"Access to model {name} is restricted")
            commit = repository.branches.get(revision, revision)
            if commit not in repository.commits:
                return self.refuse(404, "RevisionNotFound", f"Invalid rev id: {revision}")
            return commit, repository.commits[commit]

        def api(self, name, kind, revision, query):
            found = self.found(name, revision, content=kind == "tree")
            if not found:
                return
            commit, files = found
            if kind == "revision":
                siblings = [{"rfilename": path} for path in sorted(files)]
                gated = hub.repositories[name].gated and "auto"
                answer = {"id": name, "modelId": name, "sha": commit, "private": False, "gated": gated}
                self.give(200, json.dumps(answer | {"siblings": siblings, "tags": [], "downloads": 0}).encode())
                return
            folders = {path[:end] for path in files for end in range(len(path)) if path[end] == "/"}
            nodes = [{"type": "directory", "oid": "0" * 40, "size": 0, "path": path} for path in sorted(folders)]
            nodes += [file.described(path) for path, file in sorted(files.items())]
            start = int(query.get("cursor", ["0"])[0])
            headers = {}
            if start + PAGE < len(nodes):
                address = f"{hub.endpoint}/api/models/{name}/tree/{commit}"
                headers["Link"] = f'<{address}?recursive=true&expand=false&cursor={start + PAGE}>; rel="next"'
            self.give(200, json.dumps(nodes[start : start + PAGE]).encode(), headers)

        def resolve(self, name, revision, path):
            found = self.found(name, revision, content=True)
            if not found:
                return
            commit, files = found
            headers = {"X-Repo-Commit": commit}
            if path not in files:
                return self.refuse(404, "EntryNotFound", "Entry not found")
            file = files[path]
            if not file.is_large:
                return self.give_content(file.content, headers | {"ETag": f'"{file.etag}"'})
            linked = {"X-Linked-Etag": f'"{file.etag}"', "X-Linked-Size": str(len(file.content))}
            target = f"{hub.store_address}/blobs/{file.sha256}?name={quote(path, safe='')}&signature=secret"
            return self.give(302, headers=headers | linked | {"Location": target})

    return Front
