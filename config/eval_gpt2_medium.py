# evaluate gpt2-medium (355M) on both splits of a dataset, without training
# n_layer=24, n_head=16, n_embd=1024
init_from = "gpt2-medium"
eval_only = True
eval_iters = 4000  # many, for a good estimate
batch_size = 8
