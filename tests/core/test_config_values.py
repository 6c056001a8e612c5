"""Values by config path: set, compared, shown."""

from thunderhead.core.config import differences, leaves, set_value, show

CONFIG = {"seed": 1, "model": {"d_model": 64, "sizes": [1, 2]}, "callbacks": {}}


def test_a_value_is_set_in_a_copy() -> None:
    changed = set_value(CONFIG, "model.d_model", 32)
    assert (changed["model"]["d_model"], CONFIG["model"]["d_model"]) == (32, 64)
    assert set_value({}, "a.b", 1) == {"a": {"b": 1}}


def test_differences_of_configurations() -> None:
    assert dict(leaves(CONFIG)) == {"seed": 1, "model.d_model": 64, "model.sizes": [1, 2], "callbacks": {}}
    now = set_value(set_value(CONFIG, "model.d_model", 32), "optimizer.lr", 0.1)
    assert differences(CONFIG, now) == [("model.d_model", 64, 32), ("optimizer.lr", None, 0.1)]


def test_a_value_is_shown_in_one_line_of_yaml() -> None:
    shown = [show(value) for value in (None, True, 0.5, "gqa", [1, 2], {"a": 1})]
    assert shown == ["null", "true", "0.5", "gqa", "[1, 2]", "{a: 1}"]
