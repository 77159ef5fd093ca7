# strategy: very little text (a few hundred kilobytes: one author, one show, your own letters)
# The model reads all of it within a few steps, and then memorizes it. Use few steps, a very low
# learning rate, much dropout, frequent evaluation, and only the best checkpoint.
out_dir = "out-little"
eval_interval = 5
eval_iters = 0  # all windows of the validation split, and as many of the training split

init_from = "gpt2"
batch_size = 1
gradient_accumulation_steps = 16

learning_rate = 1e-5
decay_lr = False
dropout = 0.2
max_iters = 50
always_save_checkpoint = False
