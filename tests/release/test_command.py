"""`python generate.py run=…`: the model and the tokenizer of a run, read back."""

import contextlib
import json
import os
import pty
import re
import subprocess
import sys
import termios
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from thunderhead import command_line
from thunderhead.core import config
from thunderhead.core.config import ConfigError
from thunderhead.release.command import generate_text, load_tokenizer, read_prompts, read_record
from thunderhead.training.record import REPOSITORY


def test_a_runs_model_goes_on_with_a_prompt(run: Callable[..., Path]) -> None:
    folder = run("callbacks=default")
    asked = [f"run={folder}", "accelerator=cpu", "generation.prompt=def", "generation.max_new_tokens=4"]
    text = generate_text(config.compose(asked, "generate"))
    assert text.startswith("def")
    assert text == generate_text(config.compose(asked, "generate"))


def test_many_prompts_and_a_checkpoint_of_its_own(run: Callable[..., Path], tmp_path: Path) -> None:
    """Greedily each is continued as alone; whatever they are printed as, and the file of a checkpoint will do."""
    folder = run("callbacks=default")
    settings = ["accelerator=cpu", "generation.max_new_tokens=5", "generation.temperature=0.0"]
    (tmp_path / "prompts.txt").write_text("def f(\nclass Word\n\nx\n", encoding="utf-8")
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "def f("}\n{"prompt": "é\\nb"}\n', encoding="utf-8")

    def made(*overrides: str) -> str:
        checkpoint = config.quoted(str(folder / "checkpoints" / "last.ckpt"))
        return generate_text(config.compose([f"run={checkpoint}", *settings, *overrides], "generate"))

    alone = [made(f"generation.prompt='{prompt}'") for prompt in ("def f(", "class Word", "x")]
    assert made(f"prompts={tmp_path / 'prompts.txt'}") == "\n\n".join(alone)
    lines = [json.loads(line) for line in made(f"prompts={tmp_path / 'prompts.jsonl'}", "json=true").splitlines()]
    assert lines[0] == {"prompt": "def f(", "text": alone[0]}
    assert lines[1]["text"].startswith("é\nb")


@pytest.mark.parametrize(("name", "content"), [("none.txt", None), ("empty.txt", " \n"), ("a.jsonl", '{"text": "x"}')])
def test_a_file_without_prompts_is_refused(
    name: str, content: str | None, run: Callable[..., Path], tmp_path: Path
) -> None:
    if content is not None:
        (tmp_path / name).write_text(content)
    asked = [f"run={run('callbacks=default')}", f"prompts={tmp_path / name}", "accelerator=cpu"]
    with pytest.raises(ConfigError, match=r"prompts: .*a prompt a line"):
        generate_text(config.compose(asked, "generate"))


class Terminal:
    """A pseudo-terminal in the place of stdin and stdout, which shows nothing that is typed."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.ours, theirs = pty.openpty()
        modes = termios.tcgetattr(theirs)
        modes[1] &= ~termios.OPOST
        modes[3] &= ~termios.ECHO
        termios.tcsetattr(theirs, termios.TCSANOW, modes)
        self.ends = open(os.dup(theirs), encoding="utf-8"), open(theirs, "w", encoding="utf-8")  # noqa: SIM115
        for name, end in zip(("stdin", "stdout"), self.ends, strict=True):
            monkeypatch.setattr(sys, name, end)

    def types(self, text: str) -> None:
        os.write(self.ours, text.encode())

    def shows(self) -> str:
        """All that it has shown; its end."""
        for end in self.ends:
            end.close()
        shown = b""
        with contextlib.suppress(OSError):  # nobody is there any more
            while True:
                shown += os.read(self.ours, 4096)
        os.close(self.ours)
        return shown.decode()


def asked_of(folder: Path, *overrides: str) -> str:
    settings = ("accelerator=cpu", "generation.max_new_tokens=9", "generation.temperature=0.0")
    return generate_text(config.compose([f"run={folder}", *settings, *overrides], "generate"))


def test_a_terminal_shows_what_a_pipe_gets(run: Callable[..., Path], capsys: pytest.CaptureFixture[str]) -> None:
    folder = run("callbacks=default")
    capsys.readouterr()
    given = ["generation.prompt='dé'"]
    for more in ((), ("generation.stop=[m]", "generation.temperature=2.0"), ("json=true",)):
        text = asked_of(folder, *given, *more)
        assert capsys.readouterr() == (text + "\n", "")
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(command_line, "invocation_overrides", lambda: given)
            terminal = Terminal(patched)
            assert asked_of(folder, *given, *more) == text
        assert terminal.shows() == text + "\n"


def test_prompts_are_asked_for_until_ctrl_d(
    run: Callable[..., Path], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that cannot be continued is told, and the next one asked for."""
    folder, stop = run("callbacks=default"), "generation.beyond_context=stop"
    alone = [asked_of(folder, f"generation.prompt='{prompt}'") for prompt in ("def f(", "", "é")]
    capsys.readouterr()
    terminal = Terminal(monkeypatch)
    terminal.types("\n".join(["def f(", "", "x" * 32, "é", "\x04"]))
    assert asked_of(folder, stop) == ""
    assert terminal.shows() == "prompt> {}\nprompt> {}\nprompt> prompt> {}\nprompt> \n".format(*alone)
    said = "error: the prompt leaves no room in the model's context (32 of 32 tokens): shorten it, or"
    assert capsys.readouterr().err == f"{said} generation.beyond_context=slide\n"


