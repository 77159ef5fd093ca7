# quickstart, step 1: pretrain a small GPT on the docstrings of Python's standard library
# 2.6M parameters; about 2 minutes on 2 CPU cores
out_dir = "out-quickstart-base"
eval_interval = 200
eval_iters = 80
log_interval = 25

dataset = "python_docs/docstrings"
# 8 samples x 128 tokens = 1,024 tokens per step: 1 epoch = 422 steps
batch_size = 8
gradient_accumulation_steps = 1
block_size = 128

n_layer = 4
n_head = 4
n_embd = 192

learning_rate = 1.5e-3
max_iters = 600
warmup_iters = 20
beta2 = 0.99
