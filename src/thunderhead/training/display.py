"""What a person sees on the terminal: the plan, the data, the summary."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.markup import escape
from rich.table import Table

from thunderhead.terminal import Console, complain, quantity, say, size
from thunderhead.training.plan import Plan

__all__ = ["complain", "say"]
_console = Console(highlight=False)


def _table(title: str) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", show_header=False, box=None, pad_edge=False)
    table.add_column(style="cyan", no_wrap=True)
    table.add_column()
    return table


def show_plan(plan: Plan) -> None:
    """The plan as a table."""
    table = _table("Plan")
    parts = ", ".join(f"{part} {quantity(n)}" for part, n in plan.parameters.items() if n and part != "total")
    table.add_row("parameters", f"{plan.parameters['total']:,}  ({parts})")
    table.add_row("vocabulary", f"{plan.vocab_size:,} tokens; context length {plan.context_length:,}")
    flops = f"{quantity(plan.flops_per_token)}FLOPs (forward and backward), {plan.flops:.3g} FLOPs in the run"
    table.add_row("per token", flops)
    ranks = f" × {plan.data_parallel_size} ranks" if plan.data_parallel_size > 1 else ""
    if plan.tensor_parallel_size > 1:
        ranks += f" (of {plan.tensor_parallel_size} devices each)"
    at_once = f"{plan.context_length} tokens × {plan.micro_batch_size} sequences{ranks}"
    table.add_row("per step", f"{plan.tokens_per_step:,} tokens = {at_once} × {plan.accumulation} accumulated")
    table.add_row("steps", f"{plan.steps:,} ({plan.warmup_steps:,} of warm-up)")
    share = f", {plan.validation_share:.1%} of the training's computation" if plan.validation_share else ""
    every = f"every {plan.validation_every:,} steps and " if plan.validation_every < plan.steps else ""
    table.add_row("validation", f"{every}at the end{share}")
    table.add_row("tokens", f"{plan.tokens:,} ({plan.tokens / plan.parameters['total']:.2g} per parameter)")
    epochs = "known once the data is prepared"
    if plan.epochs is not None:
        by_source = ", ".join(f"{source} {epochs:.2f}" for source, epochs in plan.epochs.items())
        epochs = by_source or "none: sequences are made by rule"
    table.add_row("epochs", epochs)
    if plan.shares is not None and len(plan.shares) > 1:
        table.add_row("mixture", ", ".join(f"{source} {share:.2%}" for source, share in plan.shares.items()))
    devices = f"{plan.devices:,} × " if plan.devices > 1 else ""
    table.add_row("device", f"{devices}{plan.accelerator}; precision {plan.precision} ({plan.why_precision})")
    table.add_row("compile", f"{plan.compile} ({plan.why_compile})")
    why = plan.why_micro_batch
    auto = [] if why is None else [f"batch.micro_size=auto: {plan.micro_batch_size}: {why}"]
    for note in [*auto, *plan.notes]:
        table.add_row("note", note)
    parts = ", ".join(f"{part.replace('_', ' ')} {size(n)}" for part, n in plan.memory.items())
    table.add_row("memory", f"about {size(sum(plan.memory.values()))} per device ({parts})")
    if plan.tokens_per_day is not None:
        low, high = plan.tokens_per_day
        days = f"{plan.tokens / high:,.3g} to {plan.tokens / low:,.3g} days"
        table.add_row("speed", f"{quantity(low)} to {quantity(high)} tokens per day (plan.mfu): {days}")
    _console.print(table)


def show_profile(operators: Sequence[tuple[str, int, float]], *, total: float, folder: Path) -> None:
    """The slowest operators: name, calls, own time in µs; `total` is that of all."""
    table = Table(title="Profile: own time of operators", title_justify="left", title_style="bold", box=None)
    for name in ("operator", "calls", "ms", "share"):
        table.add_column(name, justify="left" if name == "operator" else "right")
    for operator, calls, microseconds in operators:
        table.add_row(escape(operator), f"{calls:,}", f"{microseconds / 1000:,.1f}", f"{microseconds / total:.1%}")
    _console.print(table)
    say(f"Profile: {folder}: table.txt, and a trace for https://ui.perfetto.dev or TensorBoard's profiler plugin")


def show_summary(summary: dict[str, Any]) -> None:
    """The results."""
    table = _table("Summary")
    unigram = summary["unigram_entropy"]
    known = "" if unigram is None else f"; unigram entropy {unigram:.4f}"
    table.add_row("validation loss", f"[bold]{summary['val_loss']:.4f}[/] nats per token{known}")
    table.add_row("perplexity", f"{summary['perplexity']:.2f}")
    for name, value in summary["metrics"].items():
        table.add_row(name.replace("_", " "), f"{value:.4f}")
    for name, value in summary["loss_terms"].items():
        if name != "loss":
            table.add_row(name.replace("_", " "), f"{value:.4g} in the last logged step")
    if len(summary["ledger"]) > 1:
        for source, entry in summary["ledger"].items():
            drawn = f"{entry['tokens']:,} tokens, {entry['share']:.2%}, {entry['epochs']:.2f} epochs"
            table.add_row(source, f"{drawn}; validation loss {entry['val_loss']:.4f}")
    speed = "" if summary["tokens_per_second"] is None else f", {summary['tokens_per_second']:,.0f} tokens/s"
    table.add_row("training", f"{summary['tokens']:,} tokens in {summary['seconds']:.0f} s{speed}")
    for name in ("loss_spikes", "skipped", "rollbacks"):
        if events := summary.get(name):
            steps = [event["step"] if isinstance(event, dict) else event for event in events]
            shown = f"at step {', '.join(f'{step:,}' for step in steps[:8])}" + (" …" if len(steps) > 8 else "")
            table.add_row(name.replace("_", " "), f"{len(steps)}, {shown} (inspect_batch.py shows its text)")
    _console.print()
    _console.print(table)


def show_sample(text: str) -> None:
    """A text of the model's."""
    _console.print("[bold]Sample[/]")
    _console.print(text, markup=False, soft_wrap=True)


def show_where(run_dir: Path, commands: Mapping[str, str]) -> None:
    """Where to look next, and what to do with the model."""
    _console.print()
    _console.print(f"[cyan]run folder  [/] {escape(str(run_dir))}", soft_wrap=True)
    for what, command in commands.items():
        _console.print(f"[cyan]{what:12}[/] {escape(command)}", soft_wrap=True)