def test_ctrl_c_ends_it(run: Callable[..., Path]) -> None:
    """In one line, with the status of that signal."""
    folder = run("callbacks=default")
    # a shell's background jobs ignore SIGINT, and so would all that they start; and nothing may hang here for ever
    in_terminal = (
        "import os, pty, signal, sys; signal.alarm(240); signal.signal(signal.SIGINT, signal.SIG_DFL);"
        "sys.exit(os.waitstatus_to_exitcode(pty.spawn(sys.argv[1:])))"
    )
    asked = (f"run={folder}", "accelerator=cpu", "generation.max_new_tokens=9")
    command = [sys.executable, "-c", in_terminal, sys.executable, "generate.py", *asked]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path), "TERM": "dumb"}
    ends = dict.fromkeys(("stdin", "stdout"), subprocess.PIPE)
    with subprocess.Popen(command, bufsize=0, cwd=REPOSITORY, env=environment, **ends) as process:
        shown = b""
        for n_prompts, key in enumerate((b"def f(\n", b"\x03"), 1):
            while shown.count(b"prompt> ") < n_prompts:
                shown += (more := os.read(process.stdout.fileno(), 4096))
                assert more, shown
            time.sleep(0.5)  # as a person would: Python may miss a signal that comes between its prompt and its wait
            process.stdin.write(key)
        shown += process.stdout.read()
        assert process.wait() == 130, shown
    lines = shown.decode().splitlines()
    assert lines[0] == "prompt> def f("
    assert lines[1].startswith("def f(")
    assert lines[-2].startswith("prompt> ")
    assert lines[-1] == "stopped by SIGINT; the same command starts it again"


def test_the_end_of_the_context_and_the_speed_are_told(
    run: Callable[..., Path], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    folder, stop = run("callbacks=default"), "generation.beyond_context=stop"
    text = asked_of(folder, "generation.prompt=def", stop, "generation.max_new_tokens=40", "report=true")
    said, report = capsys.readouterr().err.splitlines()
    assert text == asked_of(folder, "generation.prompt=def", "generation.max_new_tokens=29")
    assert said == "the text ends at the model's context of 32 tokens (generation.beyond_context=stop)"
    took = r"prefill [\d,]+ tokens/s \(3 tokens\), decode [\d,]+ tokens/s \(28 tokens\), cache 256 bytes a token"
    assert re.fullmatch(took, report)  # 2 layers, a key and a value of 2 heads of 8 dimensions, in float32
    (tmp_path / "prompts.txt").write_text(f"def\n{'x' * 20}\n")
    asked_of(folder, f"prompts={tmp_path / 'prompts.txt'}", stop, "generation.max_new_tokens=20")
    said = "1 of 2 texts end at the model's context of 32 tokens (generation.beyond_context=stop)\n"
    assert capsys.readouterr().err == said
    with pytest.raises(ConfigError, match=r"generation.prompt: leaves no room .*\(32 of 32 tokens\).*=slide"):
        asked_of(folder, f"generation.prompt={'x' * 32}", stop)


def whole_texts(decoder: object, tokenizer: object, device: object, *, prompt: str) -> str:
    """A way to sample of somebody else's."""
    return prompt + " and so on"


def test_other_ways_to_sample(run: Callable[..., Path], capsys: pytest.CaptureFixture[str]) -> None:
    composed = config.compose([f"run={run('callbacks=default')}", "accelerator=cpu"], "generate")
    composed.generation = {"_target_": f"{__name__}.whole_texts", "prompt": "a"}
    capsys.readouterr()
    assert generate_text(composed) == "a and so on"
    assert capsys.readouterr().out == "a and so on\n"
    composed.report = True
    with pytest.raises(ConfigError, match="report: measures generation=default only"):
        generate_text(composed)


def test_what_is_no_checkpoint_or_another_is_refused(run: Callable[..., Path]) -> None:
    folder = run("callbacks=default")
    with pytest.raises(ConfigError, match=r"^run: .*config\.yaml is no checkpoint"):
        read_record(folder / "config.yaml", "last")
    with pytest.raises(ConfigError, match=r"^checkpoint: 'best' is not last\.ckpt, which run= names"):
        read_record(folder / "checkpoints" / "last.ckpt", "best")
    assert read_record(folder / "checkpoints" / "last.ckpt", "last")[0] == folder


def test_a_run_without_a_tokenizer_says_so(tmp_path: Path) -> None:
    (tmp_path / "data.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"^run: .* has no tokenizer: its data are not of text"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("ending", ["\n", "\r\n"])
def test_prompts_are_cut_at_ends_of_lines_alone(ending: str, tmp_path: Path) -> None:
    texts = ["one\u2028more", "two\x0c\x85", "three"]
    (plain := tmp_path / "prompts.txt").write_bytes(("\ufeff" + ending.join([*texts, ""])).encode())
    assert read_prompts(plain) == texts
    lines = [json.dumps({"prompt": text}, ensure_ascii=False) for text in texts]
    (listed := tmp_path / "prompts.jsonl").write_bytes(("\ufeff" + ending.join(lines)).encode())
    assert read_prompts(listed) == texts


def test_prompts_of_any_depth_are_refused(tmp_path: Path) -> None:
    (file := tmp_path / "prompts.jsonl").write_text('{"prompt": ' + "[" * 100_000)
    with pytest.raises(ConfigError, match=rf"prompts: {file} cannot be read"):
        read_prompts(file)
