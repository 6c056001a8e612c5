"""The signature is the schema: what is refused, in which words, and what passes."""

import functools
import inspect
import subprocess
from collections.abc import Callable
from enum import Enum
from pathlib import Path
from typing import Any, Literal

import hydra
import pytest
import yaml
from hypothesis import given
from omegaconf import OmegaConf

import awkward
from programs import run
from thunderhead.core import components, config
from thunderhead.core.config import CONF_DIR, ConfigError, Problem
from thunderhead.core.types import PositiveInt, Probability
from thunderhead.training.run import settings
from tiny import OPTIONS, tiny

HERE = __name__
NO_NODES = ("experiment", "debug", "callbacks", "logger", "curation", "metrics")  # overrides, or nodes by name
NEED_PATHS = {
    "data=text": "data",
    "data=shards": "data",
    "tokenizer=huggingface": "tokenizer",
    "tokenizer=tiktoken": "tokenizer",
    "init_from=pretrained": "init_from",
}
NODES = [f"{group}={option}" for group, options in OPTIONS.items() for option in options if group not in NO_NODES]


class Part:
    """A component to check against: one parameter from the code, the others from YAML."""

    def __init__(
        self,
        d_model: int,
        *,
        width: PositiveInt,
        rate: Probability = 0.0,
        kind: Literal["a", "b"] = "a",
        pair: tuple[float, float] = (0.0, 1.0),
        ratio: int | float | None = None,
        inner: Any = None,
        beside: "Part | None" = None,
    ):
        self.d_model, self.width, self.rate, self.kind = d_model, width, rate, kind
        self.pair, self.ratio, self.inner, self.beside = pair, ratio, inner, beside


def takes_any(*, width: int, **others: Any) -> dict[str, Any]:
    return {"width": width, **others}


def node(**arguments: Any) -> dict[str, Any]:
    return {"part": {"_target_": f"{HERE}.Part", "width": 8, **arguments}}


def only(problems: list[Problem]) -> Problem:
    assert len(problems) == 1, problems
    return problems[0]


# --- check ------------------------------------------------------------------------------------------------------------


def test_values_that_fit_pass() -> None:
    assert components.check(node(rate=0.5, kind="b", pair=[0.9, 0.99], ratio=2)) == []
    assert components.check(node(ratio=0.25)) == []
    assert components.check(node(ratio=None)) == []


def test_unknown_key_suggests_the_nearest() -> None:
    problem = only(components.check(node(kinds="a")))
    assert problem == Problem("part.kinds", "is unknown to Part; did you mean kind?")


def test_unknown_key_that_resembles_nothing_lists_all() -> None:
    problem = only(components.check(node(zzz=1)))
    assert problem == Problem("part.zzz", "is unknown to Part; known: beside, inner, kind, pair, rate, ratio, width")


@pytest.mark.parametrize(
    ("arguments", "path", "message"),
    [
        (
            {"ratio": "abc"},
            "part.ratio",
            "'abc' is not accepted: should be a valid integer or should be a valid number",
        ),
        ({"width": 0}, "part.width", "0 is not accepted: should be greater than 0"),
        ({"width": "8"}, "part.width", "'8' is not accepted: should be a valid integer"),
        ({"width": True}, "part.width", "true is not accepted: should be a valid integer"),
        ({"width": None}, "part.width", "null is not accepted: should be a valid integer"),
        ({"rate": 1.0}, "part.rate", "1.0 is not accepted: should be less than 1"),
        ({"kind": "c"}, "part.kind", "'c' is not accepted: should be 'a' or 'b'"),
        (
            {"beside": 7},
            "part.beside",
            "7 is not accepted: should be a component (Part), which is a mapping with _target_",
        ),
    ],
)
def test_wrong_values_say_what_is_accepted(arguments: dict[str, Any], path: str, message: str) -> None:
    problem = only(components.check(node(**arguments)))
    assert problem.path == path
    assert problem.message.startswith(message)


