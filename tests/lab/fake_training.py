"""Stands for train.py in tests of sweeps: writes the record that a run leaves, in a tenth of a second.

The loss depends on lr (best at 1e-3), d_ff and seed. Environment: FAKE_NOISE=<sd> adds noise to it;
FAKE_FAIL=<attention> fails that attention's runs; FAKE_SLOW=<seconds> waits so long for SIGTERM at step 1, and leaves a
checkpoint if it comes.
"""

import json
import math
import os
import random
import signal
import sys
import time
from pathlib import Path

import yaml

arguments = sys.argv[1:]
config = yaml.safe_load((Path(arguments[arguments.index("--config-path") + 1]) / "job.yaml").read_text())
folder = Path(next(a for a in arguments if a.startswith("hydra.run.dir=")).partition("=")[2])
resumed = any(a.startswith("resume=") for a in arguments)
attention = config["attention"]["_target_"].rpartition(".")[2]
lr, steps = config["optimizer"]["lr"], config["budget"]["steps"]
loss = 3 + math.log(lr / 1e-3) ** 2 + config["seed"] / 1000
loss += random.Random(f"{lr} {attention} {config['seed']}").gauss(0, float(os.environ.get("FAKE_NOISE", "0")))

with (folder / "starts.txt").open("a") as starts:
    starts.write("resumed\n" if resumed else "new\n")
if os.environ.get("FAKE_FAIL") == attention:
    print("a wire broke")
    sys.exit(1)
(folder / "config.yaml").write_text(yaml.safe_dump(config))
plan = {"steps": steps, "tokens": 128 * steps, "tokens_per_step": 128, "flops_per_token": 3000, "flops": 1000 * steps}
plan |= {"parameters": {"total": 1000}, "context_length": 32, "vocab_size": 257, "memory": {"weights": 1}}
plan |= {"data_parallel_size": 1, "micro_batch_size": 2, "precision": "fp32", "accelerator": "cpu"}
(folder / "plan.json").write_text(json.dumps(plan))
header = "step,tokens,flops,train/loss,tokens_per_second,val/loss\n"
rows = "".join(f"{i},{128 * i},{1000.0 * i},{loss},{1000 + i},{loss}\n" for i in range(1, steps + 1))
if os.environ.get("FAKE_SLOW") and not resumed:
    (folder / "checkpoints").mkdir(exist_ok=True)

    def save(*_: object) -> None:
        (folder / "checkpoints" / "last.ckpt").write_text("")
        sys.exit(143)

    signal.signal(signal.SIGTERM, save)
    (folder / "metrics.csv").write_text(header + rows.splitlines()[0] + "\n")
    time.sleep(float(os.environ["FAKE_SLOW"]))
(folder / "metrics.csv").write_text(header + rows)
summary = {"val_loss": loss, "perplexity": math.exp(loss), "bits_per_byte": loss, "tokens": 128 * steps, "steps": steps}
summary |= {"parameters": 1000, "flops": 1000 * steps, "tokens_per_second": 1000.0, "seconds": 0.128 * steps}
summary |= {"precision": "fp32", "device": "none", "validation_data": "x", "validation_text": "x"}
(folder / "summary.json").write_text(json.dumps(summary))
