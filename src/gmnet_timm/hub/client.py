"""Requests to the Hub that end, and whose failure says what state things are in."""
import contextlib
import queue
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

from huggingface_hub.errors import HFValidationError, LocalTokenNotFoundError
from huggingface_hub.utils.sha import sha_fileobj

from gmnet_timm.errors import UserError
from gmnet_timm.weights.config import REQUEST_ERRORS

__all__ = ['explaining', 'file_sha256', 'within']

T = TypeVar('T')

_ADVICE = {
    401: 'Log in with `hf auth login`, or give a token with --token or HF_TOKEN.',
    403: 'The token does not allow this: it needs write permission there. --create-pr opens a pull request instead.',
    404: 'There is no such repository or revision, or the token does not show it.',
    409: 'The repository was changed by somebody else meanwhile.',
    412: 'The repository was changed by somebody else meanwhile.',
    429: 'The server limits the rate of requests: try again later.',
}


def within(seconds: float, request: Callable[[], T]) -> T:
    """The result of a request, which may not take longer.

    huggingface_hub waits without end for an answer, and as long as a server asks for before it tries again. It has no
    limit for either, so the request runs in a thread that is left behind.

    Raises:
        TimeoutError: It took longer. It may still succeed.
    """
    answers: queue.SimpleQueue[tuple[T | None, BaseException | None]] = queue.SimpleQueue()

    def run() -> None:
        try:
            answers.put((request(), None))
        except BaseException as e:
            answers.put((None, e))

    threading.Thread(target=run, daemon=True).start()  # a daemon does not keep the process
    try:
        result, error = answers.get(timeout=seconds)
    except queue.Empty:
        raise TimeoutError(f'no answer within {seconds:.0f} s (--timeout)') from None
    if error is not None:
        raise error
    return result  # type: ignore[return-value]


@contextlib.contextmanager
def explaining(what: str) -> Iterator[None]:
    """Turn the failure of a request into an error that says what state things are in."""
    try:
        yield
    except REQUEST_ERRORS as e:
        causes: list[BaseException] = [e]  # huggingface_hub wraps failures, and then advises to check the connection
        while causes[-1].__cause__ is not None:
            causes.append(causes[-1].__cause__)
        answers = [(cause, response) for cause in causes if (response := getattr(cause, 'response', None)) is not None]
        cause, response = answers[0] if answers else (causes[-1], None)
        reason = ' '.join(str(cause).split('For more information')[0].split()).rstrip('.')
        if response is not None:
            advice = _ADVICE.get(response.status_code, 'The server has a problem.')
        elif isinstance(cause, HFValidationError):
            advice = 'Names are owner/name, of letters, digits, -, _ and .'
        elif isinstance(cause, LocalTokenNotFoundError):
            advice = _ADVICE[401]
        else:
            advice = 'Check your connection.'
        raise UserError(f'{what}. {type(cause).__name__}: {reason}. {advice}') from e


def file_sha256(path: Path) -> str:
    """SHA-256 of a file."""
    with path.open('rb') as file:
        return sha_fileobj(file).hex()
