"""The report of a ladder: report.html, results.csv, a figure, the answer on the terminal."""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from thunderhead.core.config import Config
from thunderhead.lab import arms as grouping
from thunderhead.lab import page
from thunderhead.lab.jobs import Plan
from thunderhead.lab.ladder import Estimate, Ladder, Persistence, Rung, Verdict, climb
from thunderhead.lab.ladder_figures import FIGURES
from thunderhead.lab.page import Rows, interval
from thunderhead.lab.runs import Failure, Run, tuned_settings
from thunderhead.lab.scaling_report import SCALED
from thunderhead.lab.statistics import signed
from thunderhead.terminal import Console, quantity, say
from thunderhead.training import record

FURTHER = 10.0
"""Times the parameters of the largest size: where effects are projected to, if nobody says."""
SIGNS: dict[Verdict, str] = {"persists": "→", "shrinks": "↘", "grows": "↗", "flips": "⇄", "unknown": "?"}


class Place(NamedTuple):
    """Where a run stands in a ladder; what is held out is predicted, and not fitted."""

    size: str
    arm: str
    held_out: bool = False


def places_of(runs: Sequence[Run], fit_up_to: float | None = None) -> dict[Path, Place]:
    """Where finished runs of any sweeps stand: sizes differ in the model, arms in what a size has not its own of.

    Sizes with more training FLOPs than `fit_up_to` are held out.
    """
    finished = [run for run in runs if run.unfinished is None]
    sizes = {run.folder: _settings(run, of_size=True) for run in finished}
    arms = {run.folder: _settings(run, of_size=False) for run in finished}
    smallest = sorted(finished, key=lambda run: float(run.result("flops")))
    firsts = {arms[run.folder]: run for run in reversed(smallest)}
    names = dict(zip(firsts, grouping.arm_names(list(firsts.values())), strict=True))
    flops, labels = dict[str, float](), dict[str, str]()
    for run in finished:
        size = sizes[run.folder]
        flops[size] = max(flops.get(size, 0.0), float(run.result("flops")))
        labels.setdefault(size, f"{quantity(run.plan['parameters']['total'])} parameters")
    most = math.inf if fit_up_to is None else fit_up_to
    return {f: Place(labels[size], names[arms[f]], flops[size] > most) for f, size in sizes.items()}


def _settings(run: Run, *, of_size: bool) -> str:
    kept = {p: v for p, v in grouping.settings(run.config).items() if grouping.is_in(p, SCALED) == of_size}
    tuned = set() if of_size else tuned_settings(run.folder)  # an arm is one, whatever was best for it at each size
    kept = {p: v for p, v in kept.items() if (grouping.is_in(p, ["model"]) if of_size else p not in tuned)}
    return json.dumps(kept, sort_keys=True)


def rate_rule(configs: Sequence[Config]) -> str:
    """How learning rates follow the size, in words."""
    rates = sorted({rate for config in configs if (rate := config["optimizer"].get("lr")) is not None})
    shown = " … ".join(f"{rate:g}" for rate in dict.fromkeys([*rates[:1], *rates[-1:]]))
    bases = {str((config.get("parametrization") or {}).get("base_d_model")) for config in configs}
    if "None" not in bases:
        return f"muP, from those of width {', '.join(sorted(bases))} (optimizer.lr {shown})"
    if len(rates) > 1:
        return f"set by size or arm (optimizer.lr {shown})"
    return f"the same at every size (optimizer.lr {shown}), so that a trend may be the learning rate's"


def write_ladder_report(
    folder: Path,
    runs: Sequence[Run],
    places: Mapping[Path, Place],
    *,
    baseline: str | None = None,
    project: float | None = None,
    failures: Sequence[Failure] = (),
    notes: Sequence[str] = (),
) -> Path:
    """Compare arms across sizes and write what was found into a folder, replacing an earlier report there.

    `places` has the finished runs; `baseline` is an arm, None = that of the first run; `project` the parameters of a
    size to project to. The folder gets report.html, whose path is returned, results.csv and figures/. Where runs tell
    nothing, the report says why and lists them. `failures` and `notes` are those of
    `thunderhead.lab.report.write_report`.
    """
    left_out = [*failures, *(Failure(run.folder.name, run.unfinished) for run in runs if run.unfinished is not None)]
    finished = [run for run in runs if run.unfinished is None]
    found, answers, warnings, rates = None, [("open", "", "No run has finished.")], list(notes), ""
    if finished:
        rates = f"; learning rates by size: {rate_rule([run.config for run in finished])}"
        if diverged := [run for run in runs if run.diverged]:
            warnings.append(f"{len(diverged)} run(s) diverged; what is shown of the others flatters their arms.")
    try:
        found = _ladder(finished, places, baseline, project)
        answers = [answer for arm in found.arms for answer in _answers(found, arm)]
    except ValueError as error:
        answers = [("open", "", str(error))]
    rows = _rows(found) if found else []
    record.write_rows(folder / "results.csv", list(rows[0]) if rows else ["arm", "size"], rows)
    ratios = [float(run.result("tokens")) / run.plan["parameters"]["total"] for run in finished]
    budgets = f", {min(ratios):.3g} to {max(ratios):.3g} tokens a parameter" if ratios else ""
    path = page.write(
        folder,
        "ladder.html.jinja",
        title=f"Does it persist? {', '.join(arm.arm for arm in found.arms)} against {found.baseline}"
        if found
        else "No ladder",
        subtitle=f"{len(finished)} finished runs{budgets}{rates}",
        answers=answers,
        no_answer="",
        warnings=warnings,
        effects=_effects(found) if found else Rows(),
        held_out=_held_out(found) if found else Rows(),
        runs=_runs(finished, places),
        left_out=left_out,
        figures=FIGURES,
        of=found,
    )
    console = Console(highlight=False)
    console.print("\n[bold]Ladder[/]")
    told = [("cyan", f"{words} {sentence}".strip()) for _, words, sentence in answers]
    page.tell(console, told, warnings, left_out, how="compared", report=path)
    return path


