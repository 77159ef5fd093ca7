"""The HTTP server, with its limits on access, size and time.

    server = Server(("127.0.0.1", 8000), Access(), Limits())
    server.add(Engine(...), source)
    server.serve_forever()

    GET  /, /page.css, /page.js, ... the page
    GET  /health                     {"status": "ok"}
    GET  /v1/models                  the models; see describe.describe_model
    GET  /runs/NAME/metrics          losses and settings of a model's run
    POST /v1/completions             text, whole or as Server-Sent Events
    POST /v1/chat/completions        an answer in a conversation, whole or as Server-Sent Events

Each connection has a thread and one request. No request can name a file or load a model.
"""
import io
import json
import os
import socket
import sys
import time
from contextlib import suppress
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import chain
from pathlib import Path
from queue import Empty
from socketserver import TCPServer
from threading import BoundedSemaphore
from urllib.parse import unquote

from nanotune.errors import UserError, out_of_memory
from nanotune.serving.access import Access
from nanotune.serving.api import Answer, ApiError, Limits, parse_completion
from nanotune.serving.chat import ChatAnswer, parse_chat
from nanotune.serving.describe import describe_model, describe_run
from nanotune.serving.engine import Busy, Engine

MAX_CONNECTIONS = 512             # each has a thread; more are closed at once
HEADER_BYTES, BODY_BYTES = 16 * 1024, 256 * 1024
READ_SECONDS, WRITE_SECONDS = 10, 30  # READ: headers, and again the body; WRITE: each write
DRAIN_BYTES, DRAIN_SECONDS = 16 * 1024**2, 2  # to read the rest of a request after an error
POLL_SECONDS = 0.25               # how often to check whether a waiting client has disconnected
PAGE = {"/": ("page.html", "text/html"), "/page.css": ("page.css", "text/css"),
        "/page.js": ("page.js", "text/javascript"), "/chat.js": ("chat.js", "text/javascript")}
POSTS = {"/v1/completions": (parse_completion, Answer),
         "/v1/chat/completions": (parse_chat, ChatAnswer)}
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; "
    "connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff", "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin", "Cross-Origin-Opener-Policy": "same-origin",
    "Cache-Control": "no-store", "Connection": "close",
}


class Server(ThreadingHTTPServer):
    """Listens on (host, port) from the start; add() adds models. Raises UserError if the address is
    in use or not on this machine. server_close() also ends the engines."""
    request_queue_size = 128
    allow_reuse_address = os.name == "posix"  # on Windows two servers would share a port

    def __init__(self, address: tuple[str, int], access: Access, limits: Limits) -> None:
        self.access, self.limits, self.engines, self.models = access, limits, {}, []
        folder = Path(__file__).parent
        self.page = {path: (folder.joinpath(name).read_bytes(), f"{kind}; charset=utf-8")
                     for path, (name, kind) in PAGE.items()}
        self.data = {"/health": lambda: {"status": "ok"},  # JSON answers to GET
                     "/v1/models": lambda: {"object": "list", "data": self.models}}
        self.slots = BoundedSemaphore(MAX_CONNECTIONS)
        if ":" in address[0]:
            self.address_family = socket.AF_INET6
        try:
            super().__init__(address, Handler)
        except OSError as e:
            raise UserError(f"cannot listen on {address[0]} port {address[1]} "
                            f"({e.strerror or e}); choose another --port or --host") from None

    def add(self, engine: Engine, source: str) -> None:
        """Serves a model, loaded from `source`."""
        self.engines[engine.name] = engine
        about = describe_model(engine.name, source, engine.model.plain)
        about["chat"] = engine.model.tokenizer.chat is not None
        self.models.append(about)
        if about["has_run"]:
            self.data[f"/runs/{engine.name}/metrics"] = partial(describe_run, source)

    def server_bind(self):
        TCPServer.server_bind(self)  # HTTPServer's looks up the host's name over the network

    def server_close(self) -> None:
        super().server_close()
        for engine in self.engines.values():
            engine.close()

    def process_request(self, request, client_address):
        if not self.slots.acquire(blocking=False):
            self.shutdown_request(request)
            return
        try:
            super().process_request(request, client_address)
        except RuntimeError:  # the system cannot start another thread
            self.slots.release()
            raise

    def process_request_thread(self, request, client_address):
        try:
            super().process_request_thread(request, client_address)
        finally:
            self.slots.release()

    def handle_error(self, request, client_address):
        if not isinstance(sys.exception(), ConnectionError | TimeoutError):
            super().handle_error(request, client_address)


