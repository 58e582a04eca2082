"""Questions about one head, and about several heads at once."""

import queue
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

from .chat import Chat, ReplyError, StoppedError
from .endpoint import EndpointError, one_line
from .prompts import REMINDER, Prompts, read_explanation, read_fires

T = TypeVar("T")
U = TypeVar("U")


def answers(chat: Chat, prompts: Prompts, head: int, text: str | None) -> Iterator[dict[str, Any]]:
    """Ask for a head's explanation and its score.

    Args:
        chat: the model to ask.
        prompts: of the head's analysis.
        head: its number.
        text: its explanation, if it has one already.

    Yields:
        A line of explanations.jsonl for every answer; the last has no "text".

    Raises:
        EndpointError: the server does not answer; the last line says so.
        StoppedError: stop was asked for.
    """
    try:
        if text is None:
            text = chat.cut(_ask(chat, prompts.explain(head), read_explanation))
            yield {"head": head, "text": text, "model": chat.model}
        trial = prompts.trial(head)
        if trial is None:
            yield {"head": head, "score": None, "n_scored": 0, "scorer": None}
            return
        n = len(trial.passages)
        fires = _ask(chat, trial.prompt(text), lambda reply: read_fires(reply, n))
        score = round(trial.score(fires), 4)
        yield {"head": head, "score": score, "n_scored": n, "scorer": chat.model}
    except ReplyError as error:
        yield {"head": head, "error": str(error)}
    except EndpointError as error:
        yield {"head": head, "error": str(error)}  # the next call begins with other heads
        raise


def _ask(chat: Chat, prompt: str, read: Callable[[str], T]) -> T:
    """Return what is read from a reply; after nonsense, ask once more.

    Raises:
        ReplyError: it was nonsense again.
    """
    for again in (False, True):
        reply = chat.ask(prompt + REMINDER if again else prompt)
        try:
            return read(reply.text)
        except ValueError as error:
            reason = f"the reply has {error} ({one_line(reply.text, 60) or 'it is empty'})"
            if reply.ended == "length":
                reason += ", and was cut; give more --max-tokens"
            elif reply.ended is not None:
                reason += f", and ended by {reply.ended}"
    raise ReplyError(chat.cut(reason))


def in_threads(
    items: Iterable[T],
    work: Callable[[T], Iterator[U]],
    *,
    n_threads: int,
    stopped: threading.Event,
) -> Iterator[U]:
    """Yield what work(item) yields of every item, as it comes from several threads.

    An error ends all threads and is raised when they have ended. A StoppedError ends its thread.
    Items under way are waited for, unless the caller itself leaves.

    Args:
        items: taken one by one.
        work: on one of them.
        n_threads: at most.
        stopped: no more items are taken once it is set. It is set at the end.
    """
    todo: queue.SimpleQueue[T] = queue.SimpleQueue()
    for item in items:
        todo.put(item)
    done: queue.SimpleQueue[U | BaseException | None] = queue.SimpleQueue()
    n_alive = min(n_threads, todo.qsize())
    for _ in range(n_alive):
        threading.Thread(target=_run, args=(todo, work, done, stopped), daemon=True).start()
    failure: BaseException | None = None
    try:
        while n_alive:
            found = done.get()
            if found is None:
                n_alive -= 1
            elif isinstance(found, BaseException):
                failure = failure or found
            else:
                yield found
    finally:
        stopped.set()
    if failure is not None:
        raise failure


def _run(
    todo: "queue.SimpleQueue[T]",
    work: Callable[[T], Iterator[U]],
    done: "queue.SimpleQueue[U | BaseException | None]",
    stopped: threading.Event,
) -> None:
    """Work until nothing is left to do; put an error if there is one, and None last."""
    try:
        while not stopped.is_set():
            try:
                item = todo.get_nowait()
            except queue.Empty:
                break
            for found in work(item):
                done.put(found)
    except StoppedError:
        pass
    except BaseException as error:
        done.put(error)
        stopped.set()
    done.put(None)
