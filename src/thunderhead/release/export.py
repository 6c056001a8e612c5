"""`python export.py`: the model of a run as a folder for transformers or llama.cpp, and to the hub if asked."""

import re
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from omegaconf import DictConfig

from thunderhead import disk, extras
from thunderhead.core import components
from thunderhead.core import config as configuration
from thunderhead.core.config import Config, ConfigError, Problem, first_line
from thunderhead.core.model.decoder import Decoder
from thunderhead.core.tokenizer import Tokenizer
from thunderhead.core.trust import trust_typed
from thunderhead.core.types import PathText
from thunderhead.release import hub, llama_cpp
from thunderhead.release.command import load_model, load_tokenizer, read_record
from thunderhead.release.exported import write_sums
from thunderhead.release.facts import Misfit
from thunderhead.release.huggingface import converted, quiet_transformers
from thunderhead.release.model_card import Exported, draw_losses, model_card
from thunderhead.terminal import say, size
from thunderhead.training import record

TOLERANCE = 1e-3  # of logits, relative to the largest: far above rounding, far below any difference in what is computed
_UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def settings(
    *,
    run: PathText,
    out: PathText | None = None,
    format: Literal["huggingface", "gguf"] = "huggingface",
    checkpoint: Literal["last", "best"] = "last",
    averaged: bool = False,
    dtype: Literal["float32", "bfloat16"] = "float32",
    max_shard_size: str = "5GB",
    push: str | None = None,
    private: bool = True,
    trust: Sequence[str] = (),
) -> None:
    """The top-level settings, for the check; conf/export.yaml says what each does."""


def export(config: DictConfig) -> Path:
    """Write the folder, and return it: nothing is there before all of it is. Then upload it, if `push` says where.

    Raises ConfigError if the configuration is refused, the folder is there already or holds no run, the format has no
    class for the model, or the hub does not take it.
    """
    resolved = configuration.plain(config)
    problems = components.check(resolved, settings)
    shard_size = _bytes(resolved["max_shard_size"])
    if not shard_size:
        problems.append(Problem("max_shard_size", f"{resolved['max_shard_size']!r} is no size: write 5GB or 500MB"))
    if not problems and resolved["push"] is not None:
        problems += hub.problems(resolved["push"])
    if problems:
        raise ConfigError(problems)
    trust_typed(resolved)
    run_dir, recorded, weights = read_record(Path(resolved["run"]), resolved["checkpoint"])
    kind = resolved["format"]
    out = Path(resolved["out"] or run_dir / kind)
    if out.exists():
        raise ConfigError([Problem("out", f"{out} is there already: give another folder, or remove it")])
    tokenizer = load_tokenizer(run_dir)
    decoder = load_model(weights, resolved["averaged"]).decoder.float().eval()
    name = out.name if out.name != kind else recorded["name"]
    library = {"huggingface": "transformers", "gguf": "llama.cpp"}[kind]
    try:
        if kind == "gguf":
            exported = as_gguf(decoder, tokenizer, name, resolved["dtype"], shard_size)
        else:
            exported = as_transformers(decoder, tokenizer, recorded, resolved["dtype"], shard_size)
    except Misfit as error:
        raise ConfigError([Problem("run", f"{library} has no class for this model: {error}")]) from error
    except ImportError as error:
        package = {"huggingface": "transformers", "gguf": "gguf"}[kind]
        message = f"format={kind} needs {package}: {extras.install(kind)}"
        raise ConfigError([Problem("", message)]) from error
    card = model_card(run_dir, recorded, name, exported)
    with disk.naming(out):
        out.parent.mkdir(parents=True, exist_ok=True)
        making = Path(tempfile.mkdtemp(dir=out.parent, prefix=f".{out.name}."))
        try:
            exported.save(making)
            (making / "README.md").write_text(card, encoding="utf-8")
            draw_losses(run_dir, making / "loss.png")
            for path, mode in [(making, 0o755), *((file, 0o644) for file in making.iterdir())]:
                path.chmod(mode)  # libraries' 0700 and 0600 would lock colleagues out
            making.rename(out)
        except BaseException:
            shutil.rmtree(making, ignore_errors=True)
            raise
    written = size(sum(file.stat().st_size for file in out.iterdir()))
    say(", ".join([written, *(f"{key}: {value}" for key, value in exported.about.items())]))
    say(f"load it with: {exported.load(out)}")
    if resolved["push"] is not None:
        hub.upload(out, resolved["push"], resolved["private"])
    return out


