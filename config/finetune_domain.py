# strategy: continued pretraining on a large corpus of one domain (law, medicine, code, a language)
# With much text, use a learning rate near that of pretraining, with decay, and thousands of steps.
# One or two epochs are enough. Give --dataset.
out_dir = "out-domain"
eval_interval = 500
eval_iters = 800
log_interval = 10

init_from = "gpt2"
batch_size = 8
gradient_accumulation_steps = 8  # 65,536 tokens per step: less gradient noise

learning_rate = 1e-4
max_iters = 10000
warmup_iters = 200  # AdamW's moments start at 0: full steps from the start would undo pretraining
decay_lr = True     # to learning_rate / 10
