# evaluate gpt2-large (774M) on both splits of a dataset, without training
# n_layer=36, n_head=20, n_embd=1280
init_from = "gpt2-large"
eval_only = True
eval_iters = 4000  # many, for a good estimate
batch_size = 8
