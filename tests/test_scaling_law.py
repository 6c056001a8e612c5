"""A scaling law: its optimum against a search, round trips through law.json, and what is refused."""

import json
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
from scipy.optimize import minimize_scalar

from thunderhead.core.types import counted
from thunderhead.scaling_law import Law, read_law

# Hoffmann et al. as corrected by Besiroglu et al. (2404.10102), with 6 N FLOPs a token.
CHINCHILLA = Law(
    count="total",
    E=1.8172,
    A=482.01,
    B=2085.43,
    alpha=0.3478,
    beta=0.3658,
    flops_coefficient=6,
    flops_exponent=1,
    parameters=(4e7, 2e10),
    tokens=(1e9, 5e11),
    flops=(1e18, 1e22),
)
SMALL = replace(CHINCHILLA, flops_coefficient=20.0, flops_exponent=0.9)
"""Small models: FLOPs a token are no multiple of N."""


def test_the_loss_of_a_run_worked_out_by_hand() -> None:
    law = replace(CHINCHILLA, E=2.0, A=100.0, B=1000.0, alpha=0.5, beta=0.25)
    assert law.loss(10_000.0, 10_000.0) == pytest.approx(2 + 100 / 100 + 1000 / 10)
    assert law.loss(1e6, 1e8) == pytest.approx(2 + 0.1 + 10)


@pytest.mark.parametrize("law", [CHINCHILLA, SMALL])
@pytest.mark.parametrize("flops", [1e18, 5.76e23])
def test_the_optimum_is_the_lowest_loss_of_its_budget(law: Law, flops: float) -> None:
    """Against scipy's search along D = C / (k N^p)."""

    def flops_of(n: float, d: float) -> float:
        return float(law.flops_coefficient * n**law.flops_exponent * d)

    def loss(log_n: float) -> float:
        n = float(np.exp(log_n))
        return law.loss(n, flops / flops_of(n, 1.0))

    found = minimize_scalar(loss, bounds=(np.log(1e5), np.log(1e14)), method="bounded", options={"xatol": 1e-9})
    parameters, tokens, _ = law.optimum(flops)
    assert np.log(parameters) == pytest.approx(found.x, abs=1e-3)
    assert law.loss(parameters, tokens) == pytest.approx(found.fun, rel=1e-9)
    assert flops_of(parameters, tokens) == pytest.approx(flops)
    assert law.optimal_tokens(parameters) == pytest.approx(tokens)


def test_twenty_tokens_a_parameter_at_chinchillas_compute() -> None:
    """Besiroglu et al., section 5: the corrected law agrees with the 20 tokens that Chinchilla was trained with."""
    parameters, tokens, _ = CHINCHILLA.optimum(5.76e23)
    assert 15 < tokens / parameters < 25
    assert parameters == pytest.approx(70e9, rel=0.15)


@pytest.mark.parametrize(
    ("quantities", "words"),
    [
        ({"parameters": 1e9, "tokens": 1e10, "flops": 1e20}, ""),
        ({"parameters": 2.1e10}, ""),  # within a tenth
        ({"parameters": 6e10}, "an extrapolation: 3 × the most parameters that the law was fitted on"),
        (
            {"tokens": 5e8, "flops": 1e24},
            "an extrapolation: 0.5 × the fewest tokens and 100 × the most flops that the law was fitted on",
        ),
    ],
)
def test_how_far_outside(quantities: dict[str, float], words: str) -> None:
    assert CHINCHILLA.extrapolation(**quantities) == words


def test_what_is_counted() -> None:
    parts = {"total": 100, "embedding": 20, "position": 5, "head": 15, "blocks": 60}
    assert (counted(parts, "total"), counted(parts, "non_embedding")) == (100, 60)


def test_a_law_is_read_back_from_its_file(tmp_path: Path) -> None:
    file = tmp_path / "law.json"
    file.write_text(json.dumps({"law": asdict(SMALL), "intervals": {"E": [1, 2]}, "warnings": []}))
    assert read_law(file) == SMALL


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"alpha": -0.1}, r"law\.json is no fitted law: law\.alpha: input should be greater than 0"),
        ({"count": "all"}, r"law\.count: input should be 'total' or 'non_embedding'"),
        ({"beta": None}, r"law\.beta: input should be a valid number"),
    ],
)
def test_a_file_that_is_no_law_is_refused(tmp_path: Path, changes: dict[str, object], message: str) -> None:
    file = tmp_path / "law.json"
    file.write_text(json.dumps({"law": asdict(CHINCHILLA) | changes}))
    with pytest.raises(ValueError, match=message):
        read_law(file)
    file.write_text("{")
    with pytest.raises(ValueError, match="is no fitted law"):
        read_law(file)
    with pytest.raises(ValueError, match=r"No such file or directory.*experiment=scaling_law"):
        read_law(tmp_path / "none.json")
