"""The tables of a comparison's report."""

from collections.abc import Callable, Iterable, Mapping

from thunderhead.core.config import show
from thunderhead.core.terminal import quantity, size
from thunderhead.lab import statistics
from thunderhead.lab.analysis import Analysis
from thunderhead.lab.arms import Arm, percent
from thunderhead.lab.page import NONE, Rows, interval, number
from thunderhead.lab.statistics import Comparison, signed

CACHE = "cache_bytes_per_token"
Cell = Callable[[Arm], str]
"""What a column says about an arm."""


def _table(arms: Iterable[Arm], columns: Mapping[str, Cell], caption: str) -> Rows:
    return Rows(("arm", *columns), [(arm.name, *(cell(arm) for cell in columns.values())) for arm in arms], caption)


def mean(name: str, form: str) -> Cell:
    """The mean of a value over an arm's seeds."""
    return lambda arm: number(arm.mean(name), form)


def verdict(comparison: Comparison) -> tuple[str, str]:
    """A class for the colour, and words: the colour says nothing that the words do not."""
    if not comparison.resolved:
        return "open", "? one seed" if comparison.n == 1 else "? not resolved"
    return ("worse", "▲ worse") if comparison.mean > 0 else ("better", "▼ better")


def loss_columns(analysis: Analysis) -> dict[str, Cell]:
    losses = {arm.name: list(analysis.losses[arm.name].values()) for arm in analysis.arms}
    return {
        "seeds": lambda arm: str(len(losses[arm.name])),
        f"final loss ({analysis.unit})": lambda arm: f"{analysis.mean(arm):.4f}",
        "95 % CI": lambda arm: interval(statistics.mean_interval(losses[arm.name])),
    }


def ranking(analysis: Analysis) -> Rows:
    def difference(arm: Arm) -> str:
        against = analysis.against_reference(arm)
        return signed(against.mean) if against and against.n else NONE

    def its_interval(arm: Arm) -> str:
        against = analysis.against_reference(arm)
        return interval(against.t if against else None, "signed")

    columns: dict[str, Cell] = {
        **loss_columns(analysis),
        f"Δ to {analysis.reference.name}" if analysis.reference else "Δ": difference,
        "95 % CI of Δ": its_interval,
        "perplexity": mean("perplexity", ".2f"),
        "bits a byte": mean("bits_per_byte", ".4f"),
        **{name: mean(name, ".4f") for name in analysis.names(lambda run: run.metrics)},
    }
    return _table(analysis.ranking, columns, "Arms by their mean final validation loss, the lowest first.")


def comparisons(analysis: Analysis) -> Rows:
    rows = [
        (
            f"{c.arm} − {c.against}",
            verdict(c)[1],
            str(c.n),
            signed(c.mean) if c.n else NONE,
            interval(c.t, "signed"),
            interval(c.bootstrap, "signed"),
            number(c.p, ".2g"),
            number(c.p_holm, ".2g"),
            number(c.minimum_detectable, ".4f"),
            NONE if c.p is None else f"{c.seeds_needed:,}" if c.seeds_needed else f"> {statistics.MOST_SEEDS:,}",
        )
        for c in analysis.comparisons
    ]
    columns = (
        *("comparison", "verdict", "seeds", f"Δ ({analysis.unit})", "95 % CI (t)", "95 % CI (bootstrap)"),
        *("p", "p (Holm)", "smallest Δ these seeds show", "seeds to show this Δ"),
    )
    return Rows(columns, rows, "Paired differences of the final loss; below 0 the first arm is better.")


def matching(analysis: Analysis) -> Rows:
    reference = analysis.reference

    def of_reference(name: str) -> Cell:
        def cell(arm: Arm) -> str:
            value, base = arm.mean(name), reference.mean(name) if reference else None
            missed = f" ({_missed(value, base)})" if arm is not reference and value is not None and base else ""
            return NONE if value is None else f"{quantity(value)}{missed}"

        return cell

    def by_sweep(arm: Arm) -> str:
        match = arm.first.match
        if match is None:
            return "nothing was solved for"
        solved = ", ".join(f"{path}={show(value)}" for path, value in match.set.items()) or "nothing changed"
        missed = _missed(match.reached, match.target) if match.target else NONE
        return f"{match.by}: {quantity(match.reached)} of {quantity(match.target)} ({missed}) by {solved}"

    names = {"parameters": "parameters", "tokens": "tokens", "training FLOPs": "flops", "seconds": "seconds"}
    columns = {label: of_reference(name) for label, name in names.items()} | {"matched by the sweep": by_sweep}
    return _table(analysis.arms, columns, f"In brackets: against {reference.name}." if reference else "")


