"""README.md of an exported model, in the format of Hugging Face's model cards, and the picture of its losses."""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from matplotlib.figure import Figure

from thunderhead import command_line
from thunderhead.core import config as configuration
from thunderhead.core.config import Config
from thunderhead.training import record


class Exported(NamedTuple):
    """A model in another library's format, in memory.

    - save: writes it into a folder. load: a line that loads it, given the folder.
    - library: by which the hub sorts models. code: lines of Python that load it. about: rows of the card's table.
    """

    save: Callable[[Path], None]
    load: Callable[[Path], str]
    library: str
    code: list[str]
    about: dict[str, str]


def model_card(run_dir: Path, recorded: Config, name: str, exported: Exported) -> str:
    """README.md: what it is, how to load it, what it was trained on, how to make it."""
    summary = record.read_summary(run_dir) or {}
    plan = configuration.read_mapping(run_dir / "plan.json", "run", record.Planned)
    surroundings = configuration.read_mapping(run_dir / "environment.json", "run", record.Surroundings)
    trained, losses = summary.get("tokens", plan["tokens"]), ""
    if summary:
        perplexity, bits = summary.get("perplexity"), summary.get("bits_per_byte")
        losses = f"{summary['val_loss']:.4f} nats a token"
        losses += f", perplexity {perplexity:.2f}" if perplexity is not None else ""
        losses += f", {bits:.4f} bits per byte" if bits else ""
    rows = {
        "parameters": f"{plan['parameters']['total']:,}",
        "context length": f"{plan['context_length']:,} tokens",
        "trained on": f"{trained:,} tokens ({trained / plan['parameters']['total']:.3g} per parameter)",
        "validation loss": losses or "unknown: the run has not ended",
    } | exported.about
    sources = summary.get("ledger", {})
    git = surroundings.get("git") or {}
    command = command_line.shown("train.py", *surroundings.get("overrides", []))
    lines = [
        *(
            "---",
            f"library_name: {exported.library}",
            "pipeline_tag: text-generation",
            "tags: [thunderhead]",
            "---",
            "",
        ),
        *(f"# {name}", "", "A base model: it continues text, and was trained for nothing else.", ""),
        *("```python", *exported.code, "```", ""),
        *("| | |", "|---|---|", *(f"| {key} | {value} |" for key, value in rows.items()), ""),
        *("![training loss](loss.png)", ""),
    ]
    if sources:
        lines += ["## Data", "", "| source | tokens | validation loss |", "|---|---|---|"]
        lines += [f"| {source} | {share['tokens']:,} | {share['val_loss']:.4f} |" for source, share in sources.items()]
        lines.append("")
    lines += ["## How it was made", "", "```", command, "```", ""]
    commit = f" at commit {git['commit'][:12]}" if git.get("commit") else ""
    steps = f"{plan['steps']:,} steps of {plan['tokens_per_step']:,} tokens, {plan['flops']:.3g} FLOPs"
    return "\n".join([*lines, f"with Thunderhead{commit}: {steps}, precision {plan['precision']}.", ""])


def draw_losses(run_dir: Path, file: Path) -> None:
    """Training and validation loss over the tokens, where the run kept them."""
    metrics = run_dir / "metrics.csv"
    figure = Figure(figsize=(7, 3.5), layout="constrained")
    axes = figure.subplots()
    for column, name in (("train/loss", "training"), ("val/loss", "validation")):
        if points := [*record.points_of(metrics, "tokens", column)] if metrics.is_file() else []:
            axes.plot(*zip(*points, strict=True), label=name, marker="o" if column == "val/loss" else None)
    axes.set(xlabel="tokens", ylabel="loss, nats a token")
    if axes.lines:
        axes.legend()
    axes.grid(alpha=0.3)
    figure.savefig(file, dpi=120)
