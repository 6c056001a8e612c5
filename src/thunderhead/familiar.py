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
        "strategy": "zero zero_stage deepspeed distributed distributed_strategy distributed_type sharding_strategy "
        "fsdp_sharding_strategy",
        "strategy=fsdp": "fsdp use_fsdp fsdp_config fsdp_version fully_shard",
        "strategy=ddp": "ddp use_ddp",
        "strategy=fsdp strategy.cpu_offload": "fsdp_offload_params fsdp_cpu_offload offload_params",
        "strategy=fsdp strategy.reshard_after_forward": "fsdp_reshard_after_forward",
        "strategy=hsdp strategy.replicate_size": "data_parallel_replicate_degree dp_replicate",
        "strategy=hsdp strategy.shard_size": "data_parallel_shard_degree dp_shard",
        "strategy=fsdp_tp strategy.tensor_parallel_size": "tensor_parallel_degree tensor_model_parallel_size tp_size",
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
"""Our config path, or what to type before `=`, or all that is to be typed, by their word."""

STRATEGIES = {
    "fsdp1": "fsdp",
    "fsdp2": "fsdp",
    "full_shard": "fsdp",
    "zero3": "fsdp",
    "deepspeed_stage_3": "fsdp",
    "shard_grad_op": "fsdp strategy.reshard_after_forward=false",
    "zero2": "fsdp strategy.reshard_after_forward=false",
    "deepspeed_stage_2": "fsdp strategy.reshard_after_forward=false",
    "hybrid_shard": "hsdp",
    "deepspeed": "zero1",
    "deepspeed_stage_1": "zero1",
    "no_shard": "ddp",
    "dp": "ddp",
    "ddp_spawn": "ddp",
    "tp": "tensor_parallel",
    "single_device": "single",
}
"""Our options of `strategy`, by the names that Lightning, PyTorch, accelerate and DeepSpeed have for them."""


LAUNCHERS = {"submitit_slurm": "slurm", "submitit_local": "processes", "ray": "processes", "rq": "processes"}
"""Ours, by the names of Hydra's other launchers."""


def ours(key: str) -> str | None:
    """What a setting is called here, if its name, or the last part of its config path, is another project's word."""
    return FAMILIAR.get(key.rpartition(".")[2].replace("-", "_").lower())


def typed(path: str, value: str = "…") -> str:
    """What to type for a setting of ours, given as in FAMILIAR, with the value that somebody gave theirs."""
    if path == "strategy":
        value = STRATEGIES.get(value.lower(), value)
    return path if "=" in path.rsplit(maxsplit=1)[-1] else f"{path}={value}"


def option(group: str, name: str) -> str:
    """How to get what is no option of a group, but could be; nothing where we do not know."""
    if group == "strategy" and name.lower() in STRATEGIES:
        return f"type {typed('strategy', name)}"
    if group == "hydra/launcher" and name in LAUNCHERS:
        return f"type hydra/launcher={LAUNCHERS[name]} (docs/sweeps.md says why)"
    return ""
