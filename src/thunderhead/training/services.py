"""Loggers of services: W&B, MLflow, trackio, Comet; each writes into the run's folder or to a server, as it is told.

Nothing is made before the first `log_hyperparams`, which says what the run is called (`thunderhead.training.about`): a
run that is refused or only planned leaves nothing. Charts have the tokens for x. A resumed run goes on in its place.
"""

import importlib.util
import os
from argparse import Namespace
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
from lightning.pytorch.loggers import CometLogger, Logger, MLFlowLogger, WandbLogger
from lightning.pytorch.utilities import rank_zero_only
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from requests.utils import get_netrc_auth

from thunderhead.core.config import Problem, first_line, leaves
from thunderhead.core.run import Run
from thunderhead.terminal import complain
from thunderhead.training.about import card

PROJECT = "thunderhead"
Status = Literal["success", "failed"]


def needs(package: str, install: str) -> None:
    """Refuse (ValueError) a logger whose package is missing, with the command that installs it."""
    if importlib.util.find_spec(package) is None:
        raise ValueError(f"needs the package {package}: pip install '{install}'")


def without_key(logger: Logger, run: Run, variable: str, more: str) -> Iterator[Problem]:
    """Refuse a service that would ask for a key when it is too late to answer."""
    if not run.is_dry:
        name = next(name for name, each in run.loggers.items() if each is logger)
        message = f"no API key: put {variable} into the environment or into .env, {more}"
        yield Problem(f"logger.{name}", f"{message}, or keep it on this machine by logger.{name}.offline=true")


def by_tokens(row: Mapping[str, float], step: int | None) -> tuple[dict[str, float], int]:
    """A row with its step as a value, and the tokens seen, for services whose only axis is called step."""
    values = {"step": step or 0, **row}
    return values, int(values.pop("tokens", 0))


class _OnceTold:
    """Begin nothing before the run is sure to begin: Lightning asks for the experiment when it sets up."""

    _is_told = False

    @property
    def experiment(self) -> Any:
        return super().experiment if self._is_told else None  # type: ignore[misc]


class Wandb(_OnceTold, WandbLogger):
    """Weights & Biases. `settings` are those of `wandb.init`."""

    def __init__(self, save_dir: str, *, project: str | None, entity: str | None, offline: bool, **settings: Any):
        needs("wandb", "wandb>=0.25")
        self._mode = "offline" if offline else os.environ.get("WANDB_MODE", "online")
        settings |= {"entity": entity, "mode": self._mode}
        super().__init__(save_dir=save_dir, project=project or os.environ.get("WANDB_PROJECT", PROJECT), **settings)

    def problems(self, run: Run) -> Iterator[Problem]:
        """Online, W&B needs a key."""
        server = os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")
        if self._mode == "online" and not ("WANDB_API_KEY" in os.environ or get_netrc_auth(server)):
            yield from without_key(self, run, "WANDB_API_KEY", "run `wandb login`")

    @rank_zero_only
    def log_hyperparams(self, params: dict[str, Any] | Namespace) -> None:
        assert isinstance(params, dict)
        told = params["about"]
        own = {
            "id": told["id"],
            "name": told["name"],
            "group": told["group"],
            "tags": told["tags"],
            "notes": card(params),
        }
        self._is_told = True
        self._wandb_init |= own | {name: value for name, value in self._wandb_init.items() if value}
        self._wandb_init.pop("anonymous", None)  # which Lightning sets, and W&B warns of
        self.experiment.define_metric("tokens")
        self.experiment.define_metric("*", step_metric="tokens")
        super().log_hyperparams(params)

    def close(self, status: Status) -> None:
        if self._experiment is not None:
            self._experiment.finish(exit_code=int(status == "failed"))
        self._experiment = None


class MLflow(_OnceTold, MLFlowLogger):
    """MLflow, on a server or in a database that all runs share. A server that does not answer ends no run."""

    def __init__(self, save_dir: str, *, experiment: str, tracking_uri: str | None):
        needs("mlflow", "mlflow>=3")
        super().__init__(experiment, tracking_uri="http://127.0.0.1")  # not asked; a database would be made at once
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "3")  # 7 are four minutes
        self._tracking_uri = tracking_uri or os.environ.get("MLFLOW_TRACKING_URI", "")
        if not self._tracking_uri:
            logs = Path("logs").absolute()
            self._tracking_uri, self._artifact_location = f"sqlite:///{logs}/mlflow.db", f"file:{logs}/mlartifacts"

    @property
    def name(self) -> str:
        """Of the experiment, without asking for it, as Lightning does before the first step."""
        return self._experiment_name

    @property
    def version(self) -> str | None:
        return self._run_id

    @rank_zero_only
    def log_hyperparams(self, params: dict[str, Any] | Namespace) -> None:
        from mlflow.tracking import MlflowClient

        assert isinstance(params, dict)
        told = params["about"]
        if self._artifact_location:
            Path("logs").mkdir(exist_ok=True)
        self._mlflow_client, self._is_told = MlflowClient(self._tracking_uri), True
        named = {"thunderhead.id": told["id"], "mlflow.source.git.commit": told["commit"], "group": told["group"] or ""}
        if self._run_id is None:
            found = self._mlflow_client.get_experiment_by_name(self._experiment_name)
            mine = f"tags.`thunderhead.id` = '{told['id']}'"
            runs = self._mlflow_client.search_runs([found.experiment_id], mine) if found is not None else []
            self._run_id = runs[0].info.run_id if runs else None
        self._run_name = told["name"]
        self.tags = named | dict(tag.split("=", 1) for tag in told["tags"]) | {"mlflow.note.content": card(params)}
        known = self.experiment.get_run(self.run_id).data.params
        self.experiment.update_run(self.run_id, "RUNNING")
        # a parameter is set once: what a resumed run changes stands in its note
        new = {key: value for key, value in leaves(params) if key not in known and not key.startswith("about.choices")}
        super().log_hyperparams(new)
        self.experiment.set_tag(self.run_id, "mlflow.note.content", card(params))

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        from mlflow.exceptions import MlflowException

        try:
            super().log_metrics(*by_tokens(metrics, step))
        except MlflowException as error:
            complain(f"MLflow has not taken the row of step {step}: {first_line(error)}")

    @rank_zero_only
    def log_text(self, name: str, text: str, step: int) -> None:
        self.experiment.log_text(self.run_id, text, f"{name}-{step}.txt")

    @rank_zero_only
    def log_figure(self, name: str, figure: Figure, step: int) -> None:
        self.experiment.log_figure(self.run_id, figure, f"{name}-{step}.png")