class LimitedReader(io.RawIOBase):
    """Reads up to a number of bytes from a socket, until a deadline. The socket's own timeout would
    begin again with each byte."""
    def __init__(self, connection):
        self.connection, self.left, self.end = connection, 0, 0.0

    def allow(self, n_bytes, seconds):
        self.left, self.end = n_bytes, time.monotonic() + seconds

    def readable(self):
        return True

    def readinto(self, buffer):
        seconds = self.end - time.monotonic()
        if seconds <= 0:
            raise TimeoutError("the request took too long")
        if self.left <= 0:
            raise ApiError(431, f"headers may have at most {HEADER_BYTES:,} bytes")
        self.connection.settimeout(seconds)
        n = self.connection.recv_into(buffer)
        self.left -= n
        return n


class Handler(BaseHTTPRequestHandler):
    """One request of one connection."""
    protocol_version, server_version, sys_version = "HTTP/1.1", "nanotune", ""
    disable_nagle_algorithm = True  # a token is sent at once
    requestline = command = path = ""  # until the request is read
    sent = False    # whether the headers of the answer were sent
    unread = False  # whether a part of the request was not read

    def setup(self):
        super().setup()
        self.rfile.close()
        self.reader = LimitedReader(self.connection)
        self.rfile = io.BufferedReader(self.reader)

    def handle_one_request(self):
        self.reader.allow(HEADER_BYTES, READ_SECONDS)
        try:
            super().handle_one_request()
        except ApiError as e:  # the headers are too long
            self.unread = True
            self.send_failure(e)

    def finish(self):
        with suppress(OSError, ApiError):
            if self.unread:  # closing now would reset the connection, and lose the answer
                self.connection.shutdown(socket.SHUT_WR)
                self.reader.allow(DRAIN_BYTES, DRAIN_SECONDS)
                while self.rfile.read(65536):
                    pass
        super().finish()

    def respond(self):
        """Answers the request, errors included."""
        self.close_connection = True  # one request per connection, even if no answer is sent
        self.unread = "Content-Length" in self.headers or "Transfer-Encoding" in self.headers
        try:
            self.server.access.check(self.headers)
            self.route(unquote(self.path.partition("?")[0]))
        except ApiError as e:
            self.send_failure(e)
        except (ConnectionError, TimeoutError):
            pass  # the client disconnected, or did not read
        except Exception:
            self.send_failure(ApiError(500, "a bug in the server; its terminal has the traceback"))
            raise

    do_GET = do_POST = respond

    def route(self, path):
        page, data = self.server.page, self.server.data
        if path not in page and path != "/health":
            self.server.access.check_token(self.headers)
        method = "POST" if path in POSTS else "GET"
        if method == "GET" and path not in page and path not in data:
            raise ApiError(404, f"there is no {path[:99]}")
        if self.command != method:
            raise ApiError(405, f"use {method} for {path[:99]}")
        if method == "POST":
            self.complete(*POSTS[path])
        elif path in page:
            self.send(200, *page[path])
        else:
            self.send_json(200, data[path]())

    # -----------------------------------------------------------------------------
    # completions

    def complete(self, parse, answer_of):
        completion = parse(self.read_json(), self.server.engines, self.server.limits)
        try:
            job = completion.engine.submit(completion.request)
        except Busy:
            raise ApiError(429, "too many requests wait for this model; try again later") from None
        try:
            answer, results = answer_of(completion), self.results(job)
            if completion.stream:
                self.send_stream(answer, results)
            else:
                self.send_json(200, answer.whole(results))
        finally:
            completion.engine.cancel(job)

    def results(self, job):
        """Yields the job's lists of pieces while the client is connected."""
        while True:
            if self.has_disconnected():
                raise ConnectionAbortedError
            try:
                pieces = job.results.get(timeout=POLL_SECONDS)
            except Empty:
                continue
            if isinstance(pieces, ConnectionAbortedError):  # the server is shutting down
                raise pieces
            if isinstance(pieces, Exception):
                reason = ("out of memory: ask for fewer samples or tokens" if out_of_memory(pieces)
                          else "generation failed; the server's terminal has the traceback")
                raise ApiError(503 if out_of_memory(pieces) else 500, reason)
            if pieces is None:
                return
            yield pieces

    def has_disconnected(self):
        """Whether the client has closed the connection."""
        self.connection.setblocking(False)
        try:
            return not self.connection.recv(1, socket.MSG_PEEK)
        except BlockingIOError:
            return False

    def send_stream(self, answer, results):
        first = next(results, [])  # an error before the first token gets its own HTTP status
        self.start(200, "text/event-stream; charset=utf-8")
        for pieces in chain([first], results):
            self.write("".join(f"data: {dump(answer.chunk(piece))}\n\n" for piece in pieces))
        self.write("data: [DONE]\n\n")

    # -----------------------------------------------------------------------------
    # bodies

    def read_json(self):
        """The body of the request as JSON."""
        headers = self.headers
        if headers.get_content_type() != "application/json":
            raise ApiError(415, "send Content-Type: application/json")
        lengths = headers.get_all("Content-Length", [])
        if len(lengths) != 1 or "Transfer-Encoding" in headers:
            raise ApiError(411, "send one Content-Length, and no Transfer-Encoding")
        if not (lengths[0].isascii() and lengths[0].isdigit()):
            raise ApiError(400, "Content-Length must be a number")
        if len(lengths[0]) > 9 or int(lengths[0]) > BODY_BYTES:
            raise ApiError(413, f"the body may have at most {BODY_BYTES:,} bytes")
        length = int(lengths[0])
        self.reader.allow(length + 1, READ_SECONDS)
        try:
            body = self.rfile.read(length)
        except TimeoutError:
            raise ApiError(408, f"the body must arrive within {READ_SECONDS} s") from None
        self.unread = False
        if len(body) < length:
            raise ConnectionAbortedError
        try:
            return json.loads(body, parse_constant=no_constant)
        except (ValueError, RecursionError) as e:
            raise ApiError(400, f"the body is not JSON ({str(e)[:99]})") from None

    def send_json(self, status, data):
        self.send(status, dump(data).encode(), "application/json")

    def send(self, status, body, kind):
        self.start(status, kind, {"Content-Length": len(body)})
        self.write(body)

    def send_failure(self, error):
        """Sends an error, as an event if a stream has started."""
        with suppress(OSError):
            if self.sent:
                self.write(f"data: {dump(error.body())}\n\n")
            else:
                self.send_json(error.status, error.body())

    def send_error(self, code, message=None, explain=None):
        """Sends an error that http.server found, in the same form as other errors."""
        self.unread = True
        self.send_json(code, ApiError(code, message or self.responses[code][0]).body())

    def start(self, status, kind, headers=()):
        self.connection.settimeout(WRITE_SECONDS)
        self.request_version = self.protocol_version  # HTTP/0.9 would get no headers
        self.send_response(status)
        headers = HEADERS | {"Content-Type": kind} | dict(headers)
        if status == 401:
            headers["WWW-Authenticate"] = "Bearer"
        for name, value in headers.items():
            self.send_header(name, str(value))
        self.end_headers()
        self.sent = True

    def write(self, data):
        self.connection.settimeout(WRITE_SECONDS)  # has_disconnected() made it non-blocking
        self.wfile.write(data if isinstance(data, bytes) else data.encode())

    def log_error(self, format, *args):
        """Prints nothing: log_request() prints the status; a client may close without a request."""

    def log_request(self, code="-", size="-"):
        if self.path != "/health":  # the page asks for it every 2 s
            super().log_request(code, size)


def dump(data):
    return json.dumps(data, allow_nan=False, separators=(",", ":"))


def no_constant(name):
    raise ValueError(f"{name} is not a number")
