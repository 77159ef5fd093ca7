# strategy: continued pretraining on a large corpus of one domain (law, medicine, code, a language)
# Much text can move the whole model: a rate near pretraining's, decayed so that it settles, and
# thousands of steps. Give --dataset; an epoch or two is plenty.
out_dir = "out-domain"
eval_interval = 500
eval_iters = 800
log_interval = 10

init_from = "gpt2"
batch_size = 8
gradient_accumulation_steps = 8  # 65,536 tokens a step: a steady gradient

learning_rate = 1e-4
max_iters = 10000
warmup_iters = 200  # AdamW's moments start empty: full steps at once would undo pretraining
decay_lr = True     # to learning_rate / 10
