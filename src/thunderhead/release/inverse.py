"""A model of transformers as our options and weights: the way back of `release.huggingface`, by the same tables."""

import inspect
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

from thunderhead import choices, extras
from thunderhead.core import config as configuration
from thunderhead.core.config import ConfigError, Problem, first_line, set_value, show, values_of
from thunderhead.core.model.decoder import Decoder
from thunderhead.core.model_spec import COMPONENTS, build_decoder
from thunderhead.release.architectures import ARCHITECTURES, Architecture
from thunderhead.release.exported import SAFE
from thunderhead.release.facts import PLAIN, facts_of, misfits
from thunderhead.release.huggingface import configured, quiet_transformers, renamed
from thunderhead.release.rearrange import Weights

Options = dict[str, Any]
"""Values by config path; of a group alone, its option."""
_FUNCTIONS = {"gelu_new": "gelu_pytorch_tanh", "swish": "silu"}  # other names that transformers has for the same
_GATED = {"silu": "swiglu", "gelu": "geglu", "relu": "reglu"}
_CHANGES_NOTHING = re.compile(  # of a configuration: neither what is computed nor the shape of weights
    r"drop|initializer|init_std|init_device|token_id|use_cache|summary|pretraining_tp|dtype|transformers_version"
    r"|architectures|output_hidden|return_dict|chunk_size|is_decoder|label|problem_type|in_fp32|upcast|max_window_layers"
    r"|use_sliding_window|no_rope_layer_interval|learned_pos_emb|norm_type|attn_config|no_bias|use_bidirectional"
)
LENGTHS = {"max_position_embeddings", "n_positions", "max_seq_len"}


class Source(NamedTuple):
    """A folder's model without its weights: its class among ours, and its configuration."""

    folder: Path
    architecture: Architecture
    config: Any

    @property
    def context_length(self) -> int:
        config = self.config
        return int(getattr(config, "max_position_embeddings", None) or config.max_seq_len)


def read_source(folder: Path) -> Source:
    """Read config.json. Raises ConfigError if it is not there, damaged, or of a class that has no options here."""
    try:
        with quiet_transformers() as transformers:
            config = transformers.AutoConfig.from_pretrained(folder, **SAFE)
    except ImportError as error:
        raise refused(f"needs transformers: {extras.install('huggingface')}") from error
    except Exception as error:  # transformers has many names for what is wrong with it
        raise refused(f"{folder / 'config.json'} cannot be read: {first_line(error)}") from error
    name = type(config).__name__.removesuffix("Config")
    known = {architecture.name: architecture for architecture in ARCHITECTURES if architecture.name != "Gemma2"}
    if name not in known:
        raise refused(f"{folder} holds a {name}, which has no way back: those of {', '.join(known)} have")
    return Source(folder, known[name], config)


def refused(message: str) -> ConfigError:
    return ConfigError([Problem("init_from", message)])


# --- config.json as our options ---------------------------------------------------------------------------------------


def options_of(source: Source, context_length: int | None = None) -> Options:
    """Our options for a model, in a context that may be shorter than its own.

    Raises ConfigError, which names all settings of config.json that no option here is.
    """
    options, read = _translated(source, context_length or source.context_length)
    decoder, settings = reference(source, options), settings_of(source.config)
    lacking = misfits(source.architecture, facts_of(decoder))
    ours = settings_of(configured(source.architecture, decoder, decoder.head is None)) if not lacking else settings
    lacking += [f"{key}={show(settings[key])}" for key in settings if key not in read and settings[key] != ours[key]]
    if lacking:
        raise refused(f"{source.folder}: no option here is its {', '.join(lacking)}")
    return options


def settings_of(config: Any) -> dict[str, Any]:
    """What decides on the model."""
    known, content = inspect.signature(type(config)).parameters, config.to_dict()
    return {name: content.get(name) for name in known if not _CHANGES_NOTHING.search(name)}


def reference(source: Source, options: Options) -> Decoder:
    """The decoder of the options and of nothing else, on the meta device."""
    config = {
        "model": values_of("model", "nano"),
        **{group: values_of(group, choices.defaults()[group]) for group in COMPONENTS},
    }
    config["parametrization"] = values_of("parametrization", "standard")
    for path, value in options.items():
        config = set_value(config, path, value) if "." in path else {**config, path: values_of(path, value)}
    with torch.device("meta"):
        return build_decoder(config, source.config.vocab_size, None)


class _Reader:
    """Settings of a configuration, and which of them were asked for."""

    def __init__(self, config: Any):
        self.config, self.read = config, set(LENGTHS)

    def __call__(self, *names: str, default: Any = None) -> Any:
        """The first of several that is there."""
        self.read.update(getattr(self.config, "attribute_map", {}).get(name, name) for name in names)
        values = (getattr(self.config, name, None) for name in names)
        return next((value for value in values if value is not None), default)


def _allowed(architecture: Architecture, fact: str) -> set[str]:
    return set(architecture.allows.get(fact, {PLAIN[fact]}))


