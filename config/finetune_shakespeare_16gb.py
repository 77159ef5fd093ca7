# finetune all weights of gpt2-xl (1558M) on a GPU with 16 GB
# Needs torchao (pip install torchao). To print the plan without a download: --dry_run=True
#
# bytes per weight, by default:  weights 4, gradients 4, AdamW's moments 8: 25 GB for gpt2-xl
# here:                          weights 2, gradients 2, moments 2:         9.4 GB, peak 10.8 GB
#
# A T4 (16 GB, no native bfloat16) can also store the weights in bfloat16. There, --dtype=auto casts
# each matrix to float16 when it is used, with a GradScaler; the model is not compiled; adamw8bit
# computes in float32, on a copy of one tensor at a time.
out_dir = "out-shakespeare-16gb"
eval_interval = 5
eval_iters = 40

dataset = "shakespeare"
init_from = "gpt2-xl"
always_save_checkpoint = False  # ckpt.pt, 3.1 GB, only when the validation loss improves
keep_states = 1                 # a state is 6.3 GB: on small disks keep one

weights = "bfloat16"     # stochastic rounding: small updates are not lost
optimizer = "adamw8bit"  # moments in blocks of 8-bit numbers
recompute = True         # 0.4 GB of activations, not 2.9 GB; takes 4/3 of the time

# 1 sample x 32 micro-steps x 1024 tokens = 32,768 tokens per step; 1 epoch = 9.2 steps
batch_size = 1
gradient_accumulation_steps = 32
max_iters = 20

learning_rate = 3e-5
decay_lr = False
