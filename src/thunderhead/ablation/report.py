"""The report of an ablation: report.html, results.csv, PNG figures, TensorBoard HParams, a ranking on the terminal."""

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from thunderhead.ablation.runs import Failure, Run


def write_report(
    folder: Path,
    runs: Sequence[Run],
    *,
    baseline: str | None = None,
    failures: Sequence[Failure] = (),
    notes: Sequence[str] = (),
    metric: Literal["auto", "val_loss", "bits_per_byte"] = "auto",
    quiet: bool = False,
) -> Path:
    """Compare runs and write what was found into a folder, replacing an earlier report there.

        runs = read_runs(["logs/sweeps/pretrain/2026-11-24_01-00-00"])
        write_report(folder, runs, baseline="mha", failures=[Failure("attention=mla seed=2", "exit status 1")])

    Runs with equal configuration but for the seed are an arm. Only runs that came to the end of their schedule are
    compared; the others are listed. It works with any number of runs, none included.

    Args:
        folder: gets report.html, results.csv, figures/*.png and hparams/.
        runs: from `thunderhead.ablation.runs.read_runs`.
        baseline: name of the arm that others are compared with ("mha", or "attention=mha"); None = all pairs of up to
            four arms, and the first arm where there are more.
        failures: runs without a result.
        notes: sentences of the caller's for the top of the report, as a warning of the tuning.
        metric: what is compared; auto = the validation loss, or bits per byte where tokenizers differ.
        quiet: print no ranking.

    Returns:
        The path of report.html.

    Raises:
        ValueError: no arm is called `baseline`; names those that there are.
    """
    raise NotImplementedError
