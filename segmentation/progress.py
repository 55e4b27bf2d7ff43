"""How far a long stage is: a bar on a terminal; elsewhere, as in a log, a whole line each half minute."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Self

from tqdm import tqdm

EVERY = 30.0  # seconds between two lines; what ends sooner prints none


def on_terminal() -> bool:
    """Whether a bar can be drawn: bars go to stderr, lines to stdout. Some terminals say that they have no width."""
    return sys.stderr.isatty() and os.get_terminal_size(sys.stderr.fileno()).columns > 0


def print_line(text: str) -> None:
    """To stdout, at once and in order with what else the stage prints there."""
    sys.stdout.write(f"{text}\n")  # in one piece: `print` writes the end of the line apart
    sys.stdout.flush()


_say: ContextVar[Callable[[str], None]] = ContextVar("say", default=print_line)


@contextmanager
def lines_to(say: Callable[[str], None]) -> Iterator[None]:
    """Within, lines go to `say`, for example to the log of a run."""
    token = _say.set(say)
    try:
        yield
    finally:
        _say.reset(token)


class Progress:
    """Shows, within its `with` block, how much of a piece of work is done, how fast, and the time left.

    Lines come from a thread of their own, so they come also while a single item takes longer.

    Args:
        what: is being done; the lines begin with it.
        total: how many items there are, or bytes where the unit is "B"; None = unknown.
        unit: an item's name; without one, lines say only for how long it has been going on.
        before: how many of `total` were done earlier; they count as done, but not in rate and time left.
        note: gives what a line ends with.
    """

    def __init__(
        self,
        what: str,
        total: int | None = None,
        unit: str = "",
        before: int = 0,
        note: Callable[[], str] | None = None,
    ) -> None:
        self.what, self.total, self.unit, self.before, self.note = what, total, unit, before, note
        self._done = before
        self._bar: tqdm[Any] | None = None
        self._ended = threading.Event()

    def __enter__(self) -> Self:
        self._started = time.monotonic()
        if self.unit and on_terminal():
            self._bar = tqdm(
                desc=self.what, total=self.total, initial=self.before, unit=self.unit, unit_scale=self.unit == "B"
            )
        else:
            self._thread = threading.Thread(target=self._repeat, args=(_say.get(),), daemon=True)
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()
        else:
            self._ended.set()
            self._thread.join()

    def advance(self, count: int = 1) -> None:
        """So many more are done."""
        self._done += count
        if self._bar is not None:
            self._bar.update(count)

    def _repeat(self, say: Callable[[str], None]) -> None:
        while not self._ended.wait(EVERY):
            try:
                say(self._line(time.monotonic() - self._started))
            except BrokenPipeError:  # nobody reads any more, which the stage's own next line finds, too
                return

    def _line(self, seconds: float) -> str:
        done, new = self._done, self._done - self.before
        parts = []
        if self.unit and self.total:
            parts.append(f"{self._amount(done)} of {self._amount(self.total)}{self._units} ({done / self.total:.0%})")
        elif self.unit:
            parts.append(f"{self._amount(done)}{self._units}")
        if self.unit and new:
            parts.append(self._rate(new / seconds))
            if self.total:
                parts.append(f"{_duration((self.total - done) * seconds / new)} left")
        else:
            parts.append(f"{_duration(seconds)} so far")
        if self.note:
            parts.append(self.note())
        return f"{self.what}: {', '.join(parts)}"

    @property
    def _units(self) -> str:
        return " MB" if self.unit == "B" else f" {self.unit}s"

    def _amount(self, count: int) -> str:
        return f"{count / 1e6:,.0f}" if self.unit == "B" else f"{count:,}"

    def _rate(self, a_second: float) -> str:
        if self.unit == "B":
            return f"{a_second / 1e6:.1f} MB a second"
        return f"{a_second:.1f} a second" if a_second >= 1 else f"{1 / a_second:.1f} s a {self.unit}"


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60} min"
