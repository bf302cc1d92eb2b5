"""Serving the page: on this machine alone unless told otherwise, without the network, and without keeping anything."""
import contextlib
import os
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Iterator
from typing import Any

from gmnet_timm.errors import UserError
from gmnet_timm.frequency.explore.subjects import Exploration

__all__ = ['serve', 'serving']

LOOPBACK = '127.0.0.1'
_LOCAL = (LOOPBACK, 'localhost', '::1')
# The browser loads nothing from elsewhere, whatever a version of Gradio asks for.
_POLICY = b"default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob:; object-src 'none'; base-uri 'self'"


class _OwnFilesOnly:
    """Tells browsers to load nothing from other hosts."""

    def __init__(self, app: Any):
        self.app = app

    async def __call__(self, scope: dict, receive: Any, send: Any) -> None:
        async def with_policy(message: dict) -> None:
            if message['type'] == 'http.response.start':
                message['headers'] = [*message.get('headers', []), (b'content-security-policy', _POLICY)]
            await send(message)

        await self.app(scope, receive, with_policy)


@contextlib.contextmanager
def serving(about: Exploration, host: str = LOOPBACK, port: int | None = None) -> Iterator[str]:
    """Serve the page in the background while the block runs.

    Args:
        about: What the page is about.
        host: Address to listen on. On this machine's own one, requests that name another host are refused: a web page
            of somebody else could send them.
        port: Port, by default the first free one from 7860 on.

    Yields:
        Address of the page.

    Raises:
        UserError: The address or the port cannot be used.
    """
    _check_address(host, port)
    with tempfile.TemporaryDirectory(prefix='gmnet-timm-') as folder:  # uploads, until they are read
        os.environ.update(GRADIO_TEMP_DIR=folder, GRADIO_ANALYTICS_ENABLED='False')  # read on import
        from starlette.middleware import Middleware
        from starlette.middleware.trustedhost import TrustedHostMiddleware

        from gmnet_timm.frequency.explore.page import create_page, look_of_the_page

        middleware = [Middleware(_OwnFilesOnly)]
        if host in _LOCAL:
            middleware.append(Middleware(TrustedHostMiddleware, allowed_hosts=['127.0.0.1', 'localhost', '[::1]']))
        page = create_page(about)
        _, url, _ = page.launch(
            server_name=host, server_port=port, share=False, quiet=True, prevent_thread_lock=True, inline=False,
            show_error=True, max_file_size=about.max_bytes, enable_monitoring=False, run_history=False, ssr_mode=False,
            pwa=False, mcp_server=False, app_kwargs={'middleware': middleware}, **look_of_the_page())
        try:
            yield url
        finally:
            about.job.cancel()
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


def serve(about: Exploration, host: str = LOOPBACK, port: int | None = None) -> None:
    """Serve the page until Ctrl-C or a signal to end; arguments and errors as for `serving`."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    with serving(about, host, port) as url:
        print(f'{url} (Ctrl-C ends it)', flush=True)
        with contextlib.suppress(KeyboardInterrupt):
            while True:
                time.sleep(3600)
