"""A small Hub on 127.0.0.1, in memory, that the real client pushes to and loads from; faults on demand.

    with HubServer() as hub:
        hub.fail("POST .*/commit/", status=503, times=2)
        subprocess.run([sys.executable, "-c", code], env=hub.environment(tmp_path))
        hub.files("tester/name")["model_index.json"]

The client reads HF_ENDPOINT when it is imported: whatever talks to this server runs in a process of its own, with
`environment`. Models only, one branch, one user.
"""

import base64
import hashlib
import json
import os
import re
import socket
import struct
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

USER, TOKEN = "tester", "hf_TokenOfTheTests"
LFS_SUFFIXES = (".safetensors", ".png", ".npz", ".bin", ".pt", ".pkl")


@dataclass
class Fault:
    """What happens to the next requests that match; see `HubServer.fail`."""

    pattern: str
    status: int | None
    times: int
    cut: bool
    delay: float
    reached: threading.Event = field(default_factory=threading.Event)
    """Set when a request has met the fault."""
    lifted: threading.Event = field(default_factory=threading.Event)

    def lift(self):
        """End the fault, also for a request that it delays now."""
        self.lifted.set()


@dataclass
class _Repository:
    private: bool
    commits: list = field(default_factory=list)  # (sha, message, {path: bytes}), oldest first

    @property
    def files(self):
        return self.commits[-1][2] if self.commits else {}

    @property
    def sha(self):
        return self.commits[-1][0] if self.commits else "0" * 40

    def at(self, revision):
        if revision == "main":
            return self.sha, self.files
        return next(((sha, files) for sha, _, files in self.commits if sha == revision), None)

    def commit(self, message, files):
        sha = hashlib.sha1(f"{self.sha}{message}{len(self.commits)}".encode()).hexdigest()
        self.commits.append((sha, message, files))
        return sha


