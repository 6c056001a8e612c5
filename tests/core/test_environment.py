"""What is read from the environment is recorded by the name of the variable, and read again by it."""

import json
import pickle
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf

from thunderhead.core import config
from thunderhead.core.environment import FromEnvironment, escaped, hidden, of_record, recorded, variables

SECRET = "s3cr3t-t0k3n"
AWKWARD = st.text(st.sampled_from("ab \\${}:.'\"envoc"), max_size=12)


@pytest.fixture(autouse=True)
def secret(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOKEN", SECRET)
    monkeypatch.setenv("NUMBER", "12")


def plain(**values: Any) -> dict[str, Any]:
    return config.plain(OmegaConf.create(values))


def test_values_come_from_the_environment_and_their_sources_are_recorded() -> None:
    found = plain(
        uri="https://x:${oc.env:TOKEN}@y",
        same="${uri}/z",
        several=["${oc.env:TOKEN}", "no secret"],
        number="${oc.decode:${oc.env:NUMBER}}",
        text="${oc.decode:${oc.env:TOKEN}}",
        default="${oc.env:NOT_SET,none}",
    )
    assert found == {
        "uri": f"https://x:{SECRET}@y",
        "same": f"https://x:{SECRET}@y/z",
        "several": [SECRET, "no secret"],
        "number": 12,
        "text": SECRET,
        "default": "none",
    }
    assert recorded(found) == {
        "uri": "https://x:${oc.env:TOKEN}@y",
        "same": "https://x:${oc.env:TOKEN}@y/z",
        "several": ["${oc.env:TOKEN}", "no secret"],
        "number": 12,
        "text": "${oc.env:TOKEN}",
        "default": "none",
    }
    assert SECRET not in config.to_yaml(found)
    assert SECRET not in repr(found)
    assert config.plain(OmegaConf.create(escaped(of_record(recorded(found))))) == found


@given(before=AWKWARD, after=AWKWARD)
@example(before="\\${oc.env:HOME}", after="")
@example(before="a ${oc.env:TOKEN} \\", after="${")
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_text_is_read_as_it_was_recorded(before: str, after: str) -> None:
    """Literal `${oc.env:…}` too, which somebody has escaped, and text around a variable."""
    written = OmegaConf.create({"literal": escaped(before + after), "mixed": f"{escaped(before)}${{oc.env:TOKEN}}"})
    if not before.endswith("\\"):  # which would escape the variable
        found = config.plain(written)
        assert found == {"literal": before + after, "mixed": before + SECRET}
        again = yaml.safe_load(config.to_yaml(recorded(found)))
        assert SECRET not in str(again)
        assert config.plain(OmegaConf.create(escaped(of_record(again)))) == found


@pytest.mark.parametrize(
    "text", ["${oc.env:A}${hydra:runtime.cwd}", "${new_folder:/x}${oc.env:A}", "${oc.env:${oc.env:A}}"]
)
def test_records_hold_no_other_interpolations(text: str) -> None:
    with pytest.raises(ValueError, match="is more than a text"):
        of_record({"a": [text]})


def test_lists_from_the_environment_are_of_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SEVERAL", "{a: [1, 2.5, true]}")
    found = plain(a="${oc.decode:${oc.env:SEVERAL}}")
    assert found == recorded(found) == {"a": {"a": [1, 2.5, True]}}
    monkeypatch.setenv("SEVERAL", f"{{a: [1, {SECRET}]}}")
    with pytest.raises(config.ConfigError, match=r"^a: .*texts in a list.*variable for each") as refused:
        plain(a="${oc.decode:${oc.env:SEVERAL}}")
    assert SECRET not in str(refused.value)


def test_any_name_of_a_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    """`env` gives names that shells do not."""
    monkeypatch.setenv("my-token.1", SECRET)
    written = recorded(plain(a="x ${oc.env:my-token.1}"))
    assert written == {"a": "x ${oc.env:my-token.1}"}
    assert variables(of_record(written)) == {"my-token.1"}
    assert config.plain(OmegaConf.create(escaped(of_record(written)))) == {"a": f"x {SECRET}"}


def test_which_variables_are_read() -> None:
    typed = {"a": "${oc.decode:${oc.env: B}}", "b": ["${oc.env:C,1}"], "c": r"\${oc.env:D}", "d": r"\\${oc.env:E}"}
    assert variables(typed) == {"B", "C", "E"}
    assert variables(of_record({"a": r"\\${oc.env:E}", "b": r"\${oc.env:D}"})) == {"E"}


def test_other_texts_do_not_hold_them_either() -> None:
    """What components say of their settings: the plan's notes, a prompt that is gone on with."""
    plain(a="${oc.env:TOKEN}", b="${oc.env:NUMBER}")
    assert hidden(f"reads from {SECRET}/x, 12 files") == "reads from ${oc.env:TOKEN}/x, 12 files"


def test_they_are_texts_to_everybody_else() -> None:
    text = plain(a="${oc.env:TOKEN}")["a"]
    assert isinstance(text, FromEnvironment)
    assert json.dumps(text) == f'"{SECRET}"'
    assert type(pickle.loads(pickle.dumps(text))) is str
