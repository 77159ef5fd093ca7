# quickstart, step 2: finetune step 1's model on Python's language reference (pydoc_data.topics)
# with --init_from=scratch: the same steps without pretraining, to compare
out_dir = "out-quickstart"
eval_interval = 50
eval_iters = 80  # 10,240 tokens: nearly the whole validation split
log_interval = 25
always_save_checkpoint = False

dataset = "python_docs/topics"
init_from = "out-quickstart-base"
# 1,024 tokens per step: 1 epoch = 93 steps
batch_size = 8
gradient_accumulation_steps = 1
block_size = 128

# used only with --init_from=scratch
n_layer = 4
n_head = 4
n_embd = 192

learning_rate = 1e-3
max_iters = 150
warmup_iters = 10
beta2 = 0.99
