"""Turns of the threads that ask one model: prefills one after the other, decode steps together.

There is no thread of its own, so one asker alone pays for a lock and nothing else. Of several, the
one that comes first runs the step of all that are waiting by then; those that are still choosing
their last token are waited for a little while. Knows steps; knows no model and no text.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from kvlink_rag.disk.forks import renewed_in_child

PATIENCE = 0.1  # of the last step's time, for those that may come
MOST_ROWS = 32  # that are decoded together

_Step = TypeVar("_Step")
_Result = TypeVar("_Result")


@dataclass(slots=True, eq=False)
class _Waiting(Generic[_Step, _Result]):
    """A step that a thread waits for."""

    row: object
    step: _Step
    done: bool = False
    result: _Result | None = None
    error: BaseException | None = None


@dataclass(slots=True)
class _State(Generic[_Step, _Result]):
    """Who runs and who waits; all under `changed`."""

    changed: threading.Condition = field(default_factory=threading.Condition)
    busy: bool = False
    prefilled: bool = False  # whether what ran last was a prefill
    prefills: deque[object] = field(default_factory=deque)
    steps: list[_Waiting[_Step, _Result]] = field(default_factory=list)
    coming: set[object] = field(default_factory=set)  # rows of the last step that go on
    seconds: float = 0.0  # of the last step


class Turns(Generic[_Step, _Result]):
    """Who runs a model next: prefills and decode steps in turn, where both wait.

    run: several steps to their results, or errors, in the same order; where it raises, none was
    made.
    """

    def __init__(self, run: Callable[[Sequence[_Step]], Sequence[_Result | Exception]]) -> None:
        self._run = run
        self._state: _State[_Step, _Result] = _State()
        renewed_in_child(self)

    def leave_behind(self) -> None:
        """In a forked child: the threads that ran or waited are not there."""
        self._state = _State()

    @property
    def waiting(self) -> int:
        """Prefills and steps that wait for their turn."""
        with self._state.changed:
            return len(self._state.prefills) + len(self._state.steps)

    @contextmanager
    def alone(self) -> Iterator[None]:
        """The model for this thread alone, in the order of asking."""
        state, ticket = self._state, object()
        with state.changed:
            state.prefills.append(ticket)
            try:
                state.changed.wait_for(lambda: self._is_turn_of(state, ticket))
                state.busy = True
            finally:
                state.prefills.remove(ticket)
                if not state.busy:  # Ctrl-C, perhaps as its turn came
                    state.changed.notify_all()
        try:
            yield
        finally:
            with state.changed:
                state.busy, state.prefilled = False, True
                state.changed.notify_all()

    def step(self, row: object, step: _Step) -> _Result:
        """The result of one step of `row`, run with those of other rows that wait."""
        state, mine = self._state, _Waiting[_Step, _Result](row, step)
        with state.changed:
            state.steps.append(mine)
            state.coming.discard(row)
            state.changed.notify_all()
            leads = False
            try:
                state.changed.wait_for(lambda: mine.done or self._may_lead(state))
                if not mine.done:
                    state.busy = leads = True
                    state.changed.wait_for(lambda: not state.coming, PATIENCE * state.seconds)
            except BaseException:  # Ctrl-C
                self._withdraw(state, mine, leads)
                raise
            if leads:
                batch = [mine, *(each for each in state.steps if each is not mine)][:MOST_ROWS]
                state.steps = [each for each in state.steps if each not in batch]
        if leads:
            self._lead(state, batch)
        if mine.error is not None:
            raise mine.error
        return mine.result  # type: ignore[return-value]

    def end(self, row: object) -> None:
        """No further step of `row` comes."""
        state = self._state
        with state.changed:
            state.coming.discard(row)
            state.changed.notify_all()

    @staticmethod
    def _withdraw(
        state: _State[_Step, _Result], mine: _Waiting[_Step, _Result], leads: bool
    ) -> None:
        """Take a step back; one that is running ends first, for it writes to its live cache."""
        if leads:
            state.busy = False
        state.changed.wait_for(lambda: mine.done or mine in state.steps)
        if not mine.done:
            state.steps.remove(mine)
            state.changed.notify_all()

    def _lead(
        self, state: _State[_Step, _Result], batch: Sequence[_Waiting[_Step, _Result]]
    ) -> None:
        """Run the steps of `batch`, whose first is the leader's, and hand out what comes of them.

        Where the leader is ended on the way (Ctrl-C), none was made, and the others wait on.
        """
        start = time.perf_counter()
        results: Sequence[_Result | Exception] | None = None
        try:
            results = self._run([each.step for each in batch])
        finally:
            with state.changed:
                if results is None:
                    state.steps = [*batch[1:], *state.steps]
                for each, result in zip(batch, results or (), strict=False):
                    each.done = True
                    if isinstance(result, Exception):
                        each.error = result
                    else:
                        each.result = result
                state.coming = {each.row for each in batch if each.done and each.error is None}
                state.seconds = time.perf_counter() - start
                state.busy = state.prefilled = False
                state.changed.notify_all()

    @staticmethod
    def _is_turn_of(state: _State[_Step, _Result], ticket: object) -> bool:
        """Whether a prefill may begin: the first in line, and no step waits after another one."""
        return (
            not state.busy and state.prefills[0] is ticket and not (state.prefilled and state.steps)
        )

    @staticmethod
    def _may_lead(state: _State[_Step, _Result]) -> bool:
        return not state.busy and (state.prefilled or not state.prefills)
