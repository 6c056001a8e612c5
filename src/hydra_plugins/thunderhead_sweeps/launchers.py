"""Where the runs of a sweep run: `hydra/launcher=processes` and `hydra/launcher=slurm`.

Hydra imports this module at every start: what is heavy is imported where it is used.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from hydra.core.utils import JobReturn
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf

from thunderhead import extras
from thunderhead.core.config import ConfigError, Problem
from thunderhead.core.types import PositiveInt

if TYPE_CHECKING:
    from thunderhead.lab.execution import Executor
    from thunderhead.lab.packing import Unmeasured


class ThunderheadLauncher(Launcher):
    """A launcher whose jobs are started by Thunderhead's own sweepers, from resolved configurations."""

    config: DictConfig

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        self.config = config

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        """Refused: another package's sweeper knows nothing of matching, resuming and the report."""
        raise ConfigError([Problem("hydra/sweeper", "is not Thunderhead's: use hydra/sweeper=grid or optuna")])

    def executor(self) -> "Executor | Unmeasured":
        raise NotImplementedError


class ProcessLauncher(ThunderheadLauncher):
    """Jobs as processes of this machine, `n_jobs` at a time; without `fork` each imports everything by itself.

    With n_jobs=auto as many as make the most tokens a second together, which is tried before the first of them.
    """

    def __init__(self, *, n_jobs: PositiveInt | Literal["auto"], fork: bool = True):
        self.n_jobs, self.fork = n_jobs, fork

    def executor(self) -> "Executor | Unmeasured":
        from thunderhead.lab.execution import LocalExecutor
        from thunderhead.lab.job_server import IMPORTS
        from thunderhead.lab.packing import Unmeasured

        imports = IMPORTS if self.fork else None
        return Unmeasured(imports=imports) if self.n_jobs == "auto" else LocalExecutor(self.n_jobs, imports=imports)


class SlurmLauncher(ThunderheadLauncher):
    """Jobs as one SLURM array; the arguments are submitit's."""

    def __init__(self, *, n_jobs: PositiveInt, **parameters: Any):
        self.n_jobs, self.parameters = n_jobs, containers(parameters)

    def executor(self) -> "Executor":
        try:
            from thunderhead.lab.slurm import SlurmJobs
        except ImportError as error:
            raise ConfigError([Problem("hydra/launcher=slurm", f"needs: {extras.install('slurm')}")]) from error
        folder = Path(str(self.config.hydra.sweep.dir)).resolve() / "slurm"
        return SlurmJobs(folder, n_jobs=self.n_jobs, name=str(self.config.name), **self.parameters)


def containers(settings: dict[str, Any]) -> dict[str, Any]:
    """A plugin's settings as plain containers; Hydra hands over its own."""
    return {
        name: OmegaConf.to_container(value, resolve=True) if OmegaConf.is_config(value) else value
        for name, value in settings.items()
    }
