"""The checkers behind the exercises, one file per chapter.

A chapter adds `llmlib/notebook/exercises/<chapter>.py` (`introduction.py`, `attention.py`, `scaling.py` …). Each
public function in it is the checker of one exercise: it takes what the reader wrote, tries it on inputs of its own and
calls `wrong("…")` with what is wrong, never with the answer; when it returns, the answer is right.

    def mask(build):                                  # exercise("attention/mask", my_mask)
        '''A mask that hides the future.'''
        got = build(4)
        if got.shape != (4, 4):
            wrong(f"for 4 tokens the mask should be 4 × 4, not {tuple(got.shape)}")

The folded solution in the notebook ends with the same `exercise(...)` call, and tests/test_notebook.py runs each
checker on its entry of `WRONG` (a dict from exercise name to answers that must be refused), kept in the same file.
"""

import importlib
import importlib.util
import inspect
from typing import NoReturn

from llmlib.errors import ConfigError


class Wrong(AssertionError):
    """An answer that isn't right yet; the message says why."""


def wrong(reason: str) -> NoReturn:
    """Say what is wrong with an answer."""
    raise Wrong(reason)


def checkers(chapter: str) -> dict:
    """The checkers of one chapter by name."""
    path = f"{__name__}.{chapter}"
    if importlib.util.find_spec(path) is None:
        raise ConfigError(f"no chapter called {chapter!r} has exercises")
    module = importlib.import_module(path)
    found = inspect.getmembers(module, inspect.isfunction)
    return {name: f for name, f in found if f.__module__ == path and not name.startswith("_")}


def verdict(name: str, answer) -> str | None:
    """What is wrong with `answer` to the exercise `name` ("chapter/exercise"), or None when it is right."""
    chapter, _, exercise_name = name.partition("/")
    known = checkers(chapter)
    if exercise_name not in known:
        raise ConfigError(f"{chapter} has no exercise {exercise_name!r}; it has {', '.join(sorted(known))}")
    try:
        known[exercise_name](answer)
    except Wrong as reason:
        return str(reason)
    except Exception as error:  # noqa: BLE001  (whatever the reader's code raises is what they need to see)
        return f"it stops with {type(error).__name__}: {error}"
    return None


def exercise(name: str, answer) -> None:
    """Check an answer to the exercise "chapter/exercise": say that it is right, or what is wrong without solving it."""
    reason = verdict(name, answer)
    print(f"{name}: ✓ right" if reason is None else f"{name}: not yet: {reason}")
