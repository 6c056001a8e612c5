"""Users' mistakes: one clear line each, exit status 2, no traceback, nothing left behind."""

import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

import programs
from thunderhead.choices import defaults
from thunderhead.core import config
from thunderhead.core.config import ConfigError
from thunderhead.corpus.command import prepare_corpus
from thunderhead.training.run import OPTIONAL, find_problems
from tiny import tiny, train_composed, train_here

REPOSITORY = config.CONF_DIR.parent


@pytest.fixture
def refused(text_corpus: Path, shards_dir: Path, tmp_path: Path) -> Callable[..., str]:
    """Start a run in this process that must be refused; gives the message. No run folder may be left."""

    def train(*overrides: str, shards: Path = shards_dir) -> str:
        run_dir = tmp_path / "run"
        run_dir.mkdir(parents=True, exist_ok=True)
        with pytest.raises(ConfigError) as caught:
            train_here(tiny(text_corpus, shards, *overrides), run_dir)
        assert not run_dir.exists()
        return str(caught.value)

    return train


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("attention.n_kv_heads=3", "attention.n_kv_heads=3 does not divide model.n_heads=4: use 1, 2 or 4"),
        ("attention.n_kv_heads=abc", "attention.n_kv_heads: 'abc' is not accepted: should be a valid integer"),
        (
            "+attention.n_kvheads=2",
            "attention.n_kvheads: is unknown to GroupedQueryAttention; did you mean n_kv_heads?",
        ),
        ("data.path=/no/such/folder", "path=/no/such/folder does not exist"),
        ("scheduler.warmup=2", "scheduler.warmup=2 steps do not fit a run of 2 steps: at most 1 do"),
        ("model.context_length=1000000", "model.context_length"),
        ("budget.steps=0", "budget.steps: 0 is not accepted: should be greater than 0"),
        ("data.validation_fraction=0.0", "data.validation_fraction"),
        ("resume=/no/such/run", "resume: /no/such/run is no run folder"),
        ("data.path=", "data.path: '' is not accepted"),
        ("resume=", "resume: is empty"),
        ("name=../..", "name: '../..' is not accepted"),
        ("+optimzer.lr=1", "optimzer: is no group; did you mean optimizer?"),
        ("name=/tmp/x", "name: '/tmp/x' is not accepted"),
        ("name=", "name: '' is not accepted"),
        (
            "~callbacks",
            "callbacks: was taken out, and a run needs an option of it: default, ema, evaluation, lawa, none",
        ),
        ("~scheduler", "scheduler: was taken out, and a run needs an option of it: constant, cosine"),
        ("+callbacks.best=null", "callbacks.best: has no _target_: take it out with ~callbacks.best"),
        (
            "+callbacks.stop={_target_: lightning.pytorch.callbacks.EarlyStopping, monitor: val/loss, mode: sideways}",
            "callbacks.stop: `mode` can be min, max, got sideways",
        ),
        (
            "+callbacks.stop={_target_: lightning.pytorch.callbacks.EarlyStopping}",
            "callbacks.stop.monitor: is required: callbacks.stop.monitor=…",
        ),
        (
            "+trainer.limit_train_batches=3",
            "trainer.limit_train_batches: follows from other settings: set data.max_training",
        ),
        (
            "+callbacks.other={_target_: lightning.pytorch.callbacks.BatchSizeFinder}",
            "callbacks.other: the largest micro-batch that fits is found by batch.micro_size=auto: take it out",
        ),
        (  # when it is set up
            "+callbacks.swa={_target_: lightning.pytorch.callbacks.StochasticWeightAveraging, swa_lrs: 0.01}",
            "SWA with `swa_epoch_start` as a float is not supported",
        ),
        ("optimizer.lr=nan", "optimizer.lr: .nan is not accepted: should be a finite number"),
        ("optimizer.weight_decay=1e400", "optimizer.weight_decay: .inf is not accepted: should be a finite number"),
        ("seed=9223372036854775808", "seed: 9223372036854775808 is not accepted: should be less than"),
        ("optimizer.foreach=true", "optimizer: `fused` and `foreach` cannot be `True` together"),
        ("optimizer.capturable=true", "optimizer.capturable: needs CUDA, and this run is on cpu: set it to false"),
        ("optimizer.differentiable=true", "optimizer.differentiable: is for gradients through the optimizer"),
        ("trainer.gradient_clip_algorithm=text", "trainer: `gradient_clip_algorithm` text is invalid"),
        ("trainer.num_nodes=0", "trainer.num_nodes=0: write how many machines run this, 1 or more"),
        ("trust=1", "trust: 1 is not accepted"),
        ("curation.filters=3", "curation.filters: 3 is not accepted: should be a mapping of names to settings"),
        ("~loss._target_", "loss._target_: was taken out, and says what loss is"),
        ("dropout.embedding={_target_: abc}", "dropout.embedding._target_: 'abc' is no class or function"),
        (
            "model.n_layers=1000000007",
            "model.n_layers: 1000000007 is not accepted: should be less than",
        ),
        ("model.d_model=1000000008", "model: cannot be made (Storage size calculation overflowed"),
        ("activation.hidden_ratio=1e30", "activation.hidden_ratio: 1.0e+30 is not accepted"),
        ("budget.steps=9223372036854775807", "data.sources.text would be seen"),  # and does not think about it for ever
        ("+logger.csv.save_dir=/tmp", "logger.csv.save_dir: is worked out by Thunderhead and cannot be set"),
    ],
)
def test_a_setting_is_refused_with_its_name(setting: str, message: str, refused: Callable[..., str]) -> None:
    assert message in refused(setting)


