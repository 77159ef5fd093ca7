# gpt2-xl (1558M) by LoRA, on a GPU with 6 GB
# The plan, without a download: --dry_run=True
#
# The weights stay as they are, in 2 bytes each (3.1 GB). What is trained are 20M numbers beside
# them, 1.3 % as many: 0.3 GB with gradients and moments. ckpt.pt is 80 MB, and needs gpt2-xl
# beside it: its name and hash stand in it. sample.py and evaluate.py merge the two by themselves.
#
# A T4 (no native bfloat16) keeps the weights so too and multiplies in float16 (--dtype=auto).
out_dir = "out-shakespeare-lora"
eval_interval = 5
eval_iters = 40

dataset = "shakespeare"
init_from = "gpt2-xl"
always_save_checkpoint = False

lora_rank = 16        # on c_attn, c_proj and c_fc; 4 to 64 are usual
weights = "bfloat16"  # of the frozen model; adapters are float32
recompute = True

# 1 sample x 32 micro-steps x 1024 tokens = 32,768 tokens a step; 1 epoch = 9.2 steps
batch_size = 1
gradient_accumulation_steps = 32
max_iters = 40

learning_rate = 2e-4  # adapters want about ten times what the weights themselves do
weight_decay = 0.0
decay_lr = False
