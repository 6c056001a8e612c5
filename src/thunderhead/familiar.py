"""What other projects call our settings and options: answered with our words where somebody types theirs."""

FAMILIAR = {
    word: ours
    for ours, words in {
        "resume": "ckpt ckpt_path checkpoint checkpoint_path resume_from resume_from_checkpoint resume_from_path "
        "load_from load load_path",
        "init_from={}": "init_from model_name_or_path pretrained_model_name_or_path initial_checkpoint_dir",
        "budget.steps": "max_steps max_iters num_steps n_steps total_steps train_steps train_iters training_steps "
        "iterations",
        "budget=epochs budget.epochs": "epochs max_epochs num_epochs n_epochs num_train_epochs",
        "budget=tokens budget.tokens": "max_tokens train_tokens total_tokens num_tokens",
        "batch.micro_size": "batch_size micro_batch_size local_batch_size per_device_batch_size train_batch_size "
        "per_device_train_batch_size per_gpu_train_batch_size device_batch_size",
        "batch.global_tokens={tokens}": "global_batch_size",
        "batch.global_tokens": "total_batch_size",
        "batch.global_tokens=…": "gradient_accumulation_steps accumulate_grad_batches grad_accum_steps",
        "optimizer": "optim optimizer_name optimizer_type",
        "optimizer.lr": "lr learning_rate max_lr peak_lr base_lr",
        "optimizer.weight_decay": "wd weight_decay",
        "'optimizer.betas=[{},0.99]'": "beta1 adam_beta1",
        "'optimizer.betas=[0.9,{}]'": "beta2 adam_beta2",
        "optimizer.eps": "adam_eps adam_epsilon",
        "scheduler": "lr_scheduler lr_scheduler_type lr_schedule lr_decay_style",
        "scheduler.warmup": "warmup_steps warmup_iters num_warmup_steps warmup_ratio lr_warmup_steps lr_warmup_iters "
        "lr_warmup_fraction",
        "scheduler.final_ratio": "min_lr_ratio min_lr_factor lr_min_factor",
        "scheduler.final_ratio=…": "min_lr lr_min",
        "trainer.gradient_clip_val": "grad_clip clip_grad max_grad_norm clip_grad_norm gradient_clipping",
        "model": "model_name model_type model_size flavor",
        "model.d_model": "hidden_size hidden_dim n_embd n_embed dim embed_dim embedding_dim d_embed",
        "model.n_layers": "num_layers n_layer num_hidden_layers",
        "model.n_heads": "num_heads n_head num_attention_heads",
        "model.d_ff": "intermediate_size ffn_dim ffn_hidden_size mlp_dim n_inner",
        "model.context_length": "block_size seq_len seq_length sequence_length max_seq_len max_seq_length max_length "
        "max_position_embeddings n_ctx n_positions context_size",
        "model.tie_embeddings": "tie_word_embeddings tie_weights weight_tying",
        "model.tie_embeddings=false": "untie_embeddings_and_output_weights",
        "model.bias=false": "disable_bias_linear",
        "attention=gqa": "group_query_attention",
        "attention=gqa attention.n_kv_heads": "num_kv_heads num_key_value_heads n_kv_head n_query_groups "
        "num_query_groups",
        "attention.dropout": "attention_dropout attn_dropout attn_pdrop",
        "dropout": "hidden_dropout resid_pdrop dropout_rate",
        "norm": "normalization norm_type norm_class norm_class_name",
        "activation": "hidden_act activation_function act_fn",
        "activation=swiglu": "swiglu",
        "position": "position_embedding_type pos_emb",
        "position.theta": "rope_theta rope_base rotary_base",
        "precision": "dtype mixed_precision amp torch_dtype",
        "precision=bf16-mixed": "bf16",
        "precision=fp16-mixed": "fp16",
        "strategy": "zero zero_stage deepspeed distributed distributed_strategy distributed_type sharding_strategy "
        "fsdp_sharding_strategy",
        "strategy=fsdp": "fsdp use_fsdp fsdp_config fsdp_version fully_shard",
        "strategy=ddp": "ddp use_ddp",
        "strategy=zero1": "use_distributed_optimizer",
        "strategy=fsdp strategy.cpu_offload": "fsdp_offload_params fsdp_cpu_offload offload_params",
        "strategy=fsdp strategy.reshard_after_forward": "fsdp_reshard_after_forward",
        "strategy=hsdp strategy.replicate_size": "data_parallel_replicate_degree dp_replicate",
        "strategy=hsdp strategy.shard_size": "data_parallel_shard_degree dp_shard",
        "strategy=fsdp_tp strategy.tensor_parallel_size": "tensor_parallel_degree tensor_model_parallel_size tp_size",
        "trainer": "device device_type",
        "trainer.devices": "gpus n_gpus num_gpus nproc_per_node",
        "trainer.num_nodes": "nnodes",
        "activation_checkpointing": "gradient_checkpointing activation_checkpoint recompute_activations",
        "validation.every": "eval_interval eval.interval eval_every eval_steps val_check_interval val_every",
        "validation.every=…": "check_val_every_n_epoch",
        "data.max_validation_bytes=…": "eval_iters eval_batches limit_val_batches",
        "data.max_training_tokens=…": "limit_train_batches overfit_batches max_train_samples",
        "trainer.log_every_n_steps": "log_interval log_every log_freq logging_steps",
        "callbacks.checkpoint.every_n_train_steps": "save_interval save_every save_steps ckpt_interval "
        "checkpoint.interval",
        "callbacks.checkpoint.save_top_k": "save_total_limit",
        "data": "dataset dataset_name corpus",
        "data=text data.path": "data_path data_dir train_file train_data_path dataset_path",
        "data.validation_fraction": "val_fraction val_split validation_split",
        "data.validation_fraction=…": "split",
        "data.num_workers": "dataloader_num_workers",
        "tokenizer=huggingface tokenizer.path": "tokenizer_name tokenizer_dir tokenizer_path tokenizer_file vocab_file",
        "logger": "report_to log_with",
        "logger=wandb": "wandb use_wandb wandb_log",
        "logger=wandb logger.wandb.project": "wandb_project project project_name",
        "hydra.run.dir": "out_dir output_dir save_dir save_folder save log_dir logging_dir run_dir default_root_dir",
        "hydra/sweeper=optuna": "hparams_search",
        "name": "task_name run_name experiment_name exp_name wandb_run_name",
        "seed": "seed_everything random_seed manual_seed",
        "dry_run": "dryrun",
        "debug=fast": "fast_dev_run",
        "profile": "profiling enable_profiling",
        "profile=true": "profiler",
        "compile": "torch_compile use_compile",
    }.items()
    for word in words.split()
}
"""Our config path, or what to type before `=`, or all that is to be typed, by their word or config path.

`{}` stands for the value that was given, `{tokens}` for as many sequences in tokens.
"""

