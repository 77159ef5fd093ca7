# quickstart, step 1: a small GPT from scratch on the docstrings of Python's standard library
# 2.6M parameters; about 2 minutes on 2 CPU cores
out_dir = "out-quickstart-base"
eval_interval = 100
eval_iters = 20
log_interval = 10

dataset = "python_docs/docstrings"
# 16 samples x 128 tokens = 2,048 tokens a step: 1 epoch = 211 steps
batch_size = 16
gradient_accumulation_steps = 1
block_size = 128

n_layer = 4
n_head = 4
n_embd = 192

learning_rate = 3e-3
max_iters = 300
warmup_iters = 20
beta2 = 0.99
