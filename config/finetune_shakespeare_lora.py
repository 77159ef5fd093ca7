# finetune gpt2-xl (1558M) with LoRA on a GPU with 6 GB
# To print the plan without a download: --dry_run=True
#
# The weights are frozen, 2 bytes each (3.1 GB). Only 20M adapter weights are trained, 1.3 % of
# 1558M: 0.3 GB with gradients and moments. ckpt.pt is 80 MB: the adapters, and the name and hash of
# gpt2-xl. sample.py and evaluate.py load gpt2-xl and merge the adapters into it.
#
# A T4 (no native bfloat16) also stores the weights in bfloat16; it computes in float16
# (--dtype=auto).
out_dir = "out-shakespeare-lora"
eval_interval = 5
eval_iters = 40

dataset = "shakespeare"
init_from = "gpt2-xl"
always_save_checkpoint = False

lora_rank = 16        # on c_attn, c_proj and c_fc; 4 to 64 are usual
weights = "bfloat16"  # of the frozen model; adapters are float32
recompute = True

# 1 sample x 32 micro-steps x 1024 tokens = 32,768 tokens per step; 1 epoch = 9.2 steps
batch_size = 1
gradient_accumulation_steps = 32
max_iters = 40

learning_rate = 2e-4  # about ten times as high as without LoRA
weight_decay = 0.0
decay_lr = False
