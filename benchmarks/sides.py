"""The sides of train_step.py: one model trained by different code, each in its own process that waits for its turn.

One workload for all: a Llama-like decoder of 6 layers, d_model 384, 6 query and 2 key/value heads, d_ff 1024, 50,304
logits, untied (48.0 M parameters); 8 sequences of 256 tokens a step, bfloat16 autocast, AdamW, clipping at 1.
Peers come "at their best settings here" and "as shipped", see each function. `python sides.py SIDE BATCHES` is such a
process; it reads how many steps to take from the file descriptor $TURNS_IN and answers on $TURNS_OUT.

This module imports torch alone: what a peer runs with is that peer's, its allocator's settings too.
"""

import json
import os
import sys
import time
from collections.abc import Callable
from typing import Any

import torch

LAYERS, WIDTH, HEADS, KV_HEADS, D_FF, VOCAB = 6, 384, 6, 2, 1024, 50_304
T, BATCH = 256, 8
if sizes := os.environ.get("SIDES_SIZES"):  # others: of growth.py, or tiny ones to see that everything runs
    LAYERS, WIDTH, HEADS, KV_HEADS, D_FF, VOCAB, T, BATCH = json.loads(sizes)
EAGER = os.environ.get("TORCH_COMPILE_DISABLE") == "1"
LEARNING_RATE, BETAS, WEIGHT_DECAY, CLIP, NORM_EPS = 1e-3, (0.9, 0.99), 0.1, 1.0, 1e-5

TRAIN_PY = [
    "model=nano",
    f"model.n_layers={LAYERS}",
    f"model.d_model={WIDTH}",
    f"model.n_heads={HEADS}",
    f"model.context_length={T}",
    f"model.d_ff={D_FF}",
    f"model.vocab_size={VOCAB}",
    "model.tie_embeddings=false",
    "model.init_std=0.02",
    f"attention.n_kv_heads={KV_HEADS}",
    f"batch.global_tokens={BATCH * T}",
    f"batch.micro_size={BATCH}",
    f"optimizer.lr={LEARNING_RATE}",
    "precision=bf16-mixed",
    "trainer=cpu",
    "budget=steps",
    "budget.steps=2000",
    "validation.every=2000",
    "scheduler=constant",
    "name=train_step",
]
"""The workload as overrides of train.py; all else is the default: metrics, checkpoints, TensorBoard, progress."""


class Turns:
    """A process' end of the schedule: `begin()` at the start of every step returns when that step may be taken."""

    def __init__(self) -> None:
        self._orders = os.fdopen(int(os.environ["TURNS_IN"]), "r")
        self._answers = os.fdopen(int(os.environ["TURNS_OUT"]), "w")
        self._left = -1
        self.loss: Callable[[], float | None] = lambda: None

    def begin(self) -> None:
        """Report a turn that has ended, and wait for the next."""
        if self._left > 0:
            self._left -= 1
            return
        if self._left == 0:
            seconds = {"cpu": time.process_time() - self._cpu, "wall": time.perf_counter() - self._wall}
            self._answers.write(json.dumps({**seconds, "peak_bytes": peak_bytes(), "loss": self.loss()}) + "\n")
            self._answers.flush()
        order = self._orders.readline()
        if not order:  # the schedule is over
            os._exit(0)
        self._left = int(order) - 1
        forget_peak()
        self._cpu, self._wall = time.process_time(), time.perf_counter()


def lightning_turns() -> Any:
    """A callback for train.py, by `+callbacks.turns._target_=sides.lightning_turns`."""
    from lightning import Callback

    class LightningTurns(Callback):
        def on_train_start(self, trainer: Any, pl_module: Any) -> None:
            self.turns = Turns()
            from thunderhead.training.callbacks.metrics import LogMetrics

            metrics = next(c for c in trainer.callbacks if isinstance(c, LogMetrics))
            self.turns.loss = lambda: metrics.last_terms.get("loss")

        def on_train_batch_start(self, *_: Any) -> None:
            self.turns.begin()

    return LightningTurns()


