"""The part of Google Cloud Storage's JSON API that gcsfs, tensorstore and orbax speak, in memory.

The clients are the real ones and what goes over the socket is the real protocol, written after
https://cloud.google.com/storage/docs/json_api/v1: whole objects, generations and preconditions,
listings with prefix and delimiter, uploads in one piece, in two parts or resumed, copies, and
batches of deletions. It has no credentials, no paged listings and no multipart objects.
"""

import base64
import contextlib
import hashlib
import itertools
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

OBJECT = re.compile(r"(?:/download)?/storage/v1/b/([^/]+)/o/([^/]+)")
MOVE = re.compile(r"/storage/v1/b/([^/]+)/o/([^/]+)/moveTo/o/([^/]+)")
COPY = re.compile(r"/storage/v1/b/([^/]+)/o/([^/]+)/(?:rewriteTo|copyTo)/b/([^/]+)/o/([^/]+)")
LISTING = re.compile(r"/storage/v1/b/([^/]+)/o/?")
UPLOAD = re.compile(r"/(?:resumable/)?upload/storage/v1/b/([^/]+)/o/?")
BUCKET = re.compile(r"/storage/v1/b/([^/]+)")
PART = re.compile(rb"(DELETE) (\S+) HTTP/1.1")


class Refused(Exception):
    """A status other than success."""


class Bucket(dict):
    """Objects by name: (content, generation)."""

    def __init__(self, name):
        super().__init__()
        self.name, self.lock, self.numbers = name, threading.RLock(), itertools.count(1)

    def check(self, name, query):
        """Raises Refused where a precondition on the generation does not hold."""
        now = self[name][1] if name in self else 0
        if "ifGenerationMatch" in query and int(query["ifGenerationMatch"]) != now:
            raise Refused(412)
        if "ifGenerationNotMatch" in query and int(query["ifGenerationNotMatch"]) == now:
            raise Refused(304)

    def put(self, name, content, query):
        with self.lock:
            self.check(name, query)
            self[name] = (content, next(self.numbers))
            return self.about(name)

    def take(self, name, query=()):
        with self.lock:
            if name not in self and "ifGenerationMatch" not in query:
                raise Refused(404)
            self.check(name, query)
            if name not in self:
                raise Refused(404)
            return self[name]

    def drop(self, name, query=()):
        with self.lock:
            self.take(name, query)
            del self[name]

    def about(self, name):
        content, generation = self.take(name)
        return {
            "kind": "storage#object",
            "bucket": self.name,
            "name": name,
            "id": f"{self.name}/{name}/{generation}",
            "size": str(len(content)),
            "generation": str(generation),
            "metageneration": "1",
            "etag": str(generation),
            "md5Hash": base64.b64encode(hashlib.md5(content).digest()).decode(),
            "contentType": "application/octet-stream",
            "timeCreated": "2026-01-01T00:00:00.000Z",
            "updated": "2026-01-01T00:00:00.000Z",
        }

    def listing(self, query):
        prefix, delimiter = query.get("prefix", ""), query.get("delimiter")
        items, folders = [], set()
        with self.lock:
            for name in sorted(self):
                after, _, below = name.removeprefix(prefix).partition(delimiter or "\0")
                if not name.startswith(prefix) or name < query.get("startOffset", ""):
                    continue
                if "endOffset" in query and name >= query["endOffset"]:
                    continue
                if delimiter and delimiter in name[len(prefix) :]:
                    folders.add(prefix + after + delimiter)
                    if not (below == "" and query.get("includeTrailingDelimiter") == "true"):
                        continue
                items.append(self.about(name))
        return {"kind": "storage#objects", "items": items, "prefixes": sorted(folders)}