class HubServer:
    """See the module's docstring."""

    def __init__(self):
        self.requests = []
        """`METHOD /path` of every request, in order of arrival."""
        self._repositories, self._large, self._faults, self._lock = {}, {}, [], threading.Lock()
        handler = type("Handler", (_Handler,), {"hub": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self):
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        return self

    def __exit__(self, *_):
        for fault in self._faults:
            fault.lift()
        self._server.shutdown()
        self._server.server_close()

    def environment(self, home, token=TOKEN):
        """Environment variables of a process that uses this Hub, with its cache in `home`; `token=None`: a stranger."""
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGING"))}
        login = {} if token is None else {"HF_TOKEN": token}
        hub = {"HF_ENDPOINT": self.url, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1", "HF_HUB_OFFLINE": "0"}
        quiet = {"HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_UPDATE_CHECK": "1", "OMP_NUM_THREADS": "1"}
        return kept | hub | quiet | login

    def create(self, repo_id, private=False):
        """Make an empty repository, as another process or the web page would."""
        self._repositories[repo_id] = _Repository(private)

    def exists(self, repo_id):
        return repo_id in self._repositories

    def files(self, repo_id):
        """Content of each file by path, on the main branch."""
        return dict(self._repositories[repo_id].files)

    def private(self, repo_id):
        return self._repositories[repo_id].private

    def commits(self, repo_id):
        """Commit messages, oldest first."""
        return [message for _, message, _ in self._repositories[repo_id].commits]

    def fail(self, pattern, *, status=None, times=1, cut=False, delay=0.0):
        """Let the next `times` requests whose `METHOD /path` the pattern matches (re.search) go wrong.

        Args:
            status: answer with this HTTP status; the message repeats the Authorization header, as a careless server's.
            cut: read half of the body (where the client tells its length), then reset the connection.
            delay: seconds to wait before all this, or before the right answer if there is nothing else; `lift` ends it.
        """
        fault = Fault(pattern, status, times, cut, delay)
        self._faults.append(fault)
        return fault

    def _fault_for(self, request):
        with self._lock:
            self.requests.append(request)
            for fault in self._faults:
                if fault.times > 0 and not fault.lifted.is_set() and re.search(fault.pattern, request):
                    fault.times -= 1
                    return fault
        return None


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub = None
    ROUTES = (
        ("POST", r"/api/repos/create", "create_repository"),
        ("POST", r"/api/validate-yaml", "validate_card"),
        ("GET", r"/api/whoami-v2", "who_am_i"),
        ("PUT", r"/api/models/(?P<repo>.+)/settings", "change_settings"),
        ("POST", r"/api/models/(?P<repo>.+)/preupload/(?P<revision>[^/]+)", "choose_upload_modes"),
        ("POST", r"/api/models/(?P<repo>.+)/commit/(?P<revision>[^/]+)", "commit"),
        ("GET", r"/api/models/(?P<repo>.+)/tree/(?P<revision>[^/]+)(?P<under>/.*)?", "list_tree"),
        ("GET", r"/api/models/(?P<repo>.+?)(/revision/(?P<revision>[^/]+))?", "describe"),
        ("HEAD|GET", r"/(?P<repo>.+?)/resolve/(?P<revision>[^/]+)/(?P<path>.+)", "resolve"),
        ("POST", r"/(?P<repo>.+)\.git/info/lfs/objects/batch", "lfs_batch"),
        ("PUT", r"/lfs/(?P<oid>[0-9a-f]{64})", "lfs_store"),
    )

    # --- HTTP ---------------------------------------------------------------------------------------------------------

    def handle_any(self):
        self.path, _, query = self.path.partition("?")
        self.path, self.query = unquote(urlsplit(self.path).path), parse_qs(query)
        fault = self.hub._fault_for(f"{self.command} {self.path}")
        if fault is not None:
            fault.reached.set()
            fault.lifted.wait(fault.delay)
            if fault.cut and not fault.lifted.is_set():
                return self.cut()
        self.body = self.read_body()
        if fault is not None and fault.status is not None and not fault.lifted.is_set():
            return self.refuse(fault.status, f"injected for {self.headers.get('Authorization')}")
        for methods, pattern, name in self.ROUTES:
            match = re.fullmatch(pattern, self.path)
            if match and self.command in methods.split("|"):
                found = match.groupdict()
                with self.hub._lock:
                    answer = getattr(self, name)
                    return answer(**{key: value for key, value in found.items() if value is not None})
        return self.refuse(404, f"no such endpoint: {self.command} {self.path}")

    do_GET = do_HEAD = do_POST = do_PUT = handle_any

    def log_message(self, *_):
        pass

    def read_body(self):
        if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        chunks = []
        while size := int(self.rfile.readline().split(b";")[0], 16):
            chunks.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(chunks)

    def cut(self):
        self.rfile.read(int(self.headers.get("Content-Length", 2)) // 2)
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.close_connection = True
        for end in (self.rfile, self.wfile, self.connection):  # the socket closes with the last of them
            end.close()

    def reply(self, body=b"", status=200, **headers):
        self.send_response(status)
        for name, value in {"Content-Type": "application/octet-stream", **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def reply_json(self, value, status=200, **headers):
        self.reply(json.dumps(value).encode(), status, Content_Type="application/json", **headers)

    def refuse(self, status, message, **headers):
        self.reply_json({"error": message}, status, X_Error_Message=message, **headers)

    # --- rights -------------------------------------------------------------------------------------------------------

    def authorized(self):
        return self.headers.get("Authorization") == f"Bearer {TOKEN}"

    def readable(self, repo):
        """The repository, or `None` after an answer that says no."""
        repository = self.hub._repositories.get(repo)
        if repository is None or (repository.private and not self.authorized()):
            self.refuse(404 if self.authorized() else 401, "Repository not found", X_Error_Code="RepoNotFound")
            return None
        return repository

    def writable(self, repo):
        repository = self.readable(repo)
        if repository is not None and not (self.authorized() and repo.startswith(f"{USER}/")):
            self.refuse(403, "no right to write")
            return None
        return repository

    # --- endpoints ----------------------------------------------------------------------------------------------------

    def who_am_i(self):
        if not self.authorized():
            return self.refuse(401, "Invalid credentials in Authorization header")
        return self.reply_json({"type": "user", "name": USER, "orgs": [], "auth": {"type": "access_token"}})

    def create_repository(self):
        if not self.authorized():
            return self.refuse(401, "Invalid credentials in Authorization header")
        asked = json.loads(self.body)
        owner = asked.get("organization") or USER
        if owner != USER:
            return self.refuse(403, f"no right to create a repository under {owner}")
        repo = f"{owner}/{asked['name']}"
        url = {"url": f"{self.hub.url}/{repo}"}
        if repo in self.hub._repositories:
            return self.reply_json(url | {"error": "You already created this model repo"}, 409)
        self.hub._repositories[repo] = _Repository(private=asked.get("visibility") == "private")
        return self.reply_json(url)

    def change_settings(self, repo):
        repository = self.writable(repo)
        if repository is not None:
            asked = json.loads(self.body)
            repository.private = asked.get("visibility") == "private" or asked.get("private") is True
            self.reply_json({})

    def validate_card(self):
        content = json.loads(self.body)["content"]
        header = re.match(r"---\n(.*?)\n---", content, re.DOTALL)
        try:
            yaml.safe_load(header[1] if header else "")
        except yaml.YAMLError as error:
            return self.reply_json({"errors": [{"message": str(error)}], "warnings": []}, 400)
        return self.reply_json({"errors": [], "warnings": []})

    def choose_upload_modes(self, repo, revision):
        repository = self.writable(repo)
        if repository is None:
            return
        answers = []
        for file in json.loads(self.body)["files"]:
            content = repository.files.get(file["path"])
            mode = "lfs" if file["path"].endswith(LFS_SUFFIXES) else "regular"
            oid = None if content is None else _oid(file["path"], content)
            answers.append({"path": file["path"], "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        self.reply_json({"files": answers})

    def commit(self, repo, revision):
        repository = self.writable(repo)
        if repository is None:
            return None
        files, message = dict(repository.files), ""
        for line in self.body.splitlines():
            operation = json.loads(line)
            key, value = operation["key"], operation["value"]
            if key == "header":
                message = value["summary"]
            elif key == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif key == "lfsFile" and value["oid"] in self.hub._large:
                files[value["path"]] = self.hub._large[value["oid"]]
            elif key == "deletedFile" and value["path"] in files:
                del files[value["path"]]
            else:
                return self.refuse(400, f"cannot do {key} of {value.get('path')}")
        sha = repository.commit(message, files)
        return self.reply_json({"success": True, "commitOid": sha, "commitUrl": f"{self.hub.url}/{repo}/commit/{sha}"})

    def lfs_batch(self, repo):
        if self.writable(repo) is None:
            return
        answers = []
        for wanted in json.loads(self.body)["objects"]:
            answer = {"oid": wanted["oid"], "size": wanted["size"]}
            if wanted["oid"] not in self.hub._large:
                answer["actions"] = {"upload": {"href": f"{self.hub.url}/lfs/{wanted['oid']}"}}
            answers.append(answer)
        self.reply_json({"transfer": "basic", "objects": answers})

    def lfs_store(self, oid):
        if hashlib.sha256(self.body).hexdigest() != oid:
            return self.refuse(400, "the content has another sha256")
        self.hub._large[oid] = self.body
        return self.reply()

    def describe(self, repo, revision="main"):
        repository = self.readable(repo)
        if repository is None:
            return None
        found = repository.at(revision)
        if found is None:
            return self.refuse(404, "no such revision", X_Error_Code="RevisionNotFound")
        sha, files = found
        siblings = [{"rfilename": path} for path in sorted(files)]
        info = {"_id": repo, "id": repo, "modelId": repo, "sha": sha, "private": repository.private}
        return self.reply_json(info | {"gated": False, "disabled": False, "tags": [], "siblings": siblings})

    def list_tree(self, repo, revision, under="/"):
        repository = self.readable(repo)
        if repository is None:
            return None
        found = repository.at(revision)
        if found is None:
            return self.refuse(404, "no such revision", X_Error_Code="RevisionNotFound")
        recursive = self.query.get("recursive", ["false"])[0].lower() in ("true", "1")
        return self.reply_json(_tree(found[1], under.strip("/"), recursive), X_Repo_Commit=found[0])

    def resolve(self, repo, revision, path):
        repository = self.readable(repo)
        if repository is None:
            return None
        found = repository.at(revision)
        if found is None:
            return self.refuse(404, "no such revision", X_Error_Code="RevisionNotFound")
        sha, files = found
        if path not in files:
            return self.refuse(404, "Entry not found", X_Error_Code="EntryNotFound", X_Repo_Commit=sha)
        return self.reply(files[path], ETag=f'"{_oid(path, files[path])}"', X_Repo_Commit=sha)


def _oid(path, content):
    """What the client compares: sha256 of a large file, git's hash of a small one."""
    if path.endswith(LFS_SUFFIXES):
        return hashlib.sha256(content).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def _tree(files, under, recursive):
    """Entries of a folder as the Hub lists them."""
    inside = f"{under}/" if under else ""
    files = {path: content for path, content in files.items() if path.startswith(inside)}
    folders = {path[:i] for path in files for i, c in enumerate(path) if c == "/" and i > len(inside)}
    entries = [
        {"type": "directory", "path": f, "oid": hashlib.sha1(f.encode()).hexdigest(), "size": 0} for f in folders
    ]
    for path, content in files.items():
        entry = {"type": "file", "path": path, "size": len(content), "oid": _oid(path, content)}
        if path.endswith(LFS_SUFFIXES):
            entry["lfs"] = {"oid": entry["oid"], "size": len(content), "pointerSize": 130}
        entries.append(entry)
    shown = (e for e in entries if recursive or "/" not in e["path"][len(inside) :])
    return sorted(shown, key=lambda e: e["path"])
