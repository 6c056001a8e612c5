"""Finetune an exported base model on instructions: transformers' Trainer, LoRA (Hu et al. 2106.09685) by peft.

    python export.py run=logs/runs/pretrain/<time>
    python examples/finetune.py logs/runs/pretrain/<time>/huggingface finetuned
    python generate.py run=finetuned prompts=prompts.jsonl generation.temperature=0

docs/finetuning.md has what comes out. It needs the extra: uv pip install -e '.[finetune]'
"""

import argparse
import itertools
import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import LoraConfig, get_peft_model

PROMPT = "### Instruction: {instruction}\n### Response:\n"
NAMES = "value", "count", "index", "width", "height", "size", "start", "stop", "first", "last", "left", "right"
KINDS = {"sum": "+", "difference": "-", "product": "*", "quotient": "/", "remainder": "%"}


def make_instructions(file: Path, seed: int) -> None:
    """Write instructions for small functions with their responses, a line of JSON each, in a random order."""
    pairs = itertools.product(KINDS.items(), itertools.permutations(NAMES, 2))
    lines = [
        {
            "instruction": f"Write a function that returns the {kind} of {a} and {b}.",
            "response": f"def {kind}({a}, {b}):\n    return {a} {sign} {b}\n",
        }
        for (kind, sign), (a, b) in pairs
    ]
    random.Random(seed).shuffle(lines)
    file.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")


def encoded(line: dict[str, str], tokenizer: Any) -> dict[str, list[int]]:
    """A prompt with its response and the end of a document; the loss is of the response only."""
    prompt = tokenizer(PROMPT.format(**line))["input_ids"]
    response = [*tokenizer(line["response"])["input_ids"], tokenizer.eos_token_id]
    return {"input_ids": prompt + response, "labels": [-100] * len(prompt) + response}


@torch.inference_mode()
def responses(model: Any, tokenizer: Any, lines: Sequence[dict[str, str]]) -> list[str]:
    """What the model writes after each prompt, greedily, up to the end of the document."""
    texts = []
    for line in lines:
        ids = torch.tensor([tokenizer(PROMPT.format(**line))["input_ids"]], device=model.device)
        asked = {"max_new_tokens": 40, "do_sample": False, "pad_token_id": tokenizer.eos_token_id}
        out = model.generate(ids, attention_mask=torch.ones_like(ids), **asked)
        texts.append(tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True))
    return texts


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Finetune, and return losses (nats a token of the responses) and shares of right responses, before and after."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="a folder that export.py has written")
    parser.add_argument("out", type=Path, help="the folder to make")
    parser.add_argument("--instructions", type=Path, help="a .jsonl file; without one, the example makes one in `out`")
    for name, default in (("steps", 600), ("batch-size", 16), ("rank", 32), ("held-out", 50), ("seed", 0)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--lr", type=float, default=3e-3)
    asked = parser.parse_args(arguments)

    asked.out.mkdir(parents=True)
    file = asked.instructions or asked.out / "instructions.jsonl"
    if asked.instructions is None:
        make_instructions(file, asked.seed)
    lines = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    held_out, training = lines[: asked.held_out], lines[asked.held_out :]

    transformers.set_seed(asked.seed)
    tokenizer = transformers.AutoTokenizer.from_pretrained(asked.model)
    tokenizer.pad_token = tokenizer.eos_token
    model = transformers.AutoModelForCausalLM.from_pretrained(asked.model, dtype=torch.float32)
    lora = LoraConfig(r=asked.rank, lora_alpha=asked.rank, target_modules="all-linear", task_type="CAUSAL_LM")
    adapted = get_peft_model(model, lora)
    adapted.print_trainable_parameters()
    settings = transformers.TrainingArguments(
        output_dir=str(asked.out / "trainer"),
        max_steps=asked.steps,
        per_device_train_batch_size=asked.batch_size,
        per_device_eval_batch_size=asked.batch_size,
        learning_rate=asked.lr,
        lr_scheduler_type="cosine",
        warmup_steps=asked.steps // 20,
        logging_steps=max(1, asked.steps // 10),
        save_strategy="no",
        report_to="none",
        seed=asked.seed,
        use_cpu=not torch.cuda.is_available(),
        dataloader_pin_memory=torch.cuda.is_available(),
    )
    trainer = transformers.Trainer(
        model=adapted,
        args=settings,
        train_dataset=[encoded(line, tokenizer) for line in training],
        eval_dataset=[encoded(line, tokenizer) for line in held_out],
        data_collator=transformers.DataCollatorForSeq2Seq(tokenizer),
    )

    def measured() -> dict[str, Any]:
        written = responses(adapted.eval(), tokenizer, held_out)
        right = sum(text == line["response"] for text, line in zip(written, held_out, strict=True))
        return {"loss": trainer.evaluate()["eval_loss"], "right": right / len(held_out), "example": written[0]}

    before = measured()
    trainer.train()
    found = {"prompt": PROMPT.format(**held_out[0]), "before": before, "after": measured()}
    adapted.merge_and_unload().save_pretrained(asked.out)  # an ordinary model again, as it was exported
    tokenizer.save_pretrained(asked.out)
    (asked.out / "finetuning.json").write_text(json.dumps(found, indent=2), encoding="utf-8")
    print(json.dumps(found, indent=2))
    return found


if __name__ == "__main__":
    main()