class Handler(BaseHTTPRequestHandler):
    """Answers one connection."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def log_message(self, *_):
        """Keeps silent."""

    def answer(self, status, content=b"", **headers):
        if not isinstance(content, bytes):
            content = json.dumps(content).encode()
            headers["Content-Type"] = "application/json"
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def handle(self):
        with contextlib.suppress(ConnectionError):  # a client may close when it has read enough
            super().handle()

    def handle_one(self):
        length = int(self.headers.get("Content-Length") or 0)
        body = self.rfile.read(length)
        if self.headers.get("Transfer-Encoding") == "chunked":
            while size := int(self.rfile.readline(), 16):
                body += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
        url = urlsplit(self.path)
        query = {key: values[0] for key, values in parse_qs(url.query).items()}
        try:
            self.answer(*self.route(url.path, query, body))
        except Refused as error:
            code = error.args[0]
            # What has not changed is not sent, not even a reason.
            self.answer(code, b"" if code == 304 else {"error": {"code": code, "message": "no"}})

    do_GET = do_POST = do_PUT = do_DELETE = do_HEAD = do_PATCH = handle_one

    def bucket(self, name):
        if name not in self.server.buckets:
            raise Refused(404)
        return self.server.buckets[name]

    def route(self, path, query, body):
        if path.startswith("/batch"):
            return 200, self.batch(body)
        if match := UPLOAD.fullmatch(path):
            return self.upload(self.bucket(match[1]), query, body)
        if match := MOVE.fullmatch(path):
            bucket, source, target = self.bucket(match[1]), unquote(match[2]), unquote(match[3])
            with bucket.lock:
                made = bucket.put(target, bucket.take(source)[0], query)
                bucket.drop(source)
            return 200, made
        if match := COPY.fullmatch(path):
            source, target = self.bucket(match[1]), self.bucket(match[3])
            content, _ = source.take(unquote(match[2]))
            made = target.put(unquote(match[4]), content, query)
            return 200, {"kind": "storage#rewriteResponse", "done": True, "resource": made}
        if match := OBJECT.fullmatch(path):
            return self.object(self.bucket(match[1]), unquote(match[2]), query)
        if match := LISTING.fullmatch(path):
            return 200, self.bucket(match[1]).listing(query)
        if match := BUCKET.fullmatch(path):
            return 200, {"kind": "storage#bucket", "name": self.bucket(match[1]).name}
        raise Refused(404)

    def object(self, bucket, name, query):
        if self.command == "DELETE":
            bucket.drop(name, query)
            return 204, b""
        content, generation = bucket.take(name, query)
        if query.get("alt") != "media":
            return 200, bucket.about(name)
        self.extra = {"x-goog-generation": generation}
        status, wanted = 200, self.headers.get("Range")
        if wanted and (match := re.fullmatch(r"bytes=(\d*)-(\d*)", wanted)):
            size = len(content)
            first = int(match[1]) if match[1] else max(0, size - int(match[2]))
            last = min(int(match[2]), size - 1) if match[1] and match[2] else size - 1
            if first >= size:
                raise Refused(416)
            content, status = content[first : last + 1], 206
            self.extra["Content-Range"] = f"bytes {first}-{last}/{size}"
        return status, content

    def setup(self):
        super().setup()
        self.extra = {}

    def end_headers(self):
        for name, value in self.extra.items():
            self.send_header(name, str(value))
        self.extra = {}
        super().end_headers()

    def upload(self, bucket, query, body):
        if query["uploadType"] == "media":
            return 200, bucket.put(query["name"], body, query)
        if query["uploadType"] == "multipart":
            mark = re.search(r"boundary=['\"]?([^'\";]+)", self.headers["Content-Type"])[1]
            _, about, content, _ = body.split(b"--" + mark.encode())
            name = json.loads(about.split(b"\r\n\r\n", 1)[1] if b"\r\n\r\n" in about
                              else about.split(b"\n\n", 1)[1])["name"]  # fmt: skip
            gap = b"\r\n\r\n" if b"\r\n\r\n" in content else b"\n\n"
            content = content.split(gap, 1)[1]
            content = content.removesuffix(b"\n").removesuffix(b"\r")
            return 200, bucket.put(name, content, query)
        return self.resumable(bucket, query, body)

    def resumable(self, bucket, query, body):
        pending = self.server.pending
        if "upload_id" not in query:
            name = query.get("name") or json.loads(body)["name"]
            number = str(next(bucket.numbers))
            pending[number] = (name, b"", query)
            self.extra = {
                "Location": f"http://{self.headers['Host']}/upload/storage/v1/b/{bucket.name}/o"
                f"?uploadType=resumable&upload_id={number}"
            }
            return 200, {}
        name, content, first = pending[query["upload_id"]]
        content += body
        if (self.headers.get("Content-Range") or "/0").endswith("/*"):
            pending[query["upload_id"]] = (name, content, first)
            self.extra = {"Range": f"bytes=0-{len(content) - 1}"} if content else {}
            return 308, b""
        return 200, bucket.put(name, content, first)

    def batch(self, body):
        mark = re.search(r"boundary=['\"]?([^'\";]+)", self.headers["Content-Type"])[1]
        answers = []
        for part in body.split(b"--" + mark.encode())[1:-1]:
            match = PART.search(part)
            number = re.search(rb"Content-ID: *<?([^>\r\n]+)", part, re.IGNORECASE)
            place = OBJECT.fullmatch(urlsplit(match[2].decode()).path)
            try:
                self.bucket(place[1]).drop(unquote(place[2]))
                status = "204 No Content"
            except Refused:
                status = "404 Not Found"
            answers.append(
                f"\r\nContent-Type: application/http\r\nContent-ID: <response-"
                f"{number[1].decode() if number else ''}>\r\n\r\nHTTP/1.1 {status}\r\n"
                "Content-Type: application/json\r\nContent-Length: 0\r\n\r\n\r\n"
            )
        self.extra = {"Content-Type": "multipart/mixed; boundary=answers"}
        return ("--answers" + "--answers".join(answers) + "--answers--").encode()


@contextlib.contextmanager
def serving(*names):
    """Runs a server with empty buckets; gives (its address, buckets by name)."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    server.buckets, server.pending = {name: Bucket(name) for name in names}, {}
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", server.buckets
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
