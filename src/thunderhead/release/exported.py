"""A folder that export.py has written, read back through transformers: a model and a tokenizer without their run.

Shape letters: B sequences, T tokens, V vocabulary.
"""

import json
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from thunderhead import disk, extras
from thunderhead.core.config import ConfigError, Problem, first_line
from thunderhead.core.data.manifest import sha256_of
from thunderhead.core.tokenizer import Tokenizer, load_tokenizer
from thunderhead.release.huggingface import quiet_transformers


class ExportedCache(NamedTuple):
    """A `DynamicCache` of transformers as what `generate` asks of a cache."""

    past: Any

    @property
    def n_seen(self) -> int:
        return int(self.past.get_seq_length())

    @property
    def bytes_per_token(self) -> float:
        """Of one sequence, for each token that it has seen."""
        tensors = [tensor for layer in self.past.layers for tensor in (layer.keys, layer.values)]
        return float(sum(tensor.nbytes for tensor in tensors)) / (len(tensors[0]) * self.n_seen)


class ExportedModel(nn.Module):
    """A causal language model of transformers with the names of `Decoder`: what `NextTokenModel` says."""

    def __init__(self, model: Any):
        super().__init__()
        self.model, config = model, model.config
        known = (getattr(config, name, None) for name in ("max_position_embeddings", "max_seq_len"))
        self.context_length: int = next(length for length in known if length)
        self.vocab_size: int = config.vocab_size

    def logits(self, tokens_BT: Tensor, cache: ExportedCache | None = None) -> Tensor:
        """Scores of the next token after each token, (B, T, V). With a cache, the tokens follow those it has seen."""
        past = None if cache is None else cache.past
        logits_BTV: Tensor = self.model(input_ids=tokens_BT, past_key_values=past, use_cache=past is not None).logits
        return logits_BTV

    def new_cache(self, n_sequences: int, n_tokens: int, device: torch.device) -> ExportedCache:
        """An empty cache; it grows, for any number of tokens and sequences."""
        with quiet_transformers() as transformers:
            return ExportedCache(transformers.DynamicCache(config=self.model.config))


def is_exported(place: Path) -> bool:
    """Whether this is a model of transformers, and no run."""
    return (place / "config.json").is_file() and not (place / "config.yaml").is_file()


SUMS = "SHA256SUMS"
"""The checksums of exported weights, as `sha256sum -c SHA256SUMS` reads them."""


def write_sums(folder: Path) -> None:
    """Note the checksums of the weights in a folder."""
    weights = sorted(file for kind in ("safetensors", "gguf") for file in folder.glob(f"*.{kind}"))
    disk.write_text(folder / SUMS, "".join(f"{sha256_of(file)}  {file.name}\n" for file in weights))


def refuse_damaged(folder: Path) -> None:
    """Raise ValueError if weights in a folder are not those that were exported; without checksums they may be any."""
    if not (folder / SUMS).is_file():
        return
    for line in (folder / SUMS).read_text(encoding="utf-8").splitlines():
        digest, _, name = line.partition("  ")
        file = folder / Path(name).name
        if file.is_file() and sha256_of(file) != digest:
            raise ValueError(f"{file.name} is not what {SUMS} says; if it was changed on purpose, remove {SUMS}")


SAFE = {"local_files_only": True, "trust_remote_code": False}
"""How transformers is asked to read a folder."""


def read_model(folder: Path, dtype: torch.dtype | Literal["auto"] = "auto") -> Any:
    """The model of transformers in a folder, on the CPU, "auto": in the dtype that it has there.

    Raises ValueError, or what transformers and safetensors raise, if the folder is damaged.
    """
    refuse_damaged(folder)
    with quiet_transformers() as transformers:
        kind = transformers.AutoModelForCausalLM
        asked = SAFE | {"use_safetensors": True, "dtype": dtype}
        model, found = kind.from_pretrained(folder, output_loading_info=True, **asked)
    if bad := sorted(map(str, {*found["missing_keys"], *found["mismatched_keys"]})):
        raise ValueError(f"{len(bad)} of its weights are missing or of another shape, such as {bad[0]}")
    return model.eval()


def load_exported(folder: Path) -> tuple[ExportedModel, Tokenizer]:
    """The model, on the CPU in the dtype that it has there, and the tokenizer. Runs no code of the folder's.

    Raises ConfigError if transformers is not there, or the folder is damaged or without a tokenizer.
    """
    try:
        loaded = ExportedModel(read_model(folder))
        files = [json.loads((folder / f"{name}.json").read_bytes()) for name in ("tokenizer_config", "tokenizer")]
        content = {"type": "huggingface", "eos": files[0]["eos_token"], "tokenizer": files[1]}
        return loaded, load_tokenizer("huggingface", json.dumps(content))
    except ImportError as error:
        message = f"{folder} is an exported model, which needs transformers: {extras.install('huggingface')}"
        raise ConfigError([Problem("run", message)]) from error
    except Exception as error:  # transformers, safetensors and tokenizers have errors of their own
        message = f"{folder} is damaged, or no exported model ({first_line(error)}): export it again"
        raise ConfigError([Problem("run", message)]) from error
