"""The coordinate check of Yang et al. 2203.03466 (appendix D.1) holds under muP, and fails without it."""

from pathlib import Path
from unittest.mock import patch

import pytest

import programs
from thunderhead import command_line
from thunderhead.core import config
from thunderhead.core.config import ConfigError
from thunderhead.lab.coordinate_check import changes, check_coordinates, slopes
from thunderhead.options.mup import at_width

SMALL = {"widths": [32, 64, 128, 256], "values": {}, "steps": 4, "sequences": 4, "vocab_size": 256, "seeds": [1]}
# Finite width: the exponents of 3 to 8 widths in docs/mup.md are within 0.2 of 0 under muP, and above 0.5 without it.
TOLERANCE = 0.25


def exponents(*overrides: str) -> dict[str, float]:
    settings = ("model.n_heads=12", *overrides)  # heads of 16
    return slopes(changes(config.plain(config.compose(settings, "coordinate_check")), at_width, **SMALL))


@pytest.mark.parametrize(
    "choices",
    [
        ("attention=mha",),
        ("attention=mqa", "model.tie_embeddings=false", "position=learned"),
        ("attention=mla", "optimizer=lion"),
        pytest.param(("attention=mha", "optimizer=muon"), marks=pytest.mark.slow),
        pytest.param(
            ("attention=mha", "optimizer=muon", "optimizer.adjust_lr_fn=original", "activation=gelu"),
            marks=pytest.mark.slow,
        ),
    ],
    ids=" ".join,
)
def test_changes_do_not_depend_on_the_width_under_mup(choices: tuple[str, ...]) -> None:
    found = exponents(*choices, "parametrization=mup", "parametrization.base_d_model=64")
    assert next(iter(found)) == "embedding"
    assert list(found)[-2:] == ["block 1 output", "target logits"]
    assert {layer: slope for layer, slope in found.items() if abs(slope) > TOLERANCE} == {}


@pytest.mark.parametrize("optimizer", ["adamw", pytest.param("muon", marks=pytest.mark.slow)])
def test_they_grow_under_the_standard_parametrization(optimizer: str) -> None:
    found = exponents("attention=mha", f"optimizer={optimizer}", "parametrization=standard")
    assert {found[layer] > 2 * TOLERANCE for layer in ("block 0 output", "block 1 output", "target logits")} == {True}


def test_the_exponent_is_that_of_a_power_law() -> None:
    powers = {width: 3 * width**0.7 for width in (32, 64, 256)}
    assert slopes({"x": powers, "y": dict.fromkeys(powers, 2.0)}) == {"x": pytest.approx(0.7), "y": pytest.approx(0)}


def check(folder: Path, *overrides: str) -> None:
    small = ("widths=[32,64]", "seeds=[1]", "steps=1", "sequences=1", "model.n_heads=12")
    folder.mkdir()
    with patch.object(command_line, "output_dir", lambda: folder):
        check_coordinates(config.compose([*small, *overrides], "coordinate_check"), at_width)


def test_the_program_draws_tells_and_ends_with_the_verdict(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    check(tmp_path / "kept", "tolerance=9.0")
    assert "kept: no change grows" in capsys.readouterr().out
    assert (tmp_path / "kept" / "coordinates.png").stat().st_size > 10_000
    with pytest.raises(SystemExit) as status:
        check(tmp_path / "not", "tolerance=1e-9")
    assert status.value.code == 1
    said = capsys.readouterr().out
    assert "not kept: the change depends on the width beyond ±1e-09: " in said
    assert "target logits as width^" in said


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("optimizer=sgd",), r"^parametrization=mup: SGD .* width"),
        (("widths=[64]",), "^widths: needs two widths or more"),
        (("widths=[64,100]",), r"^d_model=100 is no whole number of heads .*: use a multiple of 16, or say values="),
        (
            ("values={attention.n_kv_head: 1}",),
            r"^values: attention\.n_kv_head is unknown .*attention\.n_kv_heads\?$",
        ),
        (("attention=mha", "attention.logit_softcap=5.0"), r"^attention\.logit_softcap and .* need flex_attention"),
        (("steps=0",), "^steps: 0 is not accepted"),
    ],
)
def test_bad_input_is_refused(overrides: tuple[str, ...], message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        check(tmp_path / "refused", *overrides)
    assert not (tmp_path / "refused").exists()


def test_the_program_starts(tmp_path: Path) -> None:
    settings = ("attention=mha", "widths=[32,64]", "steps=1", "sequences=2", f"hydra.run.dir={tmp_path / 'check'}")
    done = programs.run("coordinate_check.py", *settings)
    assert done.returncode == 0, done.stdout + done.stderr
