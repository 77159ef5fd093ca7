# finetune T5 to write a summary after "summarize: ", a prefix from its pretraining
# data: python data/pairs/prepare.py --input=FILE --tokenizer=google-t5/t5-base
#       --prefix="summarize: " --test_fraction=0.02 --out_dir=data/summaries
out_dir = "out-t5-summarize"
eval_interval = 200
eval_iters = 400  # pairs

dataset = "summaries"
init_from = "google-t5/t5-base"
source_length = 512   # tokens of an article; longer ones are cut, and counted
target_length = 128

# 4 pairs x 8 micro-steps = 32 pairs per step: an article takes the memory of 20 tweets
batch_size = 4
gradient_accumulation_steps = 8
recompute = True      # a third more computation, but far less memory for activations

learning_rate = 1e-4
decay_lr = False
dropout = 0.1
beta2 = 0.999
weight_decay = 0.0
max_iters = 2000
always_save_checkpoint = False  # keep the best by validation loss
patience = 5  # stop after five evaluations without improvement