@pytest.mark.parametrize("group", sorted(set(defaults()) - set(OPTIONAL)))
def test_a_group_that_was_taken_out_is_named(group: str) -> None:
    composed = config.plain(config.compose())
    del composed[group]
    (problem,) = find_problems(composed)
    assert problem.path == group
    assert problem.message.startswith("was taken out, and a run needs an option of it: ")


def test_a_logger_whose_package_is_missing(refused: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lightning.pytorch.loggers.wandb._WANDB_AVAILABLE", False)
    message = refused("+logger.other={_target_: lightning.pytorch.loggers.WandbLogger}")
    assert message.startswith("logger.other: ")


def test_a_folder_that_holds_a_run_is_not_written_over(
    run: Callable[..., Path], text_corpus: Path, shards_dir: Path
) -> None:
    folder = run("callbacks=default")
    before = {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()}
    with pytest.raises(
        ConfigError, match=r"^hydra\.run\.dir: .* holds a run already: give another folder, or go on with"
    ):
        train_here(tiny(text_corpus, shards_dir, "callbacks=default", "seed=2"), folder)
    assert {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()} == before


NO_TEXT = "{_target_: thunderhead.corpus.python_code.StandardLibrary, include_code: false, include_topics: false}"
NESTED = {
    f"+data.sources.two={NO_TEXT}": "data.sources.two: include_code and include_topics are both false",
    "data.sources.text.suffixes=5": "data.sources.text.suffixes: 5 is not accepted",
    "data.sources.text.text_field=5": "data.sources.text.text_field: 5 is not accepted",
    "+data.sources.three=5": "data.sources.three: int is no Source: its _target_ must give a",
    "+data.sources.four={_target_: torch.optim.AdamW}": "data.sources.four.params: is required",
    "curation.filters.length.max_bytes=5": "curation.filters.length.max_bytes=5 is less than min_bytes=100",
    "+curation.filters.mine={_target_: torch.nn.Linear}": "curation.filters.mine.in_features: is required",
}


def test_nested_settings_are_refused_with_their_whole_path(refused: Callable[..., str]) -> None:
    """All of them at once, by train.py and by prepare.py."""
    words = ("text_field", "suffixes", "required")
    by_signature = {k: v for k, v in NESTED.items() if any(word in v for word in words)}
    for messages in (by_signature, {k: v for k, v in NESTED.items() if k not in by_signature}):
        told = refused("curation=basic", *messages)
        with pytest.raises(ConfigError) as caught:
            prepare_corpus(config.compose(["data=text", "data.path=.", "curation=basic", *messages], "prepare"))
        for text in (told, str(caught.value)):
            assert all(f"\n{message}" in f"\n{text}" for message in messages.values()), text


def test_every_missing_path_of_a_source_is_named(refused: Callable[..., str]) -> None:
    other = "{_target_: thunderhead.corpus.sources.LocalText, path: /no/such/file}"
    message = refused("data.sources.text.path=/no/such/folder", f"+data.sources.other={other}")
    assert "data.sources.text.path=/no/such/folder does not exist" in message
    assert "data.sources.other.path=/no/such/file does not exist" in message


def test_a_budget_of_no_tokens(refused: Callable[..., str]) -> None:
    assert "budget.tokens: 0 is not accepted: should be greater than 0" in refused("budget=tokens", "budget.tokens=0")


def test_a_budget_below_one_step(refused: Callable[..., str]) -> None:
    message = refused("budget=tokens", "budget.tokens=127")
    assert "budget: 127 tokens are less than one step of batch.global_tokens=128" in message


def test_a_vocabulary_larger_than_bpe_learns(refused: Callable[..., str]) -> None:
    message = refused("tokenizer=bpe", "tokenizer.vocab_size=100000")
    assert "tokenizer.vocab_size: 100000 is not accepted: should be less than or equal to 65536" in message


def test_a_context_longer_than_all_the_text(refused: Callable[..., str], tmp_path: Path) -> None:
    (tmp_path / "few").mkdir()
    for index in range(40):
        (tmp_path / "few" / f"{index}.txt").write_text(f"only a few words, {index} of them\n")
    message = refused(
        f"data.path={tmp_path}/few", "model.context_length=4096", "batch.global_tokens=4096", "batch.micro_size=1",
        "data.validation_fraction=0.3",
    )  # fmt: skip
    assert "too few for one block of model.context_length + 1 = 4097" in message


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"", "is empty: no file has any text"), (b"\x7fELF\x00\x00\x01\x02" * 100, "binary, not UTF-8 text")],
    ids=["empty", "binary"],
)
def test_files_that_are_no_text(content: bytes, message: str, refused: Callable[..., str], tmp_path: Path) -> None:
    file = tmp_path / "file.txt"
    file.write_bytes(content)
    text = refused(f"data.path={file}")
    assert message in text
    assert str(file) in text


