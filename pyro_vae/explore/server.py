"""The server of the page: on the loopback address, behind a random token, without writing."""

import secrets
import socket
from typing import Any

from bokeh.server.server import BaseServer
from bokeh.server.tornado import BokehTornado
from tornado.httpserver import HTTPServer
from tornado.httputil import HTTPServerRequest
from tornado.ioloop import IOLoop
from tornado.web import RequestHandler

from pyro_vae.errors import UsageError
from pyro_vae.explore.page import Page

HOST = "127.0.0.1"


class Forbidden(RequestHandler):
    """The answer to each request whose address does not have the token."""

    def prepare(self) -> None:
        self.set_status(403)
        self.finish("forbidden\n")


class Picture(RequestHandler):
    """The card of one point of one level."""

    def initialize(self, page: Page) -> None:
        self.page = page

    def get(self, level: str, point: str) -> None:
        levels = self.page.view.levels
        known = int(level) < len(levels) and int(point) < len(levels[int(level)].rows)
        if not known:
            self.set_status(404)
            return
        self.set_header("Content-Type", "image/svg+xml")
        self.set_header("Cache-Control", "no-store")
        self.finish(self.page.card(int(level), int(point)))


class Gate(BokehTornado):
    """A Bokeh application that answers only requests whose path starts with the token."""

    def __init__(self, token: str, page: Page, port: int) -> None:
        super().__init__(
            page.fill,
            prefix=token,
            extra_websocket_origins=[f"{HOST}:{port}", f"localhost:{port}"],
            extra_patterns=[(r"/card/(\d+)/(\d+)", Picture, {"page": page})],
            use_index=False,
            mem_log_frequency_milliseconds=0,
            log_function=lambda handler: None,  # the terminal shows the address only
        )
        self._token = token

    def find_handler(self, request: HTTPServerRequest, **more: Any) -> Any:
        """Each request passes here: pages, files, pictures and the websocket."""
        given = request.path.strip("/").partition("/")[0]
        if not secrets.compare_digest(given.encode(), self._token.encode()):
            return self.get_handler_delegate(request, Forbidden)
        return super().find_handler(request, **more)


class Server:
    """A page that is served, from the start of the server to its end.

    Arguments:
        page: the page.
        port: the port, from 0 to 65535; 0 is a free one.

    Raises `UsageError` if the port is taken.
    """

    def __init__(self, page: Page, port: int = 0) -> None:
        try:
            listening = socket.create_server((HOST, port))
        except OSError as error:
            raise UsageError(
                f"{port} cannot be used ({error.strerror}); --port 0 picks a free one",
                argument="port",
            ) from error
        listening.setblocking(False)
        self.port: int = listening.getsockname()[1]
        self.token = secrets.token_urlsafe(32)
        self.page = page
        page.prefix = f"/{self.token}"
        application = Gate(self.token, page, self.port)
        http = HTTPServer(application)
        http.add_sockets([listening])
        self._server = BaseServer(IOLoop.current(), application, http)
        self._server.start()

    @property
    def address(self) -> str:
        """The address of the page, with its token."""
        return f"http://{HOST}:{self.port}/{self.token}"

    def run(self) -> None:
        """Answer requests until an interrupt."""
        loop = self._server.io_loop
        try:
            loop.start()
        except KeyboardInterrupt:
            pass
        finally:
            self.stop()

    def stop(self) -> None:
        """Close the port."""
        self._server.unlisten()
        self._server.stop()