_EARLY_STOPPING = "'+callbacks.stop={_target_: lightning.pytorch.callbacks.EarlyStopping, monitor: val/loss}'"
OPTIONS = {
    group: {word: ours for ours, words in named.items() for word in words.split()}
    for group, named in {
        "strategy": {
            "fsdp": "fsdp1 fsdp2 full_shard zero3 deepspeed_stage_3",
            "fsdp strategy.reshard_after_forward=false": "shard_grad_op zero2 deepspeed_stage_2",
            "hsdp": "hybrid_shard",
            "zero1": "deepspeed deepspeed_stage_1",
            "ddp": "no_shard dp ddp_spawn",
            "tensor_parallel": "tp",
            "single": "single_device",
        },
        "precision": {
            "fp16-mixed": "16 fp16 float16 half 16-mixed 16-true",
            "bf16-mixed": "bf16 bfloat16",
            "fp32": "32 float32 float 32-true no",
            "fp8": "fp8-mixed float8 transformer-engine transformer-engine-float16",
        },
        "trainer": {"gpu": "cuda cuda:0", "cpu strategy=ddp trainer.devices=2": "ddp_sim"},
        "model": {"gpt2-124m": "gpt2 gpt2-small", "gpt2-350m": "gpt2-medium", "gpt2-774m": "gpt2-large"}
        | {"gpt2-1.5b": "gpt2-xl", "llama-1b": "llama llama3 llama-3.2-1b"},
        "optimizer": {"adamw": "adam adamw_torch adamw_torch_fused adamw_hf", "muon": "muonadamw"},
        "scheduler": {"cosine": "cosine_with_warmup cosineannealinglr", "constant": "constant_with_warmup"},
        "dropout": {"none": "0 0.0", "gpt2": "0.1"},
        "activation_checkpointing": {"block": "full true"},
        "position": {"learned": "learned_absolute absolute", "rope": "rotary"},
        "attention": {"attention.backend=sdpa": "sdpa flash flash_attention", "attention.backend=flex": "flex"},
        "data": {"experiment=shakespeare_char data.path=…": "shakespeare shakespeare_char tinyshakespeare"},
        "tokenizer": {"tiktoken tokenizer.path=…": "gpt2 r50k_base cl100k_base o200k_base"},
        "callbacks": {_EARLY_STOPPING: "early_stopping"},
        "init_from": {"resume=auto": "resume"},
        "debug": {"fast": "fdr default limit", "profile=true": "profiler"},
        "logger": {"many": "many_loggers all", "csv": "none null false off no 0"},
        "hydra/launcher": {"slurm": "submitit_slurm", "processes": "submitit_local ray rq"},
    }.items()
}
"""Our option of a group, or what else to type, by the names that other projects have for it."""