def tell_predictions(
    runs: Sequence[Run], places: Mapping[Path, Place], planned: Mapping[Path, Plan], *, baseline: str
) -> None:
    """Say what the held-out size will come to before it is trained."""
    try:
        found = _ladder([run for run in runs if run.unfinished is None], places, baseline, None)
    except ValueError as error:
        say(str(error))
        return
    flops = {places[folder].arm: float(plan.flops) for folder, plan in planned.items()}
    for arm in found.arms:
        if arm.arm in flops:
            own, base = arm.predict_loss(flops[arm.arm]), arm.predict_loss(flops[baseline], of_baseline=True)
            multiplier, compute = _told(arm.project(flops[arm.arm])), f"{flops[arm.arm]:.3g} FLOPs"
            say(f"Predicted for {arm.arm} at {compute}: {multiplier} × {baseline}'s compute, loss {_told(own, 3)}")
            say(f"Predicted for {baseline} at {flops[baseline]:.3g} FLOPs: loss {_told(base, 3)}")


# --- what was found ---------------------------------------------------------------------------------------------------


def _ladder(runs: Sequence[Run], places: Mapping[Path, Place], baseline: str | None, project: float | None) -> Ladder:
    """Climb with each arm; ValueError with what is missing."""
    if len({grouping.validation_data(run) for run in runs}) > 1:
        raise ValueError("No ladder: the runs were validated on different tokens (data, tokenizer or context).")
    grouped: dict[str, dict[Place, list[Run]]] = {}
    for run in runs:
        place = places[run.folder]
        grouped.setdefault(place.arm, {}).setdefault(place, []).append(run)
    if len(grouped) < 2:
        raise ValueError(f"No ladder: the runs have {len(grouped)} arm(s), and one is compared with another.")
    first = baseline if baseline is not None else next(iter(grouped))
    if first not in grouped:
        raise ValueError(f"No ladder: the baseline {first} has no finished run; the arms are {', '.join(grouped)}.")
    every = {arm: {place: _rung(place, members) for place, members in of.items()} for arm, of in grouped.items()}
    fitted = {arm: [rung for place, rung in rungs.items() if not place.held_out] for arm, rungs in every.items()}
    arms, tested, projections = [], {}, {}
    most = max((rung.parameters for rung in fitted[first]), default=0.0)
    parameters = project if project is not None else FURTHER * most
    for name in (name for name in every if name != first):
        arm = climb(fitted[first], name, fitted[name])
        arms.append(arm)
        n, c = np.log([(effect.baseline.parameters, effect.arm.flops) for effect in arm.effects]).T
        flops = float(np.exp(np.polyval(np.polyfit(n, c, 1), np.log(parameters))))
        projections[name] = (flops, arm.project(flops))
        held_out = [p for p in every[first] if p.held_out and p._replace(arm=name) in every[name]]
        if held_out:
            tested[name] = climb(list(every[first].values()), name, list(every[name].values()))
    return Ladder(first, arms, tested, parameters, projections)


def _rung(place: Place, runs: Sequence[Run]) -> Rung:
    losses = {run.seed: float(run.result("val_loss")) for run in runs}
    if len(losses) < len(runs):
        raise ValueError(f"No ladder: several runs of {place.arm} at {place.size} have one seed; they are other arms.")
    parameters, flops = float(runs[0].plan["parameters"]["total"]), float(runs[0].result("flops"))
    return Rung(place.size, parameters, flops, dict(sorted(losses.items())))


# --- words and tables -------------------------------------------------------------------------------------------------


def _told(estimate: Estimate, digits: int = 2) -> str:
    value, low, high = (f"{x:.{digits}f}" if x < 100 else "over 100" for x in (estimate.value, *estimate.interval))
    return f"{value} (90 % CI {low} … {high})"