def test_a_list_of_the_wrong_length_is_refused() -> None:
    assert only(components.check(node(pair=[1.0]))).path == "part.pair"


def test_missing_and_supplied_keys() -> None:
    problems = components.check({"part": {"_target_": f"{HERE}.Part", "d_model": 3}})
    told = "is worked out by Thunderhead and cannot be set"
    assert [p.path for p in problems if p.message.startswith(told)] == ["part.d_model"]
    assert Problem("part.width", "is required: part.width=…") in problems
    assert len(problems) == 2


def test_any_key_passes_where_the_target_takes_any() -> None:
    target = {"_target_": f"{HERE}.takes_any", "width": 1, "other": "x"}
    assert components.check({"part": target}) == []
    assert only(components.check({"part": {**target, "width": "x"}})).path == "part.width"


@pytest.mark.parametrize(
    ("target", "why"),
    [
        ("no_such_package.Thing", "No module named 'no_such_package'"),
        (f"{HERE}.NoSuchThing", "'NoSuchThing' is importable from"),
        ("thunderhead.model.NoSuchThing", "No module named 'thunderhead.model'"),
    ],
)
def test_targets_that_cannot_be_imported(target: str, why: str) -> None:
    problem = only(components.check({"part": {"_target_": target}}))
    assert problem.path == "part._target_"
    assert problem.message.startswith(f"cannot load '{target}'")
    assert why in problem.message
    assert "\n" not in problem.message


def test_nested_nodes_and_lists_are_checked_at_their_place() -> None:
    inner = {"_target_": f"{HERE}.Part", "width": -1}
    outer = node(inner={"first": inner | {"d_model": 4}, "second": [inner]})
    # what stands inside of a component is supplied with nothing
    paths = ["part.inner.first.width", "part.inner.second[0].width", "part.inner.second[0].d_model"]
    assert [p.path for p in components.check(outer)] == paths


def test_all_problems_are_reported_in_order() -> None:
    problems = components.check(
        {"seed": -1, **node(width=0, kind="c", zzz=1), "other": {"_target_": "nowhere.X"}}, settings
    )
    paths = [p.path for p in problems]
    assert paths[0] == "seed"
    assert paths[-4:] == ["part.width", "part.kind", "part.zzz", "other._target_"]
    text = str(ConfigError(problems))
    assert all(path in text for path in paths)


# --- conf/ ------------------------------------------------------------------------------------------------------------


@functools.cache
def _defaults() -> dict[Any, Any]:
    content = OmegaConf.to_container(config.compose())
    assert isinstance(content, dict)
    return content


@pytest.mark.parametrize("name", NODES)
def test_an_option_names_exactly_what_can_be_set(name: str) -> None:
    group, _, option = name.partition("=")
    values = config.values_of(group, option) | ({"path": "x"} if name in NEED_PATHS else {})
    resolved = config.plain(OmegaConf.create({**_defaults(), group: values}))
    assert components.check(resolved, settings) == []
    arguments = set(resolved[group]) - {"_target_"}
    target = hydra.utils.get_object(resolved[group]["_target_"])
    parameters = inspect.signature(target).parameters.values()
    supplied = {p.name for p in parameters if p.default is p.empty and p.kind is not p.KEYWORD_ONLY}
    settable = {p.name for p in parameters if p.kind is not p.VAR_KEYWORD} - supplied
    if resolved[group]["_target_"].startswith("thunderhead."):
        assert arguments == settable
    else:  # of Lightning's and torch's many parameters, those that make sense here
        assert arguments <= settable


@pytest.mark.parametrize("name", [f"{group}={option}" for group in NO_NODES for option in OPTIONS[group]])
def test_options_that_are_no_node_pass_the_check(name: str) -> None:
    assert components.check(config.plain(config.compose([name])), settings) == []


def test_every_option_says_what_it_is() -> None:
    for file in CONF_DIR.glob("*/*.yaml"):
        lines = [line for line in file.read_text().splitlines() if line != "# @package _global_"]
        assert lines[0].startswith("# "), f"{file} does not begin with a sentence"


