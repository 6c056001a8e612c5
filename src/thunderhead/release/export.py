"""`python export.py`: the model of a run as a folder that transformers loads without code of ours."""

import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from matplotlib.figure import Figure
from omegaconf import DictConfig

from thunderhead import command_line, disk
from thunderhead.core import config as configuration
from thunderhead.core.config import Config, ConfigError, Problem, first_line
from thunderhead.core.environment import hidden
from thunderhead.core.model.decoder import Decoder
from thunderhead.core.tokenizer import Tokenizer
from thunderhead.core.trust import trust_typed
from thunderhead.core.types import PathText
from thunderhead.release.command import load_model, load_tokenizer, read_record
from thunderhead.release.huggingface import Misfit, converted, quiet_transformers
from thunderhead.terminal import say, size
from thunderhead.training import record

TOLERANCE = 1e-3  # of logits, relative to the largest: far above rounding, far below any difference in what is computed


def settings(
    *,
    run: PathText,
    out: PathText | None = None,
    checkpoint: Literal["last", "best"] = "last",
    averaged: bool = False,
    dtype: Literal["float32", "bfloat16"] = "float32",
    max_shard_size: str = "5GB",
    trust: Sequence[str] = (),
) -> None:
    """The top-level settings, for the check; conf/export.yaml says what each does."""


def export(config: DictConfig) -> Path:
    """Write the folder, and return it: nothing is there before all of it is.

    Raises ConfigError if the configuration is refused, the folder is there already or holds no run, or transformers has
    no class for the model.
    """
    resolved = configuration.plain(config)
    if problems := configuration.check(resolved, settings):
        raise ConfigError(problems)
    trust_typed(resolved)
    run_dir, recorded, weights = read_record(Path(resolved["run"]), resolved["checkpoint"])
    out = Path(resolved["out"] or run_dir / "huggingface")
    if out.exists():
        raise ConfigError([Problem("out", f"{out} is there already: give another folder, or remove it")])
    tokenizer = load_tokenizer(run_dir)
    decoder = load_model(weights, resolved["averaged"]).decoder
    try:
        model = converted(decoder, (recorded.get("init_from") or {}).get("architecture"))  # what it came from
        fast = fast_tokenizer(tokenizer, decoder.context_length)
    except Misfit as error:
        raise ConfigError([Problem("run", f"transformers has no class for this model: {error}")]) from error
    except ImportError as error:
        message = "export.py needs transformers: uv pip install -e '.[huggingface]'"
        raise ConfigError([Problem("", message)]) from error
    except ValueError as error:
        say(f"No tokenizer is exported: {first_line(error)}")
        fast = None
    difference = largest_difference(decoder, model)
    model = model.to(getattr(torch, resolved["dtype"]))
    _set_generation(model, recorded)
    card = model_card(run_dir, recorded, model, difference, out.name)
    with disk.naming(out):
        out.parent.mkdir(parents=True, exist_ok=True)
        making = Path(tempfile.mkdtemp(dir=out.parent, prefix=f".{out.name}."))
        try:
            model.save_pretrained(making, max_shard_size=resolved["max_shard_size"])
            if fast is not None:
                fast.save_pretrained(making)
                file = making / "tokenizer_config.json"  # version 4 knows the class by this name only, 5 by both
                known = configuration.read_mapping(file) | {"tokenizer_class": "PreTrainedTokenizerFast"}
                record.write_json(file, known)
            (making / "README.md").write_text(hidden(card), encoding="utf-8")
            _draw_losses(run_dir, making / "loss.png")
            for path, mode in [(making, 0o755), *((file, 0o644) for file in making.iterdir())]:
                path.chmod(mode)  # libraries' 0700 and 0600 would lock colleagues out
            making.rename(out)
        except BaseException:
            shutil.rmtree(making, ignore_errors=True)
            raise
    written = size(sum(file.stat().st_size for file in out.iterdir()))
    say(f"{type(model).__name__}, {written}; logits differ by {difference:.1g} at most from the run's")
    say(f'load it with: AutoModelForCausalLM.from_pretrained("{out}")')
    return out


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


def model_card(run_dir: Path, recorded: Config, model: Any, difference: float, name: str) -> str:
    """README.md in the format of model cards: what it is, how to load it, what it was trained on, how to make it."""
    summary = record.read_summary(run_dir) or {}
    plan = configuration.read_mapping(run_dir / "plan.json")
    surroundings = configuration.read_mapping(run_dir / "environment.json")
    trained, losses = summary.get("tokens", plan["tokens"]), ""
    if summary:
        parts = [f"{summary['val_loss']:.4f} nats a token", f"perplexity {summary['perplexity']:.2f}"]
        bits = summary.get("bits_per_byte")
        losses = ", ".join([*parts, f"{bits:.4f} bits per byte"] if bits else parts)
    rows = {
        "class": type(model).__name__,
        "parameters": f"{plan['parameters']['total']:,}",
        "context length": f"{plan['context_length']:,} tokens",
        "vocabulary": f"{model.config.vocab_size:,} tokens",
        "trained on": f"{trained:,} tokens ({trained / plan['parameters']['total']:.3g} per parameter)",
        "validation loss": losses or "unknown: the run has not ended",
        "logits": f"equal to those of the checkpoint: they differ by {difference:.1g} at most",
    }
    sources = summary.get("ledger", {})
    git = surroundings.get("git") or {}
    command = command_line.shown("train.py", *surroundings.get("overrides", []))
    lines = [
        *("---", "library_name: transformers", "pipeline_tag: text-generation", "tags: [thunderhead]", "---", ""),
        *(f"# {name if name != 'huggingface' else recorded['name']}", ""),
        "A base model: it continues text, and was trained for nothing else.",
        *("", "```python", "from transformers import pipeline", ""),
        'generate = pipeline("text-generation", "path/to/this/folder")',
        *('print(generate("Once upon a time", max_new_tokens=50)[0]["generated_text"])', "```", ""),
        *("| | |", "|---|---|", *(f"| {key} | {value} |" for key, value in rows.items()), ""),
        *("![training loss](loss.png)", ""),
    ]
    if sources:
        lines += ["## Data", "", "| source | tokens | validation loss |", "|---|---|---|"]
        lines += [f"| {source} | {share['tokens']:,} | {share['val_loss']:.4f} |" for source, share in sources.items()]
        lines.append("")
    lines += ["## How it was made", "", "```", command, "```", ""]
    commit = f" at commit {git['commit'][:12]}" if git.get("commit") else ""
    steps = f"{plan['steps']:,} steps of {plan['tokens_per_step']:,} tokens, {plan['flops']:.3g} FLOPs"
    return "\n".join([*lines, f"with Thunderhead{commit}: {steps}, precision {plan['precision']}.", ""])


def _draw_losses(run_dir: Path, file: Path) -> None:
    """Training and validation loss over the tokens, where the run kept them."""
    rows = [*record.rows_of(run_dir / "metrics.csv")] if (run_dir / "metrics.csv").is_file() else []
    figure = Figure(figsize=(7, 3.5), layout="constrained")
    axes = figure.subplots()
    for column, name in (("train/loss", "training"), ("val/loss", "validation")):
        points = [(float(row["tokens"]), float(row[column])) for row in rows if row.get(column) and row.get("tokens")]
        if points:
            axes.plot(*zip(*points, strict=True), label=name, marker="o" if column == "val/loss" else None)
    axes.set(xlabel="tokens", ylabel="loss, nats a token")
    if rows:
        axes.legend()
    axes.grid(alpha=0.3)
    figure.savefig(file, dpi=120)
