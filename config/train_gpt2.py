# pretrain GPT-2 (124M) on OpenWebText to a loss of about 2.85
# torchrun --standalone --nproc_per_node=8 train.py config/train_gpt2.py
# (nanoGPT's settings: about 4 days on 8 A100 40GB)
out_dir = "out-gpt2"
wandb_project = "owt"
wandb_run_name = "gpt2-124M"

dataset = "openwebtext"
# 12 samples x 40 micro-steps x 1024 tokens = 491,520 tokens per step, over all GPUs
batch_size = 12
block_size = 1024
gradient_accumulation_steps = 5 * 8
max_iters = 600000  # 300B tokens
lr_decay_iters = 600000

eval_interval = 1000
eval_iters = 2400
log_interval = 10

learning_rate = 6e-4
weight_decay = 1e-1