class Comet(_OnceTold, CometLogger):
    """Comet. Its `settings` are those of `comet_ml.ExperimentConfig`; offline, a zip archive in the run's folder."""

    def __init__(self, save_dir: str, *, project: str | None, workspace: str | None, offline: bool, **settings: Any):
        needs("comet_ml", "comet-ml>=3.49")
        self._told: dict[str, Any] = {}
        self._settings = {"offline_directory": save_dir, **settings}
        project = project or os.environ.get("COMET_PROJECT_NAME", PROJECT)
        super().__init__(project=project, workspace=workspace, online=not offline)

    def problems(self, run: Run) -> Iterator[Problem]:
        """Online, Comet needs a key."""
        import comet_ml

        config: Any = comet_ml.get_config()  # type: ignore[attr-defined]
        if self._online and not config["comet.api_key"]:
            yield from without_key(self, run, "COMET_API_KEY", "run `comet login`")

    def _create_experiment(self) -> None:
        if self._is_told:
            import comet_ml

            names = {"name": self._told["name"], "tags": self._told["tags"]}
            self._experiment_key = self._told["id"]
            self._comet_config = comet_ml.ExperimentConfig(**names, **self._settings)
            super()._create_experiment()

    @rank_zero_only
    def log_hyperparams(self, params: dict[str, Any] | Namespace) -> None:
        assert isinstance(params, dict)
        self._told, self._is_told = params["about"], True
        super().log_hyperparams(params)
        for name in ("group", "commit", "command"):
            self.experiment.log_other(name, self._told[name])
        self.experiment.log_text(card(params), metadata={"name": "choices"})

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        super().log_metrics(*by_tokens(metrics, step))

    @rank_zero_only
    def log_text(self, name: str, text: str, step: int) -> None:
        self.experiment.log_text(text, step=step, metadata={"name": name})

    @rank_zero_only
    def log_figure(self, name: str, figure: Figure, step: int) -> None:
        self.experiment.log_figure(name, figure, step=step)

    def close(self, status: Status) -> None:
        if self._experiment is not None:
            self._experiment.end()
        self._experiment = None


class Trackio(Logger):
    """trackio (Hugging Face): a local dashboard (`trackio show`), or a Space of the hub."""

    version = ""

    def __init__(self, save_dir: str, *, project: str, space_id: str | None):
        super().__init__()
        needs("trackio", "trackio>=0.22")
        self._project, self._space_id = project, space_id
        self._run: Any = None
        self._tokens_per_step = 1

    @property
    def name(self) -> str:
        return self._project

    @rank_zero_only
    def log_hyperparams(self, params: dict[str, Any] | Namespace) -> None:
        import trackio

        assert isinstance(params, dict)
        told, self._tokens_per_step = params["about"], params["planned"]["tokens_per_step"]
        self._run = trackio.init(
            self._project,
            name=f"{told['name']} {told['id'][:6]}",
            group=told["group"],
            config=dict(leaves(params)),
            space_id=self._space_id,
            resume="allow",
            embed=False,
            auto_log_gpu=False,
            auto_log_cpu=False,
        )
        self._run.log({"choices": trackio.Markdown(card(params))}, step=0)

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        values, tokens = by_tokens(metrics, step)
        self._run.log(values, step=tokens)

    @rank_zero_only
    def log_text(self, name: str, text: str, step: int) -> None:
        import trackio

        self._run.log({name: trackio.Markdown(f"```\n{text}\n```")}, step=step * self._tokens_per_step)

    @rank_zero_only
    def log_figure(self, name: str, figure: Figure, step: int) -> None:
        import trackio

        canvas: Any = FigureCanvasAgg(figure)
        canvas.draw()
        image = trackio.Image(np.asarray(canvas.buffer_rgba())[..., :3].copy())
        self._run.log({name: image}, step=step * self._tokens_per_step)

    def close(self, status: Status) -> None:
        if self._run is not None:
            self._run.finish()
        self._run = None