def _bytes(text: str) -> int:
    """The number of bytes that 5GB or 500MiB are; 0 for what is no size."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMG]i?B)", text, re.IGNORECASE)
    return 0 if found is None else int(float(found[1]) * _UNITS[found[2].upper()])


def as_transformers(
    decoder: Decoder, tokenizer: Tokenizer, recorded: Config, dtype: str, max_shard_size: int
) -> Exported:
    """A model of transformers, of the class that it came from if it came from one. Raises Misfit and ImportError."""
    model = converted(decoder, (recorded.get("init_from") or {}).get("architecture"))
    try:
        fast = fast_tokenizer(tokenizer, decoder.context_length)
    except ValueError as error:
        say(f"No tokenizer is exported: {first_line(error)}")
        fast = None
    difference = largest_difference(decoder, model)
    model = model.to(getattr(torch, dtype))
    _set_generation(model, recorded)

    def save(folder: Path) -> None:
        model.save_pretrained(folder, max_shard_size=max_shard_size)
        write_sums(folder)
        if fast is not None:
            fast.save_pretrained(folder)
            file = folder / "tokenizer_config.json"  # version 4 knows the class by this name only, 5 by both
            known = configuration.read_mapping(file) | {"tokenizer_class": "PreTrainedTokenizerFast"}
            record.write_json(file, known)

    code = [
        *("from transformers import pipeline", ""),
        'generate = pipeline("text-generation", "path/to/this/folder")',
        *('print(generate("Once upon a time", max_new_tokens=50)[0]["generated_text"])',),
    ]
    return Exported(
        save,
        lambda folder: f'AutoModelForCausalLM.from_pretrained("{folder}")',
        "transformers",
        code,
        {
            "class": type(model).__name__,
            "vocabulary": f"{model.config.vocab_size:,} tokens",
            "logits": f"equal to those of the checkpoint: they differ by {difference:.1g} at most",
        },
    )


def as_gguf(decoder: Decoder, tokenizer: Tokenizer, name: str, dtype: Any, max_shard_size: int) -> Exported:
    """A model of llama.cpp. Raises Misfit for a model or tokenizer that it cannot be, and ImportError."""
    architecture = llama_cpp.architecture_of(decoder)
    try:
        vocabulary = llama_cpp.vocabulary_of(tokenizer, decoder.vocab_size)
    except ValueError as error:
        raise Misfit(f"tokenizer={tokenizer.name}: {first_line(error)}") from error

    def save(folder: Path) -> None:
        llama_cpp.write_gguf(
            decoder, architecture, vocabulary, folder, name=name, dtype=dtype, max_shard_size=max_shard_size
        )
        write_sums(folder)

    def load(folder: Path) -> str:
        return f"llama-cli -no-cnv -m {sorted(folder.glob('model*.gguf'))[0]}"

    code = [
        *("from llama_cpp import Llama", ""),
        'model = Llama("path/to/this/folder/model.gguf")',
        'print(model("Once upon a time", max_tokens=50)["choices"][0]["text"])',
    ]
    about = {"class": f"{architecture.name}, of llama.cpp", "vocabulary": f"{decoder.vocab_size:,} tokens"}
    return Exported(save, load, "llama.cpp", code, about)


def fast_tokenizer(tokenizer: Tokenizer, context_length: int) -> Any:
    """A `PreTrainedTokenizerFast` with the same ids: it adds nothing to a text, and takes EOS' spelling for text.

    Raises ValueError for a tokenizer that it cannot be.
    """
    fast = tokenizer.as_fast()
    with quiet_transformers() as transformers:
        return transformers.PreTrainedTokenizerFast(
            tokenizer_object=fast,
            eos_token=fast.id_to_token(tokenizer.eos_id),
            split_special_tokens=True,
            clean_up_tokenization_spaces=False,
            model_max_length=context_length,
        )


def largest_difference(decoder: Decoder, model: Any) -> float:
    """Of the logits of both on random tokens. Raises RuntimeError if they are not the same but for rounding.

    Tokens of one document: with attention.document_mask ours keeps several apart, which transformers' classes do not.
    """
    tokens_BT = torch.randint(decoder.vocab_size, (2, min(decoder.context_length, 256)))
    if decoder.eos_id is not None:
        tokens_BT[tokens_BT == decoder.eos_id] = (decoder.eos_id + 1) % decoder.vocab_size
    decoder = decoder.float().eval()
    with torch.inference_mode():
        ours, theirs = decoder.logits(tokens_BT), model(tokens_BT).logits
    difference = float((ours - theirs).abs().max())
    if not difference <= TOLERANCE * float(ours.abs().max()):
        raise RuntimeError(f"{type(model).__name__} computes other logits (by {difference:g}): please report this")
    return difference


def _set_generation(model: Any, recorded: Config) -> None:
    """How text is sampled where nothing else is said: as the run did."""
    asked = recorded["generation"]
    settings = model.generation_config
    settings.do_sample, settings.pad_token_id = asked.get("temperature", 1.0) > 0, settings.eos_token_id
    if settings.do_sample:
        settings.temperature = asked.get("temperature", 1.0)
        settings.top_k, settings.top_p = asked.get("top_k") or 0, asked.get("top_p") or 1.0