def reach(analysis: Analysis) -> Rows:
    reference = analysis.reference
    if reference is None or len(analysis.arms) < 2:
        return Rows()
    targets = analysis.losses[reference.name]
    totals = [reference.mean(name) for name in ("tokens", "flops", "seconds")]
    rows = []
    for arm in analysis.arms:
        aims = {seed: targets.get(seed, analysis.mean(reference)) for seed in arm.runs}
        costs = [analysis.validation_curve(arm.runs[seed]).cost_to_reach(loss) for seed, loss in aims.items()]
        reached = [cost for cost in costs if cost is not None]
        row = [arm.name, f"{len(reached)} of {len(costs)}"]
        for index, total in enumerate(totals):
            mean = sum(cost[index] for cost in reached) / len(reached) if reached else None
            row.append(f"{quantity(mean)} ({mean / total:.2f} ×)" if mean is not None and total else NONE)
        rows.append(row)
    caption = (
        f"Cost to reach the final loss of {reference.name} of the same seed: the mean of the seeds that do, and its "
        f"ratio to all that {reference.name} took."
    )
    return Rows(("arm", "seeds that reach it", "tokens", "training FLOPs", "seconds"), rows, caption)


def inference(analysis: Analysis) -> Rows:
    columns: dict[str, Cell] = {
        "cache, bytes per token": mean(CACHE, ",.0f"),
        "parameters": mean("parameters", ",.0f"),
        "forward FLOPs per token": lambda arm: quantity(arm.first.plan.get("flops_per_token", 0) / 3),
        "measured decoding, tokens/s": mean("decode_tokens_per_second", ",.0f"),
        "final loss": lambda arm: f"{analysis.mean(arm):.4f}",
    }
    caption = "Cache: what all layers keep of a full context (keys and values), for each of its tokens."
    return _table(analysis.ranking, columns, caption)


def training(analysis: Analysis) -> Rows:
    reference = analysis.reference

    def ratio(arm: Arm) -> str:
        speeds = arm.mean("tokens_per_second"), reference.mean("tokens_per_second") if reference else None
        return f"{speeds[0] / speeds[1]:.2f} ×" if speeds[0] and speeds[1] else NONE

    def planned(arm: Arm) -> str:
        estimate = sum((arm.first.plan.get("memory") or {}).values())
        return size(estimate) if estimate else NONE

    columns: dict[str, Cell] = {
        "tokens/s": mean("tokens_per_second", ",.0f"),
        "× reference": ratio,
        "seconds": mean("seconds", ",.0f"),
        "peak memory": lambda arm: size(int(max(m))) if (m := arm.values("peak_memory_bytes")) else NONE,
        "planned": planned,
        "precision": lambda arm: str(arm.first.result("precision") or NONE),
        "device": lambda arm: str(arm.first.result("device") or NONE),
    }
    caption = "Mean over seeds, without validation; peak memory: the highest seed, on a CPU of the whole process."
    return _table(analysis.arms, columns, caption)


def loss_terms(analysis: Analysis) -> Rows:
    """Of the runs that have any; an arm without a term has none of it."""

    def mean(name: str) -> Cell:
        def cell(arm: Arm) -> str:
            values = [run.loss_terms[name] for run in arm.runs.values() if name in run.loss_terms]
            return f"{sum(values) / len(values):.4g}" if values else NONE

        return cell

    names = analysis.names(lambda run: run.loss_terms)
    if not names:
        return Rows()
    caption = "Terms of the training loss beside the cross-entropy, as they are added to it; mean over seeds."
    return _table(analysis.arms, {name: mean(name) for name in names}, caption)


def runs(analysis: Analysis) -> Rows:
    rows = [
        (
            arm.name,
            str(seed),
            f"{analysis.losses[arm.name][seed]:.4f}",
            number(run.number("tokens"), ",.0f"),
            number(run.number("seconds"), ",.0f"),
            str(run.git.get("commit", NONE))[:8],
            str(run.folder),
        )
        for arm in analysis.arms
        for seed, run in arm.runs.items()
    ]
    return Rows(("arm", "seed", "final loss", "tokens", "seconds", "commit", "folder"), rows)


def _missed(value: float, target: float) -> str:
    return "=" if value == target else percent(value / target - 1, 2)
