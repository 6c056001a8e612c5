"""Texts that languages between a user and a run (shell, Hydra, OmegaConf, YAML) might read as something else."""

from hypothesis import strategies as st

PIECES = (
    *"ab1 '\"\\${}()[],=:~-+.%#!;&|<>*?@^`/\t\n\ré日😀",
    *(
        "ü",
        "名前",
        "null",
        "true",
        "1e3",
        "-1",
        "nan",
        "???",
        "${HOME}",
        "${oc.env:HOME}",
        "$(id)",
        "\\'",
        "\\\\",
        "--",
    ),
)
TEXT = st.lists(st.sampled_from(PIECES), max_size=12).map("".join)
FOLDERS = (
    "run (1), {x}=['y'] \"z\"",
    "~ü 日本 \\ 1e3",
    "-m",
    "null",
    "a\nb $HOME `id` !x; #% & |",
)
"""Names of folders."""
