# evaluate gpt2 (124M) on both splits of a dataset, without training
# n_layer=12, n_head=12, n_embd=768
init_from = "gpt2"
eval_only = True
eval_iters = 4000  # many, for a good estimate
batch_size = 8
