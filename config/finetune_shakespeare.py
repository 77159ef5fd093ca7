# finetune gpt2-xl on Shakespeare: 20 small steps; keep the best checkpoint
# needs a GPU with 40 GB, in float32; with less, use --init_from=gpt2-medium or gpt2
import time

out_dir = "out-shakespeare"
eval_interval = 5
eval_iters = 40
wandb_project = "shakespeare"
wandb_run_name = "ft-" + str(time.time())

dataset = "shakespeare"
init_from = "gpt2-xl"  # the largest GPT-2, 1558M parameters
always_save_checkpoint = False  # ckpt.pt only when the validation loss improves

# 1 sample x 32 micro-steps x 1024 tokens = 32,768 tokens per step
# Shakespeare has 301,966 tokens: 1 epoch = 9.2 steps
batch_size = 1
gradient_accumulation_steps = 32
max_iters = 20

learning_rate = 3e-5
decay_lr = False  # constant
