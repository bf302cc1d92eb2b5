"""Serving the page: on this machine alone unless told otherwise, without the network, and without keeping anything."""
import contextlib
import logging
import os
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlsplit

from gmnet_timm.errors import UserError
from gmnet_timm.explore.pictures import MAX_BYTES, Exploration

__all__ = ['serve', 'serving']

LOOPBACK = '127.0.0.1'
_LOCAL = (LOOPBACK, 'localhost', '::1')
# The browser loads nothing from elsewhere, whatever a version of Gradio asks for.
_POLICY = b"default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob:; object-src 'none'; base-uri 'self'"


class _OwnPageOnly:
    """Takes requests from this page alone, and tells browsers to load nothing from other hosts."""

    def __init__(self, app: Any):
        self.app = app

    async def __call__(self, scope: dict, receive: Any, send: Any) -> None:
        from starlette.responses import PlainTextResponse

        async def with_policy(message: dict) -> None:
            if message['type'] == 'http.response.start':
                message['headers'] = [*message.get('headers', []), (b'content-security-policy', _POLICY)]
            await send(message)

        headers = {name: value.decode('latin-1') for name, value in scope.get('headers', [])}
        origin = headers.get(b'origin')
        # A page of somebody else can make a browser send this header, and cannot change it, nor set the others.
        hosts = (headers.get(b'host'), headers.get(b'x-forwarded-host'))
        if origin is not None and urlsplit(origin).netloc not in hosts:
            await PlainTextResponse('This request comes from another page.', 403)(scope, receive, send)
        else:
            await self.app(scope, receive, with_policy)


@contextlib.contextmanager
def serving(
        about: Exploration,
        host: str = LOOPBACK,
        port: int | None = None,
        root_path: str | None = None,
) -> Iterator[str]:
    """Serve the page in the background while the block runs.

    Args:
        about: What the page is about.
        host: Address to listen on. On this machine's own one, requests that name another host are refused: a web page
            of somebody else could send them.
        port: Port, by default the first free one from 7860 on.
        root_path: Path, or whole address, under which a proxy shows the page. Behind one, `host` is any name.

    Yields:
        Address of the page.

    Raises:
        UserError: The address or the port cannot be used.
    """
    _check_address(host, port)
    with tempfile.TemporaryDirectory(prefix='gmnet-timm-') as folder:  # for uploads
        os.environ.update(GRADIO_TEMP_DIR=folder, GRADIO_ANALYTICS_ENABLED='False')  # read on import
        from starlette.middleware import Middleware
        from starlette.middleware.trustedhost import TrustedHostMiddleware

        from gmnet_timm.explore.page import Page, look_of_the_page

        logging.getLogger('httpx').setLevel(logging.WARNING)
        middleware = [Middleware(_OwnPageOnly)]
        if host in _LOCAL and root_path is None:
            middleware.append(Middleware(TrustedHostMiddleware, allowed_hosts=['127.0.0.1', 'localhost', '[::1]']))
        page = Page(about).blocks
        # Errors that are not ours stay on the terminal: their texts hold paths of this machine.
        _, url, _ = page.launch(
            server_name=host, server_port=port, root_path=root_path, share=False, quiet=True, prevent_thread_lock=True,
            inline=False, show_error=False, max_file_size=MAX_BYTES, enable_monitoring=False, run_history=False,
            ssr_mode=False, pwa=False, mcp_server=False, app_kwargs={'middleware': middleware}, **look_of_the_page())
        try:
            yield url
        finally:
            page.close(verbose=False)


def _check_address(host: str, port: int | None) -> None:
    """Fail at once where uvicorn would only say in its log that it cannot listen."""
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((host, port or 0))
    except (OSError, OverflowError) as e:
        raise UserError(
            f'Cannot listen on {host}, port {port or "any"}: {e}. Choose others by --host and --port.') from e


def serve(about: Exploration, host: str, port: int | None, root_path: str | None) -> None:
    """Serve the page until Ctrl-C or a signal to end; arguments and errors as for `serving`."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    with serving(about, host, port, root_path) as url:
        print(f'{url} (Ctrl-C ends it)', flush=True)
        with contextlib.suppress(KeyboardInterrupt):
            while True:
                time.sleep(3600)