_RUNS = "leave it out: train.py trains, and validates on the way (evaluate.py evaluates later)"
_FILES = "files of settings are options: --config-dir=<folder> experiment=<name> for <folder>/experiment/<name>.yaml"
_KERNELS = "leave it out: attention takes PyTorch's fused kernels where they fit (attention.backend)"
REMARKS = {
    **dict.fromkeys(("train", "fit", "pretrain", "test", "do_train", "do_eval", "do_predict"), _RUNS),
    **dict.fromkeys(("config", "config_file", "job.config_file"), _FILES),
    **dict.fromkeys(("flash_attention", "flash_attn", "use_flash_attn", "attn_implementation", "flash"), _KERNELS),
    **dict.fromkeys(
        ("pipeline_model_parallel_size", "pipeline_parallel_degree", "context_parallel_size", "sequence_parallel"),
        "there is none: strategy=fsdp_tp divides weights and matrix products (docs/scaling.md)",
    ),
    **dict.fromkeys(("lr_decay_iters", "lr_decay_steps"), "leave it out: schedules end with the run"),
    "eval_only": "type python evaluate.py run=<folder of a run>",
    "print_config": "type --cfg job",
    "overwrite_output_dir": "leave it out: each run has a folder of its own",
    "push_to_hub": "type python export.py run=<folder of a run> push=<user/name>",
    "scratch": "leave it out: weights are drawn by the seed",
    "tags": "leave it out: loggers get what was chosen as tags",
}
"""What to do instead, where no setting stands for their word."""


def ours(key: str, words: dict[str, str] = FAMILIAR) -> str | None:
    """What a setting is called here, if its config path, or the last part of it, is another project's word."""
    key = key.replace("-", "_").lower()
    return words.get(key, words.get(key.rpartition(".")[2]))


def option(group: str, name: str) -> str:
    """What to type for what is no option of a group, but is called so elsewhere; nothing where we do not know."""
    said = OPTIONS.get(group, {}).get(name.lower(), "")
    return said if not said or "=" in said.split()[0] else f"{group}={said}"
