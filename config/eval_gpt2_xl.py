# evaluate gpt2-xl (1558M) on both splits of a dataset, without training
# n_layer=48, n_head=25, n_embd=1600
init_from = "gpt2-xl"
eval_only = True
eval_iters = 4000  # many, for a good estimate
batch_size = 8