# --- build ------------------------------------------------------------------------------------------------------------


def test_factory_binds_settings_and_build_calls() -> None:
    description = node(pair=[1.0, 2.0])["part"]
    assert components.factory(description)(16).d_model == 16
    part = components.build(description, d_model=4)
    assert (part.d_model, part.width, part.pair) == (4, 8, [1.0, 2.0])


# --- a component from outside

MINE = '''
import torch
from thunderhead.core.model.attention import GroupedQueryAttention


class Mine(GroupedQueryAttention):
    """Grouped-query attention whose output is scaled."""

    def __init__(self, d_model: int, n_heads: int, context_length: int, bias: bool, *, scale: float = 1.0):
        super().__init__(d_model, n_heads, context_length, bias)
        self.scale = scale
        print("my attention is built")

    def forward(self, x_BTD: torch.Tensor, context: object) -> torch.Tensor:
        return self.scale * super().forward(x_BTD, context)
'''
MINE_YAML = "# Mine.\n_target_: mine.Mine\nscale: 0.5\n"


@pytest.fixture
def outside(tmp_path: Path) -> Path:
    """A folder of a user with a module and a YAML file, as CONTRIBUTING.md has it."""
    (tmp_path / "mine.py").write_text(MINE)
    (tmp_path / "conf" / "attention").mkdir(parents=True)
    (tmp_path / "conf" / "attention" / "mine.yaml").write_text(MINE_YAML)
    return tmp_path


@pytest.fixture
def program(text_corpus: Path, shards_dir: Path, tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    def start(*arguments: str) -> subprocess.CompletedProcess[str]:
        options = [a for a in arguments if a.startswith("--")]
        overrides = tiny(text_corpus, shards_dir, *(a for a in arguments if not a.startswith("--")))
        return run("train.py", *options, *overrides, f"hydra.run.dir={tmp_path}/run", path=tmp_path)

    return start


def test_an_attention_from_outside_by_yaml_alone(
    outside: Path, program: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    done = program(f"--config-dir={outside}/conf", "attention=mine")
    assert done.returncode == 0, done.stderr
    assert "my attention is built" in done.stdout
    recorded = yaml.safe_load((outside / "run" / "config.yaml").read_text())
    assert recorded["attention"] == {"_target_": "mine.Mine", "scale": 0.5}
    assert (outside / "run" / "summary.json").exists()


@given(awkward.TEXT)
def test_what_is_resolved_is_not_resolved_again(text: str) -> None:
    node = {"_target_": "builtins.dict", "text": text, "more": [{"text": text}]}
    assert components.build(node) == {"text": text, "more": [{"text": text}]}


def test_near_targets_and_settings_that_the_code_supplies() -> None:
    problem = only(components.check({"optimizer": {"_target_": "torch.optim.SGDD"}}))
    assert "did you mean torch.optim.SGD?" in problem.message
    problem = only(components.check({"scheduler": {"_target_": f"{HERE}.own_schedule", "total": 3}}))
    assert "a setting of your own needs a default" in problem.message


def own_schedule(step: int, total: int) -> float:
    return step / total


class Colour(Enum):
    RED = 1


def has_no_form_in_yaml(*, path: Path = Path(), colour: Colour = Colour.RED) -> None:
    """Annotated with what YAML has no form of."""


def test_what_yaml_cannot_write_is_told() -> None:
    problems = components.check({"x": {"_target_": f"{HERE}.has_no_form_in_yaml", "path": "/tmp", "colour": "RED"}})
    assert [("a Path, which YAML" in p.message, "a Colour, which YAML" in p.message) for p in problems] == [
        (True, False),
        (False, True),
    ]


def test_a_scheduler_of_torchs_is_no_schedule() -> None:
    node = {"scheduler": {"_target_": "torch.optim.lr_scheduler.CosineAnnealingLR", "T_max": 10}}
    (problem,) = components.check(node)
    assert problem.path == "scheduler._target_"
    assert "scheduler=wsd" in problem.message
