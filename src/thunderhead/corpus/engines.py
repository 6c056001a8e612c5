"""Who does the work of preparing: this machine, or datatrove's executors on many."""

from dataclasses import dataclass
from typing import Protocol

from thunderhead.core.types import PositiveInt
from thunderhead.corpus.passes import Passes
from thunderhead.corpus.stages import Stages
from thunderhead.processes import allowed_cores


class Engine(Protocol):
    """Does the stages of a preparation, each by as many tasks as it says."""

    @property
    def tasks(self) -> int:
        """How many tasks share what can be shared out."""

    def carry(self, stages: Stages) -> bool:
        """Do all stages, or go on with them; false if that is handed on, and not done when this returns."""


@dataclass(frozen=True, kw_only=True)
class Local:
    """Several processes of this machine."""

    processes: PositiveInt | None = None  # None: one for each core; one works in this process

    tasks = 1

    def carry(self, stages: Stages) -> bool:
        with Passes(stages.preparation.sources) as passes:
            for stage, _ in stages.names():
                stages.run(stage, 0, passes, self.processes or allowed_cores())
        return True
