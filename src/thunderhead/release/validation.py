"""The validation of a run once more, by a checkpoint: of what is no text, such as a synthetic task's answers."""

from pathlib import Path

import lightning

from thunderhead.core.components import build
from thunderhead.core.config import Config, read_mapping
from thunderhead.core.run import build_data, build_metrics, validation_metrics
from thunderhead.core.trust import trust_typed
from thunderhead.release.command import accelerator_of, load_model, read_record
from thunderhead.release.exported import is_exported
from thunderhead.training.record import Planned
from thunderhead.training.trainer import quiet_lightning


def can_be_repeated(resolved: Config) -> bool:
    """Whether `run` has data that makes its own batches: shards may be gone, and their text is evaluated as text.

    Raises ConfigError if there is no such run.
    """
    place = Path(resolved["run"])
    return not is_exported(place) and "shards_key" not in read_record(place, resolved["checkpoint"])[1]["data"]


def validate(resolved: Config) -> dict[str, float]:
    """What training calls val/…: `loss` in nats a target, `perplexity`, and further metrics, such as `accuracy`.

    Raises ConfigError if the data cannot be made as the run had it.
    """
    accelerator = accelerator_of(resolved)
    trust_typed(resolved)
    folder, recorded, weights = read_record(Path(resolved["run"]), resolved["checkpoint"])
    plan = read_mapping(folder / "plan.json", "run", Planned)
    sizes = {"context_length": plan["context_length"], "sequences_per_step": plan["sequences_per_step"]}
    data = build_data(recorded, micro_batch_size=resolved["batch_size"], **sizes)
    metrics = validation_metrics(data, build_metrics(recorded.get("metrics", {})))
    model = load_model(weights, resolved["averaged"], metrics=metrics)
    precision = build(recorded["precision"])
    kind, _ = precision.resolve(accelerator)
    with quiet_lightning():
        trainer = lightning.Trainer(
            accelerator=accelerator,
            devices=1,
            **precision.of_kind(kind).lightning_arguments(accelerator),
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        trainer.validate(model, datamodule=data, verbose=False)
    return {name.removeprefix("val/"): float(value) for name, value in trainer.callback_metrics.items()}