def peak_bytes() -> int:
    """The most that this process held since `forget_peak` (Linux)."""
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith("VmHWM"))


def forget_peak() -> None:
    """Count the peak from here on: what compiling took does not belong to training."""
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")


def loop(
    batches: torch.Tensor,
    loss_of: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    optimizer: Any,
    parameters: Any,
) -> None:
    """A plain PyTorch training loop under bfloat16 autocast."""
    turns, parameters = Turns(), list(parameters)
    loss = torch.zeros(())
    turns.loss = lambda: float(loss)
    step = 0
    while True:
        turns.begin()
        batch = batches[step % len(batches)]
        with torch.autocast("cpu", torch.bfloat16):
            loss = loss_of(batch[:, :-1], batch[:, 1:])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, CLIP)
        optimizer.step()
        optimizer.zero_grad()
        loss = loss.detach()
        step += 1


# --------------------------------------------------------------------------------------------------------------------
# Ours


def bare(batches: torch.Tensor, compile_: str = "model", keep_freed_memory: bool = True) -> None:
    """Our decoder and optimizer in a plain loop: what train.py could reach at best."""
    from thunderhead.core import config as configuration
    from thunderhead.core.components import build
    from thunderhead.core.model_spec import build_decoder, build_optimizer
    from thunderhead.training import hardware

    config = configuration.plain(configuration.compose([*TRAIN_PY, f"compile={'none' if EAGER else compile_}"]))
    if keep_freed_memory:
        hardware.keep_freed_memory()
    decoder = build_decoder(config, VOCAB, None)
    build(config["compile"]).apply(decoder)
    decoder.initialize(1)
    optimizer = build_optimizer(config, decoder)
    loop(batches, lambda inputs, targets: decoder(inputs, targets).loss, optimizer, decoder.parameters())


# --------------------------------------------------------------------------------------------------------------------
# Peers


