# quickstart, step 2: that model finetuned on Python's language reference (pydoc_data.topics)
# with --init_from=scratch the same steps without pretraining, to see what it bought
out_dir = "out-quickstart"
eval_interval = 20
eval_iters = 0  # the whole validation split: 10,762 tokens
log_interval = 10
always_save_checkpoint = False

dataset = "python_docs/topics"
init_from = "out-quickstart-base"
# 2,048 tokens a step: 1 epoch = 46 steps
batch_size = 16
gradient_accumulation_steps = 1
block_size = 128

# read with --init_from=scratch alone
n_layer = 4
n_head = 4
n_embd = 192

learning_rate = 1e-3
max_iters = 60
warmup_iters = 5
beta2 = 0.99