def shards_of(run: Callable[..., Path], shards_dir: Path, copy: Path) -> Path:
    """A copy of all shards prepared so far, to damage."""
    run()
    shutil.copytree(shards_dir, copy)
    return copy


def test_a_corrupted_chunk(
    run: Callable[..., Path], refused: Callable[..., str], shards_dir: Path, tmp_path: Path
) -> None:
    copy = shards_of(run, shards_dir, tmp_path / "shards")
    chunks = sorted(copy.rglob("*.bin"))
    assert chunks
    for chunk in chunks:
        content = bytearray(chunk.read_bytes())
        content[len(content) // 2] ^= 1
        chunk.write_bytes(content)
    message = refused(shards=copy)
    assert "holds other bytes than were written" in message
    assert ".bin" in message


def test_a_manifest_of_another_tokenizer(
    run: Callable[..., Path], refused: Callable[..., str], shards_dir: Path, tmp_path: Path
) -> None:
    copy = shards_of(run, shards_dir, tmp_path / "shards")
    files = sorted(copy.rglob("tokenizer.json"))
    assert files
    for file in files:
        file.write_text(file.read_text().replace("}", ', "added": 1}', 1) + " ")
    assert "tokenizer" in refused(shards=copy)


# --- the whole program


@pytest.fixture
def program(text_corpus: Path, shards_dir: Path, tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    def start(*overrides: str) -> subprocess.CompletedProcess[str]:
        return programs.run("train.py", *tiny(text_corpus, shards_dir, *overrides), cwd=tmp_path)

    return start


@pytest.mark.parametrize(
    ("overrides", "messages"),
    [
        (
            ("attention.n_kv_heads=abc", "optimizer.lr=fast", "data.path=/nowhere"),
            ("attention.n_kv_heads", "optimizer.lr"),
        ),
        (("attention.n_kvheads=2",), ("attention.n_kvheads", "did you mean attention.n_kv_heads?")),
        (
            ("attention=foo", "optimizer=adam"),
            (
                "attention has no option foo; Options: gqa, mha, mla",
                "optimizer has no option adam; did you mean adamw?",
            ),
        ),
        (("callbacks=4",), ("callbacks has no option 4; Options: default, ema, evaluation, lawa, none",)),
        (("++trust.new=1",), ("trust.new cannot be set so (invalid literal for int()",)),
        pytest.param(
            ("++parameter_groups.no_decay.new=[]", "batch.micro_sizes=64"),
            ("parameter_groups.no_decay.new cannot be set so", "batch.micro_sizes is unknown; did you mean batch.mi"),
            marks=pytest.mark.slow,
        ),
        (
            ("epochs=3", "trainer.max_steps=5", "logger=wandbb"),
            ("logger has no option wandbb; did you mean wandb? Options: comet, csv, default, many, mlflow",),
        ),
        (
            ("epochs=3", "model.hidden_size=5"),
            ("epochs is unknown; here it is budget=epochs budget.epochs=3", "here it is model.d_model=5"),
        ),
        (
            ("--learning-rate=3e-4",),
            ("--learning-rate is no flag; settings are written without dashes: optimizer.lr=3e-4",),
        ),
        (
            ("callbacks=null",),
            ("callbacks has no option null; did you mean none? Options: default, ema, evaluation, lawa, none",),
        ),
        (
            ("resume=true",),
            ("resume true is no run: resume=auto goes on with the last unfinished one of this name",),
        ),
        (
            ("optimizer=adamx", "optimizer.beta=1", "lr=1"),
            ("optimizer has no option adamx; did you mean adamw?", "lr is unknown; here it is optimizer.lr=1"),
        ),
        (
            ("generation.prompt=cost ${price}", "seed=${nose:1}"),
            ("generation.prompt cost ${price} cannot be resolved", "${ as text is \\${", "seed ${nose:1} cannot be"),
        ),
    ],
    ids=[
        "values",
        "unknown key",
        "unknown options",
        "a number",
        "a key of a list",
        "a key of a list, and more",
        "logger",
        "words of others",
        "a flag",
        "no option",
        "resume",
        "options and settings",
        "references to nothing",
    ],
)
def test_the_program_refuses(
    overrides: tuple[str, ...],
    messages: tuple[str, ...],
    program: Callable[..., subprocess.CompletedProcess[str]],
    tmp_path: Path,
) -> None:
    ended = program(*overrides)
    assert ended.returncode == 2, ended.stderr
    assert "Traceback" not in ended.stderr
    assert all(message in ended.stderr for message in messages), ended.stderr
    assert not list(tmp_path.glob("logs/runs/*/*"))


@pytest.mark.parametrize("every", [0, -1])
def test_steps_between_log_rows_are_counted_from_one(every: int, refused: Callable[..., str]) -> None:
    message = refused(f"trainer.log_every_n_steps={every}")
    assert f"trainer.log_every_n_steps: {every} is not accepted: should be greater than 0" in message


def anything(*args: Any, lr: float = 0.1, **kwargs: Any) -> object:
    """What no group can do with."""
    return object()


OF_OTHER_KINDS = [
    "attention",
    "activation",
    "norm",
    "block",
    "position",
    "dropout",
    "loss",
    "activation_checkpointing",
    "optimizer",
    "parametrization",
    "scheduler",
    "precision",
    "compile",
    "batch",
    "budget",
    "validation",
    "strategy",
    "plan",
    "data",
    "tokenizer",
    "trainer",
]


@pytest.mark.parametrize("group", OF_OTHER_KINDS)
def test_components_of_another_kind_are_refused_by_their_groups_name(
    group: str, text_corpus: Path, shards_dir: Path, tmp_path: Path
) -> None:
    resolved = config.plain(config.compose(tiny(text_corpus, shards_dir)))
    target = {"_target_": f"{__name__}.anything"} | ({"lr": 0.1} if group == "optimizer" else {})
    with pytest.raises(ConfigError, match=f"^{group}: "):
        train_composed(OmegaConf.create({**resolved, group: target}), tmp_path / "run")
