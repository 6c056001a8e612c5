"""What is wrong with a configuration, collected: users are told everything at once."""

import contextlib
from collections.abc import Iterator

from thunderhead.core.config import ConfigError, Problem


class Problems(list[Problem]):
    """What is wrong with a configuration, found by trying."""

    @contextlib.contextmanager
    def collect(self) -> Iterator[None]:
        """Note what the inside raises, and go on."""
        try:
            yield
        except ConfigError as error:
            for problem in error.problems:
                self.note(problem)
        except (ValueError, AssertionError, TypeError) as error:
            self.note(Problem("", one_line(error)))

    def note(self, problem: Problem) -> None:
        """Add a problem, once: a missing path is met twice."""
        if problem not in self:
            self.append(problem)


def one_line(error: Exception) -> str:
    """The first line of an error's message; of one that a loader's worker raised, the line that says what it was."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    if lines[0].startswith("Caught ") and " in DataLoader worker process" in lines[0]:
        return lines[-1].partition(": ")[2] or lines[-1]
    return lines[0]