def _translated(source: Source, context_length: int) -> tuple[Options, set[str]]:
    """The options, as far as there are such, and the settings of the configuration that they come from."""
    (_, architecture, config), said = source, _Reader(source.config)
    with quiet_transformers() as transformers, torch.device("meta"):
        biases = [n for n in transformers.AutoModelForCausalLM.from_config(config).state_dict() if n.endswith(".bias")]

    def has_bias(*modules: str) -> bool:
        return any(name.endswith(f"{module}.bias") for module in modules for name in biases)

    names, d_model = architecture.names, said("hidden_size")
    bias = has_bias(names.get("up_proj") or names.get("feedforward.up_proj", "up_proj"))
    qkv_bias = has_bias("q_proj", "query_key_value", "c_attn")
    options: Options = {
        "model.n_layers": said("num_hidden_layers"),
        "model.d_model": d_model,
        "model.n_heads": said("num_attention_heads"),
        "model.context_length": context_length,
        "model.d_ff": said("intermediate_size", "n_inner", "ffn_dim") or said("expansion_ratio", default=4) * d_model,
        "model.vocab_size": said("vocab_size"),
        "model.vocab_multiple": 1,
        "model.tie_embeddings": bool(said("tie_word_embeddings", default=False)),
        "model.bias": bias,
        **_attention(architecture, said, context_length),
        **({"attention.qkv_bias": qkv_bias} if qkv_bias != bias else {}),
        **_position(_allowed(architecture, "position"), said("rope_parameters") or {}),
    }
    function = said("hidden_act", "activation_function", default="gelu")
    function, approximate = re.subn("_pytorch_tanh$", "", _FUNCTIONS.get(function, function))
    is_gated = _allowed(architecture, "activation") == {"gated"}
    options["activation"] = _GATED.get(function, function) if is_gated else function
    if options["activation"] not in configuration.options("activation"):
        raise refused(f"{source.folder}: no option of activation is its {function}")
    if approximate:
        options["activation.approximate"] = "tanh"

    (options["norm"],) = _allowed(architecture, "norm")
    eps = said("rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon", "norm_eps", "norm_epsilon", default=1e-5)
    options["norm.eps"] = float(eps)
    if options["norm"] == "layernorm":
        options["norm.bias"] = has_bias(names["attention_norm"])
    blocks, is_parallel = _allowed(architecture, "block"), said("use_parallel_residual", default=True)
    chosen = [block for block in blocks if block.startswith("parallel") == is_parallel] or [*blocks]
    if "post" in blocks:
        chosen = ["pre" if said("do_layer_norm_before") else "post"]
    options["block"] = chosen[0].partition(" ")[0]
    if options["block"] == "parallel":
        options["block.shared_norm"] = "shared_norm=false" not in chosen[0]
    return options, said.read


def _attention(architecture: Architecture, said: _Reader, context_length: int) -> Options:
    if _allowed(architecture, "attention") == {"mla"}:
        sizes = ("kv_lora_rank", "q_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")
        return {"attention": "mla", **{f"attention.{size}": said(size) for size in sizes}}
    n_heads, kinds = said("num_attention_heads"), said("layer_types") or []
    window = said("sliding_window") if _allowed(architecture, "attention.window") != {"null"} else None
    if set(kinds) == {"full_attention"} or (window is not None and window >= context_length):
        window = None
    if len(set(kinds)) > 1:
        said.read.remove("layer_types")  # the layers differ
    n_kv_heads = 1 if said("multi_query", default=False) else said("num_key_value_heads", default=n_heads)
    kind = "mha" if n_kv_heads == n_heads else "mqa" if n_kv_heads == 1 else "gqa"
    options: Options = {"attention": kind}
    if window is not None:
        options = {"attention": "sliding_window", "attention.window": window}
    if n_kv_heads != n_heads and options["attention"] != "mqa":
        options["attention.n_kv_heads"] = n_kv_heads
    head_dim = said("head_dim") if "given" in _allowed(architecture, "attention.head_dim") else None
    if head_dim not in (None, said("hidden_size") / n_heads):
        options["attention.head_dim"] = head_dim
    if _allowed(architecture, "attention.qk_norm") == {"true"}:
        options["attention.qk_norm"] = True
    return options


def _position(allowed: set[str], rope: Mapping[str, Any]) -> Options:
    if "rope" not in allowed:
        return {"position": "learned" if "learned" in allowed else next(iter(allowed))}
    kind = {"default": "none"}.get(rope["rope_type"], rope["rope_type"])
    if kind not in ("none", "linear", "llama3"):
        raise refused(f"its rope_parameters have the rope_type {kind}: position.scaling has none, linear and llama3")
    options = {"position": "rope", "position.theta": float(rope["rope_theta"])}
    if (fraction := rope.get("partial_rotary_factor") or 1.0) != 1:
        options["position.fraction"] = fraction
    if kind != "none":
        options |= {"position.scaling": kind, "position.factor": float(rope["factor"])}
    if kind == "llama3":
        options |= {f"position.{name}": float(rope[name]) for name in ("low_freq_factor", "high_freq_factor")}
        options["position.original_context_length"] = rope["original_max_position_embeddings"]
    return options


# --- their weights as ours --------------------------------------------------------------------------------------------


def restored(decoder: Any, architecture: Architecture, theirs: Weights) -> Weights:
    """Our weights, float32, by parameter name, of those of a model of transformers; rows that pad the vocabulary are 0.

    Going there moves numbers about and adds constants: of that, the gradient is the way back.

    Raises ValueError if theirs has other numbers than neutral ones where ours has none.
    """
    ours = {name: torch.zeros(p.shape, requires_grad=True) for name, p in decoder.named_parameters()}
    rows = {n: t[: decoder.vocab_size] if n in ("embedding.weight", "head.weight") else t for n, t in ours.items()}
    there = architecture.change(decoder, renamed(rows, architecture.names))
    head = f"{architecture.names['head']}.weight"
    for name in theirs.keys() - there.keys() - ({head} if decoder.head is None else set()):
        if (theirs[name] != (architecture.unit if name.endswith("weight") else 0)).any():
            raise ValueError(f"init_from: {name} is not neutral, and a {architecture.name} has no place for it here")
    values = [theirs[name].float() - tensor.detach() for name, tensor in there.items()]
    found = torch.autograd.grad([*there.values()], [*ours.values()], values)
    return dict(zip(ours, found, strict=True))
