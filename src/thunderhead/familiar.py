"""What other projects call our settings: answered with our words where somebody types theirs."""

FAMILIAR = {
    word: ours
    for ours, words in {
        "resume": "ckpt_path checkpoint_path resume_from resume_from_checkpoint resume_from_path load_from init_from",
        "budget.steps": "max_steps max_iters num_steps n_steps total_steps train_steps training_steps iterations",
        "budget=epochs budget.epochs": "epochs max_epochs num_epochs n_epochs num_train_epochs",
        "budget=tokens budget.tokens": "max_tokens train_tokens total_tokens num_tokens",
        "batch.micro_size": "batch_size micro_batch_size per_device_batch_size per_device_train_batch_size "
        "device_batch_size train_batch_size",
        "batch.global_tokens": "global_batch_size total_batch_size gradient_accumulation_steps accumulate_grad_batches "
        "grad_accum_steps",
        "optimizer.lr": "lr learning_rate max_lr peak_lr base_lr",
        "optimizer.weight_decay": "wd weight_decay",
        "scheduler": "lr_scheduler lr_scheduler_type lr_schedule",
        "scheduler.warmup": "warmup_steps warmup_iters num_warmup_steps warmup_ratio lr_warmup_steps",
        "trainer.gradient_clip_val": "grad_clip max_grad_norm clip_grad_norm gradient_clipping",
        "model.d_model": "hidden_size hidden_dim n_embd n_embed dim embed_dim embedding_dim d_embed",
        "model.n_layers": "num_layers n_layer num_hidden_layers",
        "model.n_heads": "num_heads n_head num_attention_heads",
        "attention.n_kv_heads": "num_kv_heads num_key_value_heads n_kv_head n_query_groups",
        "model.d_ff": "intermediate_size ffn_dim ffn_hidden_size mlp_dim n_inner",
        "model.context_length": "block_size seq_len seq_length sequence_length max_seq_len max_seq_length "
        "max_position_embeddings n_ctx n_positions context_size",
        "position.theta": "rope_theta rope_base",
        "precision": "dtype fp16 bf16 mixed_precision amp",
        "strategy": "fsdp ddp zero deepspeed distributed distributed_strategy",
        "trainer.devices": "devices gpus n_gpus num_gpus nproc_per_node",
        "trainer.num_nodes": "num_nodes nnodes",
        "activation_checkpointing": "gradient_checkpointing",
        "validation.every": "eval_interval eval_every eval_steps val_check_interval val_every",
        "trainer.log_every_n_steps": "log_interval log_every logging_steps",
        "callbacks.checkpoint.every_n_train_steps": "save_interval save_every save_steps ckpt_interval",
        "data": "dataset corpus",
        "data=text data.path": "data_path data_dir train_file dataset_path",
        "data.num_workers": "num_workers dataloader_num_workers",
        "hydra.run.dir": "out_dir output_dir save_dir log_dir run_dir",
        "name": "run_name experiment_name exp_name wandb_run_name",
        "dry_run": "dryrun fast_dev_run",
        "compile": "torch_compile use_compile",
    }.items()
    for word in words.split()
}
"""Our config path, or what to type before `=`, by their word."""

LOGGERS = {"wandb": "WandbLogger", "mlflow": "MLFlowLogger", "comet": "CometLogger"}
"""Lightning's classes, by the names that one would choose."""


def ours(key: str) -> str | None:
    """What a setting is called here, if its name, or the last part of its config path, is another project's word."""
    return FAMILIAR.get(key.rpartition(".")[2].replace("-", "_").lower())


def option(group: str, name: str) -> str:
    """How to get what is no option of a group, but could be; nothing where we do not know."""
    if group == "logger" and name in LOGGERS:
        target = f"lightning.pytorch.loggers.{LOGGERS[name]}"
        return f"type '+logger.{name}={{_target_: {target}}}' (uv pip install {name})"
    if group == "logger" and name == "tensorboard":
        return "logger=default writes for TensorBoard, and metrics.csv"
    return ""
