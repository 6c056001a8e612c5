"""Tables of docs/ablations.md: python benchmarks/ablations.py logs/sweeps/ablation_*/<time>, all finished sweeps.

Prints for each sweep its command, a table of arms and the sentences of its report, as markdown, and copies its
results.csv to benchmarks/results/ablations/.
"""

import json
import shutil
import sys
from pathlib import Path

from thunderhead.lab.analysis import Analysis, Metric, analyse
from thunderhead.lab.runs import read_runs, recorded_names
from thunderhead.lab.statistics import signed

RESULTS = Path(__file__).parent / "results" / "ablations"


def analysed(folder: Path) -> Analysis:
    """What the report of a sweep says, from its runs and the names that it gave its arms."""
    runs = read_runs(folder / job for job in json.loads((folder / "sweep.json").read_text())["jobs"])  # in its order
    metric: Metric = "loss_averaged" if "averaging" in folder.parent.name else "auto"
    return analyse(runs, names=recorded_names(runs), metric=metric)


def table(analysis: Analysis) -> list[str]:
    """A row an arm, in the order of the ranking."""
    lines = ["| arm | validation loss | − first arm | 95 % interval | |", "|---|---|---|---|---|"]
    for arm in analysis.ranking:
        found = analysis.against_reference(arm)
        mean = f"{analysis.mean(arm):.4f}"
        if found is None or found.interval is None:
            lines.append(f"| {arm.name} | {mean} | | | compared with |")
            continue
        low, high = (signed(value, 3) for value in found.interval)
        judged = {"equal": "practically equal", "open": "not resolved"}.get(found.verdict, found.verdict)
        lines.append(f"| {arm.name} | {mean} | {signed(found.mean, 3)} | {low} … {high} | {judged} |")
    return lines


def tuning(folder: Path) -> list[str]:
    """Losses of a sweep's trial runs, if it tuned."""
    file = folder / "tuning.json"
    if not file.is_file():
        return []
    table = json.loads(file.read_text())
    factors = [next(iter(trial["multiplier"].values())) for trial in next(iter(table.values()))["trials"]]
    lines = ["", "Trial runs, one seed each: validation loss at multiples of the arm's default learning rate.", ""]
    lines += [f"| arm | {' | '.join(f'× {factor:g}' for factor in factors)} |", "|---" * (len(factors) + 1) + "|"]
    for arm, tuned in table.items():
        losses = ["failed" if t["val_loss"] is None else f"{t['val_loss']:.4f}" for t in tuned["trials"]]
        lines.append(f"| {arm} | {' | '.join(losses)} |")
    return lines


def main(folders: list[str]) -> None:
    RESULTS.mkdir(exist_ok=True)
    for folder in map(Path, folders):
        name = folder.parent.name
        shutil.copy(folder / "results.csv", RESULTS / f"{name}.csv")
        analysis = analysed(folder)
        print(
            "\n".join(["", f"## {name}", "", "```", f"python train.py experiment={name}", "```", "", *table(analysis)])
        )
        print("\n".join(tuning(folder)))
        print("\n".join(["", *(f"> {sentence}  " for sentence in analysis.sentences), ""]))
        print("\n".join(f"- {warning}" for warning in analysis.warnings))


if __name__ == "__main__":
    main(sys.argv[1:])
