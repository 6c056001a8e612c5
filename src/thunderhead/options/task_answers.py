"""What a model answers to a synthetic task, for people to read."""

import torch

from thunderhead.core.model.decoder import Decoder
from thunderhead.options.synthetic_tasks import Task


@torch.inference_mode()
def sample_answers(decoder: Decoder, task: Task, device: torch.device, sequences: int = 3) -> str:
    """The first validation sequences of a task, a line each, with the model's most probable answers.

    A right answer is marked as v7✓, a wrong one shows what the model said instead: v7✗v2.
    """
    symbols, lines = [*task.symbols, "|"], []
    was_training = decoder.training
    decoder.eval()
    try:
        for n in range(sequences):
            tokens, is_answer = task.sequence("val", 0, n, decoder.context_length)
            logits_TV = decoder.logits(torch.from_numpy(tokens[None, :-1]).to(device))[0]
            said = [int(tokens[0]), *logits_TV.argmax(dim=-1).tolist()]
            written = []
            for token, answer, asked in zip(tokens.tolist(), said, is_answer.tolist(), strict=True):
                told = symbols[answer] if answer < len(symbols) else "?"  # a row of a larger vocabulary
                written.append(symbols[token] + ("" if not asked else "✓" if answer == token else f"✗{told}"))
            lines.append(" ".join(written))
    finally:
        decoder.train(was_training)
    return "\n".join(lines)