def _answers(found: Ladder, arm: Persistence) -> list[tuple[str, str, str]]:
    first, last = arm.effects[0], arm.effects[-1]
    flops, projection = found.projections[arm.arm]
    side = last.fitted.side if arm.verdict != "unknown" else 0
    colour = {1: "better", 0: "open", -1: "worse"}[side]
    sentence = (
        f"{arm.arm} is worth {_told(last.fitted)} × the compute of {found.baseline} at the largest size, "
        f"{last.arm.size}, and {_told(first.fitted)} × at the smallest, {first.arm.size}: ten times the compute "
        f"multiply it by {_told(arm.trend)}. Projected to {quantity(found.parameters)} parameters ({flops:.2g} FLOPs): "
        f"{_told(projection)} ×."
    )
    told = [(colour, f"{SIGNS[arm.verdict]} {arm.verdict}", sentence)]
    if arm.arm in found.tested:
        test = found.tested[arm.arm].effects[-1]
        predicted = arm.project(test.arm.flops)
        inside = predicted.interval.low <= test.multiplier.value <= predicted.interval.high
        told.append((
            "open",
            "held out",
            f"{test.arm.size}, with {test.arm.flops / last.arm.flops:.1f} × the compute of the largest fitted size: "
            f"predicted {_told(predicted)} ×, measured {_told(test.multiplier)} ×, "
            f"{'inside' if inside else 'outside of'} the prediction's interval.",
        ))  # fmt: skip
    return told


def _rows(found: Ladder) -> list[dict[str, object]]:
    """A row of results.csv for each arm and size, held-out ones too."""
    rows = []
    for arm in found.arms:
        tested = found.tested[arm.arm].effects[len(arm.effects) :] if arm.arm in found.tested else []
        for index, effect in enumerate([*arm.effects, *tested]):
            row: dict[str, object] = {"arm": arm.arm, "size": effect.arm.size, "held_out": index >= len(arm.effects)}
            row |= {"parameters": effect.arm.parameters, "flops": effect.arm.flops, "compute_ratio": effect.compute}
            row |= {"seeds": effect.n_seeds, "loss": effect.arm.mean, "baseline_loss": effect.baseline.mean}
            for name in ("difference", "multiplier"):
                value, (low, high) = getattr(effect, name)
                row |= {name: value, f"{name}_low": low, f"{name}_high": high}
            rows.append(row)
    return rows


def _effects(found: Ladder) -> Rows:
    rows = []
    for arm in found.arms:
        for effect in arm.effects:
            what = [arm.arm, effect.arm.size, quantity(effect.arm.parameters), f"{effect.arm.flops:.2g}"]
            losses = [f"{effect.baseline.mean:.4f}", f"{effect.arm.mean:.4f}", signed(effect.difference.value)]
            of = [interval(effect.difference.interval, "signed"), f"{effect.compute:.2f} ×", str(effect.n_seeds)]
            rows.append([*what, *losses, *of, _told(effect.multiplier), _told(effect.fitted)])
    columns = ("arm", "size", "N", "training FLOPs", f"loss of {found.baseline}", "its loss", "Δ (nats)", "90 % CI")
    more = ("its compute", "seeds", "compute multiplier", "by the trend")
    return Rows((*columns, *more), rows, "Δ is of the losses as measured; the multiplier counts the compute, too.")


def _held_out(found: Ladder) -> Rows:
    rows = []
    for arm in (arm for arm in found.arms if arm.arm in found.tested):
        test = found.tested[arm.arm].effects[-1]
        own, base = arm.predict_loss(test.arm.flops), arm.predict_loss(test.baseline.flops, of_baseline=True)
        what = f"{arm.arm} at {test.arm.size}"
        rows.append([f"{what}: multiplier", _told(arm.project(test.arm.flops)), _told(test.multiplier)])
        rows.append([f"{what}: loss", _told(own, 3), f"{test.arm.mean:.3f}"])
        rows.append([f"{found.baseline} at {test.arm.size}: loss", _told(base, 3), f"{test.baseline.mean:.3f}"])
    return Rows(("", "predicted from the smaller sizes", "measured"), rows)


def _runs(runs: Sequence[Run], places: Mapping[Path, Place]) -> Rows:
    rows = [
        [
            *(places[run.folder].arm, places[run.folder].size + " (held out)" * places[run.folder].held_out),
            *(str(run.seed), f"{run.result('val_loss'):.4f}", f"{run.result('tokens'):,.0f}"),
            *(f"{run.result('flops'):.3g}", f"{run.config['optimizer'].get('lr', math.nan):g}", str(run.folder)),
        ]
        for run in runs
    ]
    return Rows(("arm", "size", "seed", "final loss", "tokens", "training FLOPs", "optimizer.lr", "folder"), rows)
