# finetune gpt2 (124M) on Shakespeare within 10 minutes on a laptop CPU
# a shorter context and few tokens per step: about 5 s per step on 2 cores
out_dir = "out-shakespeare-cpu"
eval_interval = 15
eval_iters = 20
sample_interval = 1  # print a sample at each evaluation

dataset = "shakespeare"
init_from = "gpt2"
always_save_checkpoint = False

# 2 samples x 2 micro-steps x 128 tokens = 512 tokens per step: 1 epoch = 590 steps
batch_size = 2
gradient_accumulation_steps = 2
block_size = 128
max_iters = 60

learning_rate = 5e-5
decay_lr = False
