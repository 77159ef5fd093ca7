# pretrain a small GPT on the characters of Shakespeare: minutes on a GPU, 1 to 2 hours on a CPU
out_dir = "out-shakespeare-char"
eval_interval = 250  # often: so little data is overfitted quickly
eval_iters = 12800
log_interval = 10
always_save_checkpoint = False  # keep the best, not the last

wandb_project = "shakespeare-char"
wandb_run_name = "mini-gpt"

dataset = "shakespeare_char"
gradient_accumulation_steps = 1
batch_size = 64
block_size = 256  # characters

# 10.6M parameters
n_layer = 6
n_head = 6
n_embd = 384
dropout = 0.2

learning_rate = 1e-3  # higher than for GPT-2, as the model is small
max_iters = 5000
min_lr = 1e-4
beta2 = 0.99  # few tokens per step: average over more steps
warmup_iters = 100
