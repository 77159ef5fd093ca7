# make chat: finetune the quickstart's pretrained model on conversations about Python's library
# takes about 3 minutes on a CPU
out_dir = "out-quickstart-chat"
eval_interval = 200
eval_iters = 0  # all 105 windows of the validation split, and as many of the training split
log_interval = 100
always_save_checkpoint = False

dataset = "python_docs/chat"
init_from = "out-quickstart-base"
separate_documents = True
# 1,024 tokens per step: 1 epoch = 227 steps
batch_size = 8
gradient_accumulation_steps = 1
block_size = 128

learning_rate = 1.5e-3
max_iters = 1000
warmup_iters = 20
beta2 = 0.99