def litgpt(batches: torch.Tensor, best: bool) -> None:
    """The GPT class of litgpt.

    Best: model and loss compiled together, fused AdamW, our allocator settings. As shipped: litgpt's pretrain.py, whose
    `fit` this repeats: Fabric with bf16-mixed, the model compiled without the loss, which is computed in chunks of 128
    rows, and an AdamW that is fused on GPUs only. Its loop's logging and data loading are left out.
    """
    from litgpt.config import Config
    from litgpt.model import GPT

    config = Config(
        block_size=T,
        n_layer=LAYERS,
        n_embd=WIDTH,
        n_head=HEADS,
        n_query_groups=KV_HEADS,
        vocab_size=VOCAB,
        padded_vocab_size=VOCAB,
        intermediate_size=D_FF,
        norm_class_name="RMSNorm",
        norm_eps=NORM_EPS,
        mlp_class_name="LLaMAMLP",
        parallel_residual=False,
        rotary_percentage=1.0,
        bias=False,
    )
    settings = {"lr": LEARNING_RATE, "betas": BETAS, "weight_decay": WEIGHT_DECAY}
    torch.manual_seed(0)
    if best:
        keep_freed_memory()
        model = GPT(config)
        model.apply(model._init_weights)

        @torch.compile(fullgraph=not EAGER, dynamic=False)
        def loss_of(inputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
            return torch.nn.functional.cross_entropy(model(inputs).flatten(0, 1), targets.flatten())

        optimizer = torch.optim.AdamW(model.parameters(), fused=True, **settings)  # type: ignore[arg-type]
        loop(batches, loss_of, optimizer, model.parameters())

    from lightning import Fabric
    from litgpt.utils import chunked_cross_entropy

    fabric = Fabric(accelerator="cpu", devices=1, precision="bf16-mixed")
    fabric.launch()
    model = GPT(config)
    model.apply(model._init_weights)
    model = fabric.setup(torch.compile(model))
    optimizer = fabric.setup_optimizers(torch.optim.AdamW(model.parameters(), fused=False, **settings))  # type: ignore[arg-type]
    turns, step = Turns(), 0
    loss = torch.zeros(())
    turns.loss = lambda: float(loss)
    while True:
        turns.begin()
        batch = batches[step % len(batches)]
        loss = chunked_cross_entropy(model(batch[:, :-1].contiguous()), batch[:, 1:].contiguous())
        fabric.backward(loss)
        fabric.clip_gradients(model, optimizer, max_norm=CLIP)
        optimizer.step()
        optimizer.zero_grad()
        loss = loss.detach()
        step += 1


def huggingface(batches: torch.Tensor, best: bool) -> None:
    """LlamaForCausalLM under Hugging Face's Trainer.

    Best: compiled, with the loss inside of the compiled region and nothing but the loss returned from it (returned
    logits cost memory and time), our allocator settings; the Trainer's AdamW is fused by default. As shipped:
    TrainingArguments as they are, but for the workload's own values, so that nothing is compiled.
    """
    from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments

    if best:
        keep_freed_memory()
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=WIDTH,
        intermediate_size=D_FF,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        max_position_embeddings=T,
        rms_norm_eps=NORM_EPS,
        tie_word_embeddings=False,
        use_cache=False,
    )

    class LossOnly(LlamaForCausalLM):  # type: ignore[misc]
        def forward(self, input_ids: torch.Tensor, labels: torch.Tensor, **_: Any) -> Any:  # type: ignore[override]
            # Inputs and targets come shifted already, as `shift_labels` of the Trainer's own long-context path.
            hidden = self.model(input_ids=input_ids).last_hidden_state
            logits = self.lm_head(hidden)
            loss = self.loss_function(logits=logits, labels=None, vocab_size=VOCAB, shift_labels=labels)
            return {"loss": loss}

    class Samples(torch.utils.data.Dataset[dict[str, torch.Tensor]]):
        def __len__(self) -> int:
            return 10**7

        def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
            row = batches.view(-1, T + 1)[index % (len(batches) * BATCH)]
            return {"input_ids": row[:-1], "labels": row[1:] if best else row[:-1]}

    turns = Turns()

    class TakeTurns(TrainerCallback):  # type: ignore[misc]
        def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            turns.begin()

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
            if logs and "loss" in logs:
                turns.loss = lambda: float(logs["loss"])

    arguments = TrainingArguments(
        output_dir=os.environ["TURNS_FOLDER"],
        use_cpu=True,
        bf16=True,
        max_steps=20_000,
        per_device_train_batch_size=BATCH,
        learning_rate=LEARNING_RATE,
        lr_scheduler_type="constant",
        adam_beta1=BETAS[0],
        adam_beta2=BETAS[1],
        weight_decay=WEIGHT_DECAY,
        max_grad_norm=CLIP,
        logging_steps=10,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
        torch_compile=best and not EAGER,
    )
    model = (LossOnly if best else LlamaForCausalLM)(config)
    Trainer(model=model, args=arguments, train_dataset=Samples(), callbacks=[TakeTurns()]).train()


def keep_freed_memory() -> None:
    """What train.py asks glibc for."""
    from thunderhead.training import hardware

    hardware.keep_freed_memory()


SIDES: dict[str, Callable[[torch.Tensor], None]] = {
    "bare": bare,
    "litgpt_best": lambda batches: litgpt(batches, best=True),
    "huggingface_best": lambda batches: huggingface(batches, best=True),
    "litgpt_shipped": lambda batches: litgpt(batches, best=False),
    "huggingface_shipped": lambda batches: huggingface(batches, best=False),
    **{
        f"bare_{scope}_{allocator}": lambda batches, scope=scope, allocator=allocator: bare(  # type: ignore[misc]
            batches, scope, allocator != "glibc"
        )
        for scope in ("none", "block", "model")
        for allocator in ("glibc", "kept", "huge")
    },
}
"""Every process but train.py's own, by name: what it runs."""


def environment(side: str) -> dict[str, str]:
    """What a side needs to find when it imports torch: huge pages, or none for peers as shipped."""
    huge = side in ("bare", "train.py") or side.endswith(("_best", "_huge"))
    return {"THP_MEM_ALLOC_ENABLE": "1" if huge else "0"}


if __name__ == "__main__":
    SIDES[sys.argv[1]](torch.load(sys.argv[2]))
